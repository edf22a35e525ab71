#!/usr/bin/env bash
# A whole task on synthetic data with a tiny network, on the CPU in minutes: draws the data, trains the
# three steps of 10-5 with EIR and, from the same step 0, by fine-tuning; draws a sheet of EIR's
# composites, and ends with the two side by side: tables, and figures of IoU over steps.
# What was interrupted goes on, what is finished stays; delete _saved_synthetic to train anew.
#   bash scripts/demo.sh
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
if [ $# -gt 0 ]; then
    echo "error: demo.sh takes no arguments, such as $1 (--help says what it does)" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

DATA=data/synthetic
RUNS=_saved_synthetic
EIR=$RUNS/models/overlap_10-5_EIR-seed1
JOBS=$(($(nproc 2>/dev/null || echo 1) > 1 ? 2 : 1))

if [ ! -d "$DATA" ]; then
    mkdir -p data
    rm -rf "$DATA.part"
    "$PYTHON" scripts/make_synthetic_voc.py --output "$DATA.part" >/dev/null
    mv "$DATA.part" "$DATA"
fi
echo "data        $DATA"

"$PYTHON" scripts/run_experiments.py configs/experiments/demo.json --jobs "$JOBS"
"$PYTHON" scripts/preview_replay.py --output "$EIR/preview.png" -c "$EIR/step_2/config.json"
"$PYTHON" scripts/report.py "$RUNS/demo"
