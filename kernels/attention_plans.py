"""How attention's kernels walk a sequence: tiles of lines, and plans by device and shape.

A plan that `attention_plans.json` has measured comes first, then the rule of thumb below, which
compile reports chose. `fastclip.bench.attention_lab --sweep` measures and rewrites the file.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastclip.kernels.launch import INTERPRETED, precision_of, true_architecture

PLANS_FILE = Path(__file__).with_name("attention_plans.json")

# lines of a head 64 wide that leave room for two programs in an H100's shared memory
ON_CHIP = 272

Tiles = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Plan:
    """How the forward walks: largest tiles of queries and keys, and how a program runs.

    `held`: keys and values stay on chip. `whole`: one program has a whole head, not a tile of
    its queries. `registers`: most a thread may use, so that more programs fit; 0 sets no limit.
    """

    queries: int
    keys: int
    held: bool
    whole: bool
    warps: int
    stages: int
    registers: int = 0


@dataclass(frozen=True)
class GradientPlan:
    """How the gradient walks: as `Plan`, but `whole` means five products in one pass.

    Otherwise there are two passes and seven products, and `held` says whether the side that a
    pass does not walk stays on chip.
    """

    queries: int
    keys: int
    whole: bool
    held: bool
    warps: int
    stages: int
    registers: int = 0


def run_options(plan: Plan | GradientPlan) -> dict[str, int]:
    """What a launch takes of a plan."""
    options = {"num_warps": plan.warps, "num_stages": plan.stages}
    return options | ({"maxnreg": plan.registers} if plan.registers else {})


def tiles(length: int, largest: int, unrolled: bool = False) -> Tiles:
    """(first line, size, count) of the groups of tiles that cover `length` lines.

    Unrolled, every group is one tile.
    """
    groups: list[tuple[int, int, int]] = []
    first = 0
    while first < length:
        rest = length - first
        size = largest
        # 64 is the smallest that fills a tensor core's left side: below it only what halves
        while size > 16 and size > rest and (size > 64 or rest <= size // 2):
            size //= 2
        count = max(rest // size, 1)
        steps = [(first + n * size, size, 1) for n in range(count)]
        groups += steps if unrolled else [(first, size, count)]
        first += size * count
    return tuple(groups)


def shape_key(length_q: int, length_k: int, width: int, dtype: torch.dtype, causal: bool) -> str:
    """The name of a shape in the measured table, such as "197x197x64 16bit"."""
    name = f"{length_q}x{length_k}x{width} {precision_of(dtype)}"
    return name + (" causal" if causal else "")


@functools.cache
def measured() -> dict[str, Any]:
    """The table: "plans" by architecture, direction and shape; "faster" shapes by architecture."""
    return json.loads(PLANS_FILE.read_text())


def forward_plan(key: str, device: torch.device) -> Plan:
    """The forward's plan for a shape, as `shape_key` names it."""
    found = _measured_plan("forward", key, device)
    return Plan(*found) if found else forward_rule(key, family(_capability(device)))


def gradient_plan(key: str, device: torch.device) -> GradientPlan:
    """The gradient's plan for a shape, as `shape_key` names it."""
    found = _measured_plan("gradient", key, device)
    return GradientPlan(*found) if found else gradient_rule(key, family(_capability(device)))


def family(capability: int) -> str:
    """By matrix instruction: wgmma, tcgen05, and mma.sync, which consumer parts kept."""
    return {9: "hopper", 10: "blackwell"}.get(capability, "ampere")


def forward_rule(key: str, family: str) -> Plan:
    """What compile reports chose: no spills, and on Hopper a head on chip where it fits."""
    longest, width, precision = _read(key)
    if precision != "16bit":
        return Plan(16, 16, False, False, 4, 1)
    if family == "hopper" and longest <= ON_CHIP and width <= 64:
        return Plan(64, 64, True, True, 4, 1)
    if width <= 64:
        return Plan(64, 64, False, False, 4, 2)
    return Plan(64, 32, False, False, 8 if family == "ampere" else 4, 2)


def gradient_rule(key: str, family: str) -> GradientPlan:
    """As `forward_rule`, of the gradient."""
    longest, width, precision = _read(key)
    if precision != "16bit":
        return GradientPlan(16, 16, False, False, 8, 1)
    if width == 64 and longest <= (64 if family == "ampere" else 80):
        return GradientPlan(64, 64, True, False, 4, 1)
    if family == "ampere":
        if width <= 64:
            return GradientPlan(32, 32, False, False, 4, 1)
        return GradientPlan(16, 16, False, False, 4, 1)
    if family == "hopper" and width == 64 and longest <= ON_CHIP:
        return GradientPlan(64, 64, True, False, 8, 1)
    if width <= 64:
        return GradientPlan(64, 64, False, False, 4 if family == "hopper" else 8, 1)
    return GradientPlan(32, 64, False, False, 8, 1)


def _measured_plan(direction: str, key: str, device: torch.device) -> list[Any] | None:
    if INTERPRETED:
        return None
    plans = measured()["plans"].get(true_architecture(device), {})
    return plans.get(direction, {}).get(key)


def _read(key: str) -> tuple[int, int, str]:
    shape, precision, *_ = key.split()
    length_q, length_k, width = map(int, shape.split("x"))
    return max(length_q, length_k), width, precision


def _capability(device: torch.device) -> int:
    return 9 if INTERPRETED else torch.cuda.get_device_capability(device)[0]
