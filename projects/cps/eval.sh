#!/bin/sh
# Evaluate:  sh eval.sh [CONFIG|RUN_DIR] [CHECKPOINT] [section.key=value ...] [options of eval.py]
#
# All weights that a RUN_DIR has kept are measured with its own configuration (--epochs chooses among them); a CONFIG
# stands for its run directory runs/<config>/seed<seed>. With CHECKPOINT that file alone is measured. These three are
# looked up from where you are, then in this folder; all other paths count from this folder. PROCESSES (1) and PORT
# share the images.
project=cps default=configs/voc_1323_r50_cps.yaml
. "$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)/../../tools/eval.sh"
