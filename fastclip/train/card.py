"""The model card of a run: what its files say of it, and `unknown` where they say nothing."""

import json
from pathlib import Path
from typing import Any

from fastclip._version import __version__
from fastclip.bounded import read_yaml
from fastclip.evaluate.results import read_result
from fastclip.models import checkpoint
from fastclip.models.clip import read_description
from fastclip.train.log import METRICS_FILE, read_metrics
from fastclip.train.summary import EVALUATED

UNKNOWN = "unknown"
_CARD = """\
---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags: [clip]
license: {license_entry}
---

# {name}

A model that compares images with texts, trained with fastclip, exported by fastclip {version}.

## How to use it

```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms({address})
tokenizer = open_clip.get_tokenizer({address})
```

`fastclip.load` takes this folder too, and returns `model, preprocess, tokenizer`.

## Model

{model}

## Training

{training}

## Scores

{scores}

## License

{license}

Not written by the exporter, and for its author to add: intended uses, limits, and how the data were
chosen.
"""


def model_card(
    source: Path,
    target: Path,
    *,
    license: str = UNKNOWN,
    data_license: str = UNKNOWN,
    repository: str | None = None,
    average: bool = False,
) -> str:
    """The card of a run's checkpoint, in Markdown with the Hugging Face Hub's fields in front.

    Scores are those of the checkpoint's own step in metrics.jsonl, and those that `fastclip eval`
    wrote of this checkpoint after it was saved.

    Args:
        source, target, repository, average: see `fastclip.models.hub.export_hub`.
        license, data_license: of the weights and of the training data, as the Hub names them.

    Raises:
        FileNotFoundError: there is no run or no checkpoint. ValueError: one of its files is
            damaged.
    """
    import yaml

    path, run = checkpoint.resolve(source), checkpoint.run_of(source)
    content = checkpoint.read(path)
    given = _settings(run / "config.yaml")
    scores = _scores(run, content.get("step"), average) | _evaluated(run, path, average)
    return _CARD.format(
        name=_cell(repository or target.absolute().name),
        version=__version__,
        address=json.dumps(f"hf-hub:{repository}" if repository else f"local-dir:{target}"),
        model=_table("part", "value", _architecture(run, given)),
        training=_table("setting", "value", _training(given, content, average)),
        scores=_table("metric", "value", scores) if scores else "None are known.",
        license=_table("of", "license", {"weights": license, "training data": data_license}),
        # one line, quoted where YAML needs it
        license_entry=yaml.safe_dump(license, width=10**6).removesuffix("...\n").strip(),
    )


def _settings(file: Path) -> dict[str, Any]:
    """The flags that a run's configuration holds, and no defaults of this version."""
    values = read_yaml(file) if file.is_file() else {}
    if not isinstance(values, dict):
        return {}
    parts = [value if isinstance(value, dict) else {key: value} for key, value in values.items()]
    return {key: value for part in parts for key, value in part.items()}


def _architecture(run: Path, given: dict[str, Any]) -> dict[str, Any]:
    config = read_description(run).get("model_cfg", {})
    text = config.get("text_cfg", {})
    return {
        "architecture": given.get("model", UNKNOWN),
        "image size": config.get("vision_cfg", {}).get("image_size", UNKNOWN),
        "tokens of a text": given.get("context_length") or text.get("context_length", UNKNOWN),
        "language model as text tower": given.get("text_lm") or text.get("hf_model_name", "none"),
        "width of the features": config.get("embed_dim", UNKNOWN),
        "weights it began with": _beginning(given),
    }


def _beginning(given: dict[str, Any]) -> str:
    parts = {
        "": given.get("pretrained"),
        "image tower: ": given.get("finetune"),
        "text tower: ": given.get("text_lm"),
    }
    known = [f"{part}{source}" for part, source in parts.items() if source]
    if "pretrained" not in given and not known:
        return UNKNOWN
    return ", ".join(known) or "random"


def _training(given: dict[str, Any], content: dict[str, Any], average: bool) -> dict[str, Any]:
    loss = given.get("objective", UNKNOWN)
    if given.get("siglip"):
        loss = "siglip"
    elif given.get("loss") == "global":
        loss = "global contrastive"
    if given.get("distill_model") or given.get("distill_embeddings") or given.get("distill_shards"):
        loss = f"{loss}, with a teacher's"
    batch = given.get("batch_size", UNKNOWN)
    if isinstance(batch, int):
        batch *= given.get("accum_freq") or 1
    names = {"learning rate": "lr", "weight decay": "wd", "precision": "precision"}
    known = {label: given.get(name, UNKNOWN) for label, name in names.items()}
    # an imported checkpoint begins to count here
    steps = {label: content.get(label) or UNKNOWN for label in ("step", "epoch")}
    return {
        "data": given.get("train_data", UNKNOWN),
        "loss": loss,
        "batch size per process": batch,
        **known,
        **steps,
        "weights": "moving average (--ema)" if average else "as trained",
    }


def _scores(run: Path, step: int | None, average: bool) -> dict[str, Any]:
    """What was measured in training at the checkpoint's step."""
    if not (run / METRICS_FILE).is_file():
        return {}
    lines = [line for line in read_metrics(run) if line.get("step") == step]
    return {
        name: value
        for line in lines
        for name, value in line.items()
        if name.startswith(EVALUATED) and name.endswith("_ema") == average
    }


def _evaluated(run: Path, path: Path, average: bool) -> dict[str, Any]:
    """What `fastclip eval` measured of this checkpoint; older results may be of an older one."""
    found: dict[str, Any] = {}
    saved = path.stat().st_mtime
    for file in sorted((run / "eval").glob("*.json")):
        if file.stat().st_mtime < saved:
            continue
        try:
            result = read_result(file)
            name = result["pretrained"].removesuffix(" (average)")
            same = checkpoint.resolve(Path(name)).resolve() == path.resolve()
        # somebody else's file, or the result of a checkpoint that is gone
        except (ValueError, OSError):
            continue
        if same and result["pretrained"].endswith(" (average)") == average:
            numbers = {k: v for k, v in result["metrics"].items() if isinstance(v, int | float)}
            prefix = f"{result['task']} on {result['dataset']}: "
            if any(prefix + name in found for name in numbers):
                # of other settings
                prefix = f"{result['task']} on {result['dataset']} ({file.stem}): "
            found |= {prefix + name: value for name, value in numbers.items()}
    return found


def _table(name: str, value: str, rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {value} |", "| --- | --- |"]
    return "\n".join(lines + [f"| {_cell(key)} | {_cell(rows[key])} |" for key in rows])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.split()).replace("|", "\\|")
