"""Experiments as real processes: results, repetition, kills and failures; and what is refused."""

import contextlib
import csv
import fcntl
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configs.options import load_config
from data_loader.tasks import get_task
from scripts import run_experiments
from scripts.results import (
    COLUMNS,
    group_means,
    keep_former,
    read_comparisons,
    row,
    write_results,
)
from scripts.run_experiments import main, make_places, plan, read_experiment
from tests.helpers import CLASS_NAMES, PROJECT, code_of, error_line, small_config, snapshot
from utils.checkpoint import (
    content_digest,
    final_checkpoint,
    read_checkpoint,
    save_checkpoint,
    write_json,
)
from utils.metrics import METRICS

GROUPS = {"old": "old", "new": "new", "all": "overall", "hIoU": "harmonic"}
METHODS = {"image replay": "--replay image", "EIR": ""}
PYTHON = f"env OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= {sys.executable}"
FAKE = """\
echo "threads ${OMP_NUM_THREADS-all}, gpu $CUDA_VISIBLE_DEVICES, $*"
for epoch in 1 2 3; do
    echo "epoch $epoch/3 iteration 5/5: loss 1.2345, lr 1.00e-02, 35.1 images/s"
    sleep $SECONDS_AN_EPOCH
done
"""


class Place:
    """An experiment's file, and beside it the folder of its runs."""

    def __init__(self, folder: Path, root: Path):
        self.file, self.saved, self.root = folder / "tiny.json", folder / "saved", root
        self.write()

    def write(self, **changes) -> None:
        content = {
            "save_dir": "another",
            "config": "configs/config_synthetic.json",
            "tasks": ["10-10"],
            "setting": "overlap",
            "seeds": [1],
            "flags": shlex.join(["--data_root", str(self.root), "--crop_size", "32"])
            + " --num_workers 0 --mem_size 8",
            "step_0": "--epochs 2",
            "later": "--epochs 5 --freeze_bn --lr 0.001",
            "joint": "",
            "methods": METHODS,
            **changes,
        }
        self.file.write_text(json.dumps(content))

    def command(self, *more) -> list[str]:
        places = () if "--gpus" in more else ("--jobs", 2)
        words = ["scripts/run_experiments.py", self.file, "--save_dir", self.saved, *places, *more]
        return list(map(str, words))

    def start(self, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *self.command()],
            cwd=PROJECT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def step(self, method: str, step: int = 1, kind: str = "models", task: str = "10-10") -> Path:
        return self.saved / kind / f"overlap_{task}_{method}-seed1" / f"step_{step}"

    def remove(self, method: str) -> None:
        """Forget the last step of a method."""
        for kind in ("models", "log"):
            shutil.rmtree(self.step(method, kind=kind))

    def logs(self) -> dict[str, str]:
        """What each call has printed, by the name of its log."""
        return {path.stem: path.read_text() for path in (self.saved / "calls").iterdir()}

    def rows(self) -> list[dict[str, str]]:
        with open(self.saved / "tiny" / "results.csv", newline="") as file:
            return list(csv.DictReader(file))

    def numbers(self) -> list[dict[str, str]]:
        """The rows without what differs between two runs of the same."""
        return [{k: v for k, v in r.items() if k not in ("seconds", "peak_mib")} for r in self.rows()]

    def is_free(self) -> bool:
        """True if no process holds the lock."""
        with open(self.saved / ".lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True


class Output(io.StringIO):
    """What a call prints, as if on a terminal or not."""

    terminal = False

    def isatty(self):
        return self.terminal


def call(place: Place, *more, launcher: str = "false", terminal: bool = False) -> SimpleNamespace:
    """Run the script in this process, with another command in place of Python: one that fails."""
    out, err = Output(), io.StringIO()
    out.terminal = terminal
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setenv("LAUNCHER", launcher)
        patch.setattr(sys, "argv", place.command(*more))
        code = code_of(main)
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
    text = out.getvalue()
    return SimpleNamespace(returncode=code, stdout=text, stderr=err.getvalue())


@pytest.fixture(scope="module")
def finished(voc_root, tmp_path_factory):
    """A whole experiment, to be read only, and what the runner said."""
    place = Place(tmp_path_factory.mktemp("experiment"), voc_root)
    place.said = call(place, launcher=PYTHON)
    assert place.said.returncode == 0, place.said.stderr
    return place


@pytest.fixture
def place(finished, tmp_path):
    """A copy of the finished experiment that a test may change."""
    shutil.copytree(finished.saved, tmp_path / "saved", ignore=shutil.ignore_patterns("last.pth"))
    return Place(tmp_path, finished.root)


@pytest.fixture
def fresh(tmp_path, voc_root):
    """An experiment of which nothing has been run."""
    return Place(tmp_path, voc_root)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A launcher that prints like a training of three epochs and trains nothing."""
    monkeypatch.setenv("SECONDS_AN_EPOCH", "0")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setattr(run_experiments, "cores", lambda: 8)
    monkeypatch.setattr(run_experiments, "has_results", lambda folder: True)
    (tmp_path / "fake.sh").write_text(FAKE)
    return f"sh {tmp_path / 'fake.sh'}"


def lines_of(output, kind):
    return [line for line in output.splitlines() if line.startswith(f"{kind} ")]


def wait_for(condition, process):
    """Wait until condition() is true, at most a minute and while the process lives."""
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


class TestWholeExperiment:
    def test_what_is_said(self, finished):
        assert finished.said.stderr == ""
        assert len(lines_of(finished.said.stdout, "started")) == 3
        ended = lines_of(finished.said.stdout, "finished")
        assert ended[0] == "finished    10-10 step0, seed 1, step 0"
        assert set(ended[1:]) == {f"finished    10-10 {method}, seed 1, step 1" for method in METHODS}
        assert len(list((finished.saved / "models").glob("*/*"))) == 3
        assert finished.said.stdout.endswith(f"results     {finished.saved}/tiny/results.csv\n")

    def test_rows_are_what_the_steps_have_on_disk(self, finished):
        rows = finished.rows()
        assert tuple(rows[0]) == (*COLUMNS, *CLASS_NAMES[1:])
        assert [(r["method"], r["step"]) for r in rows] == [
            ("image replay", "0"), ("image replay", "1"), ("EIR", "0"), ("EIR", "1")
        ]  # fmt: skip
        assert [rows[0][c] for c in COLUMNS[1:]] == [rows[2][c] for c in COLUMNS[1:]]
        names = (("step0", 0), ("image-replay", 1), ("step0", 0), ("EIR", 1))
        for r, (name, step) in zip(rows, names, strict=True):
            assert (r["task"], r["setting"], r["seed"]) == ("10-10", "overlap", "1")
            assert r["val_images"] == "20"
            metrics = json.loads((finished.step(name, step) / "metrics.json").read_text())
            iou = metrics["Mean_Intersection_over_Union"]
            known = iou["by_class"]
            assert {n: r[n] for n in CLASS_NAMES} == {n: str(known.get(n, "")) for n in CLASS_NAMES}
            for column, group in GROUPS.items():
                value = -1 if iou[group] is None else iou[group]
                assert float(r[column] or -1) == pytest.approx(value, rel=1e-12)
            log = finished.step(name, step, kind="log") / "metrics.jsonl"
            epochs = [json.loads(line) for line in log.read_text().splitlines()]
            assert float(r["seconds"]) == pytest.approx(sum(e["seconds"] for e in epochs))
            assert float(r["peak_mib"]) == max(e["peak_mib"] for e in epochs)
            files = list((finished.step(name, step) / "memory").glob("*"))
            assert r["memory_entries"] == ("8" if step else "")
            assert r["memory_bytes"] == (str(sum(f.stat().st_size for f in files)) if step else "")

    def test_again_nothing_is_trained(self, finished):
        before = snapshot(finished.saved)
        again = call(finished)
        assert again.returncode == 0 and again.stderr == ""
        assert again.stdout == f"results     {finished.saved}/tiny/results.csv\n"
        assert snapshot(finished.saved) == before


class TestKilled:
    def test_terminated_it_ends_its_calls_and_the_same_command_goes_on(self, finished, place):
        place.remove("EIR")
        runner = place.start()
        wait_for((place.step("EIR") / "last.pth").is_file, runner)
        runner.terminate()
        out, err = runner.communicate(timeout=60)
        assert runner.returncode == 2 and not lines_of(out, "finished")
        assert err == "error: interrupted: run the same command to resume\n"
        assert place.is_free() and not (place.step("EIR") / "metrics.json").exists()
        assert len(place.rows()) == 2

        others = snapshot(place.step("image-replay")), snapshot(place.step("step0", 0))
        again = call(place, launcher=PYTHON)
        assert again.returncode == 0, again.stderr
        assert lines_of(again.stdout, "finished") == ["finished    10-10 EIR, seed 1, step 1"]
        assert "resumed after epoch" in place.logs()["overlap_10-10_EIR-seed1_1"]
        assert (snapshot(place.step("image-replay")), snapshot(place.step("step0", 0))) == others
        a, b = (
            read_checkpoint(p.step("EIR") / "checkpoint-epoch5.pth")["state_dict"]
            for p in (place, finished)
        )
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        assert snapshot(place.step("EIR") / "memory") == snapshot(finished.step("EIR") / "memory")
        assert place.numbers() == finished.numbers()

    def test_killed_it_leaves_a_call_that_nobody_disturbs(self, fresh, tmp_path):
        (tmp_path / "waits.sh").write_text(
            f"echo $$ >{tmp_path}/pid.part; mv {tmp_path}/pid.part "
            f"{tmp_path}/pid; read line <{tmp_path}/go"
        )
        os.mkfifo(tmp_path / "go")
        runner = fresh.start(LAUNCHER=f"sh {tmp_path}/waits.sh")
        wait_for((tmp_path / "pid").is_file, runner)
        runner.kill()
        runner.communicate()
        before = snapshot(fresh.saved)
        assert "experiments are running in" in error_line(call(fresh))
        assert snapshot(fresh.saved) == before
        (tmp_path / "go").write_text("\n")
        end = time.monotonic() + 10
        while not fresh.is_free():
            assert time.monotonic() < end
            time.sleep(0.01)


class TestFailures:
    def test_a_method_that_fails_is_a_line_and_the_others_go_on(self, place, tmp_path):
        place.remove("EIR")
        place.write(methods={"broken": "", **METHODS})
        (tmp_path / "launcher").write_text(
            'case "$*" in *broken*) echo working; echo "error: no data"; exit 2;; esac\n'
            f'exec {PYTHON} "$@"\n'
        )
        result = call(place, "--jobs", 1, launcher=f"sh {tmp_path}/launcher")
        log = place.saved / "calls" / "overlap_10-10_broken-seed1_1.txt"
        error = f"step 1 ended with code 2: error: no data ({log})"
        assert result.returncode == 1
        assert result.stderr == f"failed      10-10 broken, seed 1: {error}\n"
        assert lines_of(result.stdout, "finished") == ["finished    10-10 EIR, seed 1, step 1"]
        assert [r["method"] for r in place.rows()] == [*["image replay"] * 2, "EIR", "EIR"]

    def test_a_table_with_rows_of_runs_that_are_gone_is_kept(self, place):
        folder = place.saved / "tiny"
        before = (folder / "results.csv").read_bytes()
        place.remove("EIR")
        result = call(place)
        kept = folder / "results_until_1.csv"
        assert result.returncode == 1
        assert len(lines_of(result.stdout, "kept")) == 1 and str(kept) in result.stdout
        assert kept.read_bytes() == before
        assert [r["method"] for r in place.rows()] == ["image replay", "image replay"]
        shutil.rmtree(place.saved / "models")
        assert call(place).returncode == 1
        assert place.rows() == [] and kept.read_bytes() == before
        with open(folder / "results_until_2.csv", newline="") as file:
            assert [r["method"] for r in csv.DictReader(file)] == ["image replay", "image replay"]
        (folder / "results.csv").write_bytes(b"\xff")
        assert "results_until_3.csv" in call(place).stdout
        assert (folder / "results_until_3.csv").read_bytes() == b"\xff"

    def test_a_table_of_another_setting_is_kept(self, tmp_path):
        path = tmp_path / "results.csv"
        row = {"method": "EIR", "task": "5-3", "setting": "overlap", "seed": 1, "step": 0}
        write_results(path, [row])
        assert keep_former(path, [row]) is None
        assert keep_former(path, [{**row, "setting": "disjoint"}]) == tmp_path / "results_until_1.csv"

    def test_a_launcher_that_returns_before_its_training(self, fresh):
        result = call(fresh, launcher="true")
        assert result.returncode == 1 and not lines_of(result.stdout, "finished")
        (line,) = result.stderr.splitlines()
        assert line.startswith("failed      10-10 step0, seed 1: step 0 ended without results in ")

    def test_a_finished_step_with_other_settings_is_named_and_kept(self, place):
        before = snapshot(place.saved / "models")
        place.write(methods={**METHODS, "EIR": "--kd 3"})
        result = call(place)
        assert result.returncode == 1 and not lines_of(result.stdout, "started")
        (line,) = result.stderr.splitlines()
        assert line.startswith("failed      10-10 EIR, seed 1: ") and "--save_dir" in line
        assert str(place.step("EIR")) in line and "(--kd 5.0, now 3.0)" in line
        assert snapshot(place.saved / "models") == before
        assert [r["method"] for r in place.rows()] == ["image replay", "image replay"]

    def test_what_is_not_asked_for_and_cannot_be_collected_is_named(self, place):
        place.write(methods={**METHODS, "EIR": "--kd 3"})
        result = call(place, "--methods", "image replay")
        (line,) = result.stderr.splitlines()
        assert result.returncode == 0
        assert line.startswith("left out    10-10 EIR, seed 1: ") and "(--kd 5.0, now 3.0)" in line
        assert [r["method"] for r in place.rows()] == ["image replay", "image replay"]
        place.write()
        (place.step("EIR") / "memory/manifest.json").write_text("{")
        result = call(place, "--methods", "image replay")
        (line,) = result.stderr.splitlines()
        assert line.startswith("left out    10-10 EIR, seed 1: ") and "cannot read the memory" in line
        assert result.returncode == 0 and len(place.rows()) == 2

    def test_finished_steps_of_another_data_root_are_named(self, place, tmp_path):
        os.symlink(place.root, tmp_path / "moved")
        moved = Place(tmp_path, tmp_path / "moved")
        assert not lines_of(call(moved).stdout, "otherwise")
        moved = Place(tmp_path, tmp_path / "other")
        lines = lines_of(call(moved).stdout, "otherwise")
        assert len(lines) == 3 and all(f"was trained on {place.root}, not on" in line for line in lines)
        assert len(place.rows()) == 4

    def test_what_a_step_warns_of_is_said_once(self, place):
        """And not again where a step is trained anew without it."""
        place.write(methods={"one": "--warmup 1000", "two": "--warmup 1000"}, later="--epochs 1")
        lines = lines_of(call(place, launcher=PYTHON).stdout, "warning")
        for words in ("the learning rate never reaches its value", "batch normalisation is trained"):
            (line,) = [line for line in lines if words in line]
            assert re.match(r"warning     10-10 (one|two), seed 1, step 1: ", line)
        shutil.rmtree(place.step("one"))
        place.write(methods={"one": ""}, later="--epochs 1 --freeze_bn")
        lines = lines_of(call(place, launcher=PYTHON).stdout, "warning")
        assert lines and not any("never reaches" in line or "is trained" in line for line in lines)

    def test_a_finished_step_with_another_batch_is_named(self, place):
        place.write(methods={**METHODS, "EIR": "--bs 3"})
        result = call(place)
        assert result.returncode == 1
        (line,) = result.stderr.splitlines()
        assert line.startswith("failed      10-10 EIR, seed 1: ") and "images, not 3" in line
        assert [r["method"] for r in place.rows()] == ["image replay", "image replay"]

    def test_steps_are_stale_where_their_step_0_is_another_model_now(self, place):
        base = place.step("step0", 0)
        path = final_checkpoint(base)
        content = read_checkpoint(path)
        next(iter(content["state_dict"].values())).add_(1)
        save_checkpoint(path, content)
        made_from = json.loads((base / "made_from.json").read_text())
        made_from["final"] = content_digest(path)  # as if it had been trained anew
        (base / "made_from.json").write_text(json.dumps(made_from))
        result = call(place)
        assert result.returncode == 1
        for line, method in zip(result.stderr.splitlines(), METHODS, strict=True):
            assert line.startswith(f"failed      10-10 {method}, seed 1: ")
            assert f"was trained from another model of step 0 than {path} is now" in line
        assert place.rows() == []

    def test_nothing_starts_from_a_step_0_with_other_settings(self, place):
        place.remove("EIR")
        place.write(step_0="--epochs 3")
        result = call(place)
        assert result.returncode == 1 and not lines_of(result.stdout, "started")
        (line,) = result.stderr.splitlines()
        assert line.startswith("failed      10-10 step0, seed 1: ") and "--epochs 2, now 3" in line
        assert place.rows() == []

    def test_a_launcher_that_is_not_there(self, fresh):
        result = call(fresh, launcher="no_such_launcher")
        assert result.returncode == 1 and "cannot start no_such_launcher" in result.stderr


class TestWhatIsRun:
    @pytest.mark.parametrize(
        ("flags", "folders"),
        [
            (("--seeds", 2), ["joint_joint-seed2", "10-10_step0-seed2", "15-5_step0-seed2"]),
            (("--methods", "EIR", "--seeds", 1), ["10-10_step0-seed1", "15-5_step0-seed1"]),
            (("--methods", "joint"), ["joint_joint-seed1", "joint_joint-seed2"]),
        ],
    )
    def test_only_what_is_asked_for_and_what_it_needs(self, fresh, flags, folders):
        fresh.write(seeds=[1, 2], tasks=["10-10", "15-5"], joint="--epochs 1")
        result = call(fresh, *flags)
        assert result.returncode == 1 and len(result.stderr.splitlines()) == len(folders)
        assert set(fresh.logs()) == {f"overlap_{folder}_0" for folder in folders}

    def test_only_step_1_starts_from_the_shared_step_0(self, fresh, fake):
        fresh.write(tasks=["10-5"])
        base = fresh.step("step0", 0, task="10-5")
        base.mkdir(parents=True)
        (base / "checkpoint-epoch1.pth").touch()
        assert call(fresh, launcher=fake).returncode == 0
        logs = fresh.logs()
        for method in ("EIR", "image-replay"):
            first, second = (logs[f"overlap_10-5_{method}-seed1_{step}"] for step in (1, 2))
            assert f"--prev_checkpoint {base}/checkpoint-epoch1.pth\n" in first
            assert "--task_step 1" in first and "--task_step 2" in second
            assert "--prev_checkpoint" not in second

    def test_calls_share_the_cores_unless_they_are_told_their_threads(self, fresh, fake, monkeypatch):
        def threads(*flags):
            shutil.rmtree(fresh.saved, ignore_errors=True)
            assert call(fresh, *flags, launcher=fake).returncode == 0
            return [log.split(",")[0].split()[1] for _, log in sorted(fresh.logs().items())]

        assert threads("--jobs", 2) == ["4", "4", "all"]  # EIR, image replay, step 0
        assert threads("--jobs", 3) == ["4", "4", "all"]
        assert threads("--jobs", 1) == threads("--methods", "EIR") + ["all"] == ["all"] * 3
        fresh.write(seeds=[1, 2])
        assert threads("--jobs", 3) == ["2"] * 6  # a step 0 beside what starts from the other
        fresh.write(joint="--epochs 1")
        assert threads("--jobs", 3) == ["2"] * 4  # a step 0 beside joint training
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        assert threads("--jobs", 2) == ["7"] * 4

    def test_no_place_is_idle_while_another_step_0_is_trained(self, fresh, fake, monkeypatch):
        monkeypatch.setenv("SECONDS_AN_EPOCH", "0.5")
        fresh.write(seeds=[1, 2, 3], methods={"EIR": ""})
        lines = call(fresh, launcher=fake).stdout.splitlines()
        begin = next(
            i for i, line in enumerate(lines) if line.startswith("started     10-10 EIR, seed 1")
        )
        assert "finished    10-10 step0, seed 1, step 0" in lines[:begin]
        assert "finished    10-10 step0, seed 3, step 0" in lines[begin:]

    def test_a_call_at_a_time_on_each_gpu(self, fresh, fake, monkeypatch):
        assert call(fresh, "--gpus", "1,0", launcher=fake).returncode == 0
        gpus = {name: log.split(", ")[1] for name, log in fresh.logs().items()}
        assert gpus["overlap_10-10_step0-seed1_0"] == "gpu 5"
        assert sorted(gpus.values()) == ["gpu 4", "gpu 5", "gpu 5"]
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        assert make_places(1, "0,2") == ["0", "2"]

    def test_the_configuration_is_the_projects_and_other_paths_are_the_callers(
        self, fresh, fake, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        fresh.saved = Path("here")
        assert call(fresh, launcher=fake).returncode == 0
        log = (tmp_path / "here/calls/overlap_10-10_EIR-seed1_1.txt").read_text()
        assert f"-c {PROJECT}/configs/config_synthetic.json --save_dir here " in log


class TestProgress:
    def test_in_a_log(self, fresh, fake, monkeypatch):
        monkeypatch.setattr(run_experiments, "LOG_SECONDS", 0.1)
        monkeypatch.setenv("SECONDS_AN_EPOCH", "0.5")
        lines = lines_of(call(fresh, launcher=fake).stdout, "running")
        assert lines[0].startswith("running     0/3 steps done | 10-10 step0/1 step 0: ")
        assert any(re.fullmatch(
            r"running     1/3 steps done, about \d s to go \| "
            r"10-10 image replay/1 step 1: epoch 2/3, loss 1.2345, \d s to go \| "
            r"10-10 EIR/1 step 1: epoch 2/3, loss 1.2345, \d s to go", line
        ) for line in lines)  # fmt: skip
        assert len(set(lines)) == len(lines)

    def test_on_a_terminal_that_is_wide_or_narrow(self, fresh, fake, monkeypatch):
        monkeypatch.setenv("SECONDS_AN_EPOCH", "0.5")
        monkeypatch.setenv("COLUMNS", "80")
        out = call(fresh, launcher=fake, terminal=True).stdout
        assert not lines_of(out, "running")
        shown = [line for line in out.replace("\n", "\r").split("\r") if "/3 steps" in line]
        assert "0/3 steps done | 10-10 step0/1 step 0: epoch 1/3, loss 1.2345" in shown
        narrow = r"1/3 steps, \d s \| image replay/1 step 1: 2/3, \d s \| EIR/1 step 1: 2/3, \d s"
        assert any(re.fullmatch(narrow, line) for line in shown)
        assert max(map(len, shown)) < 80
        monkeypatch.setenv("COLUMNS", "20")
        assert "0/3 steps | step0/1" in call(fresh, launcher=fake, terminal=True).stdout.split("\r")


BAD = {
    "no JSON": (b'{"tasks": ', "is not valid JSON"),
    "a key twice": (b'{"tasks": ["5-3"], "tasks": ["15-1"]}', 'the key "tasks" stands twice'),
    "a key too many": ({"more": 1}, "lacking: none; unknown: more"),
    "no keys": (b'{"tasks": ["5-3"], "setting": "overlap"}', "lacking: save_dir, config, seeds, flags"),
    "tasks: text": ({"tasks": "10-10"}, "tasks must be a list"),
    "tasks: unknown": ({"tasks": ["7-4"]}, "unknown task '7-4'"),
    "seeds: text": ({"seeds": ["a"]}, "seeds must be a list of integers"),
    "seeds: true": ({"seeds": [True]}, "seeds must be a list of integers"),
    "seeds: negative": ({"seeds": [-1]}, "--seed is -1"),
    "methods: list of flags": ({"methods": {"x": ["--kd", "3"]}}, "methods must be an object"),
    "methods: same folder": ({"methods": {"a b": "", "a/b": ""}}, "two of the methods"),
    "methods: step0": ({"methods": {"step0": ""}}, "step0 and joint are taken"),
    "methods: unknown flag": ({"methods": {"x": "--no_such_flag 3"}}, "--no_such_flag"),
    "methods: impossible value": ({"methods": {"x": "--kd much"}}, "--kd must be a number"),
    "methods: open quote": ({"methods": {"x": "--replay 'image"}}, "cannot read the flags"),
    "methods: a flag of the runner": ({"methods": {"x": "--seed 3"}}, "x: --seed is not a flag"),
    "methods: a device": ({"methods": {"x": "-d 0"}}, "x: -d is not a flag"),
    "flags: number": ({"flags": 3}, "flags must be flags"),
    "joint: unknown flag": ({"joint": "--no_such_flag"}, "--no_such_flag"),
    "config: missing file": (
        {"config": "nowhere.json"},
        f"cannot read {PROJECT}/nowhere.json",
    ),
}


class TestBadInput:
    """One clear line, exit code 2, and nothing created."""

    @pytest.mark.parametrize("kind", BAD)
    def test_in_the_file(self, fresh, kind):
        content, words = BAD[kind]
        if isinstance(content, bytes):
            fresh.file.write_bytes(content)
        else:
            fresh.write(**content)
        result = call(fresh)
        assert words in error_line(result) and result.stdout == ""
        assert not fresh.saved.exists()

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (("--seeds", 3), "has no 3: its seeds are 1"),
            (("--methods", "EIR", "DKD"), "has no DKD: its methods are image replay, EIR"),
            (("--methods", "joint"), "has no joint: its methods are image replay, EIR"),
            (("--jobs", 0), "--jobs is 0"),
            (("--gpus", "0,"), "give indices of CUDA_VISIBLE_DEVICES=4,5"),
            (("--gpus", "2"), "give indices of CUDA_VISIBLE_DEVICES=4,5"),
            (("--gpus", "0,-1"), "give indices of CUDA_VISIBLE_DEVICES=4,5"),
        ],
    )
    def test_in_the_flags(self, fresh, monkeypatch, flags, words):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
        result = call(fresh, *flags)
        assert words in error_line(result) and result.stdout == ""
        assert not fresh.saved.exists()

    @pytest.mark.parametrize("flag", ["--save_dir", "--output"])
    def test_a_folder_that_is_a_file(self, fresh, tmp_path, flag):
        (tmp_path / "file").write_text("kept")
        line = error_line(call(fresh, flag, tmp_path / "file"))
        assert "cannot write" in line and str(tmp_path / "file") in line
        assert (tmp_path / "file").read_text() == "kept"
        assert not list(fresh.saved.glob("calls/*"))


@pytest.mark.parametrize(
    "path", sorted((PROJECT / "configs/experiments").glob("*.json")), ids=lambda path: path.name
)
def test_the_experiments_that_are_here_can_be_run(path, tmp_path):
    experiment = read_experiment(path)
    experiment["seeds"] = experiment["seeds"][-1:]  # saves time
    bases, others = plan(experiment, str(tmp_path / "saved"))
    tasks, has_dkd = len(experiment["tasks"]), "DKD" in experiment["methods"]
    assert len(bases) == tasks * (1 + has_dkd)
    assert len(others) == tasks * (len(experiment["methods"]) + bool(experiment["joint"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"methods": {**METHODS, "whole": "--eval_crop off"}},
        {"later": "--crop_size 64"},
        {"joint": "--crop_size 64"},
    ],
)
def test_methods_that_are_tested_in_different_ways_are_refused(fresh, changes):
    fresh.write(**changes)
    assert "would be tested in different ways" in error_line(call(fresh))
    assert not fresh.saved.exists()


def test_methods_of_another_training_share_a_step_0_of_their_own(fresh, tmp_path):
    dkd = "--method dkd --ac 1 --replay"
    more = {"DKD": f"{dkd} none", "DKD-M": f"{dkd} image", "more ac": f"{dkd} none --ac 2"}
    fresh.write(methods={**METHODS, **more})
    bases, others = plan(read_experiment(fresh.file), str(tmp_path / "saved"))
    names = ["step0", "step0-dkd-ac1", "step0-dkd-ac2"]
    assert [base.method for base in bases] == names
    assert [bases.index(s.base) for s in others] == [0, 0, 1, 1, 2]
    configs = [base.steps[0][1] for base in bases]
    assert [c.method for c in configs] == ["eir", "dkd", "dkd"]
    assert [c.hyperparameter.ac for c in configs] == [0, 1, 2]
    assert [c.trainer.epochs for c in configs] == [2, 2, 2]
    assert [c.name for c in configs] == [f"{name}-seed1" for name in names]
    assert [c.step_dir().name for c in configs] == ["step_0"] * 3


def whole_metrics(iou):
    """What metrics.json holds, with this of the IoU."""
    metrics = {name: dict.fromkeys(GROUPS.values(), 1.0) for name in METRICS}
    metrics["Mean_Intersection_over_Union"] |= iou
    return metrics


IOU = {name: 1.5 * i * i + 3 for i, name in enumerate(CLASS_NAMES)}


class TestRow:
    """By plain sums, from files that are made up."""

    def expected(self, order, old, seen):
        a = [IOU["background"], *(IOU[CLASS_NAMES[c]] for c in order[:old])]
        b = [IOU[CLASS_NAMES[c]] for c in order[old:seen]]
        old, new = sum(a) / len(a), sum(b) / len(b)
        return {
            "old": old,
            "new": new,
            "all": (sum(a) + sum(b)) / (1 + seen),
            "hIoU": 2 / (1 / old + 1 / new),
        }

    @pytest.mark.parametrize(("name", "old"), [("15-1_b", 15), ("5-3", 5), ("19-1", 19)])
    def test_groups(self, name, old):
        task = get_task(name, "overlap")
        for step in range(1, len(task.steps)):
            found = group_means(IOU, task, step)
            assert found == pytest.approx(self.expected(task.order, old, len(task.seen(step))))
        first = group_means(IOU, task, 0)
        assert first["old"] == first["all"] and first["new"] is first["hIoU"] is None
        assert set(group_means(dict.fromkeys(CLASS_NAMES, 0.0), task, 1).values()) == {0.0}

    def test_a_class_of_a_columns_name(self, tmp_path):
        """ADE20K has a class "step"."""
        config = load_config(PROJECT / "configs/config_ade.json")[0]
        config.task.name, config.trainer.save_dir = "100-50", str(tmp_path)
        classes = config.data.dataset.classes
        task, rows = get_task("100-50", "overlap", classes), []
        iou = {name: float(number) for number, name in enumerate(["background", *classes])}
        for step in (0, 1):
            config.task.step = step
            seen = {name: iou[name] for name in task.class_names(step)}
            config.step_dir().mkdir(parents=True)
            write_json(config.step_dir() / "metrics.json", whole_metrics({"by_class": seen}))
            rows.append(row("EIR", task, 1, config))
        write_results(tmp_path / "results.csv", rows)
        (found,) = read_comparisons(tmp_path / "results.csv")
        assert found.task == task and found.values("EIR", "step").tolist() == [[0, 1]]
        for step in (0, 1):
            expected = [[iou[name] if name in task.class_names(s) else np.nan
                         for name in task.class_names(step)] for s in (0, 1)]  # fmt: skip
            assert np.array_equal(found.class_iou("EIR", step), [expected], equal_nan=True)

    def test_joint_training_without_a_log(self, voc_root, tmp_path):
        config = small_config(voc_root, tmp_path, task_name="joint", name="joint-seed7", seed=7)
        config.step_dir().mkdir(parents=True)
        metrics = whole_metrics({"by_class": IOU, "without_images": ["bus", "cow"]})
        write_json(config.step_dir() / "metrics.json", metrics)
        task = get_task("15-1_b", "overlap")
        found = row("joint", task, 7, config)
        assert set(found) <= {*COLUMNS, *CLASS_NAMES} and "seconds" not in found
        assert [name for name in found if name in CLASS_NAMES[1:]] == list(CLASS_NAMES[1:])
        assert (found["task"], found["step"], found["seed"]) == ("15-1_b", 5, 7)
        assert found["without_images"] == "bus; cow"
        groups = {column: found[column] for column in GROUPS}
        assert groups == pytest.approx(self.expected(task.order, 15, 20))
        assert {name: found[name] for name in CLASS_NAMES} == IOU
