#!/bin/sh
# Evaluate:  sh eval.sh [CONFIG|RUN_DIR] [CHECKPOINT] [section.key=value ...] [options of eval.py]
#
# A RUN_DIR is measured with its own configuration, best.pt and last.pt both; a CONFIG stands for its run directory
# runs/<config>/seed<seed>. With CHECKPOINT that file alone is measured. These three are looked up from where you are,
# then in this folder; all other paths count from this folder. PROCESSES (1) and PORT share the images.
set -eu
folder=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
found() { # the path $1 as seen from $folder
    if [ "${1#/}" = "$1" ] && [ "$PWD" != "$folder" ] && [ -e "$1" ]; then printf '%s' "$PWD/$1"; else printf '%s' "$1"; fi
}
kind=--config what=configs/voc_classic_366_r101.yaml checkpoint=
case ${1:-} in
'' | *=* | -*) ;;
*.yaml | *.yml)
    what=$(found "$1")
    shift
    ;;
*)
    kind=--run what=$(found "$1")
    shift
    ;;
esac
case ${1:-} in
'' | *=* | -*) ;;
*)
    checkpoint=$(found "$1")
    shift
    ;;
esac
cd -- "$folder"
root=$(CDPATH='' cd -- ../.. && pwd)
. "$root/common/find_python.sh"
exec "$python" -m common.launch --processes "${PROCESSES:-1}" --port "${PORT:-0}" --module projects.brpg.eval -- \
    "$kind" "$what" ${checkpoint:+--checkpoint "$checkpoint"} "$@"
