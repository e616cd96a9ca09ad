"""Compile every kernel and tiling for NVIDIA architectures, without a GPU, and read the resources.

`python -m fastclip.bench.compile_report [OUT.json]` prints registers, spills, shared memory and
tensor-core instructions of each, and what the epilogues of 16-bit tiles of S execute (`sass.py`);
Triton brings the compiler and the disassembler along.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastclip.bench.sass import Epilogue, disassembled, epilogue
from fastclip.kernels import (
    attention,
    attention_gradient,
    attention_plans,
    dense,
    dense_gradient,
    finish,
    flagged,
    flags,
    lean,
    merge,
    sigmoid,
    similarity,
    weigh,
)
from fastclip.kernels.launch import Tiling, tilings

# bytes of shared memory that one program may use
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}
INTEGERS = ("length_ptr", "flag_ptr", "raised_ptr", "beyond_ptr")
NUMBERS = ("scale", "offset", "weight", "smoothing", "factor", "share")
POINTER = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
ATTENTION = (
    attention.forward_kernel,
    attention_gradient.whole_kernel,
    attention_gradient.two_pass_kernel,
)
# operands and the precision of their product
MERGED = {"BLOCK_T": merge.MERGED_TILES, "BLOCK_L": merge.MERGED_LINES}
# of kernels whose every tile is timed, 16-bit products a cycle and multiprocessor
EPILOGUES = (lean.lean_statistics_kernel, lean.lean_gradient_kernel, sigmoid.sigmoid_kernel)
PRODUCTS = {80: 1024, 90: 2048, 100: 4096}
PRODUCT_WIDTH = 768
OPERANDS = {"16bit": ("bfloat16", "ieee"), "tf32": ("float32", "tf32"), "ieee": ("float32", "ieee")}


@dataclass
class Report:
    """What one compiled kernel uses; bytes, instructions by name."""

    kernel: str
    variant: str
    architecture: int
    tiling: list[int]
    registers: int
    spills: int
    shared: int
    shared_limit: int
    tensor_core: str
    epilogue: Epilogue | None = None
    product: int | None = None
    """Cycles of the tile's product at a width of 768, where the epilogue is counted."""


def variants() -> Iterator[tuple[str, Any, str, dict[str, Any]]]:
    """(kernel's entry in the table, kernel, name, flags) of what the launchers ask for."""
    plain = {"HAS_DIAGONAL": True, "HAS_IDS": False, "EVEN_D": True, "COLUMNS": True}
    plain |= {"HAS_OFFSET": False}
    all_at_once = {"HAS_IDS": True, "HAS_OFFSET": True, "EVEN_D": False}
    for name, flags_ in {
        "both": {},
        "maxima": {"MAXIMA": True},
        "rows": {"COLUMNS": False, "MAXIMA": True},
        "kept": {"KEEP": True},
        "kept_rows": {"KEEP": True, "COLUMNS": False},
        "kept_ids": {**all_at_once, "KEEP": True},
        "ids": {**all_at_once, "MAXIMA": True},
    }.items():
        options = {**plain, "MAXIMA": False, "KEEP": False, **flags_}
        yield "statistics", lean.lean_statistics_kernel, name, options
    for name, flags_ in {
        "both": {},
        "offset": {"HAS_OFFSET": True},
        "rows": {"COLUMNS": False},
        "frozen_scale": {"SCALARS": False},
        "ids": all_at_once,
    }.items():
        options = {**plain, "SCALARS": True, **flags_}
        yield "gradient", lean.lean_gradient_kernel, name, options
    for name, flags_ in {
        "both": {},
        "offset": {"TOTAL": True},
        "rows": {"COLUMNS": False},
    }.items():
        yield "gradient", weigh.weigh_kernel, name, {**plain, "TOTAL": False, **flags_}
    for name, flags_ in {
        "loss": {"GRADIENT": False},
        "gradient": {},
        "odd": {"EVEN_D": False},
    }.items():
        options = {**plain, "HAS_OFFSET": True, "GRADIENT": True, **flags_}
        yield "sigmoid", sigmoid.sigmoid_kernel, name, {**options, "IDS": sigmoid.NO_IDS}
    options = {**plain, "HAS_OFFSET": True, "GRADIENT": True}
    for name, ids in {"out": sigmoid.IDS_LEFT_OUT, "positive": sigmoid.IDS_POSITIVE}.items():
        yield "sigmoid", sigmoid.sigmoid_kernel, name, {**options, "IDS": ids}
    options = {**plain, **all_at_once, "GRADIENT": True, "SCALARS": True}
    of_entries = {**options, "IDS": sigmoid.IDS_POSITIVE}
    yield "sigmoid", sigmoid.sigmoid_entries_kernel, "ids", of_entries
    yield "own_statistics", flagged.flagged_statistics_kernel, "ids", options
    yield "own_gradient", flagged.flagged_gradient_kernel, "ids", options
    options = {**plain, "COLUMNS": False, "KEEP": True}
    yield "own_statistics", similarity.statistics_kernel, "kept", options
    options = {**options, "HAS_IDS": True, "HAS_DIAGONAL": False}
    yield "own_statistics", similarity.statistics_kernel, "kept_ids", options


# with float32 operands, whose tiles are far from any limit
FLOAT32_VARIANTS = ("both", "ids", "kept", "gradient")


def tilings_of(table: str, entry: str) -> dict[str, Tiling]:
    """Tilings by precision, as the launchers make them of the table."""
    found = tilings()[table]
    if entry != "own_gradient":
        return found[entry]
    return {
        precision: replace(tiling, parts=found[entry][precision].parts, registers=None)
        for precision, tiling in found["gradient"].items()
    }


def reports(architectures: tuple[int, ...] = (80, 90, 100)) -> Iterator[Report]:
    """One report for each kernel, variant, precision and architecture of the table."""
    for architecture in architectures:
        names = ["sm_80", "small"] if architecture == 80 else [f"sm_{architecture}"]
        for table in names:
            limit = SHARED_LIMIT[86 if table == "small" else architecture]
            for entry, kernel, name, flags_ in variants():
                for precision, tiling in tilings_of(table, entry).items():
                    if precision != "16bit" and name not in FLOAT32_VARIANTS:
                        continue
                    dtype, product = OPERANDS[precision]
                    constants: dict[str, Any] = {**flags_, "TMA": tiling.tma, "PRECISION": product}
                    constants |= _sides(tiling) | {"SLOTS": _slots(table, precision)}
                    yield _compile(
                        kernel, f"{name}/{precision}", architecture, tiling, constants, dtype, limit
                    )
        if architecture == 90:
            yield from _ones()
        yield from _attention(architecture)
        small = Tiling(finish.ROWS, 0, finish.WIDTH, 4, 3)
        rest: list[tuple[Any, dict[str, Any]]] = [
            (finish.finish_kernel, {"HAS_TERM": True, "BLOCK_R": 16, "BLOCK_D": 128}),
            (finish.row_dot_kernel, {"BLOCK_R": 16, "BLOCK_D": 128}),
            (merge.merge_kernel, {"HAS_OFFSET": True, "HAS_DOT": True, **MERGED}),
            (merge.rescale_kernel, {"BLOCK_R": 16, "BLOCK_S": 256}),
            (flags.totals_kernel, {"HAS_OFFSET": True, "MAXIMA": True, **MERGED}),
            (flags.factors_kernel, {"HAS_OFFSET": True, "BLOCK_R": 128, "BLOCK_S": 256}),
            (flagged.merge_flagged_kernel, {"HAS_OFFSET": True, **MERGED}),
        ]
        limit = SHARED_LIMIT[architecture]
        for kernel, constants in rest:
            yield _compile(kernel, "16bit", architecture, small, constants, "bfloat16", limit)
        for kernel, name, constants in _dense():
            limited = dense.REGISTERS if kernel is dense.lines_kernel else None
            tiling = replace(small, registers=limited)
            yield _compile(kernel, name, architecture, tiling, constants, "bfloat16", limit)


def _dense() -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """Kernels around a whole S, of which a loss asks either the least or the most."""
    blocks: dict[str, Any] = {"BLOCK": dense.TERMS, "BLOCK_K": dense.BESIDE}
    plain: dict[str, Any] = {"KIND": 0, "COLUMNS": False, "SYMMETRIC": False}
    plain |= {
        "HAS_IDS": False,
        "HAS_INDEX": False,
        "SMOOTHED": False,
        "HITS": False,
        "HAS_DIVISOR": False,
        "SCALARS": True,
    }
    plain |= {"SCALE_SIDE": 0, "OFFSET_SIDE": -1, "WEIGHT_SIDE": -1}
    tables: dict[str, Any] = {"COLUMNS": True, "SYMMETRIC": True, "HITS": True}
    tables |= {"SCALE_SIDE": 2, "OFFSET_SIDE": 2, "WEIGHT_SIDE": 2}
    asked: dict[str, dict[str, Any]] = {
        "clip": {"COLUMNS": True},
        "smoothed": {"COLUMNS": True, "HAS_IDS": True, "SMOOTHED": True},
        "sigmoid": {"KIND": 1, "SCALE_SIDE": -1, "OFFSET_SIDE": 0},
        "index": {"HAS_INDEX": True},
        "labels": {"KIND": 2, "SYMMETRIC": True, "HAS_IDS": True, "HAS_DIVISOR": True},
        "tables": tables,
    }
    for name, flags_ in asked.items():
        constants = {**plain, **blocks, **flags_}
        lines, tiles = {"BLOCK_L": dense.LINES}, {"BLOCK_R": dense_gradient.TILE_ROWS}
        tiles["BLOCK_S"] = dense_gradient.TILE_COLUMNS
        yield dense.lines_kernel, name, {**constants, **lines}
        yield dense_gradient.gradient_kernel, name, {**constants, **tiles}
        yield (
            dense_gradient.finish_kernel,
            name,
            {**constants, "BLOCK_L": dense_gradient.ROWS, "BLOCK_D": dense_gradient.WIDTH},
        )
        yield dense_gradient.scalars_kernel, name, constants
        yield dense.total_kernel, name, constants


# lines and whether causal
TOWERS = ((50, False), (77, True), (197, False), (257, False), (577, False))


def _attention(architecture: int) -> Iterator[Report]:
    """The rules' plans at the lengths of image and text towers, heads 64 wide."""
    family = attention_plans.family(architecture // 10)
    for lines, causal in TOWERS:
        key = f"{lines}x{lines}x64 16bit"
        forward = attention_plans.forward_rule(key, family)
        gradient = attention_plans.gradient_rule(key, family)
        shape: dict[str, Any] = {
            "LENGTH_Q": lines,
            "LENGTH_K": lines,
            "WIDTH": 64,
            "BLOCK_D": 64,
            "UNIT": 8,
        }
        shape |= {"LENGTHS": False, "CAUSAL": causal, "PRECISION": "ieee"}
        whole, two_pass = attention_gradient.whole_kernel, attention_gradient.two_pass_kernel
        for kernel, plan, constants in (
            (attention.forward_kernel, forward, attention.walk_options(lines, lines, forward)),
            (
                whole if gradient.whole else two_pass,
                gradient,
                attention_gradient.walk_options(lines, lines, gradient),
            ),
        ):
            tiling = Tiling(plan.queries, plan.keys, 64, plan.warps, plan.stages)
            yield _compile(
                kernel, f"{lines}/16bit", architecture, tiling, {**shape, **constants}, "bfloat16",
                SHARED_LIMIT[architecture],
            )  # fmt: skip


def _ones() -> Iterator[Report]:
    """With arguments that are 1, which the JIT makes constants: other paths in the compiler."""
    ones = {"width": 1, "stride_x": 1, "stride_y": 1}
    for entry, kernel, name, flags_ in variants():
        tiling = tilings_of("sm_90", entry)["16bit"]
        constants = {**flags_, "TMA": False, "PRECISION": "ieee", **_sides(tiling), **ones}
        constants["SLOTS"] = _slots("sm_90", "16bit")
        constants["EVEN_D"] = False
        limit = SHARED_LIMIT[90]
        yield _compile(kernel, f"{name}/ones/16bit", 90, tiling, constants, "bfloat16", limit)


def _slots(table: str, precision: str) -> int:
    """Scalars of a tile, of which its parts have one each where it goes by its own maxima."""
    return tilings_of(table, "own_gradient")[precision].parts


def _sides(tiling: Tiling) -> dict[str, int]:
    return {k: v for k, v in tiling.options().items() if k.isupper()}


def _compile(
    kernel: Any,
    variant: str,
    architecture: int,
    tiling: Tiling,
    constants: dict[str, Any],
    dtype: str,
    limit: int,
) -> Report:
    constants = {"EMULATE": False, "STEP": weigh.STEP, **constants}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    gradient = "bfloat16" if dtype != "float32" else "float32"
    kept = "float16" if dtype != "float32" else "float32"
    if kernel in (lean.lean_statistics_kernel, weigh.weigh_kernel):
        # about a common anchor, whose range fp16 has not
        kept = gradient
    typed = {"x_ptr": dtype, "y_ptr": dtype, "partner_ptr": dtype, "a_ptr": dtype, "b_ptr": dtype}
    typed |= {"g_ptr": gradient, "e_ptr": kept, "out_ptr": gradient}
    if kernel in ATTENTION:
        others = {"lse_ptr", "delta_ptr", "length_ptr"}
        typed = {n: dtype for n in kernel.arg_names if n.endswith("_ptr") and n not in others}
    signature, attributes = {}, {}
    unaligned = kernel.do_not_specialize_on_alignment
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_id_ptr") or name in INTEGERS:
            signature[name] = "*i32"
        elif name in NUMBERS:
            # a number, unless it is a tensor of one or by pair of domains
            in_memory = constants.get(f"{name.upper()}_SIDE", -1) >= 0
            signature[name] = "*fp32" if in_memory else "fp32"
        elif name == "index_ptr":
            signature[name] = "*i64"
        elif constants.get("TMA") and name in ("x_ptr", "y_ptr"):
            lines = tiling.rows if name == "x_ptr" else tiling.columns
            element = POINTER[typed[name]][1:]
            signature[name] = f"tensordesc<{element}[{lines}, {tiling.width}]>"
        elif name.endswith("_ptr"):
            signature[name] = POINTER[typed.get(name, "float32")]
        else:
            signature[name] = "i32"
        # as the JIT finds them, but for what it is set not to look at
        aligned = name.endswith("_ptr") or name.startswith("stride") or name == "width"
        aligned = aligned and name not in unaligned and not signature[name].startswith("tensor")
        if aligned and name not in constants:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {k: v for k, v in tiling.options().items() if not k.isupper()}
    compiled = triton.compile(source, GPUTarget("cuda", architecture, 32), options=options)
    registers, spills = _resources(compiled.asm["cubin"])
    sides = [tiling.rows, tiling.columns, tiling.width, tiling.warps, tiling.stages]
    report = Report(
        kernel.fn.__name__,
        variant,
        architecture,
        sides,
        registers,
        spills,
        compiled.metadata.shared,
        limit,
        _tensor_core(compiled.asm["ptx"]),
    )
    timed = kernel in EPILOGUES and dtype != "float32" and "/ones/" not in variant
    if timed and limit == SHARED_LIMIT[architecture]:
        report.epilogue = epilogue(disassembled(compiled.asm["cubin"]), tiling.warps)
        entries = tiling.rows * tiling.columns
        report.product = entries * PRODUCT_WIDTH // PRODUCTS[architecture]
    return report


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory (spills and stack)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _tensor_core(ptx: str) -> str:
    for instruction in ("tcgen05.mma", "wgmma.mma_async", "mma.sync"):
        if instruction in ptx:
            return instruction
    return "none"


def main() -> None:
    """Print the table, and write JSON where a path is given; only of architectures after it."""
    rows = []
    chosen = tuple(int(number) for number in sys.argv[2:])
    for report in reports(chosen) if chosen else reports():
        rows.append(asdict(report))
        print(*rows[-1].values(), flush=True)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
