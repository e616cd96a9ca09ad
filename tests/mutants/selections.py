"""The tests that are run for a fault: what pytest is given, `-k` last."""

SIM = "tests/ops/test_similarity.py -k float64_equals_the_oracle or left_out or one_group"
PRECISION = "tests/ops/test_precision.py -k float64_equals_the_oracle"
MODULES = "tests/losses/test_modules.py"
CLIP = "tests/losses/test_clip.py"
OTHERS = "tests/losses/test_non_contrastive.py"
RANKS = "tests/ops/test_distributed.py -k [3"
LIBRARY = "tests/test_native_build.py -k library_alone and plain"
CPP = "tests/ops/test_cpp.py -k pairwise"
SWEEPS = "tests/ops/test_dense_sweeps.py -k each_input and torch or metrics and torch or float64"
DENSE_KERNELS = "tests/ops/test_dense_sweeps.py -k (pairwise or metrics) and triton"
TRITON = (
    "tests/kernels/test_tilings.py tests/kernels/test_triton.py"
    " -k (against_float64 and not siglip) or span or ties"
)
LEAN = "tests/kernels/test_lean.py -k not repeated and not launches"
SIGMOID = (
    "tests/kernels/test_tilings.py tests/kernels/test_triton.py -k siglip and (against or ties)"
)
ATTENTION = "tests/kernels/test_attention.py -k not same_bits and not ViT-L"
ACCUMULATE = "tests/train/test_accumulate.py -k not two_ranks"
ORDER = "tests/data/test_order.py tests/data/test_order_limits.py"
CHECKPOINT = "tests/train/test_checkpoint.py"
GLOBAL = "tests/losses/test_global_contrastive.py -k not two_processes and not traced"
OPERATORS = "tests/ops/test_operators.py"
BORDERS = "tests/ops/test_borders.py"
OPS_ATTENTION = (
    "tests/ops/test_attention.py tests/ops/test_borders.py -k packed_is or layouts or without_keys"
    " or differ or auto_is or autocast or products_and_flop or errors or widest or flash_is"
)
