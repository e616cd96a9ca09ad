"""`fastclip embed images|texts|shards DATA --model RUN -o OUT`."""

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
from fastclip.data.editing import folders_of
from fastclip.data.faults import FaultLog
from fastclip.data.options import DataOptions
from fastclip.data.regular import digest_of
from fastclip.data.shards import ShardSource
from fastclip.data.sources import open_source
from fastclip.device import choose_device
from fastclip.evaluate.embed import Embedding, features_identity, image_batches
from fastclip.evaluate.embed_shards import embed_shards
from fastclip.evaluate.features import Encoding, text_batches
from fastclip.messages import counted, logger
from fastclip.models.clip import Model


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(ModelFlags):
    """Write normalized features, one row per image or text, in the order of the data.

    Or write features into copies of shards, for --distill-shards of `fastclip train`.
    """

    kind: Annotated[Literal["images", "texts", "shards"], tyro.conf.Positional]
    """Type of the data. For shards, features of each sample's image and caption are written."""
    data: Annotated[str, tyro.conf.Positional]
    """Images: as --train-data of `fastclip train`, or a folder of images. Texts: a UTF-8 file, one
    text per line. Shards: as --train-data."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Images, texts: the .npy file, (rows, width) float32. Shards: the folder for their copies,
    which also hold KEY.teacher_image.npy and KEY.teacher_text.npy, (width,) float16. After an
    interruption, the same command resumes."""
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
    if config.kind == "shards":
        return _shards(config)
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
        digest = digest_of(texts)
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
        count, digest = sum(source.counts), source.digest()
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
    # a file that was edited between two runs is another one
    data = {"data": config.data, "kind": config.kind, "rows": count, "digest": digest}
    identity = {**_identity(config, model), **data}
    Embedding(config.output, count, identity, faults).run(batches, progress=True)
    if faults.counts:
        logger.warning(f"rows of NaN: {faults.report()}")
    print(config.output)
    return 0


def _shards(config: EmbedConfig) -> int:
    """Copy shards with features; a sample that cannot be read gets none, and said so."""
    source = open_source(config.data, config.options, split="train")
    if not isinstance(source, ShardSource):
        raise ValueError(f"{config.data} are no shards; give e.g. '/data/{{00000..00041}}.tar'")
    model = config.open(choose_device(config.device))
    scale = getattr(model.model, "logit_scale", None)
    if not isinstance(scale, Tensor) or scale.numel() != 1:
        raise ValueError(
            f"{config.model} has no single logit scale, which a teacher needs; give a CLIP model"
        )
    encoding = Encoding(config.batch_size, config.workers, config.precision, progress=True)
    # shards of another data set may have the same names
    data = {"folders": folders_of(source.names), "captions": config.options.captions}
    identity = _identity(config, model) | data
    done = embed_shards(model, source, config.output, encoding, identity)
    if done.faults.counts:
        logger.warning(f"without features: {done.faults.report()}")
    logger.info(
        f"features of {counted(done.samples, 'sample')} in {counted(done.shards, 'new shard')}; "
        f"train on them with --distill-shards --distill-logit-scale {scale.exp().item():.6g}"
    )
    print(config.output)
    return 0


def _identity(config: EmbedConfig, model: Model) -> dict[str, Any]:
    """What features depend on besides the data."""
    identity = features_identity(model, config.model, config.precision)
    return identity | ({} if config.pretrained is None else {"pretrained": config.pretrained})
