#!/bin/sh
# Evaluate:  sh eval.sh [CONFIG|RUN_DIR] [CHECKPOINT] [section.key=value ...] [options of eval.py]
#
# A RUN_DIR is measured with its own configuration, best.pt and last.pt both; a CONFIG stands for its run directory
# runs/<config>/seed<seed>. With CHECKPOINT that file alone is measured. These three are looked up from where you are,
# then in this folder; all other paths count from this folder. PROCESSES (1) and PORT share the images.
project=unimatch default=configs/voc_classic_92_r101.yaml
. "$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)/../../tools/eval.sh"
