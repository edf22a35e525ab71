"""One call of an entry point, in one process: train a step, or evaluate a checkpoint."""

from pathlib import Path

import torch

from data_loader.data_loaders import StepData
from models.deeplabv3 import DeepLabV3
from trainer.base import check_order
from trainer.base_step import BaseStep
from trainer.evaluate import evaluate
from trainer.incremental import IncrementalStep
from trainer.monitor import check_monitor
from utils.arguments import Run
from utils.checkpoint import final_checkpoint, load_weights, read_checkpoint, write_json
from utils.config import Config
from utils.config_file import differences, is_finished, load_config
from utils.distributed import device, rank
from utils.errors import UserError
from utils.logging import log, set_up_logging
from utils.metrics import format_table


def train(config: Config, run: Run) -> None:
    """Train the configured step, unless it is finished, and evaluate it."""
    folder = config.step_dir()
    if run.test:
        _start_log(config, run, None)
        named = run.resume and run.resume != "auto"
        checkpoint = Path(run.resume) if named else _finished_checkpoint(folder)
        _evaluate(config, checkpoint, run.output)
        return
    check_monitor(config)
    if not run.overwrite and is_finished(config):
        if rank() == 0:
            print(f"{folder} is finished already: nothing to do (--overwrite trains it anew)")
        return
    resume = _where_to_start(config, run)
    data = StepData(config)  # in its barrier, all processes have seen what was there
    _start_log(config, run, config.step_dir(kind="log"))
    previous = previous_checkpoint(config, run) if data.step else None
    kind = IncrementalStep if data.step else BaseStep
    trainer = kind(config, data, resume, previous, run.overwrite)
    if rank() == 0:
        if not resume:
            _clear(folder)
        write_json(folder / "config.json", config.to_dict())
    trainer.fit()


def evaluate_checkpoint(config: Config, run: Run) -> None:
    """Evaluate a checkpoint on the test images of its step."""
    _start_log(config, run, None)
    _evaluate(config, Path(run.resume), run.output)


def _evaluate(config, path, output):
    data = StepData(config)
    model = DeepLabV3(data.classes, config.arch.args.backbone)
    checkpoint = read_checkpoint(path)
    check_order(checkpoint, data, path)
    load_weights(model, checkpoint["state_dict"], path)
    model.to(device(), memory_format=torch.channels_last)
    metrics = evaluate(model, data, "test", device())
    log.info(format_table(metrics, *data.groups("test")))
    if output and rank() == 0:
        write_json(Path(output), metrics)
        log.info(f"\nmetrics     {output}")


def _start_log(config, run, folder):
    set_up_logging(folder, config.trainer.verbosity, rank() == 0)
    if run.ignored:
        log.warning(f"ignored keys of the configuration: {', '.join(run.ignored)}")


def _finished_checkpoint(folder):
    path = final_checkpoint(folder)
    if path is None:
        raise UserError(f"nothing to evaluate in {folder}: train the step first, or give -r PATH")
    return path


def _where_to_start(config, run):
    """Checkpoint to resume from, or None to start anew; refuses to lose a started run."""
    folder = config.step_dir()
    last = folder / "last.pth"
    if run.overwrite:
        return None
    if run.resume and run.resume != "auto":
        return _resume_from(Path(run.resume), folder, config)
    if run.resume and last.is_file():
        return _resume_from(last, folder, config)
    if last.is_file():
        raise UserError(
            f"{folder} holds an unfinished step: --resume auto resumes it, --overwrite starts anew"
        )
    if final_checkpoint(folder):
        raise UserError(
            f"{folder} holds a checkpoint that was not trained here: choose another --name, or "
            "--overwrite it"
        )
    return None


def _resume_from(path, folder, config):
    """The checkpoint, if it goes on with the same experiment and replaces no other one."""
    elsewhere = path.parent.resolve() != folder.resolve()
    if elsewhere and ((folder / "last.pth").is_file() or final_checkpoint(folder)):
        raise UserError(
            f"{folder} holds a checkpoint of its own: choose another --name to go on from {path}"
        )
    if (path.parent / "config.json").is_file():
        changed = differences(load_config(path.parent / "config.json")[0], config)
        changed = [key for key in changed if key != "name"]
        if changed:
            raise UserError(
                f"{path} was trained with other settings ({', '.join(changed)}): resume with the same "
                "ones, or --overwrite trains anew"
            )
    return path


def _clear(folder):
    """Remove a step's old output, what marks it as finished first."""
    for pattern in ("metrics.json", "last.pth", "model_best.pth", "checkpoint-epoch*.pth"):
        for path in folder.glob(pattern):
            path.unlink()
    name, _, step = folder.name.partition("_")
    later = folder.with_name(f"{name}_{int(step) + 1}")
    if later.is_dir():
        log.warning(f"{later} was trained from the step that is trained anew here: --overwrite it too")


def previous_checkpoint(config: Config, run: Run) -> Path:
    """The model that step t >= 1 starts from: --prev_checkpoint, or step t-1's final one."""
    if run.prev_checkpoint:
        return Path(run.prev_checkpoint)
    step = config.task.step - 1
    folder = config.step_dir(step)
    path = final_checkpoint(folder)
    if path is None or not (folder / "metrics.json").is_file():
        raise UserError(
            f"step {step} is not finished in {folder}: train it first (--task_step {step}), or give "
            "its model with --prev_checkpoint FILE"
        )
    return path
