#!/bin/sh
# Train on this machine:  sh train.sh NUM_PROCESSES PORT [CONFIG] [section.key=value ...]
#
# One process per GPU; without GPUs the processes share the CPU. CONFIG is looked up from where you are, then in this
# folder; runs land in runs/<config>/seed<seed> of this folder, where the same command continues a stopped run.
# Several machines: the same command on each, with NNODES, NODE_RANK and MASTER_ADDR set. PYTHON names the interpreter.
project=unimatch default=configs/voc_classic_92_r101.yaml
. "$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)/../../tools/train.sh"
