"""`fastclip bench PART ...`: measuring beside baselines, and reporting what was measured.

One class a part. A part that measures prints a table and writes a JSON file; `report` and `compare`
read these files.
"""

from collections.abc import Sequence
from typing import Annotated

from tyro.conf import subcommand

from fastclip.cli.bench.everything import AllConfig
from fastclip.cli.bench.operators import (
    AttentionConfig,
    CollectivesConfig,
    LossConfig,
    MemoryConfig,
)
from fastclip.cli.bench.training import DataConfig, TrainStepConfig
from fastclip.cli.bench.written import CompareConfig, ReportConfig
from fastclip.command_line import parse_flags, refuse_renamed

Config = (
    Annotated[LossConfig, subcommand("losses")]
    | Annotated[AttentionConfig, subcommand("attention")]
    | Annotated[DataConfig, subcommand("data")]
    | Annotated[TrainStepConfig, subcommand("train-step")]
    | Annotated[MemoryConfig, subcommand("memory")]
    | Annotated[CollectivesConfig, subcommand("collectives")]
    | Annotated[AllConfig, subcommand("all")]
    | Annotated[ReportConfig, subcommand("report")]
    | Annotated[CompareConfig, subcommand("compare")]
)


def main(arguments: Sequence[str]) -> int:
    """Run one part, `losses` where none is named.

    The status is 1 where an operator fails its quick check and is not timed.
    """
    arguments = list(arguments)
    first = arguments[0] if arguments else "--"
    if first.startswith("-") and first not in ("--help", "-h"):
        arguments.insert(0, "losses")
    refuse_renamed(arguments, {"--lines": "--lengths"})
    return parse_flags(Config, arguments, "fastclip bench").run()
