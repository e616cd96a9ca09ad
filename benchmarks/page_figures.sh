#!/bin/sh
# The measured figures of README and docs/benchmarks.md, in one sitting; about an hour on two cores.
#   benchmarks/page_figures.sh DIR [--quick]
# Nothing else may run meanwhile. --quick tries everything at small sizes, in minutes.
set -eu
case "${1:-}" in "" | -*) sed -n '2,4s/^# //p' "$0"; exit 2 ;; esac
cd "$(dirname "$0")/.."
DIR=$1 QUICK=${2:-}
mkdir -p "$DIR"
export CUDA_VISIBLE_DEVICES=

# part NAME FLAG...: one file, and what was printed beside it; the others run where one fails
part() {
    name=$1
    shift
    printf '\n== %s\n' "$name"
    "${PYTHON:-python3}" -m fastclip.cli bench "$@" $QUICK --output "$DIR/$name.json" ||
        failed="${failed:-} $name"
}

part losses-small losses --n 16 64 256 512
part losses losses --n 1024 2048 4096 8192
part losses-widths losses --loss clip siglip --n 8192 --width 64 128 256 --rounds 7 --no-compiled
part losses-kept losses --loss clip nt_xent mp_nce sup_con --n 8192 --keep-bytes 268435456
part losses-not-kept losses --loss clip nt_xent mp_nce sup_con --n 8192 --keep-bytes 0
part losses-bf16 losses --loss clip siglip --n 8192 --autocast --rounds 7
part memory memory
part train-step train-step --rounds 25
part collectives collectives --ranks 4
[ -z "${failed:-}" ] || { echo "failed:$failed" >&2; exit 1; }
