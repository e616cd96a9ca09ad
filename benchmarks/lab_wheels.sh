#!/bin/sh
# The baselines of benchmarks/gpu_lab.sh as wheels, for a machine with a GPU and no network.
#   benchmarks/lab_wheels.sh DIR      with a network; 4 MB
# There, before the lab:
#   python3 -m pip install --no-index --no-deps --find-links DIR DIR/*.whl
# What they need besides (torch, triton, numpy, timm, transformers) has to be there already.
set -eu
[ "$#" = 1 ] || { sed -n '2,6s/^# //p' "$0"; exit 2; }
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --dest "$1" \
    open_clip_torch==3.3.0 ftfy wcwidth inf_cl==1.2.1 siglip_kernel==0.1.2 \
    cut_cross_entropy==25.1.1 liger_kernel==0.8.5 lightly==1.6.0 pytorch_metric_learning==2.9.0
du -ch "$1"/*.whl | tail -n 1
