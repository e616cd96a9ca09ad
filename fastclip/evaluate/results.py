"""Result files in CLIP_benchmark's JSON layout."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastclip.atomic import write_text
from fastclip.bounded import read_json

_TEXTS = ("dataset", "model", "pretrained", "task")


def write_result(
    path: Path,
    *,
    dataset: str,
    model: str,
    pretrained: str,
    task: str,
    metrics: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    named: bool = False,
) -> None:
    """Write one result; the folder is made if needed.

    Args:
        dataset, model, pretrained: what was evaluated; pretrained is the run or checkpoint.
        task: "zeroshot_classification", "zeroshot_retrieval", "linear_probe" or
            "image_caption_selection".
        metrics: shares in [0, 1] by CLIP_benchmark's metric names, nested where they have parts.
        settings: what the metrics depend on besides the model, as JSON has it.
        named: whether the user named the file, so that a link of this name is written through.
    """
    result = {
        "dataset": dataset,
        "model": model,
        "pretrained": pretrained,
        "task": task,
        "metrics": metrics,
        "language": "en",
        **({} if settings is None else {"settings": settings}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=2) + "\n", named=named)


def replaces_other(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether there is a result of other settings; of one that does not say, it is not known."""
    try:
        before = read_result(path).get("settings", settings)
    except (OSError, ValueError):
        return False
    return bool(before != settings)


def read_result(path: Path) -> dict[str, Any]:
    """A result that `write_result` or CLIP_benchmark wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a result.
    """
    try:
        result = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not an evaluation result: {error}") from error
    wrong = [key for key in _TEXTS if not _of(result, key, str)]
    wrong += ["metrics"] if not _of(result, "metrics", dict) else []
    if wrong:
        raise ValueError(
            f"{path} is not an evaluation result: it lacks {', '.join(wrong)}; give files as "
            "`fastclip eval` and CLIP_benchmark write them"
        )
    return result


def _of(result: Any, key: str, kind: type) -> bool:
    return isinstance(result, dict) and isinstance(result.get(key), kind)
