"""What can be done with a trained run: commands for its own data, which run as they are printed."""

import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from fastclip.data.options import DataOptions
from fastclip.data.sources import WORLDS, guess_type
from fastclip.flags import flag_name
from fastclip.messages import shortened
from fastclip.train.config import TrainConfig
from fastclip.train.inherited import LATEST
from fastclip.train.options import LogOptions

# letters of a text that is searched for, as an example
_QUERY = 60
_ON_TRAINING_DATA = "# of the images that were trained on; for a fair score give --data others"


def resume_command(config: TrainConfig) -> str:
    """The command that resumes a run; what it does not say is in the run's settings.

    Args:
        config: of the run, with its name.
    """
    words = ["fastclip", "train", "--resume", LATEST, "--name", str(config.log.name)]
    if config.log.logs != LogOptions().logs:
        words += ["--logs", config.log.logs]
    if config.distributed.deepspeed:
        words.append("--trust-checkpoint")
    return shlex.join(words)


def next_commands(config: TrainConfig, run: Path, captions: Sequence[str] = ()) -> list[str]:
    """What to do with a trained run: search, evaluate, export; a line that begins with # is a note.

    Args:
        config: of the run.
        run: the run directory.
        captions: of the data that are searched, for an example: the held-out data if there are any.
    """
    model, data = config.model, config.data
    held_out = data.val_data or data.train_data
    trusted = ["--trust-checkpoint"] if config.distributed.deepspeed else []
    common = ["--model", str(run), *trusted]
    commands: list[list[str]] = []
    evaluates = False
    if model.views[1] > 0:
        # what a source of captions weighs is of no meaning for a search
        searched = ["--data", held_out, *_options(config, captions=False)]
        commands.append(["search", _query(captions), *searched, *common])
        commands.append(["eval", "retrieval", *common, "--data", held_out, *_options(config)])
        evaluates = True
    elif model.objective == "classify" and (data.val_data or model.label_source == "cls"):
        commands.append(["eval", "zeroshot", *common, "--data", held_out, *_options(config)])
        evaluates = True
    else:
        # nothing was learned of texts
        features = ["-o", f"{run.name}-images.npy", *_options(config, captions=False)]
        commands.append(["embed", "images", held_out, *common, *features])
    # what open_clip cannot express leaves as ONNX
    plain = model.objective == "clip" and model.text_lm is None
    exported = [str(run), f"{run.name}-exported", *trusted]
    commands.append(["convert", "to-hub" if plain else "to-onnx", *exported])
    lines = [shlex.join(["fastclip", *words]) for words in commands]
    # drawn pictures are others in an evaluation
    drawn = (*WORLDS, "synthetic")
    if evaluates and not data.val_data and guess_type(data.train_data) not in drawn:
        lines.insert(-2, _ON_TRAINING_DATA)
    return lines


def _options(config: TrainConfig, *, captions: bool = True) -> list[str]:
    """The flags that say how the data are read, where they are not as by default."""
    data = config.data
    options = {each.name: getattr(data, each.name) for each in fields(DataOptions)}
    if data.val_data:
        # as they are read in validation
        options["image_root"] = data.val_image_root
        options["dataset_type"] = "auto" if guess_type(data.val_data) else data.dataset_type
    if data.val_data or not captions:
        options["captions"] = None
    # not the fields' defaults, of which one is written out for the help
    usual = DataOptions()
    changed = {name: v for name, v in options.items() if v != getattr(usual, name)}
    return [word for name, value in changed.items() for word in (flag_name(name), str(value))]


def _query(captions: Sequence[str]) -> str:
    """A caption that is short enough, or else the first one's beginning."""
    # what begins with a dash would be a flag
    texts = [" ".join(caption.split()).lstrip("- ") for caption in captions]
    short = [text for text in texts if 0 < len(text) <= _QUERY]
    return next(iter([*short, *(shortened(text, _QUERY) for text in texts if text)]), "a photo")
