"""Training runs of a study, and what is measured of them.

A run is a process of `fastclip train`, as a user would start it. Its outcome is kept beside it, so
that a study that was stopped resumes where it was.
"""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastclip.atomic import create, write_text
from fastclip.bounded import read_object
from fastclip.data.scenes import CLASSES, TEMPLATES
from fastclip.data.sources import SceneSource
from fastclip.device import available_cores, choose_device, precision_flags
from fastclip.evaluate.features import ImageFeatures, embed_images, embed_texts
from fastclip.evaluate.interpolation import has_two_heads, weigh_heads
from fastclip.evaluate.retrieval import caption_pairs, chance_of_retrieval, retrieval_metrics
from fastclip.evaluate.zeroshot import evaluate_zeroshot
from fastclip.messages import filled
from fastclip.models.build import load
from fastclip.models.classifier import Classifier
from fastclip.models.clip import Model
from fastclip.models.simclr import SimCLR
from fastclip.train.log import read_metrics

SCENES = 1000
OUTCOME = "outcome.json"
# the flags of a run, and the seconds that it has taken so far
BEGUN = "begun.json"


@dataclass(frozen=True)
class Outcome:
    """A run that came to its end.

    Attributes:
        name, flags: of the run.
        seconds: that the run took, its start and its validation included; of CIFAR-10's, that the
            steps took.
        first_loss, last_loss: means of the first and last tenth of the lines of metrics.
        scores: by name, in [0, 1].
        chance: what guessing would score, by the same names.
    """

    name: str
    flags: tuple[str, ...]
    seconds: float
    first_loss: float
    last_loss: float
    scores: dict[str, float]
    chance: dict[str, float]

    def __str__(self) -> str:
        # parts of a score, and scores of a run's earlier epochs, are in the results alone
        shares = (f"{k} {v:.1%}" for k, v in self.scores.items() if k in self.chance)
        return filled(f"{self.name}: ", ", ".join([f"{self.seconds:.0f} s", *shares]), 2)


Scores = tuple[dict[str, float], dict[str, float]]
# of a run's directory
Judge = Callable[[Path], Scores]


@dataclass(frozen=True)
class Plan:
    """A run to be made.

    Attributes:
        name, flags: of the run.
        judge: gives scores, and what guessing would score; by default `judge_scenes`.
        after: names of the runs that it begins with.
    """

    name: str
    flags: tuple[str, ...]
    judge: Judge | None = None
    after: tuple[str, ...] = ()


def run_all(plans: Sequence[Plan], folder: Path, jobs: int = 1) -> dict[str, Outcome]:
    """Make the runs, so many side by side, each after those that it needs; outcomes by name.

    Args:
        plans: what a run needs comes before it.
        jobs: runs at a time, which share the processor's cores.

    Raises:
        ValueError: jobs is below 1.
        FileExistsError, FailedRunError: see `run`; runs that are under way come to their end first.
    """
    if jobs < 1:
        raise ValueError(f"--jobs is {jobs}; give at least 1")
    waiting, made = list(plans), dict[str, Outcome]()
    changed = threading.Condition()

    def take() -> Plan | None:
        """The first plan that has what it needs; None when there is no more."""
        with changed:
            while waiting:
                for plan in waiting:
                    if all(name in made for name in plan.after):
                        waiting.remove(plan)
                        return plan
                changed.wait()
        return None

    def hand_out_no_more() -> None:
        with changed:
            waiting.clear()
            changed.notify_all()

    def work() -> None:
        while plan := take():
            try:
                outcome = run(plan.name, plan.flags, folder, plan.judge, jobs)
            except BaseException:
                hand_out_no_more()
                raise
            print(outcome, flush=True)
            with changed:
                made[plan.name] = outcome
                changed.notify_all()

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for worker in [pool.submit(work) for _ in range(jobs)]:
                worker.result()
        finally:
            # Ctrl-C reaches this thread alone
            hand_out_no_more()
    return {plan.name: made[plan.name] for plan in plans}


class FailedRunError(OSError):
    """A training run of a study that ended before its time."""


def train(name: str, flags: Sequence[str], folder: Path, jobs: int = 1) -> Path:
    """Train in a process of its own; the run directory.

    Args:
        jobs: how many such processes share the cores.

    Raises:
        FailedRunError: it failed; the message ends as its output did.
    """
    log = folder / f"{name}.log"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "fastclip.cli", "train", *flags]
    command += ["--logs", str(folder), "--name", name, "--report-to", "none"]
    if "--precision" not in flags:
        command += precision_flags(choose_device("auto"))
    # what was cut short is resumed; what has not begun begins
    command += ["--resume", "latest"]
    environment = dict(os.environ)
    if jobs > 1:
        # threads that wait would take the other run's cores
        threads = max(1, available_cores() // jobs)
        environment |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    with create(log) as output:
        status = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if status:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise FailedRunError(f"run {name} ended with status {status}; {log} ends:\n{tail}")
    return folder / name


def run(
    name: str,
    flags: Sequence[str],
    folder: Path,
    judge: Judge | None = None,
    jobs: int = 1,
) -> Outcome:
    """Train and judge; what an earlier call with these flags found is kept.

    Args:
        judge: gives scores, and what guessing would score; by default `judge_scenes`.
        jobs: how many runs share the cores.

    Raises:
        FileExistsError: there is a run of this name with other flags.
        FailedRunError: training failed.
    """
    kept, begun = folder / name / OUTCOME, folder / name / BEGUN
    if kept.is_file():
        values = read_object(kept)
        _require_same(values, flags, kept.parent)
        return Outcome(**{**values, "flags": tuple(flags)})
    # a run that was stopped takes flags that are not given again from before
    seconds = 0.0
    if begun.is_file():
        values = read_object(begun)
        _require_same(values, flags, begun.parent)
        seconds = values["seconds"]
    begun.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        write_text(begun, json.dumps({"flags": flags, "seconds": seconds}) + "\n")
        path = train(name, flags, folder, jobs)
    finally:
        seconds += time.monotonic() - started
        write_text(begun, json.dumps({"flags": flags, "seconds": seconds}) + "\n")
    scores, chance = (judge or judge_scenes)(path)
    outcome = Outcome(name, tuple(flags), seconds, *losses_of(path), scores, chance)
    write_text(kept, json.dumps(asdict(outcome), indent=1) + "\n")
    return outcome


def _require_same(before: dict[str, Any], flags: Sequence[str], path: Path) -> None:
    if before["flags"] != list(flags):
        raise FileExistsError(f"{path} is of other flags; choose another --output or delete it")


def losses_of(run: Path) -> tuple[float, float]:
    """The mean loss of the first and of the last tenth of a run's lines of metrics."""
    losses = [line["loss"] for line in _steps(run)]
    tenth = max(1, len(losses) // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


def steady_speed(run: Path) -> float:
    """Samples a second, the median over the second half of a run's lines."""
    speeds = [line["samples_per_second"] for line in _steps(run)]
    return statistics.median(speeds[len(speeds) // 2 :])


def training_seconds(run: Path, batch: int) -> float:
    """What the steps took, evaluation and start-up apart; `batch` is a step's samples."""
    lines = _steps(run)
    done = [0, *(line["step"] for line in lines)]
    pairs = zip(pairwise(done), lines, strict=True)
    return sum((b - a) * batch / line["samples_per_second"] for (a, b), line in pairs)


def _steps(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run) if "loss" in line]


def judge_scenes(path: Path, quality: str = "short") -> Scores:
    """A run's scores on 1000 held-out scenes with captions of a quality, and those of guessing.

    accuracy is zero-shot's (a classifier's own); image_to_text and text_to_image are recall@5.
    Where there are weak and strong heads, their weight is chosen on 1000 further scenes.
    """
    model = load(path)
    system = model.model
    chance = {"accuracy": 1 / len(CLASSES)}
    if isinstance(system, SimCLR):
        return {}, {}
    prompts = list(CLASSES), list(TEMPLATES)
    if isinstance(system, Classifier):
        images = embed_images(model, SceneSource("val", SCENES))
        return {"accuracy": evaluate_zeroshot(model, images, *prompts)["acc1"]}, chance
    images = embed_images(model, SceneSource("val", 2 * SCENES, quality=quality))
    test, held_out = first_rows(images, SCENES), first_rows(images, SCENES, start=SCENES)
    scores = {}
    if has_two_heads(model):
        test, scores["head_weight"] = weigh_heads(model, held_out, test, *prompts)
    scores["accuracy"] = evaluate_zeroshot(model, test, *prompts)["acc1"]
    found, guessed = recalls(model, test, 5)
    return scores | found, chance | guessed


def recalls(model: Model, images: ImageFeatures, k: int) -> Scores:
    """image_to_text and text_to_image, recall@k, and what guessing would score."""
    texts, pairs = caption_pairs(images.texts)
    found = retrieval_metrics(images.features, embed_texts(model, texts), pairs, (k,))
    guessed = chance_of_retrieval(pairs, (k,))
    names = {
        "image_to_text": f"text_retrieval_recall@{k}",
        "text_to_image": f"image_retrieval_recall@{k}",
    }
    scores, chance = (
        {name: values[metric] for name, metric in names.items()} for values in (found, guessed)
    )
    return scores, chance


def first_rows(images: ImageFeatures, count: int, start: int = 0) -> ImageFeatures:
    """So many images from `start` on."""
    rows = slice(start, start + count)
    return replace(
        images,
        features=images.features[rows],
        texts=images.texts[rows],
        labels=images.labels[rows],
        keys=images.keys[rows],
    )
