"""Microbenchmarks, imported as `fastclip.bench.*` from the top-level folder `benchmarks/`."""

from pathlib import Path

# In a checkout the modules live beside the package; a wheel holds copies in this folder. The
# guard keeps an installed package from adopting a stranger's site-packages/benchmarks.
_root = Path(__file__).resolve().parents[2]
if (_root / "setup.py").is_file():
    __path__.append(str(_root / "benchmarks"))
