"""Every system, from its recipe for the scenes: what it learns in minutes."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from fastclip.data.scenes import caption, sample_scene
from fastclip.study.language_model import teach
from fastclip.study.report import Row, write
from fastclip.study.runs import judge_scenes, run

COLUMNS = {
    "accuracy": "zero-shot",
    "image_to_text": "image → text @5",
    "text_to_image": "text → image @5",
}
# in this order: some begin with an earlier one's weights
SYSTEMS = (
    *("clip", "siglip", "slip", "siamlip", "byolip", "barlip", "swalip", "rocket", "uniclip"),
    *("semantic", "semantic_negatives", "align", "basic_image", "basic"),
    *("classify", "simclr", "finetuned"),
)
_BEGINS_WITH = {
    "semantic_negatives": "semantic",
    "basic": "basic_image",
    "finetuned": "simclr",
}


def study(folder: Path, systems: Sequence[str] = SYSTEMS, flags: Sequence[str] = ()) -> str:
    """Train and judge the systems, one after the other; returns the report.

    Args:
        folder: for runs and report; runs that are there already are not made again.
        systems: names of `SYSTEMS`; what one of them begins with is added.
        flags: of `fastclip train`, for all of them.

    Raises:
        ValueError: a system is unknown.
    """
    unknown = set(systems) - set(SYSTEMS)
    if unknown:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}; use {', '.join(SYSTEMS)}")
    wanted = {*systems, *(_BEGINS_WITH[name] for name in systems if name in _BEGINS_WITH)}
    rows: list[Row] = []
    for name in SYSTEMS:
        if name in wanted:
            # rich captions are what that system is about
            quality = "dense" if name.startswith("semantic") else "short"
            judge = functools.partial(judge_scenes, quality=quality)
            outcome = run(name, [*_flags(name, folder), *flags], folder, judge)
            rows.append((name, [outcome]))
            print(outcome, flush=True)
    notes = [
        "1000 held-out scenes, with short captions; semantic's with dense ones. "
        "basic_image, classify and finetuned have no text: their accuracy is of their own "
        "classifier. The loss is not comparable between systems."
    ]
    return write(folder, "Every system on the scenes", rows, COLUMNS, notes)


def _flags(name: str, folder: Path) -> list[str]:
    # as many samples as fit three minutes of two cores
    quick = ["quickstart", "--train-num-samples", "16000", "--epochs", "2"]
    recipes: dict[str, Callable[[], list[str]]] = {
        "clip": lambda: quick,
        "siglip": lambda: [*quick, "--siglip"],
        "semantic": lambda: ["semantic_scenes", "--text-lm", _language_model(folder)],
        "semantic_negatives": lambda: [
            *("semantic_negatives_scenes", "--text-lm", _language_model(folder)),
            *("--pretrained", str(folder / "semantic")),
        ],
        "basic": lambda: ["basic_scenes", "--finetune", str(folder / "basic_image")],
        "finetuned": lambda: ["classify_scenes", "--finetune", str(folder / "simclr")],
    }
    return ["--config", *recipes.get(name, lambda: [f"{name}_scenes"])()]


def _language_model(folder: Path) -> str:
    path = folder / "language_model"
    if not (path / "config.json").is_file():
        scenes = [sample_scene(i, split="train") for i in range(4000)]
        texts = [caption(s, q, i) for i, s in enumerate(scenes) for q in ("dense", "short")]
        loss = teach(path, texts, 200)
        print(f"language model: {loss:.2f} nats a token", flush=True)
    return str(path)
