#!/bin/sh
# Train under Slurm:  sh slurm_train.sh NUM_GPUS PORT PARTITION [CONFIG] [section.key=value ...]
#
# One task per GPU, at most GPUS_PER_NODE (8) of them on a machine, CPUS_PER_TASK (5) cores each. CONFIG as for
# train.sh. srun's own variables (SLURM_TIMELIMIT, SLURM_ACCOUNT, ...) count; two minutes before the time limit the
# run saves itself.
project=unimatch default=configs/voc_classic_92_r101.yaml
. "$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)/../../tools/slurm_train.sh"
