"""One call of an entry point, in one process: train a step, or evaluate a checkpoint."""

import contextlib
import shutil
from pathlib import Path

import torch

from configs.options import EVALUATED, Config, EvalCall, TrainCall, load_config
from data_loader.data_loaders import StepData
from data_loader.data_root import SPLITS
from data_loader.memory import beside
from trainer import output
from trainer.base_step import BaseStep
from trainer.dkd import DKDBaseStep, DKDStep
from trainer.evaluate import evaluate
from trainer.incremental import IncrementalStep
from utils.checkpoint import final_checkpoint, locked, read_json_object, write_json
from utils.config import differences
from utils.distributed import barrier, device, rank, world_size
from utils.errors import UserError
from utils.logging import log, set_up_logging
from utils.metrics import METRICS, format_table

# The kinds of steps by method: that of step 0, and that of the steps after it.
STEPS = {"eir": (BaseStep, IncrementalStep), "dkd": (DKDBaseStep, DKDStep)}


def train(config: Config, call: TrainCall) -> None:
    """Train the configured step, unless it is finished, and evaluate it."""
    folder = config.step_dir()
    if call.test:
        _start_log(config, call, None)
        named = call.resume and call.resume != "auto"
        path = Path(call.resume) if named else _last_checkpoint(folder)
        _say_how_it_was_trained(config, path)
        _evaluate(config, path)
        return
    if not call.overwrite and output.is_finished(config, world_size(), previous=call.prev_checkpoint):
        if rank() == 0:
            print(f"{folder} is finished already: nothing to do (--overwrite trains it anew)")
            for how in output.trained_otherwise(config, world_size()):
                print(f"it was trained {how}")
        return
    if config.world_size > world_size() == 1:
        raise UserError(
            f"the configuration has world_size {config.world_size}, but this process is alone: several "
            "nodes need GPUs and --multiprocessing_distributed, or torchrun; else set world_size to 1"
        )
    output.check_places(config)
    resume = output.where_to_start(config, call)
    set_up_logging(None, config.trainer.verbosity, rank() == 0)  # no file before all is checked
    data = StepData(config)
    previous = output.previous_checkpoint(config, call) if data.step else None
    kind = STEPS[config.method][min(data.step, 1)]
    trainer = kind(config, data, resume, previous)
    barrier()  # all processes have looked at the folder before the first one writes into it
    busy = f"another process is training {folder}: wait for it, or end it"
    with locked(folder, busy) if rank() == 0 else contextlib.nullcontext():
        _start_log(config, call, config.step_dir(kind="log"))
        data.describe()
        if rank() == 0:
            _check_still(config, call, resume)
        try:
            trainer.prepare()
            barrier()  # all processes have read the memory before it gets its place
            output.begin(trainer)
        except UserError:  # but for a run that was ended, since the next one goes on with them
            shutil.rmtree(beside(folder / "pseudo_labels"), ignore_errors=True)
            raise
        finally:
            if rank() == 0:  # what was drawn for a run that is refused
                shutil.rmtree(beside(folder / "memory"), ignore_errors=True)
        barrier()
        trainer.fit()


def _check_still(config, call, resume):
    """Raise UserError if another process trained the step before this one had the lock."""
    if call.overwrite:
        return
    if output.is_finished(config, world_size()) or output.where_to_start(config, call) != resume:
        raise UserError(
            f"another process has trained {config.step_dir()} meanwhile: the same command with "
            "--resume auto goes on from there"
        )


def evaluate_checkpoint(config: Config, call: EvalCall) -> None:
    """Evaluate a checkpoint on the test images of its step."""
    if call.output:
        _check_output(Path(call.output))
    _start_log(config, call, None)
    _say_how_it_was_trained(config, Path(call.resume))
    metrics = _evaluate(config, Path(call.resume), call.score)
    if call.score != 0.5:
        log.info(f"score       {call.score:g}, which a prediction asked for in place of 0.5")
        metrics["score"] = call.score
    if call.output and rank() == 0:
        write_json(Path(call.output), metrics)
        log.info(f"\nmetrics     {call.output}")


def _check_output(path):
    """Raise UserError where anything but nothing, an empty file, or such numbers would be lost."""
    if path.name == "metrics.json" and (path.parent / "made_from.json").exists():
        raise UserError(f"{path} has the results of a step: give another --output")
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return
    if not (path.is_file() and (read_json_object(path) or {}).keys() >= {*METRICS}):
        raise UserError(
            f"cannot write {path}: what is there are no numbers of an evaluation; give another --output"
        )


def _evaluate(config, path, score=0.5):
    data = StepData(config)
    data.describe()
    model, content = output.read_model(path, data, config.arch.args.backbone, data.step)
    model.to(device(), memory_format=torch.channels_last)
    if output.was_replaced(path):
        log.warning(
            f"{path} has changed since its step was finished: these results are not that step's"
        )
    found = {split: data.digest(split) for split in SPLITS}
    known = found | content.get("made_from", {})
    if known["val"] != found["val"]:
        log.warning(
            f"the validation list or its labels are not those of the training of {path}: these results "
            "are none to compare with its own"
        )
    # which classes were never shown is told by the training images, if they are the same ones
    untrained = []
    if known["train"] == found["train"]:
        untrained = data.never_shown()
    else:
        log.warning(
            f"the training list or its labels are not those of the training of {path}: classes that it "
            "was shown no image of are not marked"
        )
    metrics = evaluate(model, data, "test", device(), score, untrained)
    log.info(format_table(metrics, *data.groups))
    log.info(f"\ncheckpoint  {path}")
    return metrics


def _start_log(config, call, folder):
    set_up_logging(folder, config.trainer.verbosity, rank() == 0)
    if call.ignored:
        log.warning(f"ignored keys of the configuration: {', '.join(call.ignored)}")
    if call.unused:
        log.warning(f"without effect here: {', '.join(call.unused)}")


def _last_checkpoint(folder):
    path = final_checkpoint(folder)
    if path is None:
        raise UserError(f"nothing to evaluate in {folder}: train the step first, or give -r PATH")
    if not output.has_results(folder):
        log.warning(f"{folder} is not finished: {path.name} is the latest that was kept")
    return path


def _say_how_it_was_trained(config, path):
    """Warn of settings that an evaluation makes use of and that the training had others of."""
    trained = path.parent / "config.json"
    if trained.is_file():
        try:
            changed = differences(load_config(trained)[0], config)
        except UserError:  # another program's, or damaged
            return
        # of train and val stand there only what one flag sets together with test's
        unread = ("data_loader.args.train.", "data_loader.args.val.")
        other = [
            words for key, words in changed.items() if key in EVALUATED and not key.startswith(unread)
        ]
        if other:
            log.warning(
                f"{path} was trained with other settings ({'; '.join(other)}): an evaluation without "
                "-c and these flags takes those"
            )
