"""Seeded faults: each mutant of `mutants.py` must fail the tests that should see it.

    python tests/mutants/run.py [--filter WORD] [--jobs N] [--limit SECONDS] [--list]

Works on copies of the tree, never on the checkout. A mutant is killed when a test fails; a run that
breaks before its tests, or takes too long, is counted apart. Status 1 if a mutant survives or
breaks. A selection of tests is first run without a fault: one that fails then would call every
mutant killed.
"""

import argparse
import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "logs")


def mutated(mutant: Mutant, root: Path) -> str:
    """The file's text with the fault.

    Raises:
        ValueError: the old text does not occur exactly once.
    """
    text = (root / mutant.file).read_text()
    if (count := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.file}: {mutant.old!r} occurs {count} times; it must once")
    return text.replace(mutant.old, mutant.new)


def run_tests(root: Path, tests: str, limit: float) -> tuple[str, str]:
    """ "passed", "failed", "timed out" or "broken", and pytest's line on the first failure.

    Only a test that ran and failed is "failed". A collection, an import or a fixture that fails,
    nothing to run, and pytest's own death are "broken": no test saw the fault.
    """
    # a file rewritten within a second, with its old size, would be served from its bytecode
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["COLUMNS"] = "200"
    selection = tests.split(" -k ", 1)
    arguments = selection[0].split() + (["-k", selection[1]] if selection[1:] else [])
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-n", "0", *arguments],
            cwd=root,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return "timed out", ""
        finally:
            # ranks that the tests started, too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        lines = output.read().splitlines()
    failed = [line for line in lines if line.startswith("FAILED ")]
    if status == 1 and failed and not any(line.startswith("ERROR ") for line in lines):
        return "failed", failed[0].removeprefix("FAILED ")
    return "passed" if status == 0 else "broken", f"status {status}: {' '.join(lines[-1:])}"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Run seeded faults against their tests.")
    parser.add_argument("--filter", default="", help="a word in their file, text or tests")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=300, help="seconds a run may take")
    parser.add_argument("--list", action="store_true", help="check the list and show it")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.filter in " ".join(m)]
    for mutant in chosen:
        mutated(mutant, ROOT)
    if options.list or not chosen:
        print(*chosen, f"{len(chosen)} mutants", sep="\n")
        return 0 if chosen else 1

    with tempfile.TemporaryDirectory(prefix="fastclip-mutants-") as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for job in range(options.jobs):
            tree = Path(shutil.copytree(ROOT, Path(folder, str(job)), ignore=LEFT_OUT))
            # some tests ask git for the files
            subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
            trees.put(tree)

        def sound(tests: str) -> tuple[str, str]:
            tree = trees.get()
            try:
                return run_tests(tree, tests, options.limit)
            finally:
                trees.put(tree)

        def outcome(mutant: Mutant) -> str:
            tree = trees.get()
            path = tree / mutant.file
            original = path.read_text()
            try:
                path.write_text(mutated(mutant, tree))
                found, line = run_tests(tree, mutant.tests, options.limit)
            finally:
                path.write_text(original)
                trees.put(tree)
            word = {"passed": "SURVIVED", "failed": "killed"}.get(found, found)
            print(f"{word:9} {mutant.file}: {mutant.old!r} as {mutant.new!r}", flush=True)
            print(f"          {line}", flush=True)
            return word

        with ThreadPoolExecutor(options.jobs) as pool:
            selections = sorted({m.tests for m in chosen})
            for tests, (found, line) in zip(selections, pool.map(sound, selections), strict=True):
                if found != "passed":
                    raise SystemExit(f"without a fault, {tests}: {found}, {line}")
            words = list(pool.map(outcome, chosen))
    print(", ".join(f"{words.count(word)} {word}" for word in sorted(set(words))))
    return 0 if set(words) <= {"killed", "timed out"} else 1


if __name__ == "__main__":
    raise SystemExit(main())
