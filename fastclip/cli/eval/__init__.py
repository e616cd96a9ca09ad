"""`fastclip eval BENCHMARK --model MODEL ...`: one class a benchmark, see `flags.Evaluation`."""

from collections.abc import Sequence
from typing import Annotated

from tyro.conf import subcommand

from fastclip.cli.eval.classification import LinearProbe, Zeroshot
from fastclip.cli.eval.compositional import Aro, SugarCrepe, Winoground
from fastclip.cli.eval.retrieval import Docci, Retrieval
from fastclip.cli.eval.robustness import Robustness
from fastclip.cli.eval.table import List, Table
from fastclip.command_line import parse_flags

Command = (
    Annotated[Zeroshot, subcommand("zeroshot")]
    | Annotated[Retrieval, subcommand("retrieval")]
    | Annotated[LinearProbe, subcommand("linear-probe")]
    | Annotated[Aro, subcommand("aro")]
    | Annotated[SugarCrepe, subcommand("sugarcrepe")]
    | Annotated[Winoground, subcommand("winoground")]
    | Annotated[Docci, subcommand("docci")]
    | Annotated[Robustness, subcommand("robustness")]
    | Annotated[Table, subcommand("table")]
    | Annotated[List, subcommand("list")]
)


def main(arguments: Sequence[str]) -> int:
    """Run one of them; an evaluation prints its metrics as one JSON object."""
    return parse_flags(Command, arguments, "fastclip eval").run()
