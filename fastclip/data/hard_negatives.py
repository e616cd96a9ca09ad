"""Hard negatives by rule: captions that say something else in almost the same words.

In the style of NegCLIP and ARO (Yuksekgonul et al. 2023), with small lexicons in place of a tagger.
A rule rather makes nothing than a text that means the same, as "a cat and a dog" does for "a dog
and a cat". Attributes and relations are English; words are reordered in any language.
"""

import random
import re
from collections.abc import Iterator, Sequence
from itertools import chain, combinations, pairwise, zip_longest

from fastclip.data import text_augment
from fastclip.data.text_augment import article_before, match_case

KINDS = ("attribute", "relation", "order")

# words looked at: 77 tokens hold hardly more, and a change that is not seen makes no negative
REACH = 48

_MARKS = re.escape(text_augment.PUNCTUATION)
_WORD = re.compile(rf"([^\s{_MARKS}]+(?:['’-][^\s{_MARKS}]+|[.,]\d+)*)")

# classes, each of groups of words that mean about the same
_CLASSES = """red | blue navy | green | yellow golden | white | black | brown | gray grey | orange |
pink | purple violet; large big huge giant enormous massive gigantic | small little tiny miniature;
tall | short; long | short; young | old elderly; new modern | old ancient antique vintage; wooden
wood | metal metallic steel | plastic | glass | stone | brick | leather; striped | plaid checkered |
spotted dotted; round circular | square rectangular; open | closed; empty | full; wet | dry;
clean | dirty; hot | cold; dark | bright; sunny | cloudy | foggy | rainy; happy | sad | angry;
male | female; two | three | four | five | six"""
_NUMBERS = {"two", "three", "four", "five", "six"}
# nouns or verbs too: attributes only where a word follows, and none in the pairs
_BEFORE_NOUN = set("""orange wood metal steel plastic glass stone brick leather square open dry
clean little short long dark""".split())  # fmt: skip
_FIXED = {"hot dog", "hot dogs", "orange juice", "little bit", "little league", "open air"}

# = holds both ways, > one way
_OPPOSITE_PAIRS = """to the left of = to the right of, left of = right of, left side = right side,
on the left = on the right, left hand = right hand, in front of = behind, on = under, above = below,
on top of = underneath, inside = outside, indoors = outdoors, into = out of, up = down,
over > under, beneath > on, near = far from, next to > far from, beside > far from,
close to > far from, before = after, entering = leaving, pushing = pulling, walking = running"""
# what is false once the two noun phrases around it are exchanged
_ASYMMETRIC = """in, on, into, onto, inside, under, beneath, underneath, above, below, over, atop,
behind, across, through, at, wearing, holding, riding, eating, carrying, pulling, pushing, chasing,
feeding, reading, cutting, hitting, throwing, catching, watching, has, wears, holds, rides, eats,
covered in, covered with, covered by, filled with, full of, surrounded by, on top of, in front of,
left of, right of, to the left of, to the right of"""
# no relations after or before these words
_PARTICLES = {"on", "over", "under", "up", "down", "in", "at"}
_IDIOM_STARTS = set("turned turning put putting cut cutting lined set setting made holding".split())
_IDIOM_ENDS = set("""left right side sides way day night display sale phone tv fire time trip middle
vacation back background foreground distance row rows line air""".split())  # fmt: skip

# what words do: function words, determiners, what joins equals, links to a verb, verbs and, as are
# all other words, nouns and what describes them; later lines have precedence
_TAG_WORDS = {
    "F": """behind beneath underneath inside outside atop along across toward towards around front
        top left right like without no not one""",
    "D": """a an the some this these those his her its their my our your each every another several
        many""",
    "J": "and or next to near beside by alongside",
    "L": "is are was were being that who up down",
    "V": """sits stands sit stand lies lays rests hangs walks runs rides holds wears eats plays goes
        looks flies jumps drives waits watches uses carries pulls pushes throws catches takes""",
    "N": "building ceiling clothing dining living painting parking something string thing wedding",
}
_TAGS = dict.fromkeys(text_augment.STOP_WORDS, "F")
_TAGS |= {word: tag for tag, words in _TAG_WORDS.items() for word in words.split()}
# small letters after punctuation: no phrase continues there
_PHRASE_AFTER = re.compile("D*[NV]N*")
_PHRASE_BEFORE = re.compile("([Dd]D*N+|[Nn]N*)[VL]*$")
_LIST = re.compile("[NVnv](?:[Jj][JDjd]*[NVnv]|dD*[NV]|[nv])*")

_GROUPS = [[group.split() for group in line.split("|")] for line in _CLASSES.split(";")]
_CLASSES_OF = {w: [c for c in _GROUPS if w in chain(*c)] for w in re.findall(r"\w+", _CLASSES)}
_OPPOSITES = {b: a for a, b in re.findall(r"(\w[\w ]*) = (\w[\w ]*)", _OPPOSITE_PAIRS)}
_OPPOSITES |= dict(re.findall(r"(\w[\w ]*) [=>] (\w[\w ]*)", _OPPOSITE_PAIRS))
_EXCHANGING = set(re.findall(r"\w[\w ]*", _ASYMMETRIC))
_LONGEST_FIRST = sorted(_OPPOSITES.keys() | _EXCHANGING, key=len, reverse=True)
_RELATION = re.compile(rf"(?<!\S)(?:{'|'.join(_LONGEST_FIRST)})(?!\S)")


class _Caption:
    """The first words of a caption, and the white space and punctuation around them."""

    def __init__(self, text: str) -> None:
        self.pieces = _WORD.split(text, maxsplit=REACH)
        self.words = self.pieces[1::2]
        self.low = [word.lower() for word in self.words]
        self.english = text_augment.looks_english(" ".join(self.words))
        first = self.words[0] if self.words else "I"
        # a capital in the middle would betray a negative; German nouns keep theirs
        titled = first != "I" and first.lower() != first == first.capitalize()
        self.capital = self.english and titled
        if self.capital:
            self.pieces[1] = self.words[0] = self.low[0]
        self.articles = set(pairwise(self.low))
        tags = [self._tag(i) for i in range(len(self.low))]
        joined = [gap.isspace() for gap in self.pieces[:-1:2]]
        self.tags = "".join(t if j else t.lower() for t, j in zip(tags, joined, strict=True))
        self.attributes = [i for i in range(len(self.low)) if self._is_attribute(i)]

    def _tag(self, i: int) -> str:
        word = self.low[i]
        # "a covered wagon", but "a wagon covered with"
        ends = i + 1 == len(self.low) or _TAGS.get(self.low[i + 1], "N") not in "NV"
        verb = word.endswith("ing") or (word.endswith("ed") and len(word) > 4 and ends)
        return _TAGS.get(word, "V" if verb else "N")

    def _is_attribute(self, i: int) -> bool:
        known = self.english and self.low[i] in _CLASSES_OF
        before_noun = self.tags[i + 1 : i + 2] in ("N", "V")
        fixed = " ".join(self.low[i : i + 2]) in _FIXED
        return known and not fixed and (before_noun or self.low[i] not in _BEFORE_NOUN)

    def nouns(self, start: int, end: int) -> list[str]:
        """The words that may name things, as far as lexicons know."""
        places = set(range(start, end)) - set(self.attributes)
        words = [self.low[i] for i in sorted(places) if self.tags[i] in "NVnv"]
        return [word for word in words if not word.endswith("ly")]

    def phrase_after(self, i: int) -> tuple[int, int]:
        """The noun phrase after word i: its first word and the one after its last."""
        match = _PHRASE_AFTER.match(self.tags, i + 1)
        return match.span() if match else (0, 0)

    def phrase_before(self, i: int) -> tuple[int, int]:
        """The noun phrase before word i and its verb."""
        match = _PHRASE_BEFORE.search(self.tags[:i]) if self.tags[i].isupper() else None
        return match.span(1) if match else (0, 0)

    def same_if_exchanged(self, i: int, j: int) -> bool:
        """Whether words i and j are parts of one list, or attributes, maybe of things alike."""
        listed = _LIST.fullmatch(self.tags, i, j + 1)
        return listed is not None or {i, j} <= set(self.attributes)

    def with_words(self, start: int, end: int, words: str) -> str:
        """The caption with these words instead of others."""
        words = match_case(words, self.words[start])
        return self.written([*self.pieces[: 2 * start + 1], words, *self.pieces[2 * end :]])

    def with_exchanged(self, a: tuple[int, int], b: tuple[int, int]) -> str:
        """The caption with two stretches of words in each other's place, the earlier first."""
        (i, j), (k, m) = ((2 * start + 1, 2 * end) for start, end in (a, b))
        old = self.pieces
        return self.written([*old[:i], *old[k:m], *old[j:k], *old[i:j], *old[m:]])

    def written(self, pieces: list[str]) -> str:
        """Words and what is between them as a text, with the articles and the capital it needs."""
        for i in range(1, len(pieces) - 2, 2):
            article, after = pieces[i], pieces[i + 2]
            if self.english and article in ("a", "an", "A", "An", "AN"):
                # articles that the caption has itself stay, right or wrong
                if (article.lower(), after.lower()) not in self.articles:
                    pieces[i] = match_case(article_before(after), article)
        if self.capital:
            pieces[1] = pieces[1][:1].upper() + pieces[1][1:]
        return "".join(pieces)


def _attribute_negatives(caption: _Caption, rng: random.Random) -> Iterator[str]:
    edits = [(i, i) for i in caption.attributes]
    for i, j in combinations(caption.attributes, 2):
        a, b = caption.low[i], caption.low[j]
        heads = [caption.nouns(*caption.phrase_after(k)) for k in (i, j)]
        groups = [group for groups in _CLASSES_OF[a] for group in groups if b in group]
        alike = any(a in group for group in groups)
        fit = bool(groups) or (all(heads) and not _NUMBERS & {a, b})
        if fit and not alike and heads[0] != heads[1] and caption.nouns(i + 1, j):
            edits.append((i, j))
    rng.shuffle(edits)
    for i, j in edits:
        others = [group for groups in _CLASSES_OF[caption.low[i]] for group in groups]
        others = [group for group in others if not set(group) & set(caption.low)]
        if i < j:
            yield caption.with_exchanged((i, i + 1), (j, j + 1))
        elif others:
            yield caption.with_words(i, i + 1, rng.choice(others)[0])


def _relation_negatives(caption: _Caption, rng: random.Random) -> Iterator[str]:
    made = []
    text = " ".join(caption.low) if caption.english else ""
    for match in _RELATION.finditer(text):
        name, start = match[0], text.count(" ", 0, match.start())
        end = start + name.count(" ") + 1
        before, after = caption.phrase_before(start), caption.phrase_after(end - 1)
        noun, last = (caption.low[span[1] - 1] for span in (before, after))
        if name in _PARTICLES:
            if not any(after) or last in _IDIOM_ENDS or {*caption.low[:start][-1:]} & _IDIOM_STARTS:
                continue
        if name in _OPPOSITES:
            made.append(caption.with_words(start, end, _OPPOSITES[name]))
        if name in _EXCHANGING and any(before) and any(after) and noun != last:
            made.append(caption.with_exchanged(before, after))
    rng.shuffle(made)
    yield from made


def _order_negatives(caption: _Caption, rng: random.Random) -> Iterator[str]:
    places = [i for i, tag in enumerate(caption.tags) if tag in "NVnv"]
    for _ in range(8 if len(places) > 1 else 0):
        i, j = sorted(rng.sample(places, 2))
        if j > i + 1 and not caption.same_if_exchanged(i, j):
            yield caption.with_exchanged((i, i + 1), (j, j + 1))
    trigrams = [caption.words[i : i + 3] for i in range(0, len(caption.words), 3)]
    turned = [words[(k := rng.choice((1, -1))) :] + words[:k] for words in trigrams]
    rng.shuffle(trigrams)
    for groups in (trigrams, turned):
        pieces = list(caption.pieces)
        pieces[1::2] = chain(*groups)
        yield caption.written(pieces)


_RULES = (_attribute_negatives, _relation_negatives, _order_negatives)


def normalized(text: str) -> str:
    """What texts share that differ in case and white space only."""
    return " ".join(text.casefold().split())


def hard_negatives(caption: str, kinds: Sequence[str] = KINDS, *, rng: random.Random) -> list[str]:
    """Captions that say something else in almost the same words.

    Args:
        caption: in English; of another language only the order is changed. Changes are made in its
            first 48 words.
        kinds: "attribute", colors, sizes, materials and so on exchanged between two things, or one
            replaced; "relation", one replaced by its opposite, or the two phrases around one
            exchanged; "order", two words exchanged, or trigrams shuffled or turned round.
        rng: chooses which come first, and among replacements.

    Returns:
        Texts that differ from the caption and one another in more than case, one of each kind in
        turn; none of a kind that finds nothing to change, as "order" does where all words are one.

    Raises:
        ValueError: another kind.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"kind of hard negatives is {unknown[0]!r}; use any of {', '.join(KINDS)}")
    words = _Caption(caption)
    found = {normalized(caption): ""}
    streams = [_RULES[KINDS.index(kind)](words, rng) for kind in kinds]
    for text in chain.from_iterable(zip_longest(*streams, fillvalue="")):
        found.setdefault(normalized(text), text)
    return [text for text in found.values() if text]
