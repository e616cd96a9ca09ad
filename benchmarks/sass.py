"""What a compiled kernel executes behind its main loop, counted in its disassembly.

A kernel that forms a tile of S is a prologue, a loop of matrix instructions, and an epilogue that
makes exponentials, sums and G of the tile. Nothing of these overlaps within a program, so the
epilogue's instructions are time. They are counted on the way that a tile inside the matrix takes:
the shortest from the loop to the end. Loops and calls behind the main loop are not expected.
"""

import heapq
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;\s*/\*", re.MULTILINE)
# a program's warps share four schedulers; a special function unit takes 8 cycles for a warp
SCHEDULERS, SPECIAL_CYCLES = 4, 8


@dataclass
class Epilogue:
    """Instructions of one warp, by kind, and the least cycles of a whole program.

    issue: each scheduler issues one instruction a cycle. exchange: shuffles and shared memory, one
    access of 32 words a cycle. special: exponentials and reciprocals.
    """

    instructions: int
    shuffles: int
    barriers: int
    loads: int
    spills: int
    issue: int
    exchange: int
    special: int


def disassembled(cubin: bytes) -> str:
    """SASS of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [TOOL, "--dump-sass", file.name], capture_output=True, text=True, check=True
        ).stdout


def epilogue(sass: str, warps: int) -> Epilogue:
    """The counts, from a kernel's SASS.

    Raises:
        ValueError: there is no loop with matrix instructions, or no way from it to the end.
    """
    code = [(int(address, 16), text) for address, text in LINE.findall(sass)]
    path = _way_out(code)
    count = Counter(_operation(code[i][1]) for i in path)
    exchange = sum(_words(code[i][1]) for i in path)

    def kinds(*names: str) -> int:
        return sum(n for operation, n in count.items() if operation.split(".")[0] in names)

    special = kinds("MUFU")
    return Epilogue(
        instructions=len(path),
        shuffles=kinds("SHFL"),
        barriers=kinds("BAR", "SYNCS"),
        loads=kinds("LDG"),
        spills=kinds("LDL", "STL"),
        issue=len(path) * warps // SCHEDULERS,
        exchange=exchange * warps,
        special=special * SPECIAL_CYCLES * warps // SCHEDULERS,
    )


def _operation(text: str) -> str:
    words = text.split()
    return words[1] if words[0].startswith("@") else words[0]


def _words(text: str) -> int:
    """Cycles of the unit that shuffles and shared memory go through."""
    operation = _operation(text)
    kind = operation.split(".")[0]
    if kind == "SHFL":
        return 1
    if kind in ("LDSM", "STSM"):
        return 4
    if kind in ("LDS", "STS"):
        return 4 if ".128" in operation else 2 if ".64" in operation else 1
    return 0


def _way_out(code: list[tuple[int, str]]) -> list[int]:
    """Indices of the instructions from the main loop to the end, on the shortest way forward."""
    at = {address: i for i, (address, _) in enumerate(code)}

    def target(i: int) -> int | None:
        text = code[i][1]
        found = re.findall(r"0x([0-9a-f]+)", text)
        branch = _operation(text).startswith("BRA") and ".DIV" not in _operation(text)
        return at.get(int(found[-1], 16)) if branch and found else None

    matrix = [i for i, (_, text) in enumerate(code) if "MMA" in _operation(text)]
    loops = (
        i
        for i in range(len(code))
        if (start := target(i)) is not None and start <= i and any(start <= m <= i for m in matrix)
    )
    end_of_loop = next(loops, None)
    if end_of_loop is None:
        raise ValueError("no loop with matrix instructions in the disassembly")
    first = end_of_loop + 1
    length, before, heap = {first: 0}, {first: first}, [(0, first)]
    while heap:
        cost, i = heapq.heappop(heap)
        text = code[i][1]
        conditional = text.startswith("@") or re.search(r"BRA\S*\s+!?U?P\d", text) is not None
        if _operation(text) == "EXIT" and not conditional:
            path = [i]
            while path[-1] != first:
                path.append(before[path[-1]])
            return path[::-1]
        branch = target(i)
        following = [i + 1] if branch is None or conditional else []
        for j in [*following, *([branch] if branch is not None else [])]:
            if i < j < len(code) and cost + 1 < length.get(j, cost + 2):
                length[j], before[j] = cost + 1, i
                heapq.heappush(heap, (cost + 1, j))
    raise ValueError("no way from the main loop to the end in the disassembly")
