"""`fastclip train [--config FILE|RECIPE] [--FLAG VALUE ...]`."""

import sys
from collections.abc import Sequence

from fastclip.train.config import parse
from fastclip.train.health import NonFiniteError
from fastclip.train.loop import train


def main(arguments: Sequence[str]) -> int:
    """Train; 0 on success, 3 if the run stopped at a non-finite loss or gradient."""
    try:
        run = train(parse(arguments))
    except NonFiniteError as error:
        print(f"fastclip train: stopped: {error}", file=sys.stderr)
        return 3
    print(run)
    return 0
