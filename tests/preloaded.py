"""What the process imports whose forks are the tests' processes; `tests.processes` starts it."""

import contextlib
import importlib
import os

# as `fastclip train` chooses before its import; what looks for GPUs could not be forked
os.environ.setdefault("DS_ACCELERATOR", "cpu")
for name in (
    "deepspeed",
    "fastclip.train.loop",
    "matplotlib.pyplot",
    "open_clip",
    "pytest",
    # what the first step and the wrapper of several ranks import
    "torch._dynamo",
    "tyro",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
