"""`fastclip eval retrieval` and `docci`: images found by their captions, and captions by images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastclip.cli.eval.flags import DataEvaluation, Evaluation
from fastclip.evaluate.docci import evaluate_docci
from fastclip.evaluate.retrieval import (
    caption_pairs,
    chance_of_retrieval,
    evaluate_retrieval,
    require_ranks,
)
from fastclip.evaluate.table import CHANCE
from fastclip.evaluate.wds import is_wds, split_captions
from fastclip.models.clip import Model


@dataclass(frozen=True, kw_only=True)
class Retrieval(DataEvaluation):
    """Retrieve images by their captions, and captions by images."""

    recall_k: tuple[int, ...] = (1, 5, 10)
    """Values of k in recall@k."""

    task = "zeroshot_retrieval"
    required = ("txt",)

    def check(self) -> None:
        """See `Evaluation.check`."""
        super().check()
        require_ranks(self.recall_k)

    def measure(self, model: Model) -> dict[str, Any]:
        """Recall in both directions, that of guessing, and how many images and texts there are."""
        images = self.embed(model, self.data)
        if is_wds(self.data):
            images = split_captions(images)
        found = evaluate_retrieval(model, images, k=self.recall_k, precision=self.precision)
        _, pairs = caption_pairs(images.texts)
        return {**found, CHANCE: chance_of_retrieval(pairs, self.recall_k)}


@dataclass(frozen=True, kw_only=True)
class Docci(Evaluation):
    """Retrieve the 5,000 test images of DOCCI by their long descriptions, and vice versa."""

    root: Path
    """Folder with docci_descriptions.jsonlines and images/."""
    recall_k: tuple[int, ...] = (1, 5, 10)
    """Values of k in recall@k."""

    task = "zeroshot_retrieval"
    dataset = "docci"

    def check(self) -> None:
        """See `Evaluation.check`."""
        super().check()
        require_ranks(self.recall_k)

    def measure(self, model: Model) -> dict[str, Any]:
        """Recall in both directions."""
        return evaluate_docci(model, self.root, self.encoding, self.recall_k)
