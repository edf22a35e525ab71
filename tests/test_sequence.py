"""Whole tasks: the user's commands as written, and sequences that are killed and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_loader.data_root import scan_label
from data_loader.tasks import get_task
from scripts.make_synthetic_voc import make_synthetic_voc
from tests.helpers import PROJECT
from utils.checkpoint import read_checkpoint

SETTINGS = """
unset PORT
GPU=1
BS=32 # Total 32
SAVEDIR='_saved_voc'
TASKSETTING='overlap' # or 'disjoint'
TASKNAME='5-3'
EPOCH=60
INIT_LR=0.001
LR=0.0001
INIT_POSWEIGHT=2
MEMORY_SIZE=100
NAME='EIR'
"""
FIRST = r"""
CUDA_VISIBLE_DEVICES=1 python train_voc.py -c configs/config_voc.json \
-d ${GPU} --multiprocessing_distributed --dist_url ${PORT} --save_dir ${SAVEDIR} --name ${NAME} \
--task_name ${TASKNAME} --task_setting ${TASKSETTING} --task_step 0 --lr ${INIT_LR} --bs ${BS} """
LATER = r"""
CUDA_VISIBLE_DEVICES=1 python train_voc.py -c configs/config_voc.json \
-d ${GPU} --multiprocessing_distributed --dist_url ${PORT} --save_dir ${SAVEDIR} --name ${NAME} \
--task_name ${TASKNAME} --task_setting ${TASKSETTING} --task_step STEP --lr ${LR} --bs ${BS} """
EVALUATE = (
    "\nCUDA_VISIBLE_DEVICES=1 python eval_voc.py -d 0 --test -r "
    "${SAVEDIR}/models/${TASKSETTING}_${TASKNAME}_${NAME}/step_5/checkpoint-epoch${EPOCH}.pth"
)


def bash(script, folder=PROJECT, **environment):
    folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", *script],
        cwd=folder,
        env={**os.environ, "PATH": folders, "OMP_WAIT_POLICY": "PASSIVE", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def keep_few_images(root):
    """A training list with two images for step 0 of 5-3, one in one piece, and one for each other."""
    path = root / "ImageSets/Segmentation/train_aug.txt"
    steps = get_task("5-3", "overlap").steps
    chosen = {}
    for line in path.read_text().splitlines():
        file = f"{root}{line.split()[1]}"
        pixels, regions = scan_label(np.array(Image.open(file)), Path(file), 20)
        classes = np.flatnonzero(pixels[1:]) + 1
        for step, members in enumerate(steps):
            if set(classes) <= set(members):
                chosen.setdefault((step, bool((regions[classes] == 1).all())), line)
    wanted = [(0, False), *((step, True) for step in range(6))]
    path.write_text("".join(chosen[key] + "\n" for key in wanted))


@pytest.mark.slow
def test_the_users_commands_as_written(tmp_path):
    root = make_synthetic_voc(tmp_path / "voc", train=400, val=4, size=128)
    keep_few_images(root)
    own = f"--data_root {root} --epochs 1 --backbone_weights none || exit $?"
    settings = SETTINGS.replace("_saved_voc", str(tmp_path / "saved")).replace("EPOCH=60", "EPOCH=1")
    script = settings + FIRST + "--pos_weight ${INIT_POSWEIGHT} " + own
    for step in range(1, 6):
        line = LATER.replace("STEP", str(step))
        script += line + "--freeze_bn --mem_size ${MEMORY_SIZE} " + own
    output = tmp_path / "eval.json"
    process = bash(["-c", script + EVALUATE + f" --output {output}"])
    text, _ = process.communicate(timeout=3000)
    assert process.returncode == 0, text
    folder = tmp_path / "saved" / "models" / "overlap_5-3_EIR"
    assert output.read_text() == (folder / "step_5" / "metrics.json").read_text()
    assert "one batch of 2 instead of 32" in text
    assert "one batch of 6 instead of 32" in text
    manifest = json.loads((folder / "step_5" / "memory" / "manifest.json").read_text())
    assert len(manifest["entries"]) == 5
    state = read_checkpoint(folder / "step_5" / "checkpoint-epoch1.pth")["state_dict"]
    assert "backbone.layer3.22.conv3.weight" in state
    assert state["cls.6.weight"].shape == (3, 256, 1, 1)
    assert all(value.isfinite().all() for value in state.values())


def sequence(root, save_dir):
    flags = f"--data_root {root} --save_dir {save_dir} --backbone tiny --backbone_weights none"
    flags += " --crop_size 64 --num_workers 0"
    settings = {"BS": "8", "EPOCH": "2", "INIT_LR": "0.02", "LR": "0.01", "MEMORY_SIZE": "40"}
    return bash(["scripts/train_voc.sh", "10-5", "overlap", *flags.split()], **settings)


def kill_when(process, exists):
    """Kill a sequence with all its processes as soon as exists() is true."""
    while not exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.0005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_killed_sequence_ends_with_the_weights_of_an_undisturbed_one(tmp_path):
    root = make_synthetic_voc(tmp_path / "voc", train=80, val=10, size=64)
    calm = sequence(root, tmp_path / "calm")
    text, _ = calm.communicate(timeout=900)
    assert calm.returncode == 0, text
    folder = tmp_path / "killed" / "models" / "overlap_10-5_EIR"
    moments = (
        lambda: (folder / "step_0" / "config.json").exists(),
        lambda: (folder / "step_0" / "last.pth").exists(),
        lambda: len(list((folder / "step_1" / "memory.unfinished").glob("*.png"))) > 3,
        lambda: (folder / "step_1" / "last.pth").exists(),
        lambda: list((folder / "step_2").glob(".last.pth.*.unfinished")),
        lambda: (folder / "step_2" / "metrics.json").exists(),
    )
    for moment in moments:
        kill_when(sequence(root, tmp_path / "killed"), moment)
    again = sequence(root, tmp_path / "killed")
    text, _ = again.communicate(timeout=900)
    assert again.returncode == 0, text
    assert "finished already" in text and "hIoU" in text
    for step in range(3):
        paths = [
            tmp_path / run / "models" / "overlap_10-5_EIR" / f"step_{step}" / "checkpoint-epoch2.pth"
            for run in ("calm", "killed")
        ]
        one, other = (read_checkpoint(path)["state_dict"] for path in paths)
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert (
            paths[0].with_name("metrics.json").read_text()
            == paths[1].with_name("metrics.json").read_text()
        )


@pytest.mark.parametrize(("outside", "gpus"), [({}, "3,1"), ({"CUDA_VISIBLE_DEVICES": "5"}, "5")])
def test_the_sequence_script_stays_on_its_gpus_and_in_the_folder_of_its_caller(
    tmp_path, monkeypatch, outside, gpus
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    launcher = tmp_path / "launcher"
    launcher.write_text(f'#!/bin/sh\necho "$1 ${{CUDA_VISIBLE_DEVICES-all}} $PWD" >>{tmp_path}/calls\n')
    launcher.chmod(0o755)
    script = [f"{PROJECT}/scripts/train_voc.sh", "10-5", "overlap", "-d", "3,1", "--save_dir", "mine"]
    bash(script, tmp_path, LAUNCHER=str(launcher), BS="32", **outside).communicate(timeout=600)
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert [Path(program).name for program, *_ in calls] == 3 * ["train_voc.py"] + ["eval_voc.py"]
    assert all(where == [gpus, str(tmp_path)] for _, *where in calls)


def test_the_sequence_script_needs_task_and_setting():
    process = bash(["scripts/train_voc.sh", "5-3"])
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 2 and text.startswith("error: ")


def test_the_sequence_script_does_not_guess_the_batch_of_a_launcher(tmp_path, monkeypatch):
    monkeypatch.delenv("BS", raising=False)
    script = ["scripts/train_voc.sh", "5-3", "overlap", "--save_dir", str(tmp_path)]
    process = bash(script, LAUNCHER="torchrun --nproc_per_node 2")
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 2 and "error: LAUNCHER says how many processes there are: " in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--task_step", "--task_step=1", "--resume", "-r", "--test"])
def test_the_sequence_script_refuses_what_is_for_a_single_step(flag):
    text, _ = (process := bash(["scripts/train_voc.sh", "5-3", "overlap", flag, "1"])).communicate()
    assert process.returncode == 2 and text.startswith(f"error: {flag} is for a single step")


def test_the_sequence_script_refuses_an_unknown_task(tmp_path):
    process = bash(["scripts/train_voc.sh", "7-4", "overlap", "--save_dir", str(tmp_path)])
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 2 and "error: unknown task '7-4'" in text
    assert list(tmp_path.iterdir()) == []


PROGRAMS = {
    "scontrol": 'echo "first"; echo "second"',
    "srun": """
echo "srun $1"; shift
for node in 0 1; do SLURM_NODEID=$node "$@" || exit $?; done""",
    "torchrun": 'echo "node $SLURM_NODEID: torchrun $*"',
    "python": f'''
[ "$1" = - ] && exec "{sys.executable}" "$@"
echo "node $SLURM_NODEID: report"''',
}


def test_several_nodes_meet_anew_for_each_step_and_the_first_one_reports(tmp_path):
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"JOB_ID": "7", "JOB_NODELIST": "n[1-2]", "NNODES": "2", "GPUS_ON_NODE": "4"}
    job = {f"SLURM_{name}": value for name, value in {**job, "CPUS_PER_TASK": "32"}.items()}
    flags = ["10-10", "overlap", "--save_dir", str(tmp_path)]
    script = ["-c", 'PATH=$0:$PATH exec bash scripts/train_voc.slurm "$@"', str(tmp_path)]
    process = bash([*script, *flags], PYTHON=str(tmp_path / "python"), **job)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert "srun --cpus-per-task=32" in text
    for node in (0, 1):
        lines = [line for line in text.splitlines() if line.startswith(f"node {node}: torchrun")]
        starts = "--nnodes 2 --nproc_per_node 4 --rdzv_backend c10d"
        assert all(starts in line and "--rdzv_endpoint first:29500" in line for line in lines)
        meetings = [line.split("--rdzv_id ")[1].split()[0] for line in lines]
        assert meetings == ["7-0", "7-1", "7-evaluation"]
        assert all(" --bs 4 " in line for line in lines[:2]) and "eval_voc.py -r" in lines[2]
    assert [line for line in text.splitlines() if line.endswith("report")] == ["node 0: report"]
