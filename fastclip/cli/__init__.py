"""The command line: `fastclip COMMAND ...`, a file or a folder for each command.

A command's module is imported when it is called, so `fastclip --version` needs torch alone.
"""

import argparse
import difflib
import importlib
import os
import select
import sys
import textwrap
import warnings
from collections.abc import Sequence

from fastclip._version import __version__
from fastclip.messages import logger, shown

COMMANDS = {
    "train": "train a model from a configuration and flags",
    "eval": "score any model on a benchmark: zero-shot, retrieval, compositional, robustness",
    "search": "find images by a text or by another image: a table and a picture",
    "embed": "write the features of images or texts to a .npy file",
    "data": "preview data: a contact sheet of images with captions",
    "check-data": "read and decode all of the shards: count the samples, report every fault",
    "quickstart": "train and evaluate a small model on the embedded data",
    "convert": "make shards from other formats, recaption shards, import and export checkpoints",
    "plan": "compute memory, traffic and FLOP of a global batch on many GPUs; choose settings",
    "bench": "measure losses, training steps and data loading against baselines; report, compare",
    "study": "small experiments of several training runs: a table and a plot",
    "info": "print versions, devices, and which implementation each operator uses",
}

# The extra that brings a package, where it is not `train`.
EXTRAS = {
    "deepspeed": "deepspeed",
    "nvidia": "dali",
    "transformers": "recaption",
    "spacy": "tagger",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit status: 0, 1 for an error, 2 for wrong usage."""
    width = max(map(len, COMMANDS))
    indent = " " * (width + 4)
    listing = "\n".join(
        textwrap.fill(f"  {name:{width}}  {what}", 80, subsequent_indent=indent)
        for name, what in COMMANDS.items()
    )
    parser = argparse.ArgumentParser(
        prog="fastclip",
        description="Contrastive image-text training: exact, in memory linear in the batch.",
        epilog=f"commands:\n{listing}\n\n`fastclip COMMAND --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastclip {__version__}")
    # DeepSpeed's launcher puts it in front of what it starts; the environment says the same
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("command", metavar="COMMAND", nargs="?")
    parser.add_argument("options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.command is None:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    if parsed.command not in COMMANDS:
        near = difflib.get_close_matches(parsed.command, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(COMMANDS)}"
        parser.error(f"command {parsed.command!r} is unknown; {hint}")
    # torch says so of an installation that needs none
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    with shown():
        return _run(parsed.command, parsed.options)


def _run(command: str, options: Sequence[str]) -> int:
    try:
        module = command.replace("-", "_")
        status = importlib.import_module(f"fastclip.cli.{module}").main(options)
        # a reader that has left is noticed here, not at the interpreter's end
        sys.stdout.flush()
        return status
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fastclip"):
            raise
        extra = EXTRAS.get((error.name or "").partition(".")[0], "train")
        logger.error(
            f"fastclip {command} needs the package {error.name!r}: pip install "
            f"'fastclip-kernels[{extra}]', or {error.name} itself where that does not bring it"
        )
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return 0
        # bad input is reported in a sentence; a traceback is for our own bugs
        logger.error(f"fastclip {command}: error: {_sentence(error)}")
    except KeyboardInterrupt:
        logger.error("interrupted")
    return 1


def _sentence(error: Exception) -> str:
    """An error's text; the system's own ones begin with a number, not with the file."""
    if isinstance(error, OSError) and str(error).startswith("[Errno"):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return str(error)


def _reader_left() -> bool:
    """Whether it was standard output that broke, as in `fastclip ... | head`: that is no error.

    Other pipes lead to processes that should be alive.
    """
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    # what is still buffered goes nowhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True
