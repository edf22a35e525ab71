"""scripts/status.py on folders of runs as training leaves them."""

import json
import os
import time

import pytest

from scripts.status import duration, main
from tests.helpers import code_of, small_config
from utils.checkpoint import content_digest, save_checkpoint, write_json
from utils.metrics import GROUPS, METRICS


@pytest.fixture
def step(tmp_path):
    """Makes the folder of a step: epochs that were recorded, how long ago, and whether it is done."""

    def make(number, epochs=0, ago=5.0, done=None):
        config = small_config(
            tmp_path, tmp_path / "saved", task_name="10-5", task_step=number, epochs=9
        )
        folder, log = config.step_dir(), config.step_dir(kind="log")
        write_json(folder / "config.json", config.to_dict())
        log.mkdir(parents=True)
        row = {"loss": 0.5, "seconds": 60.0, "images_per_second": 12.34}
        lines = [json.dumps({"epoch": e, **row}) + "\n" for e in range(1, epochs + 1)]
        (log / "metrics.jsonl").write_text("".join(lines) + ('{"epoch": 9, "lo' if epochs else ""))
        os.utime(log / "metrics.jsonl", (time.time() - ago,) * 2)
        if done is not None:
            write_json(folder / "metrics.json", {m: dict.fromkeys(GROUPS, done) for m in METRICS})

    return make


def lines(tmp_path, capsys):
    assert main([str(tmp_path / "saved")]) == 0
    return capsys.readouterr().out.splitlines()


def test_steps_done_under_way_and_left(step, tmp_path, capsys):
    step(0, 9, done=61.234)
    step(1, 4, ago=120.0)
    title, first, second, left = lines(tmp_path, capsys)
    assert title == "overlap_10-5_EIR: 1 of 3 steps done"
    assert first.split() == ["step", "0", "done", "mIoU", "61.23"]
    assert "epoch 4 of 9, loss 0.5000, 12.3 images/s, about 3 min to go" in second
    assert left.split() == ["left", "steps", "2"]


def test_a_run_that_went_silent_is_said_to_be_resumable(step, tmp_path, capsys):
    step(0, 4, ago=7200)
    assert "nothing written for 2.0 h: --resume auto goes on" in lines(tmp_path, capsys)[1]


def test_a_step_without_an_epoch(step, tmp_path, capsys):
    step(0)
    assert "no epoch is finished yet" in lines(tmp_path, capsys)[1]


def test_a_damaged_result_is_no_result(step, tmp_path, capsys):
    step(0, 9, done=50.0)
    for path in (tmp_path / "saved").rglob("metrics.json"):
        path.write_text("{}")
    assert "0 of 3 steps done" in lines(tmp_path, capsys)[0]


SPEED = '{"epoch": 1, "loss": 1, "seconds": 2, "images_per_second": "fast"}'


@pytest.mark.parametrize("text", [SPEED, "[]"])
def test_a_damaged_record_is_none(step, tmp_path, capsys, text):
    step(0, 9)
    for path in (tmp_path / "saved").rglob("metrics.jsonl"):
        path.write_text(text + "\n")
    assert "no epoch is finished yet" in lines(tmp_path, capsys)[1]


def test_a_damaged_run_does_not_hide_the_others(step, tmp_path, capsys):
    step(0, 9, done=50.0)
    other = tmp_path / "saved/models/a_run/step_0"
    other.mkdir(parents=True)
    (other / "config.json").write_text("{")
    assert main([str(tmp_path / "saved")]) == 2
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("a_run: ") and "is not valid JSON" in first
    assert rest[0] == "overlap_10-5_EIR: 1 of 3 steps done"


def test_a_step_that_started_from_another_model_is_marked(step, tmp_path, capsys):
    for t in (0, 1):
        step(t, 9, done=50.0)
    first, second = sorted((tmp_path / "saved/models").glob("*/step_*"))
    save_checkpoint(first / "checkpoint-epoch9.pth", {"epoch": 9})
    record = {"own_previous": True, "previous": content_digest(first / "checkpoint-epoch9.pth")}
    write_json(second / "made_from.json", record)
    assert lines(tmp_path, capsys)[2].endswith("mIoU 50.00")
    save_checkpoint(first / "checkpoint-epoch9.pth", {"epoch": 9, "trained": "anew"})
    assert lines(tmp_path, capsys)[2].endswith(
        "from another model of the step before than is there now"
    )


def test_a_step_0_that_another_run_has_is_missing_in_neither(step, tmp_path, capsys):
    for t in (0, 1, 2):
        step(t, 9, done=50.0)
    run = tmp_path / "saved/models/overlap_10-5_EIR"
    first = tmp_path / "saved/models/overlap_10-5_step0-seed1/step_0"
    first.parent.mkdir()
    (run / "step_0").rename(first)
    write_json(run / "step_1/made_from.json", {"own_previous": False})
    found = lines(tmp_path, capsys)
    assert [found[0], found[3]] == [
        "overlap_10-5_EIR: 2 of 2 steps done",
        "overlap_10-5_step0-seed1: 1 of 1 steps done",
    ]
    assert len(found) == 5  # with three lines of steps, and none of steps that are left
    first.parent.rename(run.with_name("overlap_10-5_mine"))  # some run that others start from
    assert lines(tmp_path, capsys)[-1].split() == ["left", "steps", "1,", "2"]


def test_a_folder_without_runs_ends_in_one_line(tmp_path, capsys):
    assert code_of(lambda: main([str(tmp_path)])) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "give the --save_dir" in lines[0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(7, "7 s"), (99, "99 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
