"""Experiments as real processes: results, repetition, kills and failures; and what is refused."""

import contextlib
import csv
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data_loader.data_loaders import cores
from data_loader.tasks import CLASS_NAMES, get_task
from scripts.results import COLUMNS, group_means, row, write_results
from scripts.run_experiments import choose, collect, main, make_slots, plan, read_experiment
from tests.helpers import PROJECT, error_line, run_script, small_config, snapshot
from utils.checkpoint import read_checkpoint
from utils.errors import UserError

GROUPS = {"old": "old", "new": "new", "all": "overall", "hIoU": "harmonic"}
METHODS = {"image replay": "--replay image", "EIR": ""}


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
            "later": "--epochs 10 --freeze_bn",
            "joint": "--epochs 1",
            "methods": METHODS,
            **changes,
        }
        self.file.write_text(json.dumps(content))

    def command(self, *more) -> list[str]:
        words = ["scripts/run_experiments.py", self.file, "--save_dir", self.saved, "--jobs", 2, *more]
        return list(map(str, words))

    def run(self, *more) -> subprocess.CompletedProcess:
        return run_script(*self.command(*more))

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *self.command()],
            cwd=PROJECT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def step(self, method: str, step: int = 1, kind: str = "models", task: str = "10-10") -> Path:
        return self.saved / kind / f"overlap_{task}_{method}-seed1" / f"step_{step}"

    def remove(self, method: str) -> None:
        """Forget the last step of a method."""
        for kind in ("models", "log"):
            shutil.rmtree(self.step(method, kind=kind))

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


@pytest.fixture(scope="module")
def finished(voc_root, tmp_path_factory):
    """A whole experiment, to be read only, and what the runner said."""
    place = Place(tmp_path_factory.mktemp("experiment"), voc_root)
    place.said = place.run()
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
def call(monkeypatch, capsys):
    """Run the script in this process, with another command in place of Python: one that fails."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(place, *more, launcher="false"):
        monkeypatch.setenv("LAUNCHER", launcher)
        monkeypatch.setattr(sys, "argv", place.command(*more))
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=end.value.code, stdout=out, stderr=err)

    yield call
    signal.signal(signal.SIGTERM, handler)


def ended(output):
    """What the runner says of runs that have ended."""
    return [line for line in output.splitlines() if not line.startswith("started ")]


def children(pid):
    """Processes that a process has started."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in lists for child in path.read_text().split()]


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())["Mean_Intersection_over_Union"]


def wait_for(condition, process=None):
    """Wait until condition() is true, at most a minute and while the process lives."""
    end = time.monotonic() + 60
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


def same_model(one, other):
    a, b = (read_checkpoint(folder / "checkpoint-epoch10.pth")["state_dict"] for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class TestWholeExperiment:
    def test_what_is_said(self, finished):
        lines = ended(finished.said.stdout)
        titles = ["step0, step 0", "image replay, step 1", "EIR, step 1", "joint, step 0"]
        assert lines[0] == "finished    10-10 overlap, seed 1, step0, step 0"
        assert set(lines[:-1]) == {f"finished    10-10 overlap, seed 1, {title}" for title in titles}
        assert lines[-1] == f"results     {finished.saved}/tiny/results.csv" and len(lines) == 5
        assert finished.said.stderr == ""
        started = [x for x in finished.said.stdout.splitlines() if x.startswith("started ")]
        logs = {Path(line.rpartition(": ")[2]) for line in started}
        assert logs == set((finished.saved / "calls").iterdir()) and len(started) == 4

    def test_step_0_is_trained_once(self, finished):
        names = {f"{p.parent.name}/{p.name}" for p in (finished.saved / "models").glob("*/*")}
        assert names == {
            "overlap_10-10_step0-seed1/step_0",
            "overlap_10-10_image-replay-seed1/step_1",
            "overlap_10-10_EIR-seed1/step_1",
            "overlap_joint_joint-seed1/step_0",
        }
        said = (finished.saved / "calls" / "overlap_10-10_EIR-seed1_1.txt").read_text()
        assert "8 entries" in said and "epoch 10/10" in said

    def test_rows_and_columns(self, finished):
        header = (finished.saved / "tiny" / "results.csv").read_text().splitlines()[0]
        assert header.split(",") == list(COLUMNS)
        assert set(CLASS_NAMES) <= set(COLUMNS)
        rows = finished.rows()
        assert [(r["method"], r["step"]) for r in rows] == [
            ("image replay", "0"), ("image replay", "1"), ("EIR", "0"), ("EIR", "1"), ("joint", "1")
        ]  # fmt: skip
        for r in rows:
            assert (r["task"], r["setting"], r["seed"]) == ("10-10", "overlap", "1")
            assert r["val_images"] == "20"
            assert float(r["seconds"]) > 0 and float(r["peak_mib"]) > 50
        assert [rows[0][c] for c in COLUMNS[1:]] == [rows[2][c] for c in COLUMNS[1:]]

    def test_numbers_are_those_of_the_steps(self, finished):
        rows = finished.rows()
        folders = [
            finished.step("step0", 0),
            finished.step("image-replay"),
            finished.step("step0", 0),
            finished.step("EIR"),
        ]
        for r, folder in zip(rows, folders, strict=False):
            iou = metrics_of(folder)
            known = iou["by_class"]
            assert {n: r[n] for n in CLASS_NAMES} == {n: str(known.get(n, "")) for n in CLASS_NAMES}
            for column, group in GROUPS.items():
                if iou[group] is None:
                    assert r[column] == ""
                else:
                    assert float(r[column]) == pytest.approx(iou[group], rel=1e-12, abs=1e-12)
        assert float(rows[0]["old"]) > 0 and rows[0]["new"] == rows[0]["hIoU"] == ""

    def test_joint_training_is_grouped_like_the_last_step(self, finished):
        joint = finished.rows()[-1]
        iou = metrics_of(finished.step("joint", 0, task="joint"))["by_class"]
        values = [iou[name] for name in CLASS_NAMES]
        assert [joint[name] for name in CLASS_NAMES] == list(map(str, values))
        old, new = sum(values[:11]) / 11, sum(values[11:]) / 10
        expected = [old, new, sum(values) / 21, 2 * old * new / (old + new)]
        assert [float(joint[c]) for c in GROUPS] == pytest.approx(expected, rel=1e-12, abs=1e-12)

    def test_seconds_and_memory_are_what_is_on_disk(self, finished):
        base, whole, _, eir, joint = finished.rows()
        log = finished.step("EIR", kind="log") / "metrics.jsonl"
        epochs = [json.loads(line) for line in log.read_text().splitlines()]
        assert float(eir["seconds"]) == pytest.approx(sum(e["seconds"] for e in epochs))
        assert float(eir["peak_mib"]) == max(e["peak_mib"] for e in epochs)
        for r, method in ((whole, "image-replay"), (eir, "EIR")):
            files = list((finished.step(method) / "memory").iterdir())
            assert int(r["memory_entries"]) == sum(f.name.endswith("_label.png") for f in files) == 8
            assert int(r["memory_bytes"]) == sum(len(f.read_bytes()) for f in files)
        assert all(r[c] == "" for r in (base, joint) for c in ("memory_entries", "memory_bytes"))

    def test_again_nothing_is_trained(self, finished):
        def times():
            files = [p for p in finished.saved.rglob("*") if p.is_file() and p.name != "results.csv"]
            return {p: p.stat().st_mtime_ns for p in files}

        before, csv_before = times(), (finished.saved / "tiny" / "results.csv").read_bytes()
        again = finished.run()
        assert again.returncode == 0 and again.stderr == ""
        assert again.stdout == f"results     {finished.saved}/tiny/results.csv\n"
        assert times() == before
        assert (finished.saved / "tiny" / "results.csv").read_bytes() == csv_before


class TestKilled:
    def test_terminated_it_ends_its_children_and_the_same_command_goes_on(self, finished, place):
        place.remove("EIR")
        runner = place.start()
        wait_for((place.step("EIR") / "last.pth").is_file, runner)
        runner.terminate()
        out, err = runner.communicate(timeout=60)
        assert runner.returncode == 2 and ended(out) == []
        assert err == "error: interrupted: run the same command to resume\n"
        assert place.is_free()
        assert 1 <= read_checkpoint(place.step("EIR") / "last.pth")["epoch"] < 10
        assert not (place.step("EIR") / "metrics.json").exists()
        assert len(place.rows()) == 3

        others = snapshot(place.step("image-replay")), snapshot(place.step("step0", 0))
        again = place.run()
        assert again.returncode == 0, again.stderr
        assert ended(again.stdout)[0] == "finished    10-10 overlap, seed 1, EIR, step 1"
        said = (place.saved / "calls" / "overlap_10-10_EIR-seed1_1.txt").read_text()
        assert "resumed after epoch" in said
        assert (snapshot(place.step("image-replay")), snapshot(place.step("step0", 0))) == others
        assert same_model(place.step("EIR"), finished.step("EIR"))
        assert snapshot(place.step("EIR") / "memory") == snapshot(finished.step("EIR") / "memory")
        assert place.numbers() == finished.numbers()

    def test_killed_it_leaves_a_child_that_nobody_disturbs(self, finished, place, call):
        place.remove("EIR")
        runner = place.start()
        try:
            wait_for((place.step("EIR") / "last.pth").is_file, runner)
            (child,) = children(runner.pid)
            os.killpg(child, signal.SIGSTOP)  # so that it lives while it is looked at
            os.kill(runner.pid, signal.SIGKILL)
            assert runner.wait() == -signal.SIGKILL
            assert not (place.step("EIR") / "metrics.json").exists()
            before = snapshot(place.saved)
            assert "experiments are running in" in error_line(place.run())
            assert snapshot(place.saved) == before
            os.killpg(child, signal.SIGCONT)
            wait_for(place.is_free)
        except BaseException:
            for pid in (*children(runner.pid), runner.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise
        assert same_model(place.step("EIR"), finished.step("EIR"))
        again = call(place)
        assert again.returncode == 0 and again.stdout.startswith("results ")
        assert place.numbers() == finished.numbers()


class TestFailures:
    def test_a_method_that_fails_is_a_line_and_the_others_go_on(self, place, call, tmp_path):
        place.remove("EIR")
        place.write(methods={"broken": "--data_root nowhere", **METHODS})
        launcher = tmp_path / "launcher"  # trains the broken one only
        launcher.write_text(f'case "$*" in *broken*) exec {sys.executable} "$@";; esac\n')
        result = call(place, "--jobs", 1, launcher=f"sh {launcher}")
        assert result.returncode == 1
        (line,) = result.stderr.splitlines()
        assert line.startswith("failed      10-10 overlap, seed 1, broken: step 1 ended with code 2: ")
        log = place.saved / "calls" / "overlap_10-10_broken-seed1_1.txt"
        assert "error: data root nowhere does not exist" in line and line.endswith(f"({log})")
        assert ended(result.stdout)[0] == "finished    10-10 overlap, seed 1, EIR, step 1"
        assert [r["method"] for r in place.rows()] == ["image replay", "image replay", "joint"]

    def test_a_finished_step_with_other_settings_is_named_and_kept(self, finished, place, call):
        before = snapshot(place.saved / "models")
        place.write(methods={**METHODS, "EIR": "--kd 3"})
        result = call(place)
        assert result.returncode == 1 and result.stdout.startswith("results ")
        (line,) = result.stderr.splitlines()
        assert line.startswith("failed      10-10 overlap, seed 1, EIR: ")
        assert str(place.step("EIR")) in line and "(hyperparameter.kd)" in line
        assert "--save_dir" in line
        assert snapshot(place.saved / "models") == before
        assert [r["method"] for r in place.rows()] == ["image replay", "image replay", "joint"]
        place.write()
        _, others = plan(read_experiment(place.file), str(place.saved))
        write_results(place.saved / "tiny" / "results.csv", collect(others))
        assert place.rows() == finished.rows()

    def test_nothing_starts_from_a_step_0_with_other_settings(self, place, call):
        place.remove("EIR")
        before = snapshot(place.saved / "models")
        place.write(step_0="--epochs 3")
        result = call(place)
        assert result.returncode == 1 and result.stdout.startswith("results ")
        (line,) = result.stderr.splitlines()
        assert line.startswith("failed      10-10 overlap, seed 1, step0: ")
        assert "(trainer.epochs)" in line
        assert snapshot(place.saved / "models") == before
        assert [r["method"] for r in place.rows()] == ["joint"]


class TestWhatIsRun:
    def test_without_a_step_0_its_methods_are_left_out(self, fresh, call):
        fresh.write(seeds=[1, 2], joint="")
        result = call(fresh, "--jobs", 1)
        assert result.returncode == 1
        assert [line.partition(": ")[0] for line in result.stderr.splitlines()] == [
            "failed      10-10 overlap, seed 1, step0", "failed      10-10 overlap, seed 2, step0"
        ]  # fmt: skip
        assert fresh.rows() == []

    @pytest.mark.parametrize(
        ("flags", "folders"),
        [
            (("--seeds", 2), ["joint_joint-seed2", "10-10_step0-seed2", "15-5_step0-seed2"]),
            (("--methods", "EIR", "--seeds", 1), ["10-10_step0-seed1", "15-5_step0-seed1"]),
            (("--methods", "joint"), ["joint_joint-seed1", "joint_joint-seed2"]),
        ],
    )
    def test_only_what_is_asked_for_and_what_it_needs(self, fresh, call, flags, folders):
        fresh.write(seeds=[1, 2], tasks=["10-10", "15-5"])
        assert call(fresh, *flags).returncode == 1
        started = {path.name for path in (fresh.saved / "calls").iterdir()}
        assert started == {f"overlap_{folder}_0.txt" for folder in folders}

    def test_only_step_1_starts_from_the_shared_step_0(self, finished, fresh, call):
        fresh.write(tasks=["10-5"], joint="")
        base = fresh.step("step0", 0, task="10-5")
        shutil.copytree(finished.step("step0", 0), base)
        config = base / "config.json"
        config.write_text(config.read_text().replace('"10-10"', '"10-5"'))
        assert call(fresh, launcher="echo").returncode == 0
        for method in ("EIR", "image-replay"):
            logs = [fresh.saved / "calls" / f"overlap_10-5_{method}-seed1_{t}.txt" for t in (1, 2)]
            first, second = (log.read_text().split() for log in logs)
            assert first[-2:] == ["--prev_checkpoint", str(base / "checkpoint-epoch2.pth")]
            assert "--prev_checkpoint" not in second
            assert [words[words.index("--task_step") + 1] for words in (first, second)] == ["1", "2"]

    def test_chosen_runs(self, fresh):
        fresh.write(seeds=[1, 2], tasks=["10-10", "10-5"])
        experiment = read_experiment(fresh.file)
        bases, others = plan(experiment, "saved")
        assert len(bases) == 4 and len(others) == 2 * 2 * 3
        chosen = list(filter(choose(experiment, fresh.file, [2], ["EIR"]), others))
        assert [run.title for run in chosen] == [
            "10-10 overlap, seed 2, EIR", "10-5 overlap, seed 2, EIR"
        ]  # fmt: skip
        assert [len(run.calls) for run in chosen] == [1, 2]
        assert [c.task.step for c in chosen[1].configs] == [1, 2]
        assert all(run.base.configs[0].seed == 2 for run in chosen)


class TestSlots:
    def test_a_run_at_a_time_on_each_gpu(self, monkeypatch):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert make_slots(1, "0,2") == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "2"}]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
        assert make_slots(1, "1,0") == [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "4"}]

    def test_runs_share_the_cores(self, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert make_slots(1, None) == [{}]
        threads = str(max(1, cores() // 2))
        assert make_slots(2, None) == [{"OMP_NUM_THREADS": threads}] * 2
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        assert make_slots(2, None) == [{"OMP_NUM_THREADS": "7"}] * 2


BAD = {
    "no JSON": (b'{"tasks": ', "cannot read the experiment"),
    "no text": (b"\xff\xfe{}", "cannot read the experiment"),
    "a list": (b"[]", "must be a JSON object with these keys"),
    "a key too few": (b'{"tasks": ["10-10"]}', "with these keys and no other: save_dir, config"),
    "a key too many": ({"more": 1}, "with these keys and no other: save_dir, config"),
    "tasks: text": ({"tasks": "10-10"}, "tasks must be a list"),
    "tasks: none": ({"tasks": []}, "tasks must be a list"),
    "tasks: numbers": ({"tasks": [3]}, "tasks must be a list"),
    "tasks: twice": ({"tasks": ["10-10", "15-5", "10-10"]}, "two of the tasks"),
    "tasks: joint": ({"tasks": ["joint"]}, "joint are taken"),
    "tasks: unknown": ({"tasks": ["7-4"]}, "unknown task '7-4'"),
    "setting": ({"setting": "overlapping"}, "unknown setting 'overlapping'"),
    "seeds: text": ({"seeds": ["a"]}, "seeds must be a list of integers"),
    "seeds: text of a number": ({"seeds": ["1"]}, "seeds must be a list of integers"),
    "seeds: fraction": ({"seeds": [1.5]}, "seeds must be a list of integers"),
    "seeds: true": ({"seeds": [True]}, "seeds must be a list of integers"),
    "seeds: a number": ({"seeds": 1}, "seeds must be a list of integers"),
    "seeds: none": ({"seeds": []}, "seeds must be a list of integers"),
    "seeds: twice": ({"seeds": [1, 2, 1]}, "two of the seeds"),
    "seeds: negative": ({"seeds": [-1]}, "--seed is -1"),
    "methods: list": ({"methods": ["EIR"]}, "methods must be an object"),
    "methods: none": ({"methods": {}}, "methods must be an object"),
    "methods: number": ({"methods": {"x": 3}}, "methods must be an object"),
    "methods: list of flags": ({"methods": {"x": ["--kd", "3"]}}, "methods must be an object"),
    "methods: same folder": ({"methods": {"a b": "", "a/b": ""}}, "two of the methods"),
    "methods: joint": ({"methods": {"joint": ""}}, "step0 and joint are taken"),
    "methods: step0": ({"methods": {"step0": ""}}, "step0 and joint are taken"),
    "methods: unknown flag": ({"methods": {"x": "--no_such_flag 3"}}, "--no_such_flag"),
    "methods: impossible value": ({"methods": {"x": "--kd much"}}, "--kd must be a number"),
    "methods: open quote": ({"methods": {"x": "--replay 'image"}}, "cannot read the flags"),
    "methods: a flag of the runner": ({"methods": {"x": "--seed 3"}}, "x: --seed is not a flag"),
    "methods: its name": ({"methods": {"x": "--name=y"}}, "x: --name=y is not a flag"),
    "methods: overwrite": ({"methods": {"x": "--overwrite"}}, "x: --overwrite is not a flag"),
    "methods: a configuration": ({"methods": {"x": "--config=a.json"}}, "x: --config=a.json is not"),
    "methods: a device": ({"methods": {"x": "-d 0"}}, "x: -d is not a flag"),
    "flags: number": ({"flags": 3}, "flags must be flags"),
    "later: null": ({"later": None}, "later must be further flags"),
    "joint: unknown flag": ({"joint": "--no_such_flag"}, "--no_such_flag"),
    "config: missing file": ({"config": "nowhere.json"}, "cannot read the configuration nowhere.json"),
}


class TestBadInput:
    """One clear line, exit code 2, and nothing created."""

    @pytest.mark.parametrize("kind", BAD)
    def test_in_the_file(self, fresh, call, kind):
        content, words = BAD[kind]
        if isinstance(content, bytes):
            fresh.file.write_bytes(content)
        else:
            fresh.write(**content)
        result = call(fresh)
        assert words in error_line(result) and result.stdout == ""
        assert not fresh.saved.exists()

    def test_no_file(self, fresh, call):
        fresh.file.unlink()
        assert "No such file" in error_line(call(fresh))
        assert not fresh.saved.exists()

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (("--seeds", 3), "has no 3: its seeds are 1"),
            (("--methods", "EIR", "DKD"), "has no DKD: its methods are image replay, EIR"),
            (("--methods", "joint"), "has no joint: its methods are image replay, EIR"),
            (("--jobs", 0), "--jobs is 0"),
        ],
    )
    def test_in_the_flags(self, fresh, call, flags, words):
        fresh.write(joint="")
        result = call(fresh, *flags)
        assert words in error_line(result) and result.stdout == ""
        assert not fresh.saved.exists()

    @pytest.mark.parametrize("gpus", ["", "a", "0,", "0;1"])
    def test_gpus(self, gpus, monkeypatch):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        with pytest.raises(UserError, match="give indices such as"):
            make_slots(1, gpus)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
        with pytest.raises(UserError, match="give indices of CUDA_VISIBLE_DEVICES=4,5"):
            make_slots(1, "2")

    @pytest.mark.parametrize("flag", ["--save_dir", "--output"])
    def test_a_folder_that_is_a_file(self, fresh, call, tmp_path, flag):
        (tmp_path / "file").write_text("kept")
        line = error_line(call(fresh, flag, tmp_path / "file"))
        assert "cannot write" in line and str(tmp_path / "file") in line
        assert (tmp_path / "file").read_text() == "kept"
        assert not list(fresh.saved.glob("calls/*"))

    def test_as_a_process(self, fresh):
        fresh.write(methods={"x": "--no_such_flag"})
        assert "--no_such_flag" in error_line(fresh.run())
        assert not fresh.saved.exists()


@pytest.mark.parametrize(
    "path", sorted((PROJECT / "configs/experiments").glob("*.json")), ids=lambda path: path.name
)
def test_the_experiments_that_are_here_can_be_run(path, tmp_path):
    experiment = read_experiment(path)
    experiment["seeds"] = experiment["seeds"][-1:]  # saves time
    bases, others = plan(experiment, str(tmp_path / "saved"))
    assert len(bases) == len(experiment["tasks"])
    assert len(others) == len(bases) * (len(experiment["methods"]) + bool(experiment["joint"]))
    folders = [c.step_dir() for run in bases + others if run.method != "joint" for c in run.configs]
    assert len(set(folders)) == len(folders)
    for run in others:
        steps = [c.task.step for c in run.configs]
        assert steps == ([0] if run.method == "joint" else list(range(1, len(run.task.steps))))
        assert all(c.seed == run.seed for c in run.configs)
    assert list(tmp_path.iterdir()) == []


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

    def test_joint_training_without_a_log(self, voc_root, tmp_path):
        config = small_config(voc_root, tmp_path, task_name="joint", name="joint-seed7", seed=7)
        config.step_dir().mkdir(parents=True)
        metrics = {"Mean_Intersection_over_Union": {"by_class": IOU}}
        (config.step_dir() / "metrics.json").write_text(json.dumps(metrics))
        task = get_task("15-1_b", "overlap")
        found = row("joint", task, 7, config)
        assert set(found) <= set(COLUMNS) and "seconds" not in found
        assert (found["task"], found["step"], found["seed"]) == ("15-1_b", 5, 7)
        groups = {column: found[column] for column in GROUPS}
        assert groups == pytest.approx(self.expected(task.order, 15, 20))
        assert {name: found[name] for name in CLASS_NAMES} == IOU
