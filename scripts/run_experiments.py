"""Run methods x tasks x seeds from a JSON file, and collect their results in one CSV.

python scripts/make_synthetic_voc.py --output data/synthetic
python scripts/run_experiments.py configs/experiments/methods.json --jobs 2

Each step of each method is one call of train_voc.py. Step 0 is trained once for each task and seed and
shared by all methods, but for those whose flag --method asks for another training: these share one of
their own. Finished steps are skipped and an interrupted one is resumed: this can be stopped at any time
and called again. LAUNCHER starts a step: "python", or torchrun with its own flags.

The calls that run at a time with --jobs share the cores; a step 0 that all others wait for has them
all. On a CPU the number of threads changes the digits, and by the end of a training the results, about
as another seed does. OMP_NUM_THREADS, if it is set, is what each call has: with it the same results
come again with other --jobs, or after an interruption.

The folder of the runs is locked against a second process, where the system has such locks.
"""

import contextlib
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils.program

from configs.options import Config, load_config, read_train
from data_loader.data_loaders import cores
from data_loader.tasks import Task, get_task
from scripts.results import keep_former, row, write_results
from scripts.status import duration
from trainer.output import has_results, is_finished, trained_otherwise
from utils.checkpoint import final_checkpoint, locked
from utils.config import Parser, load_json
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
KEYS = {
    "save_dir": "the folder of the runs; experiments that share runs share it",
    "config": "the configuration file of all runs, from the project's folder",
    "tasks": "a list of names of tasks, one at least",
    "setting": "overlap, disjoint or sequential",
    "seeds": "a list of integers, one at least",
    "flags": "flags of train_voc.py for every step",
    "step_0": "further flags for step 0",
    "later": "further flags for steps >= 1",
    "joint": "further flags for the joint training, '' for none of it",
    "methods": "an object of names and their flags for steps >= 1, one at least; of these --method, "
    "and --ac with it, hold for step 0 too",
}
SEVERAL = {"tasks": (list, str), "seeds": (list, int), "methods": (dict, str)}
RESERVED = ("--config", "--device", "--help", "--overwrite", "--test", "--prev_checkpoint")
PROGRESS = re.compile(r"epoch (\d+)/(\d+)(?: iteration (\d+)/(\d+))?: (loss [\d.]+)")
LOG_SECONDS = 60  # from one line on where the calls are to the next, unless they go to a terminal


@dataclass(eq=False)
class Sequence:
    """Steps to train one after the other, and what the results call them.

    steps: the flags of train_voc.py for each, and the configuration that they make.
    base: the sequence whose model step 1 starts from. left: the steps that are not finished yet.
    seconds: how long the training of its latest step takes in all, None as long as that is not known.
    """

    method: str
    task: Task
    seed: int
    steps: list[tuple[list[str], Config]]
    base: "Sequence | None" = None
    left: list[tuple[list[str], Config]] = field(default_factory=list)
    seconds: float | None = None

    @property
    def title(self) -> str:
        return f"{self.task.name} {self.method}, seed {self.seed}"


def read_experiment(path: Path) -> dict:
    """The experiment's JSON object; UserError for unknown or missing keys and wrong types."""
    content = load_json(path)
    if not isinstance(content, dict) or set(content) != set(KEYS):
        given = content if isinstance(content, dict) else ()
        lacking = ", ".join(key for key in KEYS if key not in given) or "none"
        unknown = ", ".join(key for key in given if key not in KEYS) or "none"
        raise UserError(
            f"{path} must be a JSON object with these keys and no other: {', '.join(KEYS)}; lacking: "
            f"{lacking}; unknown: {unknown}"
        )
    for key, value in content.items():
        kind, item = SEVERAL.get(key, (str, str))
        items = value.values() if isinstance(value, dict) else value
        right = type(value) is kind and all(type(i) is item for i in items)
        if not right or (key in SEVERAL and not value):
            raise UserError(f"{path}: {key} must be {KEYS[key]}")
    for key in SEVERAL:
        names = [_folder_name(str(value)) for value in content[key]]
        if len({*names, "step0", "joint"}) < len(names) + 2:
            raise UserError(
                f"{path}: two of the {key} would have the same folder; step0 and joint are taken"
            )
    return content


def _folder_name(method):
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in method)


def plan(experiment: dict, save_dir: str) -> tuple[list[Sequence], list[Sequence]]:
    """The sequences of step 0 and all others; every flag of every call is checked on the way."""
    bases, others = [], []
    classes = load_config(ROOT / experiment["config"])[0].data.dataset.classes
    for seed, name in itertools.product(experiment["seeds"], experiment["tasks"]):
        task = get_task(name, experiment["setting"], classes)
        shared = {}
        for method, flags in experiment["methods"].items():
            flags = f"{experiment['later']} {flags}"
            numbers = range(1, len(task.steps))
            steps = [_step(experiment, save_dir, method, seed, name, t, flags) for t in numbers]
            folder, flags = _of_step_0(steps[0][1])
            if folder not in shared:
                flags = f"{experiment['step_0']} {flags}"
                step = _step(experiment, save_dir, folder, seed, name, 0, flags)
                shared[folder] = Sequence(folder, task, seed, [step])
                bases.append(shared[folder])
            base = shared[folder]
            others.append(Sequence(method, task, seed, steps, base))
        if experiment["joint"]:
            step = _step(experiment, save_dir, "joint", seed, "joint", 0, experiment["joint"])
            others.append(Sequence("joint", task, seed, [step]))
    tested = {str(c.data.test.args): s.method for s in [*bases, *others] for _, c in s.steps}
    if len(tested) > 1:
        names = " and ".join([*tested.values()][:2])
        raise UserError(
            f"{names} would be tested in different ways, so that their results could not be compared: "
            "give --crop_size and --eval_crop in the flags of all steps"
        )
    return bases, others


def _of_step_0(config):
    """Name and further flags of the step 0 that a method's later steps, so configured, start from."""
    if config.method == "eir":
        return "step0", ""
    ac = f"{config.hyperparameter.ac:g}"
    return f"step0-{config.method}-ac{ac}", f"--method {config.method} --ac {ac}"


def _step(experiment, save_dir, method, seed, task, number, flags):
    """The flags of train_voc.py for one step, and the configuration that they make."""
    own = {
        "-c": ROOT / experiment["config"],
        "--save_dir": save_dir,
        "--name": f"{_folder_name(method)}-seed{seed}",
        "--seed": seed,
        "--task_name": task,
        "--task_setting": experiment["setting"],
        "--task_step": number,
        "--resume": "auto",
    }
    try:
        further = _split(f"{experiment['flags']} {flags}")
        for word in further:
            if re.match(r"-[a-z]", word) or word.partition("=")[0] in {*own, *RESERVED}:
                raise UserError(f"{word} is not a flag to give here, the experiment sets it")
        words = [*(str(word) for pair in own.items() for word in pair), *further]
        return words, read_train(words)[0]
    except UserError as error:
        raise UserError(f"{method}: {error}") from None


def _split(flags):
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise UserError(f"cannot read the flags {flags}: {error}") from None


@dataclass
class Call:
    """A call of train_voc.py for a step of a sequence, and how far it is.

    place: as Runner has it. log: what the call prints, from byte `begin` on. warned: the size of the
    step's own log before the call.
    done: part of the training, 0 to 1. first: when it was first seen training, and done then.
    """

    sequence: Sequence
    step: int
    place: str | None
    log: Path
    begin: int
    warned: int
    process: subprocess.Popen
    done: float = 0.0
    first: tuple[float, float] | None = None
    text: str = "starting"

    def __str__(self) -> str:
        of = self.sequence
        return f"{of.task.name} {of.method}/{of.seed} step {self.step}: {self.text}"

    def look(self) -> None:
        """Read in the log how far it is."""
        with open(self.log, "rb") as file:
            file.seek(max(self.begin, file.seek(0, os.SEEK_END) - 4096))
            found = PROGRESS.findall(file.read().decode(errors="replace"))
        if not found:
            return
        epoch, epochs, iteration, iterations, loss = found[-1]
        done = (int(epoch) - 1 + int(iteration or 1) / int(iterations or 1)) / int(epochs)
        if done == self.done:
            return
        now, self.done = time.monotonic(), done
        self.first = self.first or (now, done)
        self.text = f"epoch {epoch}/{epochs}, {loss}" if done < 1 else "evaluating"
        if done > self.first[1]:
            seconds = (now - self.first[0]) / (done - self.first[1])
            self.sequence.seconds = seconds
            self.text += f", {duration(seconds * (1 - done))} to go" if done < 1 else ""


class Runner:
    """Trains sequences, each from when the step 0 it starts from is there, and shows where they are.

    places: of the calls that run at a time; each is the GPU to see, or None for a share of the cores.
    folder: of the runs. lock: on it, a file descriptor that the calls inherit, so that the folder stays
    locked as long as one of them lives.
    """

    def __init__(
        self,
        bases: list[Sequence],
        others: list[Sequence],
        places: list,
        folder: Path,
        lock: int | None,
    ):
        self.bases, self.others, self.places = bases, others, places
        self.launcher = _split(os.environ.get("LAUNCHER", "")) or [sys.executable]
        self.lock, self.logs = lock, folder / "calls"
        self.logs.mkdir(exist_ok=True)
        self.calls: list[Call] = []
        self.failed: set[Sequence] = set()
        self.warned_of: set[str] = set()
        self.interrupted = False
        self.live = sys.stdout.isatty()
        self.shown, self.shown_at = "", time.monotonic()

    def run(self, results: Callable[[], None]) -> int:
        """Train what is left; returns the number of sequences that failed.

        What starts from one that failed is left out. results() is called first and after each step.
        """
        self._look([*self.bases, *self.others])
        for sequence in [*self.bases, *self.others]:
            for _, config in [step for step in sequence.steps if step not in sequence.left]:
                for how in trained_otherwise(config):
                    self.say(
                        f"otherwise   {config.step_dir()} was trained {how}, which is asked for now"
                    )
        results()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)
        try:
            self._train(results)
        finally:
            self._stop()
        return len(self.failed)

    def _look(self, sequences):
        """See which steps are left; a sequence whose results are another experiment's has failed."""
        for sequence in sequences:
            sequence.left = list(sequence.steps)
            if {sequence, sequence.base} & self.failed:
                continue
            try:
                sequence.left = [step for step in sequence.steps if not _is_finished(sequence, step)]
            except UserError as error:
                self._fail(sequence, error)

    def _interrupt(self, *_):
        """Handle a signal: an exception from here could lose track of a process that just starts."""
        self.interrupted = True

    def _train(self, results):
        free = list(self.places)
        # a single step 0 that all others wait for has all the cores, else they are shared by as many
        # calls as can run at a time
        ready, others = self._ready(), self._open(self.others)
        alone = ready if len(ready) == 1 else []
        at_a_time = min(len(free), max(len(ready), len(others)))
        while self.calls or self._ready():
            while free and (ready := self._ready()):
                try:
                    sharing = 1 if ready[0] in alone else at_a_time
                    self.calls.append(self._start(ready[0], free[0], sharing))
                    free.pop(0)
                except UserError as error:
                    self._fail(ready[0], error)
            self._show()
            time.sleep(0.2)
            if self.interrupted:
                raise KeyboardInterrupt
            for call in [call for call in self.calls if call.process.poll() is not None]:
                self._end(call)
                free.append(call.place)
                # those that start from it are stale where it is another model now
                self._look([s for s in self.others if s.base is call.sequence])
                results()

    def _open(self, sequences):
        """Those with steps left that neither failed nor start from one that did."""
        return [s for s in sequences if s.left and not {s, s.base} & self.failed]

    def _ready(self):
        """The open sequences whose next step can be trained now."""
        running = [call.sequence for call in self.calls]
        sequences = [s for s in self._open([*self.bases, *self.others]) if s not in running]
        return [s for s in sequences if not (s.base and s.base.left)]

    def _start(self, sequence, place, at_a_time):
        """The call for a sequence's next step, with its share of what so many calls share."""
        words, config = sequence.left[0]
        command = [*self.launcher, str(ROOT / "train_voc.py"), *words]
        if sequence.base and config.task.step == 1:
            folder = sequence.base.steps[0][1].step_dir()
            command += ["--prev_checkpoint", str(final_checkpoint(folder) or folder)]
        environment = dict(os.environ)
        if place is not None:
            environment["CUDA_VISIBLE_DEVICES"] = place
        elif at_a_time > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // at_a_time)))
        log = self.logs / f"{config.step_dir().parent.name}_{config.task.step}.txt"
        own = config.step_dir(kind="log") / "log.txt"
        warned = own.stat().st_size if own.is_file() else 0
        try:
            with open(log, "ab") as file:
                begin = file.tell()
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=[] if self.lock is None else [self.lock],  # a call may outlive this
                )
        except OSError as error:
            raise UserError(f"cannot start {command[0]}: {error}") from None
        self.say(f"started     {sequence.title}, step {config.task.step}: {log}")
        return Call(sequence, config.task.step, place, log, begin, warned, process)

    def _end(self, call):
        """Say how a call has ended."""
        self.calls.remove(call)
        if code := call.process.returncode:
            last = call.log.read_text("utf-8", "replace").strip().splitlines()[-1:]
            error = f"step {call.step} ended with code {code}: {' '.join(last)} ({call.log})"
            self._fail(call.sequence, error)
        elif not has_results(folder := call.sequence.left[0][1].step_dir()):
            error = f"step {call.step} ended without results in {folder}: the call must last as long as"
            self._fail(call.sequence, f"{error} the training, and see the same files ({call.log})")
        else:
            _, config = call.sequence.left.pop(0)
            self.say(f"finished    {call.sequence.title}, step {call.step}")
            self._pass_on_warnings(f"{call.sequence.title}, step {call.step}", config, call.warned)

    def _pass_on_warnings(self, title, config, begin):
        """Say what a step's log warns of from byte `begin` on, unless another step's has done so."""
        log = config.step_dir(kind="log") / "log.txt"
        content = log.read_bytes()[begin:] if log.is_file() else b""
        for line in content.decode("utf-8", "replace").splitlines():
            warning = line.partition(" WARNING ")[2]
            if warning and warning not in self.warned_of:
                self.say(f"warning     {title}: {warning}")
                self.warned_of.add(warning)

    def _fail(self, sequence, error):
        self.failed.add(sequence)
        self.say(f"failed      {sequence.title}: {error}", sys.stderr)

    def say(self, line: str, file: TextIO | None = None) -> None:
        """Print a line, to standard output by default, where the one that keeps up stands."""
        self._rewrite("")
        print(line, file=file or sys.stdout, flush=True)

    def _rewrite(self, line):
        """On a terminal, put this in the place of the line that keeps up."""
        if self.live and line != self.shown:
            print(f"\r{' ' * len(self.shown)}\r{line}", end="", flush=True)
            self.shown = line

    def _show(self):
        """Show where the calls are: on a terminal in a line that keeps up, else in one a minute."""
        for call in self.calls:
            call.look()
        line = " | ".join([self._overall(), *map(str, self.calls)])
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            if len(line) > width:  # without what is missed least: the task comes first after a bar
                line = re.sub(r"(?<=\| )\S+ | done|about |epoch |, loss [\d.]+| to go", "", line)
            self._rewrite(line[:width])
        elif line != self.shown and time.monotonic() >= self.shown_at + LOG_SECONDS:
            self.say(f"running     {line}")
            self.shown, self.shown_at = line, time.monotonic()

    def _overall(self):
        """The steps that are done, and the time to go as far as it can be told."""
        sequences = [*self.bases, *self.others]
        steps, left = sum(len(s.steps) for s in sequences), sum(len(s.left) for s in sequences)
        text = f"{steps - left}/{steps} steps done"
        running = {call.sequence: call for call in self.calls}
        if not running or not all(s.seconds for s in running) or self._open(self.bases):
            return text  # step 0 says nothing of the time that the other steps take
        # a method that has not run yet is taken to be like those that run
        usual, seconds = mean(s.seconds for s in running), 0.0
        for s in self._open(self.others):
            done = running[s].done if s in running else 0
            seconds += (len(s.left) - done) * (s.seconds or usual)
        return f"{text}, about {duration(seconds / len(running))} to go"

    def _stop(self):
        """End what is running; it resumes from its last epoch next time."""
        self._rewrite("")
        end = getattr(os, "killpg", os.kill)  # where there are groups, the loader workers too
        for call in self.calls:
            with contextlib.suppress(ProcessLookupError):
                end(call.process.pid, signal.SIGTERM)
        for call in self.calls:
            call.process.wait()


def collect(sequences: list[Sequence], refused: dict[Sequence, UserError]) -> list[dict]:
    """The rows of results.csv: the steps that are finished, of sequences with more than a step 0.

    Sequences whose results were trained with other settings, or are damaged, are left out; refused
    says then which these are, and why.
    """
    rows = []
    refused.clear()
    for sequence in sequences:
        shared = sequence.base.steps if sequence.base else []
        try:
            finished = [step for step in sequence.steps if _is_finished(sequence, step)]
            if finished and all(_is_finished(sequence.base, step) for step in shared):
                configs = [config for _, config in [*shared, *finished]]
                rows += [row(sequence.method, sequence.task, sequence.seed, c) for c in configs]
        except UserError as error:
            refused[sequence] = error
    return rows


def _is_finished(sequence, step):
    """True if a step of the sequence is finished; UserError as in is_finished."""
    base = sequence.base
    return is_finished(step[1], start=base and final_checkpoint(base.steps[0][1].step_dir()))


def make_places(jobs: int, gpus: str | None) -> list[str | None]:
    """For each call that may run at a time the GPU that it sees; without gpus jobs times None."""
    if gpus is None:
        if jobs < 1:
            raise UserError(f"--jobs is {jobs}; it must be at least 1")
        return [None] * jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else None
    try:
        indices = [int(gpu) for gpu in gpus.split(",")]
        if min(indices) < 0:
            raise IndexError
        return [names[i] if names else str(i) for i in indices]
    except (ValueError, IndexError):
        seen = f" of CUDA_VISIBLE_DEVICES={visible}" if visible else ""
        raise UserError(f"--gpus is {gpus!r}; give indices{seen} such as 0 or 0,1") from None


def choose(path: Path, key: str, known: list, asked: list | None) -> list:
    """The seeds or methods that are asked for, by default all; UserError for one that is not known."""
    for name in asked or []:
        if name not in known:
            raise UserError(f"{path} has no {name}: its {key} are {', '.join(map(str, known))}")
    return asked or known


def _main(arguments):
    path = arguments.experiment
    experiment = read_experiment(path)
    methods = [*experiment["methods"], *(["joint"] if experiment["joint"] else [])]
    seeds = choose(path, "seeds", experiment["seeds"], arguments.seeds)
    methods = choose(path, "methods", methods, arguments.methods)
    places = make_places(arguments.jobs, arguments.gpus)
    save_dir = str(arguments.save_dir or experiment["save_dir"])
    bases, others = plan(experiment, save_dir)
    # by folder, since the joint training of a seed is the same for all tasks
    asked = [s for s in others if s.seed in seeds and s.method in methods]
    todo = list({s.steps[0][1].step_dir(): s for s in asked}.values())
    folder = Path(save_dir).expanduser()
    results = (arguments.output or folder / path.stem) / "results.csv"
    needed = [base for base in bases if any(s.base is base for s in todo)]
    busy = f"experiments are running in {folder} already: wait for them, end them, or give another "
    with locked(folder, f"{busy}--save_dir") as lock:
        runner, refused = Runner(needed, todo, places, folder, lock), {}

        def write():
            rows = collect(others, refused)
            if former := keep_former(results, rows):
                runner.say(f"kept        {former}: the table until now, with rows that {results} lacks")
            write_results(results, rows)

        failures = runner.run(write)
    for sequence, error in refused.items():
        if not {sequence, sequence.base} & runner.failed:  # which have had their line
            print(f"left out    {sequence.title}: {error}", file=sys.stderr)
    print(f"results     {results}")
    return failures


def main() -> None:
    parser = Parser(None, __doc__)
    parser.add_argument(
        "experiment", type=utils.program.a_path, help="JSON file; configs/experiments has some"
    )
    parser.add_argument(
        "--save_dir", type=utils.program.a_path, help="folder of the runs, instead of the experiment's"
    )
    parser.add_argument(
        "--output",
        type=utils.program.a_path,
        help="folder of results.csv (default: <save_dir>/<experiment's name>)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="run only these of the experiment's seeds")
    parser.add_argument("--methods", nargs="+", help="run only these of its methods")
    places = parser.add_mutually_exclusive_group()
    places.add_argument("--jobs", type=int, default=1, help="runs at a time, sharing the cores")
    places.add_argument("--gpus", help="such as 0,1,2: a run at a time on each of these GPUs")
    try:
        failures = _main(parser.parse_args())
    except KeyboardInterrupt:
        raise UserError("interrupted: run the same command to resume") from None
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
