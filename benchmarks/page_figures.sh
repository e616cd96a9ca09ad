#!/bin/sh
# The measured figures of README and docs/benchmarks.md, in one sitting; over an hour on two cores.
#   [SHARDS=SHARDS] [CIFAR10=DIR] benchmarks/page_figures.sh DIR [--quick]
# Nothing else may run meanwhile. Loading is measured on SHARDS of photographs, accuracy on what
# `fastclip convert cifar10` wrote; without them these are left out. --quick tries everything else at
# small sizes, in minutes.
set -eu
case "${1:-}" in "" | -*) sed -n '2,6s/^# //p' "$0"; exit 2 ;; esac
cd "$(dirname "$0")/.."
DIR=$1 QUICK=${2:-}
mkdir -p "$DIR"
export CUDA_VISIBLE_DEVICES=

# part NAME MODULE WORD...: one file, and what was printed beside it; the others run where one fails
part() {
    name=$1 module=$2
    shift 2
    printf '\n== %s\n' "$name"
    "${PYTHON:-python3}" -m "$module" "$@" $QUICK --output "$DIR/$name.json" ||
        failed="${failed:-} $name"
}
bench() {
    part "$1" fastclip.cli bench "$@"
}

# one file: a table of several would mix hours and versions
bench losses --n 16 64 256 512 1024 2048 4096 8192
part variants fastclip.bench.variants
part variants-widths fastclip.bench.variants --loss clip siglip --width 64 128 256
part variants-bf16 fastclip.bench.variants --loss clip siglip --autocast --compiled
bench memory
bench train-step --rounds 25
bench collectives --ranks 2 4 --n 256 1024
part ranking fastclip.bench.ranking
[ -z "${SHARDS:-}" ] || part data fastclip.cli bench data "$SHARDS" --rounds 9
[ -z "${CIFAR10:-}" ] || [ -n "$QUICK" ] ||
    "${PYTHON:-python3}" -m fastclip.cli study cifar10 "$CIFAR10" --output "$DIR/cifar10"
[ -z "${failed:-}" ] || { echo "failed:$failed" >&2; exit 1; }
