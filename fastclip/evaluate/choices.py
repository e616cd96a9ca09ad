"""Choosing the true text of an image among false ones, as benchmarks of composition ask for it."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

from fastclip.evaluate.features import Encoding, ImageFile, embed_files, embed_texts
from fastclip.models.clip import Model

Scores = tuple[float, ...]
Rule = Callable[[Scores], bool]


@dataclass(frozen=True)
class Choice:
    """A case: an image and the texts to choose from.

    Args:
        image: the file.
        texts: two or more, the true one first.
        group: the cases that it is averaged with.
    """

    image: ImageFile
    texts: tuple[str, ...]
    group: str = ""


@dataclass(frozen=True)
class Accuracy:
    """How often the true text was chosen.

    Args:
        by_group: the share of each group's cases, in the order in which groups first appear.
        cases: number of cases in each group.
        micro: the share of all cases.
        ties: the share of all cases whose true text scores the same as the best false one.
    """

    by_group: dict[str, float]
    cases: dict[str, int]
    micro: float
    ties: float

    def macro(self, at_least: int = 1, apart: Collection[str] = ()) -> float | None:
        """The mean over groups of so many cases or more, but for those `apart`; None of none."""
        shares = [
            share
            for name, share in self.by_group.items()
            if self.cases[name] >= at_least and name not in apart
        ]
        return fmean(shares) if shares else None


def score_choices(model: Model, cases: Sequence[Choice], encoding: Encoding) -> list[Scores]:
    """Cosine similarities of each case's image and texts, in the texts' order.

    Each image and each text is encoded once; equal texts of a case tie to the bit.

    Raises:
        ValueError: there is no case, or images are missing or cannot be read.
    """
    image_features = embed_files(model, [case.image for case in cases], encoding)
    texts = list(dict.fromkeys(chain.from_iterable(case.texts for case in cases)))
    text_features = embed_texts(
        model, texts, batch_size=encoding.batch_size, precision=encoding.precision
    )
    row_of = {text: row for row, text in enumerate(texts)}
    scores = []
    for case, image in zip(cases, image_features, strict=True):
        rows = [row_of[text] for text in case.texts]
        # a matrix product may add the same numbers in another order from row to row
        scores.append(tuple((text_features[rows] * image).sum(dim=1).tolist()))
    return scores


def strict(scores: Scores) -> bool:
    """Whether the true text scores above all others; a tie is wrong, and so is NaN."""
    return all(scores[0] > other for other in scores[1:])


def first(scores: Scores) -> bool:
    """Whether the true text is the first of the best; it wins a tie, NaN is wrong."""
    return all(scores[0] >= other for other in scores[1:])


def tied(scores: Scores) -> bool:
    """Whether the true text scores the same as the best of the others."""
    return first(scores) and not strict(scores)


def accuracy(cases: Sequence[Choice], scores: Sequence[Scores], rule: Rule = strict) -> Accuracy:
    """How often the rule finds the true text chosen, of one case or more."""
    counts = Counter(case.group for case in cases)
    right = Counter(case.group for case, own in zip(cases, scores, strict=True) if rule(own))
    return Accuracy(
        by_group={group: right[group] / count for group, count in counts.items()},
        cases=dict(counts),
        micro=right.total() / len(cases),
        ties=fmean(map(tied, scores)),
    )
