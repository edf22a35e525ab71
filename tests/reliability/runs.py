"""Small runs that are disturbed: real processes, ended by real signals.

A process costs seconds until PyTorch is imported. So the runs are forked from a server that has
imported all of it once, and train in about a second: what train_voc.py does, from its command line on.
"""

import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import utils.program  # noqa: F401

import torch

from configs.options import parse_eval, parse_train
from tests.helpers import SMALL, error_line, snapshot
from trainer.run import evaluate_checkpoint, train
from utils.checkpoint import read_file, write_json
from utils.distributed import launch
from utils.errors import UserError

torch.set_num_threads(1)  # autograd's threads do not survive a fork, and the cores are shared

COMMANDS = {"train": (parse_train, train), "eval": (parse_eval, evaluate_checkpoint)}
RUN = "overlap_5-3_EIR"
STEP_1 = {"task_step": 1, "mem_size": 4, "lr": 0.001, "freeze_bn": None}
# A run writes every kind of file: numbered checkpoints, the best one, and a memory.
SETTINGS = {
    "trainer": {
        "verbosity": 1,
        "save_period": 1,
        "validation_period": 1,
        "monitor": "max Mean_Intersection_over_Union",
    }
}

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["pytest", __name__])
_one_at_a_time = threading.Lock()  # to start a process, and to ask for one, are not safe in threads


def flags(root: Path, save_dir: Path, **changes) -> list[str]:
    """The command line of a small run; a change to None stands for a flag without a value."""
    settings = root.parent / "settings.json"
    write_json(settings, SETTINGS)  # whole, since other runs may be reading it
    given = {"config": settings, "data_root": root, "save_dir": save_dir, **SMALL, **changes}
    words = ([f"--{name}"] if v is None else [f"--{name}", str(v)] for name, v in given.items())
    return [word for pair in words for word in pair]


class Run:
    """A process that runs train_voc.py's (or eval_voc.py's) command line."""

    def __init__(
        self,
        arguments: list[str],
        prepare: Callable[[], None] | None = None,
        command: str = "train",
        environment: dict[str, str] | None = None,
        output: Path | None = None,
    ):
        """prepare: called in the process before it starts to work; it must be picklable.

        output: folder for what the process prints, by default beside --save_dir.
        """
        beside = Path(arguments[arguments.index("--save_dir") + 1]).parent
        self.output = (output or beside) / f"out_{time.time_ns()}"
        self.output.mkdir(parents=True)
        for name in ("stdout", "stderr"):  # here, since the process may be killed before it makes them
            (self.output / name).touch()
        self.process = _processes.Process(
            target=_work, args=(command, arguments, self.output, prepare, environment or {})
        )
        with _one_at_a_time:
            self.process.start()

    def exitcode(self) -> int | None:
        """The exit code, None while it runs."""
        with _one_at_a_time:
            return self.process.exitcode

    def end(self, timeout: float = 300) -> SimpleNamespace:
        """Wait until it has ended: returncode (-9 where it was killed), stdout, stderr."""
        limit = time.monotonic() + timeout
        while (code := self.exitcode()) is None:
            if time.monotonic() > limit:
                self.process.kill()
                raise TimeoutError(f"the run did not end in {timeout} seconds")
            time.sleep(0.02)
        texts = {name: (self.output / name).read_text() for name in ("stdout", "stderr")}
        shutil.rmtree(self.output)
        return SimpleNamespace(returncode=code, **texts)


def run(*arguments, **settings) -> SimpleNamespace:
    """A run from its start to its end."""
    return Run(*arguments, **settings).end()


def two_at_a_time(work: Callable, cases: Iterable) -> list:
    """[work(case) for each case], two of them at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, cases))


def _work(command, arguments, output, prepare, environment):
    """The forked process."""
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", **environment})
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        stream.flush()
        file = os.open(output / name, os.O_WRONLY)
        os.dup2(file, stream.fileno())
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parse, work = COMMANDS[command]
    # tempfile draws its names from a generator that all forks of the server would share
    random.seed()
    try:
        config, call = parse(arguments)
        if prepare:
            prepare()
        launch(work, config, call)
    except (Exception, KeyboardInterrupt):
        sys.excepthook(*sys.exc_info())  # utils.program's, as in train_voc.py


# Points at which a run changes its files.


def watch(act: Callable[[int, str], None]) -> None:
    """Have act(number, what) called in this process right before each change of a file.

    Python itself reports (sys.audit) each file that is opened to be written, renamed, or removed, each
    folder made or removed; and the syncs are reported here. So no point has to be named by hand.
    """
    number = 0

    def hook(event, arguments):
        nonlocal number
        what = _change(event, arguments)
        if what:
            act(number, what)
            number += 1

    sync = os.fsync

    def fsync(file):
        sys.audit("os.fsync", file)
        sync(file)

    os.fsync = fsync
    sys.addaudithook(hook)


def _change(event, arguments):
    """What an audit event changes, in words; None where it changes nothing."""
    if event == "os.fsync":
        return "sync"
    if event == "os.mkdir" and os.path.isdir(arguments[0]):
        return None
    if event == "open":
        path, mode, opened = arguments
        writes = opened & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        event = f"open {mode}" if writes and isinstance(path, (str, os.PathLike)) else ""
    elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
        path = arguments[0]
    else:
        return None
    return f"{event} {Path(path).name}" if event and Path(path).name != "null" else None


def _kill(number, at, what):
    if at == number:
        os.kill(os.getpid(), signal.SIGKILL)


def _note(file, at, what):
    os.write(file, f"{what}\n".encode())


def kill_before(number: int) -> Callable[[], None]:
    """For Run: the process is killed (SIGKILL) right before its change of that number, from 0."""
    return partial(_watch_and_kill, number)


def _watch_and_kill(number):
    watch(partial(_kill, number))


def note_changes(path: Path) -> Callable[[], None]:
    """For Run: the process writes what it changes into a file, a line each."""
    return partial(_watch_and_note, path)


def _watch_and_note(path):
    watch(partial(_note, os.open(path, os.O_CREAT | os.O_WRONLY)))


# What a run leaves.


def result(save_dir: Path, step: int = 1) -> dict[str, str]:
    """What a step left, by the names of its files: digests of all that is computed.

    Of checkpoints the content counts, of the records of epochs all but what was measured (time and
    memory). Files that only say how the run was made, and the log, are left out.
    """
    folder = save_dir / "models" / RUN / f"step_{step}"
    found = {name: digest for name, digest in snapshot(folder).items() if name.startswith("memory/")}
    for path in sorted(folder.glob("*.pth")):
        try:
            found[path.name] = _digest(read_file(path))
        except UserError as error:
            found[path.name] = f"unreadable: {error}"
    if (folder / "metrics.json").is_file():
        found["metrics.json"] = (folder / "metrics.json").read_text(errors="replace")
    records = save_dir / "log" / RUN / f"step_{step}" / "metrics.jsonl"
    if records.is_file():
        lines = records.read_text(errors="replace").splitlines()
        found["metrics.jsonl"] = "\n".join(map(_computed, lines))
    return found


def _computed(line):
    """A record of an epoch as text, without what was measured."""
    losses, _, validated = line.partition(', "seconds"')
    return f"{losses} {validated[validated.find('val_') :]}"


def _digest(value):
    """A digest of nested dictionaries and lists of tensors and plain values."""
    if isinstance(value, torch.Tensor):
        data = f"{value.dtype} {list(value.shape)}".encode() + value.contiguous().numpy().tobytes()
    elif isinstance(value, dict):
        data = "".join(f"{key!r} {_digest(v)} " for key, v in value.items()).encode()
    elif isinstance(value, (list, tuple)):
        data = " ".join(map(_digest, value)).encode()
    else:
        data = repr(value).encode()
    return hashlib.sha256(data).hexdigest()


def leftovers(save_dir: Path) -> list[str]:
    """Unfinished files in a run's folders."""
    return [str(path) for path in save_dir.rglob("*unfinished*")]


def copy(source: Path, target: Path) -> Path:
    """A copy of a run's output; checkpoints, which are only ever replaced, are linked."""

    def copy_file(a, b):
        return os.link(a, b) if str(a).endswith(".pth") else shutil.copy2(a, b)

    return Path(shutil.copytree(source, target, copy_function=copy_file))


def refused(outcome: SimpleNamespace) -> str | None:
    """The error line of a run that was refused as it should be; None where it succeeded.

    Fails for anything else: another exit code, more lines, a traceback, an error that nobody foresaw.
    """
    if outcome.returncode == 0:
        assert "Traceback" not in outcome.stdout + outcome.stderr, outcome.stderr
        return None
    line = error_line(outcome)
    assert "a fault of this program" not in line, line
    return line
