"""Is better text enough to learn composition (Stone et al. 2024)? Captions by text tower."""

import functools
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from fastclip.data.order import hash64
from fastclip.data.scenes import NEGATIVE_KINDS, caption, hard_negatives, sample_scene
from fastclip.data.sources import SceneSource
from fastclip.evaluate.features import embed_images, embed_texts
from fastclip.evaluate.retrieval import caption_pairs, chance_of_recall, retrieval_metrics
from fastclip.models.clip import Model
from fastclip.study.language_model import teach
from fastclip.study.report import Row, write
from fastclip.study.runs import Plan, Scores, run_all
from fastclip.study.variants import (
    NO_VALIDATION,
    STEPS,
    differences,
    outcomes_of,
    run_name,
    scores_of,
    seeds_note,
)
from fastclip.study.verdict import Verdict, positive, together

SCENES = 1000
# of a run
SAMPLES, QUICK_SAMPLES = 9600, 4800
# of the phase with hard negatives, which begins with what dense captions have taught
LATER_SHARE = 0.3
COLUMNS = {
    "composition": "composition",
    "dense_recall": "text → image @1, dense captions",
    "short_recall": "text → image @1, short captions",
}
CAPTIONS: dict[str, tuple[str, ...]] = {
    "alt-text": ("--captions", "alt=1"),
    "short": ("--captions", "short=1"),
    "dense": ("--captions", "dense=1"),
    "dense, sentences": ("--captions", "dense=1", "--sentence-sampling"),
}
BEGUN, NEGATIVES = "dense, sentences", "+ hard negatives"
# the false captions are short ones, so true ones of both kinds go with them
LATER = (
    *("--captions", "dense=1,short=1", "--sentence-sampling", "--hard-negatives", "1"),
    *("--lr", "5e-4", "--warmup", "5"),
)
SCRATCH, PRETRAINED = "from scratch", "pretrained"
TOWERS = (SCRATCH, PRETRAINED)


def study(
    folder: Path,
    seeds: int = 3,
    flags: Sequence[str] = (),
    jobs: int = 1,
    samples: int = SAMPLES,
) -> str:
    """Train with each kind of captions and each text tower and compare; returns the report.

    Args:
        folder: for runs and report; runs that are there already are not made again.
        seeds: runs of each.
        flags: of `fastclip train`, for all of them.
        jobs: runs at a time.
        samples: of each run, but for the later phase.
    """
    later_samples = ("--train-num-samples", str(int(samples * LATER_SHARE)))
    language_model = folder / "language_model"
    if not (language_model / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        teach(language_model)
    towers = {
        SCRATCH: ("--model", "RN10t-64-long"),
        PRETRAINED: (
            *("--model", "RN10t-64", "--text-lm", str(language_model), "--context-length", "96"),
            *("--text-lm-unfrozen", "2"),
        ),
    }
    common = ("--config", "quickstart", "--epochs", "1", *STEPS)
    plans = []
    for seed in range(seeds):
        ends = ("--seed", str(seed), *NO_VALIDATION, *flags)
        for tower, own in towers.items():
            begin = (*common, "--train-num-samples", str(samples), *own)
            for kind, captions in CAPTIONS.items():
                name = run_name(label(kind, tower), seed)
                plans.append(Plan(name, (*begin, *captions, *ends), judge))
            begun = run_name(label(BEGUN, tower), seed)
            later = (
                *common,
                *own,
                *LATER,
                *later_samples,
                "--pretrained",
                str(folder / begun),
                *ends,
            )
            plans.append(Plan(run_name(label(NEGATIVES, tower), seed), later, judge, (begun,)))
    outcomes = run_all(plans, folder, jobs)
    labels = [label(kind, tower) for tower in TOWERS for kind in (*CAPTIONS, NEGATIVES)]
    rows: list[Row] = [(name, outcomes_of(name, outcomes, seeds)) for name in labels]
    notes = [
        seeds_note(seeds, jobs),
        f"{SCENES} held-out scenes. Composition: of a short caption and one that differs by an "
        f"attribute, a relation or the order of two objects, which is nearer to the image, ties "
        f"against it; mean over the three kinds. {samples} samples a run; hard negatives are a "
        f"later phase of {LATER_SHARE:.0%} as many, which begins with '{BEGUN}'. The "
        "pretrained tower is a GPT-2 of four layers, taught dense and short captions by "
        "next-token loss, two layers frozen; the same for all seeds.",
    ]
    return write(folder, "Captions and the text tower", rows, COLUMNS, notes, verdicts_of(rows))


def label(kind: str, tower: str) -> str:
    """A row's."""
    return f"{kind}, {tower}"


@functools.cache
def _cases() -> tuple[list[str], list[tuple[int, int, str]]]:
    """Texts, the short captions first; and (scene, false text, kind) of every hard negative."""
    texts, cases = [], []
    for index in range(SCENES):
        scene, seed = sample_scene(index, split="val"), hash64(index)
        texts.append(caption(scene, "short", seed))
        for kind in NEGATIVE_KINDS:
            cases += [(index, text, kind) for text in hard_negatives(scene, kind, seed)[:1]]
    false = [text for _, text, _ in cases]
    numbered = [(i, SCENES + n, kind) for n, (i, _, kind) in enumerate(cases)]
    return texts + false, numbered


def composition(images: Tensor, texts: Tensor, cases: Sequence[tuple[int, int, str]]) -> float:
    """Share of cases in which the image is nearer to its caption than to the false one.

    Ties count as wrong. The mean over the kinds of their shares.

    Args:
        images: (N, D). texts: (T, D), text i < N the caption of image i.
        cases: image, false text, kind.
    """
    image = torch.tensor([i for i, _, _ in cases])
    false = torch.tensor([n for _, n, _ in cases])
    right = (images[image] * texts[image]).sum(1) > (images[image] * texts[false]).sum(1)
    kinds = [kind for _, _, kind in cases]
    shares = [right[[k == kind for k in kinds]].double().mean().item() for kind in sorted({*kinds})]
    return mean(shares)


def judge(model: Model) -> Scores:
    """Composition, and recall@1 of images by dense and by short captions."""
    scores, chance = {}, {"composition": 0.5}
    qualities = ("dense", "short")
    images = embed_images(model, SceneSource("val", SCENES, captions=qualities))
    for quality, own in zip(qualities, zip(*images.texts, strict=True), strict=True):
        texts, pairs = caption_pairs([(text,) for text in own])
        found = retrieval_metrics(images.features, embed_texts(model, texts), pairs, (1,))
        scores[f"{quality}_recall"] = found["image_retrieval_recall@1"]
        chance[f"{quality}_recall"] = chance_of_recall(pairs[:, 1].bincount(), SCENES, 1)
    texts, cases = _cases()
    scores["composition"] = composition(images.features, embed_texts(model, texts), cases)
    return scores, chance


def verdicts_of(rows: Sequence[Row]) -> list[Verdict]:
    """The paper's steps, one by one, and all together."""

    def gain(claim: str, score: str, first: str, second: str) -> Verdict:
        a, b = (scores_of(rows, name, score) for name in (first, second))
        what = f"{first} - {second}, {COLUMNS[score]},"
        return positive(claim, what, differences(a, b))

    dense, alt = label("dense", SCRATCH), label("alt-text", SCRATCH)
    parts = [
        gain("dense captions help retrieval", "dense_recall", dense, alt),
        gain("dense captions help composition", "composition", dense, alt),
        gain(
            "a pretrained text tower helps, with dense captions",
            "dense_recall",
            label("dense", PRETRAINED),
            dense,
        ),
        gain(
            "sentence sampling helps short captions",
            "short_recall",
            label(BEGUN, SCRATCH),
            dense,
        ),
        gain(
            "hard negatives help composition",
            "composition",
            label(NEGATIVES, SCRATCH),
            label(BEGUN, SCRATCH),
        ),
        gain(
            "and cost retrieval",
            "dense_recall",
            label(BEGUN, SCRATCH),
            label(NEGATIVES, SCRATCH),
        ),
    ]
    return [together("text supervision is what composition takes", parts), *parts]
