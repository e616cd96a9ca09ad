"""The run directory: its name, and that one process at a time trains in it."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from fastclip.train.config import TrainConfig
from fastclip.train.distributed import World
from fastclip.train.inherited import LATEST, is_run
from fastclip.train.options import LogOptions

LOCK = ".training"
# file systems that have no locks; of theirs a run is as before
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def named(config: TrainConfig, world: World) -> TrainConfig:
    """The configuration with a name.

    That is the given one, that of the run directory that `--resume` names, or one made of the time
    and the model.
    """
    if config.log.name is not None:
        return config
    resume = config.checkpoint.resume
    if resume == LATEST:
        raise ValueError("--resume latest needs --name, the run to resume")
    if resume is not None and is_run(Path(resume)):
        # as "." and ".." have no name
        run = Path(resume) if Path(resume).name.strip(".") else Path(resume).resolve()
        elsewhere = config.log.logs != LogOptions().logs
        if elsewhere and Path(config.log.logs).resolve() != run.parent.resolve():
            raise ValueError(
                f"--resume {resume} continues in that directory; leave out --logs, or give --name "
                "to continue in a new one"
            )
        log = replace(config.log, logs=str(run.parent), name=run.name)
        return replace(config, log=log, checkpoint=replace(config.checkpoint, resume=LATEST))
    model = Path(config.model.model).stem
    name = f"{datetime.now():%Y_%m_%d-%H_%M_%S}-{model}-b{config.optim.batch_size}"
    # the ranks' clocks may differ: all take the first one's
    return replace(config, log=replace(config.log, name=world.gather(name)[0]))


def hold(run: Path, world: World, around: ExitStack) -> None:
    """Hold the run directory on the first rank until the end; where that fails, all raise."""
    failure = None
    if world.is_first:
        try:
            around.enter_context(claim(run))
        except FileExistsError as error:
            failure = str(error)
    failure = world.gather(failure)[0]
    if failure:
        raise FileExistsError(failure)


@contextmanager
def claim(run: Path) -> Iterator[None]:
    """Hold a run directory, which is made; it is free again when the process ends, however it ends.

    A directory that is still empty at the end goes again.

    Raises:
        FileExistsError: another process trains in it.
    """
    handle = _lock(run)
    try:
        yield
    finally:
        # while it is held: who waits with the old file open sees that it is gone
        (run / LOCK).unlink(missing_ok=True)
        os.close(handle)
        with suppress(OSError):
            run.rmdir()


def _lock(run: Path) -> int:
    while True:
        try:
            run.mkdir(parents=True, exist_ok=True)
            handle = os.open(run / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            # removed between the two by the one before
            continue
        try:
            # not flock: loader processes would inherit it and outlive a killed run
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return handle
            os.close(handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise FileExistsError(
                f"{run} exists and another process trains in it; choose another --name, or wait "
                "for its end"
            ) from error
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)
