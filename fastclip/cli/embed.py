"""`fastclip embed images|texts DATA --model RUN -o out.npy`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from torch import Tensor

from fastclip.bounded import ANNOTATIONS, read_text
from fastclip.cli.model_flags import ModelFlags
from fastclip.command_line import parse_flags
from fastclip.data.faults import FaultLog
from fastclip.data.options import DataOptions
from fastclip.data.sources import open_source
from fastclip.device import choose_device
from fastclip.evaluate.embed import Embedding, fingerprint, image_batches
from fastclip.evaluate.features import text_batches
from fastclip.messages import logger


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(ModelFlags):
    """Write normalized features, one row per image or text, in the order of the data."""

    kind: Annotated[Literal["images", "texts"], tyro.conf.Positional]
    """Type of the data."""
    data: Annotated[str, tyro.conf.Positional]
    """Images: as --train-data of `fastclip train`, or a folder of images. Texts: a UTF-8 file, one
    text per line."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The .npy file, (rows, width) float32. After an interruption the same command resumes."""
    batch_size: int = 256
    """Images or texts per batch."""
    workers: int = 2
    """Processes that load images."""
    precision: Literal["fp32", "amp", "amp_bf16"] = "fp32"
    """Precision of the towers."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    num_samples: int = 1000
    """Number of scenes, collages or synthetic images; other data are read whole."""
    options: Annotated[DataOptions, tyro.conf.arg(name="")] = field(default_factory=DataOptions)
    """How the data are read."""


def main(arguments: Sequence[str]) -> int:
    """Embed; a row of an unreadable image is NaN, and said so."""
    config = parse_flags(EmbedConfig, arguments, "fastclip embed")
    if config.output.suffix != ".npy":
        raise ValueError(f"--output {config.output} must end in .npy")
    model = config.open(choose_device(config.device))
    faults = FaultLog()
    options: dict[str, Any] = {"batch_size": config.batch_size, "precision": config.precision}
    batches: Callable[[int], Iterator[tuple[int, Tensor]]]
    if config.kind == "texts":
        # not splitlines, which also splits at separators that captions may contain
        content = read_text(Path(config.data), ANNOTATIONS).removeprefix("\ufeff")
        content = content.replace("\r\n", "\n").removesuffix("\n")
        texts = content.split("\n") if content else []
        count = len(texts)
        batches = partial(text_batches, model, texts, **options)
    else:
        source = open_source(
            config.data,
            config.options,
            split="val",
            count=config.num_samples,
            required=(),
        )
        count = sum(source.counts)
        batches = partial(
            image_batches,
            model,
            source,
            workers=config.workers,
            faults=faults,
            **options,
        )
    if count == 0:
        raise ValueError(f"{config.data} holds nothing to embed")
    identity = {
        "model": config.model,
        "weights": fingerprint(model.model),
        "precision": config.precision,
        "data": config.data,
        "kind": config.kind,
        "rows": count,
    }
    if config.pretrained is not None:
        identity["pretrained"] = config.pretrained
    Embedding(config.output, count, identity).run(batches, progress=True)
    if faults.counts:
        logger.warning(f"rows of NaN: {faults.report()}")
    print(config.output)
    return 0
