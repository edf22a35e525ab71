"""A run that is killed, at any moment, and started again ends where it would have ended."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import PROJECT, error_line, run_script
from tests.reliability.runs import (
    RUN,
    STEP_1,
    Run,
    copy,
    flags,
    kill_before,
    leftovers,
    note_changes,
    refused,
    result,
    run,
    two_at_a_time,
)
from trainer.output import has_results

pytestmark = pytest.mark.slow
AGAIN = ["--resume", "auto"]


@pytest.mark.parametrize("step", [0, 1])
def test_killed_before_each_change_of_a_file(step, root, step_0, step_1, place):
    """Every write, rename and removal of memory, checkpoints, metrics, log and settings."""
    whole, changes = [(step_0, {}), (step_1, STEP_1)][step]
    assert len(whole.points) > 20, whole.points

    def kill(case):
        number, what = case
        saved = place / f"{number}" / "saved"
        if step:
            copy(step_0.folder, saved)
        command = flags(root, saved, **changes)
        assert run(command, prepare=kill_before(number)).returncode == -signal.SIGKILL, what
        outcome = run([*command, *AGAIN])
        if outcome.returncode or result(saved, step) != whole.result or leftovers(saved):
            return number, what, outcome.stderr
        shutil.rmtree(saved.parent)

    wrong = [failed for failed in two_at_a_time(kill, enumerate(whole.points)) if failed]
    print(f"killed at {len(whole.points)} points of step {step}: {', '.join(whole.points)}")
    assert not wrong


def test_killed_before_each_change_of_a_file_while_it_overwrites(root, step_1, place):
    """At no point does the step count as finished with what no whole run made.

    The step is overwritten with other settings. Killed, it either has the old results or the new ones,
    or counts as unfinished. The same command brings the new results, with --resume auto where that is
    not refused, and with --overwrite in any case.
    """
    changes = {**STEP_1, "mem_size": 5, "pos_weight": 3}
    new = copy(step_1.folder, place / "new" / "saved")
    noted = place / "points"
    outcome = run([*flags(root, new, **changes), "--overwrite"], prepare=note_changes(noted))
    assert outcome.returncode == 0, outcome.stderr
    expected, points = result(new), noted.read_text().splitlines()
    assert expected != step_1.result
    resumed = []

    def kill(case):
        number, what = case
        saved = copy(step_1.folder, place / f"{number}" / "saved")
        command = flags(root, saved, **changes)
        killed = run([*command, "--overwrite"], prepare=kill_before(number))
        assert killed.returncode == -signal.SIGKILL, what
        if has_results(saved / "models" / RUN / "step_1"):
            found = result(saved)
            if found != step_1.result and found != expected:
                return number, what, "counts as finished"
        outcome = run([*command, *AGAIN])
        if refused(outcome):
            outcome = run([*command, "--overwrite"])
        else:
            resumed.append(number)
        if outcome.returncode or result(saved) != expected or leftovers(saved):
            return number, what, outcome.stderr
        shutil.rmtree(saved.parent)

    wrong = [failed for failed in two_at_a_time(kill, enumerate(points)) if failed]
    print(f"killed at {len(points)} points of an overwrite, {len(resumed)} of them resumed: {points}")
    assert not wrong


@pytest.mark.parametrize("step", [0, 1])
def test_killed_at_random_moments(step, root, step_0, step_1, place):
    whole, changes = [(step_0, {}), (step_1, STEP_1)][step]
    draw, moments = random.Random(step), []

    def start(number):
        saved = place / f"{number}" / "saved"
        if step:
            copy(step_0.folder, saved)
        return flags(root, saved, **changes)

    started = time.monotonic()
    two_at_a_time(lambda number: run(start(number)), (-2, -1))
    seconds = time.monotonic() - started  # how long a run takes beside another one

    def kill(number):
        command, moment = start(number), draw.uniform(0, seconds)
        begun = Run(command)
        time.sleep(moment)
        begun.process.kill()
        if begun.end().returncode == -signal.SIGKILL:
            moments.append(round(moment / seconds, 2))
        outcome = run([*command, *AGAIN])
        saved = place / f"{number}" / "saved"
        if outcome.returncode or result(saved, step) != whole.result or leftovers(saved):
            return number, outcome.stderr
        shutil.rmtree(saved.parent)

    wrong = [failed for failed in two_at_a_time(kill, range(15)) if failed]
    print(f"killed {len(moments)} of 15 in step {step}, at these parts of it: {sorted(moments)}")
    assert not wrong and len(moments) > 5


def test_the_script_itself_killed_twice(root, step_0, step_1, place):
    """As a user runs it, with a process of its own; killed in each of its epochs."""
    saved = copy(step_0.folder, place / "saved")
    command = ["train_voc.py", *flags(root, saved, **STEP_1), *AGAIN]
    for epoch in (1, 2):
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=PROJECT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for line in process.stdout:
            if line.startswith(f"epoch {epoch}/2"):
                break
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0)
        process.stdout.close()
    outcome = run_script(*command)
    assert outcome.returncode == 0, outcome.stderr
    assert result(saved) == step_1.result


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT], ids=lambda kind: kind.name)
def test_a_signal_ends_it_in_seconds_with_the_line_that_says_how_to_go_on(kind, root, step_0, place):
    saved = copy(step_0.folder, place / "saved")
    command = flags(root, saved, **{**STEP_1, "epochs": 300})
    begun = Run(command)
    last = saved / "models" / RUN / "step_1" / "last.pth"
    while not last.is_file():
        assert begun.exitcode() is None
        time.sleep(0.05)
    started = time.monotonic()
    os.kill(begun.process.pid, kind)
    outcome = begun.end()
    assert time.monotonic() - started < 10
    assert "--resume auto goes on" in error_line(outcome)
    assert "unreadable" not in str(result(saved)) and not leftovers(saved)
