"""Which of a sample's captions are used, in which part and form, and its hard negatives."""

import math
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fastclip.data.hard_negatives import hard_negatives, normalized
from fastclip.data.index import Fault
from fastclip.data.samples import Sample, UnreadableSample
from fastclip.data.text_augment import TextAugmentation, clean

# a sentence may end here: at stops and what closes it, before white space, or at a blank line; the
# groups in lookaheads take all they can and give nothing back, so that the time stays linear
_END = re.compile(
    r"(?<![.!?…])(?=(?P<mark>[.!?…]+))(?P=mark)(?=(?P<close>[\"')\]”’»]*))(?P=close)\s+"
    r"|[。！？｡]+[」』”’）]*\s*|\n\s*\n\s*"
)
_WORD_BREAK = re.compile(r"[\s(\[\"'“‘]")
_SAYS_SOMETHING = re.compile(r"\w")
_NUMBER = re.compile(r"\s*\d+")
# words with a stop of their own: before a name, before a number, and some that may end a sentence
_TITLES = frozenset(
    "mr mrs ms dr prof st mt gen col lt sgt capt rev hon gov sen rep approx ca cf vs e.g i.e al"
    " est".split()
)
_COUNTERS = frozenset("no nos fig vol pp ch".split())
_ABBREVIATIONS = frozenset(
    "etc inc ltd co corp jr sr dept ave blvd rd jan feb mar apr jun jul aug sep sept oct nov dec"
    " a.m p.m u.s u.k u.n d.c in ft oz lb lbs cm mm km kg min hr hrs sec".split()
)


@dataclass(frozen=True)
class DrawnCaptions:
    """What is drawn of one sample: a text for each view, and hard negatives."""

    texts: tuple[str, ...]
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaptionSampling:
    """How a sample's texts are drawn.

    Args:
        weights: sources of captions with the weights that they are drawn by; within a source, all
            captions are alike. Empty, or where a sample has none of the sources: its `texts`.
        sentences: whether a random part of the caption's sentences is taken: first their number,
            each alike, then which; their order is kept.
        views: how each view's text is augmented.
        redraw: whether each view draws a caption of its own; else all views augment the same one.
        negatives: hard negatives for each sample.

    Raises:
        ValueError: a weight is not positive and finite, there is no view, or the number of
            negatives is negative.

    Examples:
        >>> import random
        >>> from fastclip.data.captions import CaptionSampling
        >>> from fastclip.data.sources import SceneSource
        >>> sample = SceneSource("train", 100, objects=2).read(0, 7)
        >>> sample.texts
        ('there is a red cross below a cyan diamond',)
        >>> drawn = CaptionSampling(negatives=2).draw(sample, random.Random(0))
        >>> drawn.texts == sample.texts, len(drawn.negatives)
        (True, 2)
    """

    weights: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
    sentences: bool = False
    views: tuple[TextAugmentation, ...] = (TextAugmentation(),)
    redraw: bool = True
    negatives: int = 0

    def __post_init__(self) -> None:
        # pairs can be hashed and sent to loader processes
        object.__setattr__(self, "weights", tuple(dict(self.weights).items()))
        for source, weight in dict(self.weights).items():
            if not 0 < weight < math.inf:
                raise ValueError(f"weight of {source!r} is {weight}; give a positive finite number")
        if not self.views:
            raise ValueError("there are no views of a caption; give at least one TextAugmentation")
        if self.negatives < 0:
            raise ValueError(f"negatives is {self.negatives}; give 0 or more")

    def draw(self, sample: Sample, rng: random.Random) -> DrawnCaptions:
        """A function of the sample and the random state alone; no text is empty.

        Negatives are those that the sample brings, else ones made by rule from the first view's
        caption as it is before augmentation: of attributes and relations, and of order where these
        are too few. None is one of the sample's captions or of the texts drawn, but for case and
        white space. Too few are repeated. Where no rule makes one, it is the caption with its words
        shuffled; and where that is no other text, as for a single word, "no " and the caption.

        Args:
            sample: with its captions.
            rng: what is drawn from.

        Raises:
            UnreadableSample: the sample has no caption with anything in it.
        """
        pools = self._pools(sample)
        captions = [self._draw_caption(pools, rng)]
        for _ in self.views[1:]:
            captions.append(self._draw_caption(pools, rng) if self.redraw else captions[0])
        pairs = zip(self.views, captions, strict=True)
        structure = sample.meaning.structure if sample.meaning else frozenset()
        texts = tuple(view.augment(caption, rng, structure) for view, caption in pairs)
        if not self.negatives:
            return DrawnCaptions(texts)
        known = [*texts, *captions, *sample.texts]
        known += [text for found in sample.captions.values() for text in found]
        return DrawnCaptions(texts, self._negatives(sample, captions[0], known, rng))

    def _pools(self, sample: Sample) -> list[tuple[float, list[str]]]:
        """The captions to draw from, with weights."""
        pools = [
            (weight, filled)
            for source, weight in dict(self.weights).items()
            if (filled := _filled(sample.captions.get(source, ())))
        ]
        if not pools:
            pools = [(1.0, _filled(sample.texts))]
        if not pools[0][1]:
            raise UnreadableSample(Fault("sample without caption", sample.where or sample.key))
        return pools

    def _draw_caption(self, pools: list[tuple[float, list[str]]], rng: random.Random) -> str:
        captions = rng.choices([pool for _, pool in pools], [weight for weight, _ in pools])[0]
        caption = rng.choice(captions)
        if not self.sentences:
            return caption
        parts = split_sentences(caption)
        count = rng.randint(1, len(parts))
        kept = sorted(rng.sample(range(len(parts)), count))
        return "".join(parts[i] for i in kept).strip()

    def _negatives(
        self, sample: Sample, caption: str, known: Iterable[str], rng: random.Random
    ) -> tuple[str, ...]:
        cleaned = self.views[0].clean
        taken = {normalized(form) for text in known for form in (text, clean(text))}

        def new(texts: Iterable[str]) -> list[str]:
            different = {normalized(text): text for text in texts}
            return [text for key, text in different.items() if key and key not in taken]

        given = [clean(text) if cleaned else text for text in sample.negatives]
        found = new(given)
        if found:
            found = rng.sample(found, min(len(found), self.negatives))
        else:
            caption = clean(caption) or caption if cleaned else caption
            kinds = ["attribute", "relation"]
            rng.shuffle(kinds)
            found = new(hard_negatives(caption, kinds, rng=rng))
            if len(found) < self.negatives:
                found = new([*found, *hard_negatives(caption, ("order",), rng=rng)])
        words = caption.split()
        if not found:
            found = new(" ".join(rng.sample(words, len(words))) for _ in range(8))
        denied = f"no {caption}"
        while not found:
            found = new([denied])
            denied = f"no {denied}"
        return tuple(found[i % len(found)] for i in range(self.negatives))


def split_sentences(text: str) -> list[str]:
    """The text's sentences, each with the white space after it: joined, they are the text.

    A sentence ends at a stop before white space, at a full-width stop, and at a blank line; not
    after an abbreviation, an initial or a list's number, nor where a small letter follows an
    ellipsis or a quotation.
    """
    sentences = []
    start, spoken = 0, _SAYS_SOMETHING.search(text)
    for match in _END.finditer(text):
        if spoken is None or spoken.start() >= match.start():
            continue
        following = _SAYS_SOMETHING.search(text, match.end())
        if following is None:
            break
        if _ends_sentence(text, start, match):
            sentences.append(text[start : match.end()])
            start, spoken = match.end(), following
    return [*sentences, text[start:]]


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    mark, following = match["mark"], text[match.end()]
    if mark is None:
        return True
    if mark != ".":
        return not (following.islower() and (match["close"] or mark[0] in ".…"))
    # abbreviations are short
    word = _WORD_BREAK.split(text[max(start, match.start() - 12) : match.start()])[-1].lower()
    initial = len(word) == 1 and word.isalpha()
    if initial or word in _TITLES or (word in _COUNTERS and following.isdigit()):
        return False
    # what "2." numbers comes after it
    if _NUMBER.fullmatch(text, start, match.start()):
        return False
    return not (following.islower() and (word in _ABBREVIATIONS or match["close"]))


def _filled(texts: Iterable[str]) -> list[str]:
    return [text for text in texts if text.strip()]
