#!/usr/bin/env bash
# A whole task on synthetic data with a tiny network, on the CPU in minutes: draws the data, trains the
# three steps of 10-5 with EIR, and shows the table over steps, the curve, and a sheet of composites.
# What was interrupted goes on, what is finished stays; delete _saved_synthetic to train anew.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

export PYTHON CONFIG=configs/config_synthetic.json
export BS=16 EPOCH=16 INIT_LR=0.03 LR=0.01 MEMORY_SIZE=60
DATA=data/synthetic
RUN=_saved_synthetic/models/overlap_10-5_EIR

if [ ! -d "$DATA" ]; then
    mkdir -p data
    rm -rf "$DATA.part"
    "$PYTHON" scripts/make_synthetic_voc.py --output "$DATA.part" >/dev/null
    mv "$DATA.part" "$DATA"
fi
echo "data        $DATA"

bash scripts/train_voc.sh 10-5 overlap "$@"
"$PYTHON" scripts/preview_replay.py --output "$RUN/preview.png" -c "$RUN/step_1/config.json"
