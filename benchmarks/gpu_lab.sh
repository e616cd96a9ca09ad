#!/bin/sh
# One session on a GPU, in seven minutes: see benchmarks/gpu_lab.py.
#   benchmarks/gpu_lab.sh --output DIR [--archive FILE] [--stage STAGE] [--budget SECONDS] [--quick]
# Needs a Python with torch and triton, and a C compiler (Triton builds its launcher); nothing is
# installed. PYTHON names another interpreter.
set -eu
cd "$(dirname "$0")/.."
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m fastclip.bench.gpu_lab "$@"
