#!/usr/bin/env bash
# Train all steps of a task and evaluate the last; finished steps are skipped, an interrupted one is
# resumed.
#   bash scripts/train_voc.sh 5-3 overlap [flags of train_voc.py, for every step]
# The settings below are the paper's; each can be set from outside, such as EPOCH=30 bash scripts/...
# BS is per process: the paper's 32 are shared by the GPUs that this machine shows.
# LAUNCHER starts a step, such as torchrun with its own flags, in which {step} becomes the step's number,
# or "evaluation" (see scripts/train_voc.slurm); BS must be set with it. The report is the first node's.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
if [ $# -lt 2 ]; then
    echo "error: give task and setting, such as: bash scripts/train_voc.sh 5-3 overlap" >&2
    exit 2
fi
TASK=$1 SETTING=$2
shift 2
for flag in "$@"; do
    case $flag in -h | --help | --task_step* | -r* | --resume* | --test | --prev_checkpoint*)
        echo "error: $flag is for a single step, with train_voc.py: this script trains all of them" >&2
        exit 2 ;;
    esac
done
ROOT=$(cd "$(dirname "$0")/.." && pwd) # relative paths in the flags stay the caller's

ASKED=${CONFIG:-} CONFIG=${CONFIG:-configs/config_voc.json}
[ -f "$CONFIG" ] || [ ! -f "$ROOT/$CONFIG" ] || CONFIG=$ROOT/$CONFIG
EPOCH=${EPOCH:-60} MEMORY_SIZE=${MEMORY_SIZE:-100}
INIT_LR=${INIT_LR:-0.001} LR=${LR:-0.0001} INIT_POSWEIGHT=${INIT_POSWEIGHT:-2}
PYTHON=${PYTHON:-python}
LAUNCH=("$PYTHON")
[ -z "${LAUNCHER:-}" ] || read -r -a LAUNCH <<<"$LAUNCHER"

task=(-c "$CONFIG" --multiprocessing_distributed --task_name "$TASK" --task_setting "$SETTING"
    --epochs "$EPOCH")
plan=$(PYTHONPATH=$ROOT "$PYTHON" - "${task[@]}" "$@" <<'PYTHON'
import os

import utils.program

import torch

from configs.options import parse_train
from data_loader.tasks import task_of

config, _ = parse_train()
task = task_of(config.data)
print(len(task.steps), config.step_dir().parent, sep="\n")
print(os.environ.get("CUDA_VISIBLE_DEVICES", "all"), max(1, torch.cuda.device_count()), sep="\n")
PYTHON
)
{ read -r steps; read -r folder; read -r visible; read -r gpus; } <<<"$plan"
[ "$visible" = all ] || export CUDA_VISIBLE_DEVICES=$visible  # -d holds for the evaluation as well
if [ -z "${BS:-}" ] && [ -n "${LAUNCHER:-}" ]; then
    echo "error: LAUNCHER says how many processes there are: set BS, the images of each" >&2
    exit 2
fi
if [ -z "${BS:-}" ] && [ $((32 % gpus)) -ne 0 ]; then
    echo "error: $gpus GPUs cannot share the batch of 32 evenly: set BS, the images of each" >&2
    exit 2
fi
BS=${BS:-$((32 / gpus))}

[ -z "$ASKED" ] || echo "set here, whatever $CONFIG says: EPOCH=$EPOCH BS=$BS (a process)" \
    "INIT_LR=$INIT_LR LR=$LR INIT_POSWEIGHT=$INIT_POSWEIGHT MEMORY_SIZE=$MEMORY_SIZE"

launch() { # launch NAME PROGRAM FLAGS...; NAME stands for {step}
    local name=$1
    shift
    "${LAUNCH[@]//"{step}"/$name}" "$@"
}

resume=(--resume auto)
case " $* " in *" --overwrite "*) resume=() ;; esac
for ((step = 0; step < steps; step++)); do
    echo "== $TASK $SETTING, step $step of 0..$((steps - 1))"
    if [ "$step" -eq 0 ]; then
        own=(--lr "$INIT_LR" --pos_weight "$INIT_POSWEIGHT")
    else
        own=(--lr "$LR" --freeze_bn --mem_size "$MEMORY_SIZE")
    fi
    launch "$step" "$ROOT/train_voc.py" "${task[@]}" --bs "$BS" "${own[@]}" "$@" \
        --task_step "$step" "${resume[@]}"
done

last=("$folder/step_$((steps - 1))"/checkpoint-epoch*.pth)
checkpoint=$(printf '%s\n' "${last[@]}" | sort -V | tail -n 1)
launch evaluation "$ROOT/eval_voc.py" -r "$checkpoint"
[ "${SLURM_NODEID:-0}" -ne 0 ] || "$PYTHON" "$ROOT/scripts/report.py" "$folder"
