"""Compile every kernel and tiling for NVIDIA architectures, without a GPU, and read the resources.

`python -m fastclip.bench.compile_report` prints registers, spills, shared memory and tensor-core
instructions of each, and what the epilogues of 16-bit tiles of S execute (`sass.py`); Triton brings
the compiler and the disassembler along. It ends with 1 where something is above its limit
(`compile_limits.py`). `--all` compiles what no limits are kept for too, `--triton 3.6` does it
with another version of Triton, installed beside this one for the time of the run.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastclip.bench import compile_limits
from fastclip.bench.compile_cases import ARCHITECTURES, EPILOGUES, Case, cases
from fastclip.bench.sass import Epilogue, disassembled, epilogue
from fastclip.kernels import attention, attention_gradient, lean, weigh

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
# 16-bit products a cycle and multiprocessor
PRODUCTS = {80: 1024, 86: 512, 90: 2048, 100: 4096}
PRODUCT_WIDTH = 768


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
    """Cycles of the tile's product at a width of 768, where the epilogue is counted: of 16-bit
    products, one tile a program.
    """
    triton: str = triton.__version__
    limited: bool = True
    """Whether it is one that limits are kept for."""


def compiled(case: Case) -> Report:
    """Compile one case, and read what it uses."""
    kernel, tiling, dtype = case.kernel, case.tiling, case.dtype
    architecture, limit = case.architecture, SHARED_LIMIT[case.architecture]
    constants = {"EMULATE": False, **case.constants}
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
    found = triton.compile(source, GPUTarget("cuda", architecture, 32), options=options)
    registers, spills = _resources(found.asm["cubin"])
    sides = [tiling.rows, tiling.columns, tiling.width, tiling.warps, tiling.stages]
    report = Report(
        kernel.fn.__name__,
        case.variant,
        architecture,
        sides,
        registers,
        spills,
        found.metadata.shared,
        limit,
        _tensor_core(found.asm["ptx"]),
        limited=case.shipped,
    )
    if kernel in EPILOGUES and case.variant.count("/") == 1 and dtype != "float32":
        report.epilogue = epilogue(disassembled(found.asm["cubin"]), tiling.warps)
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


def with_triton(version: str, arguments: list[str]) -> int:
    """Run the report with another version of Triton, in a folder of its own for the time.

    Nothing that is installed changes: the folder comes first on the path of a new process.
    """
    with tempfile.TemporaryDirectory(prefix="fastclip-triton-") as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*pip, f"triton=={version}.*"], check=True)
        paths = [folder, str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "TRITON_CACHE_DIR": str(Path(folder) / "cache"),
        }
        command = [sys.executable, "-m", "fastclip.bench.compile_report", *arguments]
        return subprocess.run(command, env=environment).returncode


def main() -> int:
    """Print the table; 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(prog="fastclip.bench.compile_report", description=__doc__)
    parser.add_argument(
        "--architectures", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES
    )
    parser.add_argument("--all", action="store_true", help="also what no limits are kept for")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports there")
    parser.add_argument("--renew", action="store_true", help="make what is measured the limits")
    parser.add_argument("--triton", metavar="X.Y", help="with this version of Triton, by pip")
    options = parser.parse_args()
    if options.triton:
        at = sys.argv.index("--triton")
        return with_triton(options.triton, sys.argv[1:at] + sys.argv[at + 2 :])
    rows, problems = [], []
    for architecture in options.architectures:
        for case in cases(architecture, options.all):
            try:
                rows.append(asdict(compiled(case)))
                print(*rows[-1].values(), flush=True)
            except RuntimeError as problem:
                said = f"sm_{architecture} {case.name} does not compile: {problem}"
                known = compile_limits.known_to_fail(triton.__version__, architecture, case.name)
                print(said, flush=True)
                problems += [] if known else [said]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.renew:
        compile_limits.renew(rows)
    problems += [line for row in rows for line in compile_limits.exceeded(row)]
    print(*problems, f"{len(rows)} compilations, {len(problems)} above a limit", sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
