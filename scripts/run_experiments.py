"""Run methods x tasks x seeds from a JSON file, and collect their results in one CSV.

python scripts/make_synthetic_voc.py --output data/synthetic
python scripts/run_experiments.py configs/experiments/methods.json --jobs 2

Each step of each run is one call of train_voc.py. Step 0 is trained once for each task and seed and
shared by all methods. Finished steps are skipped and an interrupted one is resumed: this can be
stopped at any time and called again. LAUNCHER starts a step: "python", or torchrun with its own flags.
"""

import argparse
import concurrent.futures
import contextlib
import fcntl
import functools
import itertools
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_loader.data_loaders import cores
from data_loader.tasks import Task, get_task
from scripts.results import row, write_results
from utils.arguments import read_train
from utils.checkpoint import final_checkpoint
from utils.config import Config
from utils.config_file import is_finished
from utils.errors import UserError, exit_with

ROOT = Path(__file__).resolve().parents[1]
KEYS = {
    "save_dir": "the folder of the runs; experiments that share runs share it",
    "config": "the configuration file of all runs",
    "tasks": "a list of names of tasks, one at least",
    "setting": "overlap, disjoint or sequential",
    "seeds": "a list of integers, one at least",
    "flags": "flags of train_voc.py for every step",
    "step_0": "further flags for step 0",
    "later": "further flags for steps >= 1",
    "joint": "further flags for the joint training, '' for none of it",
    "methods": "an object of names and their flags for steps >= 1, one at least",
}
RESERVED = ("--config", "--device", "--overwrite", "--test", "--prev_checkpoint")
SEVERAL = {"tasks": (list, str), "seeds": (list, int), "methods": (dict, str)}


@dataclass
class Run:
    """A sequence of calls of train_voc.py, one per step, and what the results call it."""

    method: str
    task: Task
    seed: int
    calls: list[list[str]]
    configs: list[Config]
    base: "Run | None" = None

    @property
    def title(self) -> str:
        return f"{self.task.name} {self.task.setting}, seed {self.seed}, {self.method}"


def read_experiment(path: Path) -> dict:
    """The experiment's JSON object; UserError for unknown or missing keys and wrong types."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the experiment {path}: {error}") from None
    if not isinstance(content, dict) or set(content) != set(KEYS):
        keys = ", ".join(KEYS)
        raise UserError(f"{path} must be a JSON object with these keys and no other: {keys}")
    for key, value in content.items():
        if not _has_type(value, *SEVERAL.get(key, (str, None))):
            raise UserError(f"{path}: {key} must be {KEYS[key]}")
    for key in SEVERAL:
        names = [_folder_name(str(value)) for value in content[key]]
        if len({*names, "step0", "joint"}) < len(names) + 2:
            raise UserError(
                f"{path}: two of the {key} would have the same folder; step0 and joint are taken"
            )
    return content


def _has_type(value, kind, item):
    """True for a value of a kind; if it is to have items, there are some, and all of their type."""
    if type(value) is not kind or item is None:
        return type(value) is kind
    return bool(value) and all(type(i) is item for i in (value.values() if kind is dict else value))


def _folder_name(method):
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in method)


def plan(experiment: dict, save_dir: str) -> tuple[list[Run], list[Run]]:
    """The runs of step 0 and all others; every flag of every call is checked on the way."""
    bases, others = [], []
    for seed, name in itertools.product(experiment["seeds"], experiment["tasks"]):
        task = get_task(name, experiment["setting"])
        make = functools.partial(_make_run, experiment, save_dir, seed, task)
        base = make("step0", experiment["step_0"], task, [0])
        bases.append(base)
        for method, flags in experiment["methods"].items():
            flags, steps = f"{experiment['later']} {flags}", range(1, len(task.steps))
            others.append(make(method, flags, task, steps, base))
        if experiment["joint"]:
            joint = get_task("joint", experiment["setting"])
            others.append(make("joint", experiment["joint"], joint, [0]))
    return bases, others


def _make_run(experiment, save_dir, seed, task, method, flags, trained, steps, base=None):
    """The run of a method on a task; `trained` is the task of its calls."""
    calls = [_call(experiment, save_dir, trained, method, seed, step, flags) for step in steps]
    try:
        configs = [read_train(call)[0] for call in calls]
    except UserError as error:
        raise UserError(f"{method}: {error}") from None
    return Run(method, task, seed, calls, configs, base)


def _call(experiment, save_dir, task, method, seed, step, flags):
    words = {
        "-c": experiment["config"],
        "--save_dir": save_dir,
        "--name": f"{_folder_name(method)}-seed{seed}",
        "--seed": seed,
        "--task_name": task.name,
        "--task_setting": task.setting,
        "--task_step": step,
        "--resume": "auto",
    }
    further = _split(f"{experiment['flags']} {flags}")
    for word in further:
        if re.match(r"-[a-z]", word) or word.partition("=")[0] in {*words, *RESERVED}:
            raise UserError(f"{method}: {word} is not a flag to give here, the experiment sets it")
    return [*(str(word) for pair in words.items() for word in pair), *further]


def _split(flags):
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise UserError(f"cannot read the flags {flags}: {error}") from None


def has_results(config: Config) -> bool:
    """True if the step is finished with these settings."""
    with contextlib.suppress(UserError):
        return is_finished(config)
    return False


class Runner:
    """Runs calls on a fixed number of slots, each with its share of the machine."""

    def __init__(self, slots: list[dict[str, str]], lock: int, log_dir: Path):
        self.slots, self.lock, self.log_dir = queue.SimpleQueue(), lock, log_dir
        self.launcher = _split(os.environ.get("LAUNCHER", "")) or [sys.executable]
        self.processes: set[subprocess.Popen] = set()
        self.stopping = False
        for slot in slots:
            self.slots.put(slot)

    def __call__(self, run: Run) -> str | None:
        """Train what is missing of a run; the error's line if a step fails."""
        try:
            for call, config in zip(run.calls, run.configs, strict=True):
                if is_finished(config) or self.stopping:
                    continue
                if run.base and config.task.step == 1:
                    call = [*call, "--prev_checkpoint", str(_model(run.base))]
                self.train(run, config, call)
        except UserError as error:
            print(f"failed      {run.title}: {error}", file=sys.stderr)
            return str(error)

    def train(self, run: Run, config: Config, call: list[str]) -> None:
        """One call of train_voc.py in a free slot; its output goes to a log."""
        slot = self.slots.get()
        log = self.log_dir / f"{config.step_dir().parent.name}_{config.task.step}.txt"
        _say(f"started     {run.title}, step {config.task.step}: {log}")
        try:
            with open(log, "ab") as file:
                process = subprocess.Popen(
                    [*self.launcher, str(ROOT / "train_voc.py"), *call],
                    env={**os.environ, **slot},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=[self.lock],  # who holds it, this process or one it left, is at work
                )
            self.processes.add(process)
            if self.stopping:
                self.stop()
            code = process.wait()
            self.processes.remove(process)
        except OSError as error:
            raise UserError(f"cannot start {self.launcher[0]}: {error}") from None
        finally:
            self.slots.put(slot)
        if code and not self.stopping:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"step {config.task.step} ended with code {code}: {' '.join(last)} ({log})")
        if not code:
            _say(f"finished    {run.title}, step {config.task.step}")

    def stop(self) -> None:
        """End what is running; it resumes from its last epoch next time."""
        self.stopping = True
        for process in list(self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)  # its loader workers too


def _say(line):
    sys.stdout.write(f"{line}\n")  # in one piece, also from several threads
    sys.stdout.flush()


def _model(base: Run) -> Path:
    path = final_checkpoint(base.configs[0].step_dir())
    if path is None:
        raise UserError(f"no model of step 0 in {base.configs[0].step_dir()}")
    return path


def run_all(bases: list[Run], others: list[Run], runner: Runner, results: Callable) -> int:
    """All runs, those of step 0 first; returns the number that failed.

    What starts from a step 0 that failed is left out. results() is called before and after each run.
    """
    results()
    failed = []
    with concurrent.futures.ThreadPoolExecutor(max_workers=runner.slots.qsize()) as pool:
        try:
            for stage in (bases, others):
                runs = {pool.submit(runner, run): run for run in stage if run.base not in failed}
                for done in concurrent.futures.as_completed(runs):
                    if done.result() is not None:
                        failed.append(runs[done])
                    results()
        except BaseException:
            runner.stop()
            pool.shutdown(cancel_futures=True)
            raise
    return len(failed)


def collect(runs: list[Run]) -> list[dict]:
    """The rows of results.csv: the steps that are finished, of runs with more than a shared step 0."""
    rows = []
    for run in runs:
        shared = run.base.configs if run.base else []
        configs = list(filter(has_results, run.configs))
        if configs and all(map(has_results, shared)):
            rows += [row(run.method, run.task, run.seed, config) for config in [*shared, *configs]]
    return rows


def lock(folder: Path) -> int:
    """A lock on the folder of the runs, as a file descriptor; UserError while another holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"experiments are running in {folder} already: wait for them, end them, or give another "
            "--save_dir"
        ) from None
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror}") from None
    return descriptor


def make_slots(jobs: int, gpus: str | None) -> list[dict[str, str]]:
    """The environment of each of the runs that go on at a time."""
    if gpus is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else None
        try:
            indices = [int(gpu) for gpu in gpus.split(",")]
            return [{"CUDA_VISIBLE_DEVICES": names[i] if names else str(i)} for i in indices]
        except (ValueError, IndexError):
            seen = f" of CUDA_VISIBLE_DEVICES={visible}" if visible else ""
            raise UserError(f"--gpus is {gpus!r}; give indices{seen} such as 0 or 0,1") from None
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}; it must be at least 1")
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
    return [{"OMP_NUM_THREADS": threads}] * jobs if jobs > 1 else [{}]


def choose(experiment: dict, path: Path, seeds: list | None, methods: list | None) -> Callable:
    """Test for the runs that are asked for; UserError for what the experiment does not have."""
    joint = ["joint"] if experiment["joint"] else []
    have = {"seeds": experiment["seeds"], "methods": [*experiment["methods"], *joint]}
    for key, asked in (("seeds", seeds), ("methods", methods)):
        for name in asked or []:
            if name not in have[key]:
                raise UserError(f"{path} has no {name}: its {key} are {', '.join(map(str, have[key]))}")
    seeds, methods = seeds or have["seeds"], methods or have["methods"]
    return lambda run: run.seed in seeds and run.method in methods


def _main(arguments):
    path = arguments.experiment
    experiment = read_experiment(path)
    asked_for = choose(experiment, path, arguments.seeds, arguments.methods)
    slots = make_slots(arguments.jobs, arguments.gpus)
    save_dir = arguments.save_dir or experiment["save_dir"]
    bases, others = plan(experiment, save_dir)
    folder = Path(save_dir).expanduser()
    results = (arguments.output or folder / path.stem) / "results.csv"
    held = lock(folder)
    (folder / "calls").mkdir(exist_ok=True)
    runner = Runner(slots, held, folder / "calls")
    # the joint training of a seed is the same for all tasks
    todo = {run.configs[0].step_dir(): run for run in filter(asked_for, others)}
    failures = run_all(
        [base for base in bases if any(run.base is base for run in todo.values())],
        list(todo.values()),
        runner,
        lambda: write_results(results, collect(others)),
    )
    print(f"results     {results}")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path, help="JSON file; configs/experiments has some")
    parser.add_argument("--save_dir", help="folder of the runs, instead of the experiment's")
    parser.add_argument(
        "--output", type=Path, help="folder of results.csv (default: <save_dir>/<experiment's name>)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="run only these of the experiment's seeds")
    parser.add_argument("--methods", nargs="+", help="run only these of its methods")
    places = parser.add_mutually_exclusive_group()
    places.add_argument("--jobs", type=int, default=1, help="runs at a time, sharing the cores")
    places.add_argument("--gpus", help="such as 0,1,2: a run at a time on each of these GPUs")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failures = _main(parser.parse_args())
    except UserError as error:
        exit_with(error)
    except KeyboardInterrupt:
        exit_with(UserError("interrupted: run the same command to resume"))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
