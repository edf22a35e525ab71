#!/usr/bin/env bash
# Step 0 of task 5-3 on synthetic data: draws the data, trains a tiny network, evaluates it.
# What was interrupted goes on, what is finished stays; scripts/demo.sh --overwrite trains anew.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

CONFIG=configs/config_synthetic.json
DATA=data/synthetic
STEP=_saved_synthetic/models/overlap_5-3_EIR/step_0

if [ ! -d "$DATA" ]; then
    mkdir -p data
    rm -rf "$DATA.part"
    "$PYTHON" scripts/make_synthetic_voc.py --output "$DATA.part" >/dev/null
    mv "$DATA.part" "$DATA"
fi
echo "data        $DATA"

[ $# -gt 0 ] || set -- --resume auto
"$PYTHON" train_voc.py -c "$CONFIG" --task_step 0 --pos_weight 2 "$@"
CHECKPOINT=$(ls "$STEP"/checkpoint-epoch*.pth | sort -V | tail -n 1)

echo
echo "eval_voc.py -r $CHECKPOINT"
"$PYTHON" eval_voc.py -r "$CHECKPOINT"
echo
echo "metrics     $STEP/metrics.json"
