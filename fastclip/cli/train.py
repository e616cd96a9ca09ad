"""`fastclip train [--config FILE|RECIPE] [--FLAG VALUE ...]`."""

import os
from collections.abc import Sequence
from pathlib import Path

from fastclip.messages import logger
from fastclip.train import stop, watch
from fastclip.train.config import TrainConfig, parse
from fastclip.train.distributed import DeadRankError
from fastclip.train.health import NonFiniteError
from fastclip.train.loop import train
from fastclip.train.stop import StoppedError


def main(arguments: Sequence[str]) -> int:
    """Train; the process's exit status.

    0: trained. 3: stopped at a non-finite loss or gradient. 4: another rank ended, or no data
    came. 75: SIGTERM or SIGUSR1 received and a checkpoint saved; resume with --resume latest.
    """
    run = run_or_status(parse(arguments))
    if isinstance(run, int):
        return run
    print(run)
    return 0


def run_or_status(config: TrainConfig) -> Path | int:
    """Train; the run directory, or the exit status where it stopped, which the log says.

    Args:
        config: the run's configuration.
    """
    try:
        return train(config)
    except NonFiniteError as error:
        logger.error(f"fastclip train: stopped: {error}")
        return 3
    except DeadRankError as error:
        logger.error(f"fastclip train: stopped: {error}")
        # process groups with a dead member do not close
        os._exit(watch.EXIT_STATUS)
    except StoppedError as error:
        logger.error(f"fastclip train: saved and stopped: {error}")
        return stop.EXIT_STATUS
