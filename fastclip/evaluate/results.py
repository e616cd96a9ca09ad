"""Result files in CLIP_benchmark's JSON layout."""

import json
from pathlib import Path


def write_result(
    path: Path, *, dataset: str, model: str, pretrained: str, task: str, metrics: dict[str, float]
) -> None:
    """Write one result; the folder is made if needed.

    Args:
        dataset, model, pretrained: what was evaluated; pretrained is the run or checkpoint.
        task: "zeroshot_classification" or "zeroshot_retrieval".
        metrics: shares in [0, 1] by CLIP_benchmark's metric names.
    """
    result = {
        "dataset": dataset,
        "model": model,
        "pretrained": pretrained,
        "task": task,
        "metrics": metrics,
        "language": "en",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
