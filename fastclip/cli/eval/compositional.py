"""`fastclip eval aro`, `sugarcrepe` and `winoground`: does word order matter to the model?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastclip.cli.eval.flags import Evaluation
from fastclip.evaluate import sharing
from fastclip.evaluate.aro import PARTS, evaluate_aro
from fastclip.evaluate.sugarcrepe import SETS, evaluate_sugarcrepe
from fastclip.evaluate.winoground import evaluate_winoground
from fastclip.messages import logger
from fastclip.models.clip import Model


@dataclass(frozen=True, kw_only=True)
class Aro(Evaluation):
    """Choose the true caption of a region or image: relations, attributes and word order."""

    root: Path
    """Folder with images/, and visual_genome_relation.json, visual_genome_attribution.json,
    coco_order.json and flickr30k_order.json, or some of them."""
    parts: tuple[Literal["relation", "attribution", "coco_order", "flickr30k_order"], ...] = ()
    """Parts to measure; by default those that are present."""

    task = "image_caption_selection"
    dataset = "aro"

    def measure(self, model: Model) -> dict[str, Any]:
        """Accuracies of the parts; see `evaluate_aro`."""
        metrics = evaluate_aro(model, self.root, self.encoding, self.parts)
        # others than those asked for are not missed
        wanted = self.parts or PARTS
        _report_absent(self.root, [PARTS[part] for part in wanted if part not in metrics["cases"]])
        return metrics


@dataclass(frozen=True, kw_only=True)
class SugarCrepe(Evaluation):
    """Choose between the true caption of an image and a hard negative."""

    root: Path
    """Folder with sugar_crepe/, the seven JSON files, and COCO's val2017/."""

    task = "image_caption_selection"
    dataset = "sugarcrepe"

    def measure(self, model: Model) -> dict[str, Any]:
        """Accuracies of the sets; see `evaluate_sugarcrepe`."""
        metrics = evaluate_sugarcrepe(model, self.root, self.encoding)
        _report_absent(self.root, [f"{name}.json" for name in SETS if name not in metrics])
        return metrics


@dataclass(frozen=True, kw_only=True)
class Winoground(Evaluation):
    """Match two images with two captions that have the same words."""

    root: Path
    """Folder with examples.jsonl and images/."""

    task = "image_caption_selection"
    dataset = "winoground"

    def measure(self, model: Model) -> dict[str, Any]:
        """Text, image and group score; see `evaluate_winoground`."""
        return evaluate_winoground(model, self.root, self.encoding)


def _report_absent(root: Path, files: list[str]) -> None:
    if files and sharing.is_first():
        logger.warning(f"not measured of {root}: {', '.join(files)}")
