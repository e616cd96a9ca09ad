"""Which kernels the compile report compiles: each variant that the launchers ask for, by tiling.

The shipped ones are those that limits are kept for. The others (`everything`) have shown nothing
that the shipped ones do not, at twice their cost: float32 products of each variant, arguments that
are 1, second launches on other architectures than Hopper.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
from fastclip.kernels.launch import VARIANTS, Tiling, tiling_of

ARCHITECTURES = (80, 86, 90, 100)
# rows of the table of tilings; consumer parts have the small one
TABLES = {80: "sm_80", 86: "small", 90: "sm_90", 100: "sm_100"}
# operands and the precision of their product
OPERANDS = {"16bit": ("bfloat16", "ieee"), "tf32": ("float32", "tf32"), "ieee": ("float32", "ieee")}
# kernels whose every tile is timed
EPILOGUES = (lean.lean_statistics_kernel, lean.lean_gradient_kernel, sigmoid.sigmoid_kernel)
MERGED = {"BLOCK_T": merge.MERGED_TILES, "BLOCK_L": merge.MERGED_LINES}
# of kernels that form no product
SMALL = Tiling(finish.ROWS, 0, finish.WIDTH, 4, 3)
# with float32 operands, whose tiles are far from any limit
FLOAT32_VARIANTS = ("ids", "gradient")


# these cost an inside tile what `ids` and `kept_ids` do, but registers: once, on Hopper, is enough
LIKE_IDS = ("kept", "maxima", "offset", "out", "biased")
UNBIASED = {"HAS_ROW_BIAS": False, "HAS_COLUMN_BIAS": False}
BIASED = {"HAS_ROW_BIAS": True, "HAS_COLUMN_BIAS": True}
# sequence lengths of towers, and whether causal
TOWERS = ((50, False), (77, True), (197, False), (257, False), (577, False))


@dataclass(frozen=True)
class Case:
    """One compilation: a kernel with its constants and tiling, for an architecture."""

    kernel: Any
    variant: str
    architecture: int
    tiling: Tiling
    constants: dict[str, Any]
    dtype: str = "bfloat16"
    shipped: bool = True

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__name__} {self.variant}"


class Variant(NamedTuple):
    """A kernel as launchers ask for it: its entry in the table of tilings, and its constants."""

    entry: str
    kernel: Any
    name: str
    constants: dict[str, Any]

    def tiling(self, table: str, precision: str) -> Tiling:
        """As the launchers make it of the table."""
        if self.entry != "own_gradient":
            return tiling_of(table, self.entry, self._words(self.entry), precision)
        sides = tiling_of(table, "gradient", self._words("gradient"), precision)
        return replace(sides, parts=self.slots(table, precision), registers=None)

    def slots(self, table: str, precision: str) -> int:
        """Scalars of a tile, of which its parts have one each where it goes by its own maxima."""
        words = self._words("own_gradient")
        return tiling_of(table, "own_gradient", words, precision).parts

    def _words(self, entry: str) -> frozenset[str]:
        asked = self.constants
        found = {
            "ids": asked["HAS_IDS"],
            "biased": asked["HAS_COLUMN_BIAS"],
            "offset": asked["HAS_OFFSET"],
            "rows": not asked["COLUMNS"],
            "kept": asked.get("KEEP", False),
            "maxima": asked.get("MAXIMA", False),
            "frozen": not asked.get("SCALARS", True),
            "loss": not asked.get("GRADIENT", True),
        }
        return frozenset(word for word in VARIANTS[entry] if found[word])


def variants() -> Iterator[Variant]:
    """What the launchers ask for. `ids` has all that costs registers at once."""
    plain = {"HAS_DIAGONAL": True, "HAS_IDS": False, "EVEN_D": True, "COLUMNS": True}
    plain |= {"HAS_OFFSET": False, **UNBIASED}
    all_at_once = {"HAS_IDS": True, "HAS_OFFSET": True, "EVEN_D": False}
    statistics: dict[str, dict[str, bool]] = {
        "both": {},
        "maxima": {"MAXIMA": True},
        "rows": {"COLUMNS": False, "MAXIMA": True},
        "kept": {"KEEP": True},
        "kept_rows": {"KEEP": True, "COLUMNS": False},
        "kept_ids": {**all_at_once, "KEEP": True},
        "ids": {**all_at_once, "MAXIMA": True},
        "biased": {**BIASED, "KEEP": True},
    }
    for name, flags_ in statistics.items():
        options = {**plain, "MAXIMA": False, "KEEP": False, **flags_}
        yield Variant("statistics", lean.lean_statistics_kernel, name, options)
    gradient: dict[str, dict[str, bool]] = {
        "both": {},
        "offset": {"HAS_OFFSET": True},
        "rows": {"COLUMNS": False},
        "frozen_scale": {"SCALARS": False},
        "ids": all_at_once,
        "biased": BIASED,
    }
    for name, flags_ in gradient.items():
        options = {**plain, "SCALARS": True, **flags_}
        yield Variant("gradient", lean.lean_gradient_kernel, name, options)
    weighed: dict[str, dict[str, bool]] = {
        "both": {},
        "offset": {"TOTAL": True},
        "rows": {"COLUMNS": False},
        "biased": BIASED,
    }
    for name, flags_ in weighed.items():
        yield Variant("gradient", weigh.weigh_kernel, name, {**plain, "TOTAL": False, **flags_})
    sigmoids: dict[str, dict[str, Any]] = {
        "loss": {"GRADIENT": False},
        "gradient": {},
        "odd": {"EVEN_D": False},
        "out": {"IDS": sigmoid.IDS_LEFT_OUT, "HAS_IDS": True},
        "positive": {"IDS": sigmoid.IDS_POSITIVE, "HAS_IDS": True},
    }
    asked = {**plain, "HAS_OFFSET": True, "GRADIENT": True, "IDS": sigmoid.NO_IDS}
    for name, flags_ in sigmoids.items():
        yield Variant("sigmoid", sigmoid.sigmoid_kernel, name, {**asked, **flags_})
    options = {**plain, **all_at_once, "GRADIENT": True, "SCALARS": True}
    of_entries = {**options, "IDS": sigmoid.IDS_POSITIVE}
    yield Variant("sigmoid", sigmoid.sigmoid_entries_kernel, "ids", of_entries)
    yield Variant("own_statistics", flagged.flagged_statistics_kernel, "ids", options)
    yield Variant("own_gradient", flagged.flagged_gradient_kernel, "ids", options)
    options = {**plain, "COLUMNS": False, "KEEP": True}
    yield Variant("own_statistics", similarity.statistics_kernel, "kept", options)
    options = {**options, "HAS_IDS": True, "HAS_DIAGONAL": False}
    yield Variant("own_statistics", similarity.statistics_kernel, "kept_ids", options)


def cases(architecture: int, everything: bool = False) -> Iterator[Case]:
    """What is compiled for an architecture: the shipped ones, or `everything`."""
    found = [*_of_tiles(architecture), *_walking(architecture)]
    found += [*_rest(architecture), *_dense(architecture)]
    if architecture != 86:
        found += attention_cases(architecture)
    if architecture == 90:
        found += _ones()
    return (case for case in found if everything or case.shipped)


def _of_tiles(architecture: int) -> Iterator[Case]:
    table = TABLES[architecture]
    for variant in variants():
        for precision, (dtype, product) in OPERANDS.items():
            tiling = variant.tiling(table, precision)
            constants = _constants(variant, tiling, product, variant.slots(table, precision))
            yield Case(
                variant.kernel,
                f"{variant.name}/{precision}",
                architecture,
                tiling,
                constants,
                dtype,
                _keeps_limits(variant, precision, architecture),
            )


def _keeps_limits(variant: Variant, precision: str, architecture: int) -> bool:
    name, common = variant.name, variant.kernel in EPILOGUES
    if precision == "tf32":
        return common and name in FLOAT32_VARIANTS and architecture != 86
    if precision == "ieee":
        # no matrix unit: alike everywhere
        return common and name in FLOAT32_VARIANTS and architecture == 80
    # `odd` differs in the loads of the product; what is not timed a tile is looked at on Hopper
    # and biases, which have tilings of their own there, on Blackwell
    once = name in LIKE_IDS and (name, architecture) != ("biased", 100)
    return name != "odd" and (architecture == 90 or (common and not once))


def _constants(variant: Variant, tiling: Tiling, product: str, slots: int) -> dict[str, Any]:
    sides = {k: v for k, v in tiling.options().items() if k.isupper()}
    if variant.kernel is sigmoid.sigmoid_entries_kernel:
        sides["PARTS"] = sigmoid.ENTRIES_PARTS
    return {
        **variant.constants,
        **sides,
        "TMA": tiling.tma,
        "TRANSPOSE": tiling.transpose,
        "FLATTEN": tiling.walkers > 0,
        "PRECISION": product,
        "SLOTS": slots,
        "STEP": weigh.step_of(tiling.rows, variant.name == "biased"),
    }


def _walking(architecture: int) -> Iterator[Case]:
    """What the sweep of tilings tries beside the shipped: programs that walk over all tiles."""
    table = TABLES[architecture]
    for variant in variants():
        if variant.kernel in EPILOGUES and variant.name in ("both", "gradient"):
            tiling = replace(variant.tiling(table, "16bit"), walkers=1)
            constants = _constants(variant, tiling, "ieee", variant.slots(table, "16bit"))
            # one kernel shows whether an architecture's compiler can fuse the loops
            shipped = variant.entry == "statistics" and architecture != 86
            name = f"{variant.name}/walking/16bit"
            yield Case(variant.kernel, name, architecture, tiling, constants, shipped=shipped)


def _rest(architecture: int) -> Iterator[Case]:
    rest: list[tuple[Any, dict[str, Any]]] = [
        (finish.finish_kernel, {"HAS_TERM": True, "BLOCK_R": 16, "BLOCK_D": 128}),
        (finish.row_dot_kernel, {"BLOCK_R": 16, "BLOCK_D": 128}),
        (merge.merge_kernel, {"HAS_OFFSET": True, "HAS_DOT": True, **MERGED}),
        (merge.rescale_kernel, {"BLOCK_R": 16, "BLOCK_S": 256}),
        (flags.totals_kernel, {"HAS_OFFSET": True, "MAXIMA": True, **UNBIASED, **MERGED}),
        (
            flags.factors_kernel,
            {"HAS_OFFSET": True, "BLOCK_R": 128, "BLOCK_S": 256, **UNBIASED},
        ),
        (flagged.merge_flagged_kernel, {"HAS_OFFSET": True, **MERGED}),
    ]
    for kernel, constants in rest:
        yield Case(kernel, "16bit", architecture, SMALL, constants, shipped=architecture == 90)


def _dense(architecture: int) -> Iterator[Case]:
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
        of_rows = {"BLOCK_L": dense_gradient.ROWS, "BLOCK_D": dense_gradient.WIDTH}
        for kernel, sides in (
            (dense.lines_kernel, lines),
            (dense_gradient.gradient_kernel, tiles),
            (dense_gradient.finish_kernel, of_rows),
            (dense_gradient.scalars_kernel, {}),
            (dense.total_kernel, {}),
        ):
            limited = dense.REGISTERS if kernel is dense.lines_kernel else None
            tiling = replace(SMALL, registers=limited)
            # no matrix unit, and far from any limit but for what has most
            shipped = name == "tables" and architecture == 90
            yield Case(kernel, name, architecture, tiling, {**constants, **sides}, shipped=shipped)


def _ones() -> Iterator[Case]:
    """With arguments that are 1, which the JIT makes constants: other paths in the compiler."""
    ones = {"width": 1, "stride_x": 1, "stride_y": 1, "TMA": False, "EVEN_D": False}
    for variant in variants():
        tiling = variant.tiling("sm_90", "16bit")
        constants = _constants(variant, tiling, "ieee", variant.slots("sm_90", "16bit"))
        shipped = variant.kernel is lean.lean_statistics_kernel and variant.name == "both"
        name = f"{variant.name}/ones/16bit"
        yield Case(variant.kernel, name, 90, tiling, {**constants, **ones}, "bfloat16", shipped)


def attention_cases(architecture: int) -> Iterator[Case]:
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
        backward = whole if gradient.whole else two_pass
        walks = (
            attention.walk_options(lines, lines, forward),
            attention_gradient.walk_options(lines, lines, gradient),
        )
        plans: tuple[Any, Any] = (forward, gradient)
        for kernel, plan, walk in zip(
            (attention.forward_kernel, backward), plans, walks, strict=True
        ):
            tiling = Tiling(plan.queries, plan.keys, 64, plan.warps, plan.stages)
            # the tests of attention compile them all
            constants = {**shape, **walk}
            name = f"{lines}/16bit"
            yield Case(kernel, name, architecture, tiling, constants, shipped=False)
