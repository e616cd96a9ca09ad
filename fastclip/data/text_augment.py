"""Text augmentation: stop-words removed, then one of EDA's operations.

The operations are those of Easy Data Augmentation (Wei and Zou 2019), weighted as the improved
CLIP baselines do (Fini et al. 2023). Stop-words and synonyms are English and leave other languages
alone; the other operations move or drop whole words and never touch the letters of one.
"""

import html
import random
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from fastclip.data.templates import read_lines

# named, since marks that belong to a word (of Hindi, say) are no letters to Python either
PUNCTUATION = string.punctuation + "“”‘’„«»‹›…–—¡¿、。，．！？：；・（）「」『』《》【】"

# without negations, whose loss would turn the meaning round
STOP_WORDS = frozenset(
    """a an the this that these those some any each such own same other i me my mine myself we us
    our ours you your yours yourself he him his himself she her hers herself it its itself they them
    their theirs themselves who whom whose which what there here am is are was were be been being
    has have had having do does did doing can could will would shall should may might must i'm i've
    i'd i'll we're we've we'll you're you've you'll he's he'll she's she'll it's it'll they're
    they've they'll that's there's of in on at to from with by for as about into onto through during
    up down over under above below between off out against and or but if because while when where
    how why than then so nor just also very too only again both all more most""".split()
)

# common words of other languages in Latin letters that are rare in English text
_OTHER_LANGUAGES = frozenset(
    """un una unos unas el los las al del con por para su se es y une le la les de des du et est
    avec sur au aux qui il lo gli della di che und der das ein eine einen einem einer auf mit ist
    dem zu von het een voor zijn och ett av og um uma na em da com""".split()
)
_OTHER_LETTER = re.compile(r"[^\W\d_a-zA-Z]")

# sounds, not letters: "an hour", "an SUV", but "a unicorn", "a one-way street"
_VOWEL_SOUND = re.compile(
    r"(?i)(?!one\b|once\b|eu|ewe|uni(?![dmn])|us[aeu]|us\b|uk\b|ute|uti|uri|ufo)[aeiou]"
    r"|hour|heir|honest|hono|(?:8\d*|11|18)(?!\d)|(?:suv|rv|lcd|led|mri|hdtv|x-?ray)s?\b",
)

_OPERATIONS = ("synonym", "swap", "deletion", "identity")
# the words that may stand for a word, by that word in lower case
Synonyms = Mapping[str, tuple[str, ...]]


def read_synonyms(path: str | Path) -> Synonyms:
    """Synonyms from a UTF-8 file: a group of words a line, with spaces between; # starts a comment.

    Raises:
        ValueError: a line is no such group, there is none, or the file is not UTF-8.
    """
    found: dict[str, tuple[str, ...]] = {}
    for line in read_lines(Path(path)):
        group = [] if line.startswith("#") else line.lower().split()
        bare = {word for word in group if word == word.strip(PUNCTUATION)}
        if group and (len(bare) < len(group) or len(group) == 1):
            raise ValueError(f"{path}: {line!r}: give two or more words, only spaces between")
        for word in group:
            found[word] = (*found.get(word, ()), *(other for other in group if other != word))
    if not found:
        raise ValueError(f"{path} holds no synonyms; give a line such as 'couch sofa'")
    return found


@lru_cache(maxsize=1)
def common_synonyms() -> Synonyms:
    """The package's own synonyms: common words of captions."""
    return read_synonyms(Path(__file__).with_name("synonyms.txt"))


@dataclass(frozen=True)
class TextAugmentation:
    """What is done to a caption; by default nothing.

    Args:
        stop_words: probability that English stop-words are removed, unless no other word is left.
        synonym, swap, deletion, identity: weights by which one of them is drawn: words replaced by
            synonyms, the places of two words exchanged, words dropped, nothing. All zero: nothing.
        synonym_words, swap_pairs: how many words are replaced, or pairs exchanged in turn.
        deletion_rate: probability that a word is dropped; one at least stays.
        clean: whether HTML's entities are resolved and white space is collapsed first.
        synonyms: the words that may stand for a word, by that word in lower case; None for the
            package's own.

    Raises:
        ValueError: a number is outside what it can mean.

    Examples:
        >>> import random
        >>> from fastclip.data.text_augment import TextAugmentation
        >>> TextAugmentation(stop_words=1.0).augment("a photo of the red car", random.Random(0))
        'photo red car'
        >>> swapped = TextAugmentation(swap=1.0).augment("a red car", random.Random(0))
        >>> swapped != "a red car", sorted(swapped.split())
        (True, ['a', 'car', 'red'])
    """

    stop_words: float = 0.0
    synonym: float = 0.0
    swap: float = 0.0
    deletion: float = 0.0
    identity: float = 0.0
    synonym_words: int = 1
    swap_pairs: int = 1
    deletion_rate: float = 0.1
    clean: bool = False
    synonyms: Synonyms | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name in (*_OPERATIONS, "stop_words", "deletion_rate", "synonym_words", "swap_pairs"):
            least = 1 if name in ("synonym_words", "swap_pairs") else 0
            most = 1 if name in ("stop_words", "deletion_rate") else 1_000_000
            if not least <= (value := getattr(self, name)) <= most:
                raise ValueError(f"{name} is {value}; give a number in [{least}, {most}]")

    @classmethod
    def weak(cls) -> "TextAugmentation":
        """Stop-words removed from four captions of five (Fini et al. 2023)."""
        return cls(stop_words=0.8)

    @classmethod
    def strong(cls) -> "TextAugmentation":
        """As weak, then a synonym, an exchange or dropped words (Fini et al. 2023)."""
        return cls(stop_words=0.8, synonym=0.4, swap=0.4, deletion=0.2)

    def augment(
        self, text: str, rng: random.Random, structure: frozenset[str] = frozenset()
    ) -> str:
        """The text, augmented; empty only where it was. White space stays where nothing changes.

        Args:
            text: a caption.
            rng: what is drawn from.
            structure: words, in lower case, that say how the others belong together, as "above"
                does in "a star above a ring": none is dropped or replaced, and in a text of two
                or more no words are exchanged.
        """
        if self.clean:
            text = clean(text) or text
        weights = [getattr(self, name) for name in _OPERATIONS]
        if structure and sum(_bare(word) in structure for word in text.split()) > 1:
            weights[_OPERATIONS.index("swap")] = 0
        operation = rng.choices(_OPERATIONS, weights)[0] if any(weights) else "identity"
        without = rng.random() < self.stop_words
        words = text.split()
        if (without or operation == "synonym") and looks_english(text):
            if without:
                words = _without_stop_words(words, structure)
            if operation == "synonym":
                synonyms = common_synonyms() if self.synonyms is None else self.synonyms
                _replace_words(words, synonyms, self.synonym_words, rng, structure)
        if operation == "swap" and len(words) > 1:
            for _ in range(self.swap_pairs):
                _swap_words(words, rng)
        elif operation == "deletion" and len(words) > 1:
            kept = [
                word
                for word in words
                if rng.random() >= self.deletion_rate or _bare(word) in structure
            ]
            words = kept or [rng.choice(words)]
        return text if words == text.split() else " ".join(words)


def clean(text: str) -> str:
    """HTML's entities resolved, twice as web text often needs, and white space collapsed."""
    return " ".join(html.unescape(html.unescape(text)).split())


def looks_english(text: str) -> bool:
    """Whether no letter and no word shows another language; short texts may well deceive."""
    if not text.isascii() and _OTHER_LETTER.search(text):
        return False
    return _OTHER_LANGUAGES.isdisjoint(text.lower().split())


def article_before(word: str) -> str:
    """ "a" or "an", by the sound that the word begins with."""
    return "an" if _VOWEL_SOUND.match(word) else "a"


def match_case(word: str, model: str) -> str:
    """The word in capitals, or with a capital first, where the model is so."""
    if len(model) > 1 and model.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word


def _parts(token: str) -> tuple[str, str, str]:
    """Punctuation before, the word, punctuation after."""
    return token.partition(token.strip(PUNCTUATION) or token)


def _bare(token: str) -> str:
    """The token's word in lower case, without punctuation around it."""
    return token.strip(PUNCTUATION).lower()


def _without_stop_words(words: list[str], structure: frozenset[str]) -> list[str]:
    # words with punctuation on them stay, and with it the ends of sentences
    dropped = STOP_WORDS - structure if structure else STOP_WORDS
    kept = [word for word in words if word.lower().replace("’", "'") not in dropped]
    return kept if any(word.strip(PUNCTUATION) for word in kept) else words


def _replace_words(
    words: list[str],
    synonyms: Synonyms,
    count: int,
    rng: random.Random,
    structure: frozenset[str],
) -> None:
    bare = [_bare(word) for word in words]
    places = [i for i, word in enumerate(bare) if word in synonyms and word not in structure]
    for place in rng.sample(places, min(count, len(places))):
        before, old, after = _parts(words[place])
        new = rng.choice(synonyms[old.lower()])
        words[place] = before + match_case(new, old) + after
        article = words[place - 1] if place else ""
        if article.lower() in ("a", "an") and article_before(old) != article_before(new):
            words[place - 1] = match_case(article_before(new), article)


def _swap_words(words: list[str], rng: random.Random) -> None:
    first, second = rng.sample(range(len(words)), 2)
    before, word, after = _parts(words[first])
    start, other, end = _parts(words[second])
    words[first], words[second] = before + other + after, start + word + end
