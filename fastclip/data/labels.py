"""Class labels of samples: their own, or those of class names found in their captions."""

import random
import re
from collections.abc import Sequence
from typing import Literal

from fastclip.data.samples import Sample

NO_LABEL = -1

_WORD = re.compile(r"\w+")


class ClassMatcher:
    """Finds class names in texts, as whole words.

    Photographs get labels like this without a language model (Fang et al. 2022). White space of any
    kind and length is alike. A name inside a longer one that is found is not counted, as "shark" in
    "hammerhead shark". A name of several classes stands for each.

    Args:
        names: of the classes, in the order of the labels; one may be several synonyms with commas
            between them, as ImageNet's are ("tench, Tinca tinca").
        case_sensitive: whether capitals matter.

    Raises:
        ValueError: a class has no name with a letter or digit in it.
    """

    def __init__(self, names: Sequence[str], *, case_sensitive: bool = False) -> None:
        self.case_sensitive = case_sensitive
        classes: dict[str, list[int]] = {}
        for number, listed in enumerate(names):
            # a name is looked up where its first word is
            synonyms = [
                name[first.start() :]
                for name in map(self._normal, listed.split(","))
                if (first := _WORD.search(name))
            ]
            if not synonyms:
                raise ValueError(f"class {number} is called {listed!r}; give a name of words")
            for name in synonyms:
                classes.setdefault(name, []).append(number)
        # by their first words, the longest first
        self._names: dict[str, list[tuple[str, list[int]]]] = {}
        for name in sorted(classes, key=len, reverse=True):
            self._names.setdefault(_WORD.findall(name)[0], []).append((name, classes[name]))

    def __call__(self, text: str) -> list[int]:
        """The classes found, each once, in the order of their places."""
        text = self._normal(text)
        found: dict[int, None] = {}
        reach = 0
        for word in _WORD.finditer(text):
            for name, classes in self._names.get(word[0], ()):
                end = word.start() + len(name)
                if text.startswith(name, word.start()) and not _WORD.match(text, end):
                    if end > reach:
                        found |= dict.fromkeys(classes)
                        reach = end
                    break
        return list(found)

    def _normal(self, text: str) -> str:
        text = " ".join(text.split())
        return text if self.case_sensitive else text.casefold()


class LabelSource:
    """Where the labels of training samples come from.

    Args:
        classes: names of the classes, in the order of the labels.
        source: "cls", the labels that the data have; or "text", class names found in the captions.
        case_sensitive: see `ClassMatcher`; for "text".

    Raises:
        ValueError: see `ClassMatcher`.
    """

    def __init__(
        self,
        classes: Sequence[str],
        source: Literal["cls", "text"] = "cls",
        *,
        case_sensitive: bool = False,
    ) -> None:
        self.count = len(classes)
        self._find = None
        if source == "text":
            self._find = ClassMatcher(classes, case_sensitive=case_sensitive)

    def draw(self, sample: Sample, rng: random.Random) -> int:
        """The sample's label, -1 for none; where its captions name several classes, one of them.

        Raises:
            ValueError: the data's label is beyond the classes.
        """
        if self._find is not None:
            captions = [text for texts in sample.captions.values() for text in texts]
            texts = dict.fromkeys([*sample.texts, *captions])
            found = dict.fromkeys(label for text in texts for label in self._find(text))
            return rng.choice(list(found)) if found else NO_LABEL
        if sample.label is None:
            return NO_LABEL
        if not 0 <= sample.label < self.count:
            raise ValueError(
                f"sample {sample.key} ({sample.where or 'no file'}) has label {sample.label}, the "
                f"{self.count} classes are 0..{self.count - 1}; name all classes in their order"
            )
        return sample.label
