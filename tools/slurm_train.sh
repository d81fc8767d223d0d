# shellcheck shell=sh
# The rest of every projects/*/slurm_train.sh, which sets $project and $default (a configuration).
set -eu
usage='usage: sh slurm_train.sh NUM_GPUS PORT PARTITION [CONFIG] [section.key=value ...]'
gpus=${1:?"$usage"}
port=${2:?"$usage"}
partition=${3:?"$usage"}
shift 3
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
per_node=${GPUS_PER_NODE:-8}
if [ "$gpus" -lt "$per_node" ]; then per_node=$gpus; fi
export MASTER_PORT="$port"
exec srun --partition="$partition" --job-name="$project" --ntasks="$gpus" --ntasks-per-node="$per_node" \
    --gres="gpu:$per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 --signal=USR1@120 \
    "$python" -u -m "projects.$project.train" --config "$config" "$@"
