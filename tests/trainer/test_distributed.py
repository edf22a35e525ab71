"""Two gloo processes under torchrun against one process with the same global batch."""

import functools
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from configs.options import Config, TrainCall
from tests.helpers import code_of, error_line, run_script, small_config, snapshot, train_flags
from tests.trainer.steps import KINDS, assert_same_step, confident_model
from trainer.run import train
from utils.distributed import _join, free_port, launch, usable_gpus
from utils.errors import UserError, explained

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}  # a group of one process
TWO = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port")


SETTINGS = {"freeze_bn": True, "pos_weight": 2.0, "data_loader__args__test__batch_size": 3}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return confident_model(tmp_path_factory.mktemp("teacher") / "model.pth")


def gradients(voc_root, folder, teacher, kind, processes, pieces):
    """What tests/trainer/gradients.py writes of a batch of 10 images."""
    changes = {**SETTINGS, **KINDS[kind], "bs": 10 // processes, "accumulate": pieces}
    launcher = (*TWO, free_port(), "-m") if processes == 2 else ("-m",)
    arguments = [voc_root, folder / "saved", folder / "found.pth", json.dumps(changes)]
    arguments += [teacher] if "task_step" in changes else []
    result = run_script(*launcher, "tests.trainer.gradients", *arguments)
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "found.pth")


@pytest.fixture(scope="module")
def one(voc_root, tmp_path_factory, teacher):
    """What one process with the whole batch finds in a kind of step."""
    return functools.cache(
        lambda kind: gradients(voc_root, tmp_path_factory.mktemp("one"), teacher, kind, 1, 1)
    )


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [
        ("base", 1),
        ("base", 2),
        ("incremental", 2),
        ("DKD", 2),
        pytest.param("incremental", 1, marks=pytest.mark.slow),
    ],
)
def test_two_processes_have_the_gradients_losses_and_evaluation_of_one(
    one, voc_root, tmp_path, teacher, kind, pieces
):
    """With EIR: paste, pseudo labels and distillation, on a memory that one of them has drawn."""
    one, two = one(kind), gradients(voc_root, tmp_path, teacher, kind, 2, pieces)
    assert [i for ids in two["ids"] for i in ids] == one["ids"][0] and len(two["ids"]) == 2
    assert two["memories"] == 2 * one["memories"]
    first, second = two["seen"]
    assert {key: first[key] + second[key] for key in first} == one["seen"][0]
    assert first["void"] != second["void"]
    if kind == "incremental":
        assert (first.pop("draws"), second.pop("draws")) == (1, 0)
        assert all(first.values()) and all(second.values()) and all(one["losses"].values())
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-10)
    assert two["gradients"].keys() == one["gradients"].keys()
    largest = max(g.abs().max() for g in one["gradients"].values())
    assert largest > 1e-3
    for name, gradient in one["gradients"].items():
        assert gradient.dtype == torch.float64
        difference = (gradient - two["gradients"][name]).abs().max()
        # DKD's student begins as its teacher: what pulls it there is rounding alone at first
        assert difference <= 1e-10 * max(gradient.abs().max(), 1e-3 * largest), name
    assert torch.equal(one["counts"], two["counts"])
    assert one["metrics"] == two["metrics"]


WRAPPED = """
import os, torch
from configs.options import Config, TrainCall
from utils.distributed import launch

def work(config):
    cycle = [torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))]
    cycle.append(cycle)

names = lambda: {open(f"/proc/self/task/{i}/comm").read() for i in os.listdir("/proc/self/task")}
launch(work, Config())
assert not any("gloo" in name for name in names()), names()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_thread_of_the_group_is_left_for_the_interpreter_to_trip_over(tmp_path):
    result = run_script("-c", WRAPPED, **ALONE, MASTER_PORT=str(free_port()))
    assert result.returncode == 0, result.stderr


FAILING = """
import sys, torch.distributed as dist
from configs.options import Config, TrainCall
from utils.distributed import launch
from utils.errors import UserError, explained

def work(config):
    dist.get_backend = lambda: "nccl"
    dist.destroy_process_group = lambda: print("left the group")
    raise {"UserError": UserError, "ValueError": ValueError}[sys.argv[1]]("broken")

launch(work, Config())
"""


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("UserError", "error: broken"),
        ("ValueError", "error: a fault of this program, please report"),
    ],
)
def test_an_error_does_not_wait_for_processes_in_an_nccl_collective(kind, line, tmp_path):
    where = {"MASTER_PORT": str(free_port()), "TMPDIR": str(tmp_path)}
    result = run_script("-c", FAILING, kind, **ALONE, **where)
    assert error_line(result).startswith(line)
    assert result.stdout == ""


def test_a_process_without_a_gpu_of_its_own_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="process 1 of this machine has no GPU of its own: 1 can"):
        _join(Config(), 1)


def test_processes_that_cannot_find_each_other_are_an_error(cpu):
    with pytest.raises(UserError, match=r"cannot find each other at tcp://127.0.0.1:x: "):
        _join(Config(), 0, "tcp://127.0.0.1:x", 0, 2)


def test_an_error_of_nccl_keeps_its_words(cpu, monkeypatch):
    def refuse(*args, **kwargs):
        raise torch.distributed.DistBackendError("NCCL error in: x.cpp:1\nLast error:\nno route")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *place: iter([(None, 0, 1)]))
    with pytest.raises(torch.distributed.DistBackendError) as found:
        _join(Config(), 0)
    line = "the processes cannot be connected: NCCL error in: x.cpp:1 Last error: no route"
    assert str(explained(found.value)) == line


PATIENT = """
import sys, time
import torch.distributed as dist
from configs.options import Config, TrainCall
from utils.distributed import barrier, first_process_first, launch, rank

def refuse(*args, **kwargs):
    raise AssertionError("a barrier that gives up")

def slow():
    time.sleep(float(sys.argv[1]) if rank() == 0 else 0)
    return time.time()

def work(config):
    dist.barrier = refuse
    times = [first_process_first(slow) for _ in range(2)]
    barrier()
    print(rank(), *times, flush=True)

launch(work, Config())
"""


def test_processes_wait_for_the_first_one_without_a_limit_of_the_backend():
    result = run_script(*TWO, free_port(), "--no_python", sys.executable, "-c", PATIENT, 1.5)
    assert result.returncode == 0, result.stderr
    lines = (line.split() for line in result.stdout.splitlines())
    times = {int(rank): [float(t) for t in rest] for rank, *rest in lines}
    assert all(later > first for first, later in zip(times[0], times[1], strict=True))


LATE = """
import time
from configs.options import Config, TrainCall
from utils import distributed

def work(config):
    distributed.barrier()
    if distributed.rank() == 1:
        time.sleep(2)
        assert distributed._store.check(["barrier 1 complete"])

distributed.launch(work, Config())
"""


def test_the_first_process_holds_the_store_until_nobody_looks_at_it():
    """It holds the store itself where there is no torchrun."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ThreadPoolExecutor() as pool:
        ranks = [{"RANK": rank, "LOCAL_RANK": rank, **place} for rank in "01"]
        results = list(pool.map(lambda rank: run_script("-c", LATE, **rank), ranks))
    for result in results:
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr and "error: " not in result.stderr


def test_a_process_that_waits_at_a_barrier_ends_when_another_one_fails(tmp_path):
    """Its launcher's SIGTERM ends it at once; torchrun would kill it after 30 seconds."""
    failing = PATIENT.replace("time.sleep(", "rank() or print(time.time(), flush=True) or 1 / 0, (")
    command = (*TWO, free_port(), "--no_python", sys.executable, "-c", failing, 0)
    result = run_script(*command, TMPDIR=str(tmp_path))
    assert result.returncode != 0 and "ZeroDivisionError" in result.stderr
    assert time.time() - float(result.stdout) < 25  # since it failed, however long they took to start


def test_gpus_that_torch_cannot_use_are_an_error_that_names_the_driver(cpu, monkeypatch, capsys):
    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is\ntoo old (found version 11040).")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    assert usable_gpus() == 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert code_of(lambda: launch(print, Config(multiprocessing_distributed=True))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the NVIDIA driver shows 2 GPUs, but torch ")
    assert "is too old (found version 11040)" in line and "CUDA_VISIBLE_DEVICES=''" in line
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert usable_gpus() == 2


def test_several_nodes_need_the_place_of_the_first(cpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = Config(multiprocessing_distributed=True, world_size=2)
    assert code_of(lambda: launch(print, config)) == 2
    assert "error: several nodes need --dist_url tcp://HOST:PORT" in capsys.readouterr().err


def test_a_rank_beyond_the_last_node_is_an_error(cpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = Config(multiprocessing_distributed=True, world_size=2, rank=2)
    assert code_of(lambda: launch(print, config)) == 2
    assert "error: rank is 2: of world_size 2 nodes the last has rank 1" in capsys.readouterr().err


def test_one_of_several_nodes_does_not_train_alone(cpu, voc_root, tmp_path):
    config = small_config(voc_root, tmp_path)
    config.world_size = 2
    with pytest.raises(UserError, match="has world_size 2, but this process is alone"):
        train(config, TrainCall())
    assert list(tmp_path.iterdir()) == []


def test_a_connection_that_a_single_process_loses_is_said(cpu, capsys):
    """Only in a group another process has ended, and has said why."""

    def download(_):
        raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(SystemExit) as ended:
        launch(download, Config())
    assert ended.value.code == 2
    assert "error: the operating system refused: Connection reset by peer" in capsys.readouterr().err


def test_training_under_torchrun_reports_what_one_process_evaluates(voc_root, tmp_path):
    small = {"data_loader": {"args": {"test": {"batch_size": 3}}}}
    (tmp_path / "config.json").write_text(json.dumps(small))
    flags = train_flags(voc_root, tmp_path, epochs=6, name="two", num_workers=1, lr=0.05)
    flags += ["-c", str(tmp_path / "config.json")]
    result = run_script(
        *TWO, free_port(), "train_voc.py", *flags, "--multiprocessing_distributed", "--dist_url"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 6/6: ") == 1
    assert result.stderr.count("running on the CPU") == 1
    folder = tmp_path / "models" / "overlap_5-3_two" / "step_0"
    again = run_script(
        "eval_voc.py", "-d", 0, "--test", "-r", folder / "checkpoint-epoch6.pth",
        "--output", tmp_path / "again.json", OMP_NUM_THREADS="2",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.json").read_text() == (folder / "metrics.json").read_text()
    assert json.loads((folder / "metrics.json").read_text())["Pixel_Accuracy"]["new"] is None
    assert not {k for k in torch.load(folder / "last.pth")["state_dict"] if k.startswith("module.")}


@pytest.mark.slow
def test_two_processes_that_resume_end_with_the_weights_of_two_undisturbed_ones(
    voc_root, tmp_path, teacher
):
    """An incremental step by --multiprocessing_distributed; under torchrun from its first epoch on."""
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"save_period": 1}}))

    def train(name, launcher, *more):
        flags = train_flags(voc_root, tmp_path, name=name, task_step=1, mem_size=9, bs=3, lr=1e-4)
        flags += ["-c", tmp_path / "config.json"]
        flags += ["--freeze_bn", "--prev_checkpoint", teacher, *more]
        result = run_script(*launcher, *flags)
        assert result.returncode == 0, result.stderr
        return tmp_path / "models" / f"overlap_5-3_{name}" / "step_1", result

    spawned = ("-m", "tests.trainer.spawned", "--multiprocessing_distributed")
    whole, result = train("whole", spawned)
    assert result.stdout.count("epoch 2/2: ") == 1
    torchrun = (*TWO, free_port(), "train_voc.py")
    resumed, _ = train("resumed", torchrun, "--resume", whole / "checkpoint-epoch1.pth")
    assert_same_step(whole, resumed, "checkpoint-epoch2.pth")
    assert snapshot(whole / "memory") == snapshot(resumed / "memory")


def test_processes_started_by_the_program_end_with_one_line(voc_root, tmp_path):
    """What they all find, after they have met; said again where the machine is slow to end them."""
    flags = train_flags(voc_root, tmp_path, task_step=1, prev_checkpoint="nowhere.pth")
    result = run_script("-m", "tests.trainer.spawned", *flags, "--multiprocessing_distributed")
    assert result.returncode == 2
    assert set(result.stderr.splitlines()) == {"error: no checkpoint at nowhere.pth"}


def test_a_loss_that_is_not_finite_in_one_process_ends_both_with_one_line(voc_root, tmp_path):
    flags = train_flags(voc_root, tmp_path, bs=8, epochs=1)
    spawned = ("-m", "tests.trainer.spawned", *flags, "--multiprocessing_distributed", "--freeze_bn")
    result = run_script(*spawned, NOT_FINITE_IN="1")
    (line,) = {line for line in result.stderr.splitlines() if line.startswith("error: ")}
    assert result.returncode == 2
    assert "not finite in step 0, epoch 1/1, iteration 1 (bce nan" in line
    assert not list(tmp_path.rglob("*.pth"))
