#!/bin/sh
# Train on this machine:  sh train.sh NUM_PROCESSES PORT [CONFIG] [section.key=value ...]
#
# One process per GPU; without GPUs the processes share the CPU. CONFIG is looked up from where you are, then in this
# folder; runs land in runs/<config>/seed<seed> of this folder, where the same command continues a stopped run.
# Several machines: the same command on each, with NNODES, NODE_RANK and MASTER_ADDR set. PYTHON names the interpreter.
set -eu
usage='usage: sh train.sh NUM_PROCESSES PORT [CONFIG] [section.key=value ...]'
processes=${1:?"$usage"}
port=${2:?"$usage"}
shift 2
folder=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
config=configs/voc_classic_366_r101.yaml
case ${1:-} in
*.yaml | *.yml)
    config=$1
    shift
    if [ "${config#/}" = "$config" ] && [ "$PWD" != "$folder" ] && [ -f "$config" ]; then config=$PWD/$config; fi
    ;;
esac
cd -- "$folder"
root=$(CDPATH='' cd -- ../.. && pwd)
. "$root/common/find_python.sh"
exec "$python" -m common.launch --processes "$processes" --port "$port" --module projects.brpg.train -- \
    --config "$config" "$@"
