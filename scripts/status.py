"""Show how far the runs in a folder are: steps done, under way and left, loss, speed and time to go.

python scripts/status.py _saved_voc
"""

import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils.program

from configs.options import Config, load_config
from data_loader.tasks import task_of
from trainer.output import has_results, is_stale, model_before, read_record, read_results
from utils.config import Parser
from utils.errors import UserError


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would choose."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def last_record(path: Path) -> dict | None:
    """The last whole line of a step's metrics.jsonl; None if there is none yet, or no record in it."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
        record = json.loads([line for line in lines if line.endswith(b"\n")][-1])
        speed = record.get("images_per_second", 0)
        whole = all(map(math.isfinite, (record["epoch"], record["loss"], record["seconds"], speed)))
    except (OSError, ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError):
        return None
    return record if whole else None


def describe_step(config: Config, folder: Path, log_folder: Path, now: float) -> str:
    """One line about a step that was started: its result, or how far it is."""
    epoch = last_record(log_folder / "metrics.jsonl")
    if metrics := read_results(folder):
        miou = f"done      mIoU {metrics['Mean_Intersection_over_Union']['overall']:.2f}"
        stale = is_stale(folder, model_before(folder))
        return f"{miou}, from another model of the step before than is there now" if stale else miou
    if not epoch:
        written = max(path.stat().st_mtime for path in folder.iterdir())
        return f"started   no epoch is finished yet, last written {duration(now - written)} ago"
    epochs, written = config.trainer.epochs, (log_folder / "metrics.jsonl").stat().st_mtime
    left = (epochs - epoch["epoch"]) * epoch["seconds"] - (now - written)
    text = f"under way epoch {epoch['epoch']} of {epochs}, loss {epoch['loss']:.4f}"
    if "images_per_second" in epoch:
        text += f", {epoch['images_per_second']:.1f} images/s"
    if now - written > 3 * epoch["seconds"] + 60:
        return f"{text}, nothing written for {duration(now - written)}: --resume auto goes on"
    return f"{text}, about {duration(max(left, 0))} to go and the test"


def describe_run(run: Path, now: float) -> list[str]:
    """The lines about a run, the folder of its steps; now: seconds since the epoch.

    A step 0 that the methods of an experiment share has no steps left, and a run that started from
    another one's step 0 lacks none.
    """
    folders = {int(p.name[5:]): p for p in run.glob("step_*") if p.name[5:].isdecimal()}
    folders = {t: p for t, p in sorted(folders.items()) if (p / "config.json").is_file()}
    if not folders:
        return [f"{run.name}: no step was started"]
    configs = {t: load_config(folder / "config.json")[0] for t, folder in folders.items()}
    steps = task_of(next(iter(configs.values())).data).steps
    logs = run.parent.parent / "log" / run.name
    expected = range(len(steps))
    if 0 not in folders and read_record(run / "step_1").get("own_previous") is False:
        expected = expected[1:]
    elif [*folders] == [0] and "_step0-" in run.name:  # as run_experiments.py names it
        expected = expected[:1]
    done = sum(has_results(folder) for folder in folders.values())
    lines = [f"{run.name}: {done} of {len(expected)} steps done"]
    for t, folder in folders.items():
        lines.append(f"  step {t:<3} {describe_step(configs[t], folder, logs / folder.name, now)}")
    left = [str(t) for t in expected if t not in folders]
    return [*lines, f"  left     steps {', '.join(left)}"] if left else lines


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = Parser(None, __doc__)
    parser.add_argument("save_dir", type=utils.program.a_path, help="the --save_dir of the runs")
    save_dir = parser.parse_args(argv).save_dir
    runs = sorted(path for path in (save_dir / "models").glob("*") if path.is_dir())
    if not runs:
        raise UserError(f"no run in {save_dir}: give the --save_dir of train_voc.py")
    damaged = 0
    for run in runs:
        try:
            print(*describe_run(run, time.time()), sep="\n")
        except UserError as error:  # the others are of interest all the more
            damaged = 2
            print(f"{run.name}: {error}")
    return damaged


if __name__ == "__main__":
    sys.exit(main())
