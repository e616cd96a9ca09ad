"""`fastclip convert cifar10 SRC OUT`: shards from other formats."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastclip.data.convert import convert_cifar10


@dataclass(frozen=True)
class ConvertConfig:
    """Make webdataset shards from a data set on disk."""

    format: Annotated[Literal["cifar10"], tyro.conf.Positional]
    """cifar10: torchvision's CIFAR-10; captions are class templates, 5,000 images held out."""
    source: Annotated[Path, tyro.conf.Positional]
    """Where the data set lies."""
    target: Annotated[Path, tyro.conf.Positional]
    """Folder for the shards."""
    seed: int = 0
    """Of the split and the captions."""


def main(arguments: Sequence[str]) -> int:
    """Convert; prints the number of samples a split."""
    config = tyro.cli(ConvertConfig, args=list(arguments), prog="fastclip convert")
    for split, counts in convert_cifar10(config.source, config.target, seed=config.seed).items():
        print(f"{split}: {sum(counts)} samples in {len(counts)} shards", file=sys.stderr)
    print(config.target)
    return 0
