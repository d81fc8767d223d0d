# shellcheck shell=sh
# The rest of every projects/*/train.sh, which sets $project and $default (a configuration).
set -eu
usage='usage: sh train.sh NUM_PROCESSES PORT [CONFIG] [section.key=value ...]'
processes=${1:?"$usage"}
port=${2:?"$usage"}
shift 2
folder=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
config=$default
case ${1:-} in
*.yaml | *.yml)
    config=$1
    shift
    if [ "${config#/}" = "$config" ] && [ "$PWD" != "$folder" ] && [ -f "$config" ]; then config=$PWD/$config; fi
    ;;
esac
cd -- "$folder"
root=$(CDPATH='' cd -- ../.. && pwd)
. "$root/tools/find_python.sh"
exec "$python" -m tools.launch --processes "$processes" --port "$port" --module "projects.$project.train" -- \
    --config "$config" "$@"
