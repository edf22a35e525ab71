"""What is around a run fails: the disk, another run, one of its processes; or it goes on elsewhere."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.helpers import PROJECT, error_line, snapshot
from tests.reliability.runs import RUN, SETTINGS, STEP_1, Run, copy, flags, refused, result, run
from utils.checkpoint import read_checkpoint
from utils.distributed import free_port

pytestmark = pytest.mark.slow
AGAIN = ["--resume", "auto"]
STEP = f"models/{RUN}/step_1"
CHECKPOINT = 18  # MiB of a checkpoint of these runs


def _mount(*arguments):
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode == 0


@pytest.fixture
def disk(place: Path) -> Iterator[Path]:
    """A file system of its own, in memory; skips where this user may not mount one."""
    folder = place / "disk"
    folder.mkdir()
    if os.name != "posix" or os.geteuid() or not _mount("-t", "tmpfs", "none", folder):
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


# What is full first: the log, the memory, the first checkpoint, the second, the numbered ones.
@pytest.mark.parametrize("kib", [8, 24, 40, 10 * 1024, 30 * 1024, 50 * 1024, 70 * 1024])
def test_a_full_disk_is_one_line_and_the_rerun_ends_the_same(kib, root, step_0, step_1, disk):
    before = step_0.folder / "models" / RUN / "step_0" / "checkpoint-epoch2.pth"
    command = [*flags(root, disk / "saved", **STEP_1), "--prev_checkpoint", str(before)]
    (disk / "saved").mkdir()
    assert _mount("-o", f"remount,size={kib}k", disk)
    outcome = run(command, output=root.parent / "out")
    line = refused(outcome)
    assert "cannot write" in line and "MiB are free" in line
    good = {k: v for k, v in result(disk / "saved").items() if k.endswith(".pth")}
    assert not any("unreadable" in digest for digest in good.values())
    assert _mount("-o", "remount,size=1g", disk)
    outcome = run([*command, *AGAIN], output=root.parent / "out")
    assert outcome.returncode == 0, outcome.stderr
    assert _comparable(result(disk / "saved")) == _comparable(step_1.result)


def _comparable(found):
    """A result without the checkpoints, which say whether the model before was the run's own."""
    return {name: value for name, value in found.items() if not name.endswith(".pth")}


def test_an_output_folder_that_cannot_be_written_is_one_line(root, step_0, disk):
    copy_of_step_0 = flags(root, disk / "saved", **STEP_1)
    before = step_0.folder / "models" / RUN / "step_0" / "checkpoint-epoch2.pth"
    command = [*copy_of_step_0, "--prev_checkpoint", str(before)]
    assert _mount("-o", "remount,ro", disk)
    assert "cannot write" in error_line(run(command, output=root.parent / "out"))


def _limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_limit_on_the_size_of_files_is_one_line(root, step_0, step_1, place):
    """As a full disk, where this user may not mount one."""
    saved = copy(step_0.folder, place / "saved")
    command = flags(root, saved, **STEP_1)
    outcome = run(command, prepare=partial(_limit_files, 2**20))
    assert "cannot write" in error_line(outcome)
    outcome = run([*command, *AGAIN])
    assert outcome.returncode == 0, outcome.stderr
    assert result(saved) == step_1.result


def test_two_runs_on_one_step_at_the_same_instant(root, step_0, step_1, place):
    """One trains; the other is refused in one line, or comes late and finds the step finished."""
    lines = []
    for number in range(5):
        saved = copy(step_0.folder, place / f"{number}" / "saved")
        command = flags(root, saved, **STEP_1)
        ends = [one.end() for one in [Run(command), Run([*command, *AGAIN])]]
        assert sorted(end.returncode for end in ends) in ([0, 2], [0, 0])
        lines += [line for line in map(refused, ends) if line]
        assert result(saved) == step_1.result
    print(f"two at once: {len(lines)} of 5 refused in one line")


def test_two_runs_that_build_one_label_index(root, step_0, place):
    """Both train, and both as if they were alone."""
    for path in (root / "label_index").glob("*"):
        path.unlink()
    both = [Run(flags(root, place / f"{number}" / "saved")) for number in range(2)]
    assert [one.end().returncode for one in both] == [0, 0]
    for number in range(2):
        assert result(place / f"{number}" / "saved", 0) == step_0.result


# Several processes of one run, as torchrun starts them.


def _ranks(arguments, number):
    """The processes of one run."""
    common = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        Run(arguments, environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(number)
    ]


def _close(found, expected):
    """The same but for checkpoints and losses, which differ by the order of a sum."""
    assert found.keys() == expected.keys()
    memory = [name for name in found if name.startswith("memory/")]
    assert memory and all(found[name] == expected[name] for name in memory)


def test_resumed_with_other_processes(root, halfway, step_1, place):
    """The same batch over all processes goes on where batch normalisation is frozen."""
    saved = copy(halfway, place / "two" / "saved")
    ends = [one.end() for one in _ranks([*flags(root, saved, **{**STEP_1, "bs": 2}), *AGAIN], 2)]
    assert [end.returncode for end in ends] == [0, 0], ends[0].stderr
    _close(result(saved), step_1.result)
    before = snapshot(halfway / STEP)
    saved = copy(halfway, place / "refused" / "saved")
    ends = [one.end() for one in _ranks([*flags(root, saved, **STEP_1), *AGAIN], 2)]
    lines = [end.stderr for end in ends if "error: " in end.stderr]
    assert {end.returncode for end in ends} == {2} and "now 8: resume with 1 process(es)" in lines[0]
    assert snapshot(saved / STEP)["last.pth"] == before["last.pth"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"bs": 2},
            "an update took 4 images over all processes, now 2: resume with 1 process(es) and --bs 4",
        ),
        ({"epochs": 3}, "trained with other settings (--epochs 2, now 3): resume with the same"),
        ({"epochs": 1}, "trained with other settings (--epochs 2, now 1): resume with the same"),
        ({"lr": 0.002}, "trained with other settings (--lr 0.001, now 0.002): resume with the same"),
        ({"accumulate": 2}, None),
        ({"num_workers": 1}, None),
    ],
    ids=str,
)
def test_resumed_with_other_settings(changes, words, root, halfway, step_1, place):
    saved = copy(halfway, place / "saved")
    outcome = run([*flags(root, saved, **{**STEP_1, **changes}), *AGAIN])
    line = refused(outcome)
    if words:
        assert words in line
        assert snapshot(saved / STEP)["last.pth"] == snapshot(halfway / STEP)["last.pth"]
        outcome = run([*flags(root, saved, **STEP_1), *AGAIN])
        assert outcome.returncode == 0 and result(saved) == step_1.result
    else:
        assert line is None
        _close(result(saved), step_1.result)


def test_another_accumulation_is_refused_where_batch_normalisation_trains(root, place):
    saved = place / "saved"
    command = flags(root, saved, epochs=300)
    begun = Run(command)
    last = saved / "models" / RUN / "step_0" / "last.pth"
    while not last.is_file():
        assert begun.exitcode() is None
        time.sleep(0.05)
    begun.process.kill()
    begun.end()
    line = error_line(run([*flags(root, saved, epochs=300, accumulate=2), *AGAIN]))
    assert "statistics over 4 images, now over 2: resume with 1 process(es), --bs 4 and --acc" in line


def test_one_of_two_processes_is_killed(root, step_0, place):
    """The others end too, what was saved stands, and one process can go on."""
    saved = copy(step_0.folder, place / "saved")
    changes = {**STEP_1, "bs": 2, "epochs": 60}
    both = _ranks(flags(root, saved, **changes), 2)
    last = saved / STEP / "last.pth"
    while not last.is_file():
        assert all(one.exitcode() is None for one in both)
        time.sleep(0.05)
    os.kill(both[1].process.pid, signal.SIGKILL)
    ends = [one.end(timeout=60) for one in both]
    assert ends[0].returncode == 2 and ends[1].returncode == -signal.SIGKILL
    assert "Traceback" not in ends[0].stderr and "a fault of this" not in ends[0].stderr
    epoch = len((saved / f"log/{RUN}/step_1/metrics.jsonl").read_text().splitlines())
    outcome = run([*flags(root, saved, **{**changes, "bs": 4}), *AGAIN])
    assert outcome.returncode == 0, outcome.stderr
    assert "resumed after epoch" in outcome.stdout and 0 < epoch <= 60
    assert SETTINGS["trainer"]["save_period"] == 1


def _torchrun(arguments):
    """train_voc.py in two processes, as a user starts them."""
    command = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port()]
    return subprocess.Popen(
        [sys.executable, *map(str, command), "train_voc.py", *arguments],
        cwd=PROJECT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _process_of(launcher, rank):
    """The number of the process of that rank, among those that a launcher has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    environments = {child: Path(f"/proc/{child}/environ").read_bytes() for child in children}
    return next(int(c) for c, e in environments.items() if f"RANK={rank}".encode() in e.split(b"\0"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_of_torchrun_is_killed(root, place):
    """In the middle of the second epoch; resumed, it ends as two processes that nobody disturbed."""
    folders = [place / name / "saved" for name in ("whole", "killed")]
    whole, killed = ([*flags(root, f, bs=2, epochs=4), *AGAIN] for f in folders)
    undisturbed, disturbed = _torchrun(whole), _torchrun(killed)
    for line in disturbed.stdout:
        if line.startswith("epoch 1/4"):
            os.kill(_process_of(disturbed.pid, 1), signal.SIGKILL)
            break
    started = time.monotonic()
    assert disturbed.wait(timeout=120) not in (0, None)
    print(f"the other process ended {time.monotonic() - started:.0f} s after the one that was killed")
    disturbed.stdout.close()
    step = f"models/{RUN}/step_0"
    assert 1 <= read_checkpoint(folders[1] / step / "last.pth")["epoch"] < 4
    assert not (folders[1] / step / "metrics.json").exists()
    for process in (undisturbed, _torchrun(killed)):
        process.communicate(timeout=600)
        assert process.returncode == 0
    assert result(folders[1], 0) == result(folders[0], 0)
