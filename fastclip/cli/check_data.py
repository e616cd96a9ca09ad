"""`fastclip check-data SHARD ...`: read all of the shards before training does."""

import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastclip.atomic import write_text
from fastclip.command_line import parse_flags
from fastclip.data.check import Report, check_shards
from fastclip.data.options import CACHE_BYTES, parse_weights
from fastclip.data.remote import ShardCache, is_remote
from fastclip.data.samples import SampleReader
from fastclip.data.shards import expand_shards
from fastclip.device import available_cores
from fastclip.messages import counted


@dataclass(frozen=True)
class CheckDataConfig:
    """Read all of the shards, decode every image, and report every fault."""

    shards: Annotated[tuple[str, ...], tyro.conf.Positional]
    """As --train-data of `fastclip train`, e.g. '/data/{00000..00041}.tar'; one or more."""
    required: tuple[str, ...] = ("txt",)
    """What a sample must have besides an image: txt for training, cls for zero-shot evaluation.
    Only samples that have it are counted."""
    captions: str | None = None
    """As --captions of `fastclip train`."""
    workers: int | None = None
    """Number of processes; by default one per core."""
    write: bool = True
    """Write sizes.json, so that training need not count, and NAME.idx for DALI's reader."""
    strict: bool = False
    """Exit with status 1 if there is any fault."""
    json: Path | None = None
    """File to write the report to."""
    cache_dir: str | None = None
    """Cache folder of remote shards; by default fastclip in the user's cache."""
    cache_bytes: int = CACHE_BYTES
    """Maximum size of --cache-dir in bytes."""


def main(arguments: Sequence[str]) -> int:
    """Check; prints the report. The status is 1 where nothing can be read, and see --strict."""
    config = parse_flags(CheckDataConfig, arguments, "fastclip check-data")
    names = [name for part in config.shards for name in expand_shards(part)]
    folders = {os.path.dirname(name) or "." for name in names if not is_remote(name)}
    if config.write and (closed := [f for f in sorted(folders) if not os.access(f, os.W_OK)]):
        raise ValueError(f"{closed[0]} cannot be written to; give --no-write")
    captions = tuple(parse_weights(config.captions)) if config.captions else ()
    report = check_shards(
        names,
        SampleReader(config.required, captions),
        ShardCache(config.cache_dir, config.cache_bytes),
        workers=available_cores() if config.workers is None else config.workers,
        write=config.write,
        progress=True,
    )
    print(table(report))
    if config.json:
        write_text(config.json, json.dumps(as_json(report), indent=1) + "\n", named=True)
    return int(report.good == 0 or (config.strict and bool(report.counts)))


def table(report: Report) -> str:
    """The faults with their counts and first places, and a line on the whole."""
    lines = []
    width = max((len(kind) for kind in report.counts), default=0)
    for kind, count in report.counts.most_common():
        first, *others = report.places[kind]
        lines.append(f"{kind:{width}}  {count:>11,}  {first}")
        lines.extend(" " * (width + 15) + place for place in others)
    if lines:
        lines.insert(0, f"{'fault':{width}}  {'count':>11}  first places")
    whole = (
        f"{counted(report.samples, 'sample')} in {counted(report.shards, 'shard')}, "
        f"{report.good:,} of them good; {report.bytes / 1e6:,.1f} MB in {report.seconds:.1f} s, "
        f"{report.samples / report.seconds:,.0f} samples/s"
    )
    lines.append(textwrap.fill(whole, 80))
    return "\n".join(lines)


def as_json(report: Report) -> dict[str, Any]:
    """The same for programs; faults are {kind: {"count": ..., "places": [...]}}."""
    names = ("shards", "samples", "good", "bytes", "seconds", "written")
    faults = {
        kind: {"count": count, "places": report.places[kind]}
        for kind, count in report.counts.most_common()
    }
    return {name: getattr(report, name) for name in names} | {"faults": faults}
