# shellcheck shell=sh
# The rest of every projects/*/eval.sh, which sets $project and $default (a configuration).
set -eu
folder=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
found() { # the path $1 as seen from $folder
    if [ "${1#/}" = "$1" ] && [ "$PWD" != "$folder" ] && [ -e "$1" ]; then printf '%s' "$PWD/$1"; else printf '%s' "$1"; fi
}
kind=--config what=$default checkpoint=
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
. "$root/tools/find_python.sh"
exec "$python" -m tools.launch --processes "${PROCESSES:-1}" --port "${PORT:-0}" --module "projects.$project.eval" -- \
    "$kind" "$what" ${checkpoint:+--checkpoint "$checkpoint"} "$@"
