"""Triton kernels, imported as `fastclip.kernels.*` from the top-level folder `kernels/`."""

from pathlib import Path

# In a checkout the modules live beside the package; a wheel holds copies in this folder. The
# guard keeps an installed package from adopting a stranger's site-packages/kernels.
_root = Path(__file__).resolve().parents[2]
if (_root / "setup.py").is_file():
    __path__.append(str(_root / "kernels"))
