"""What a step leaves in its folder, and what a later call finds there.

config.json          the settings
memory/              the memory that the step replays (data_loader/memory.py)
last.pth             checkpoint of the latest epoch, to resume from
model_best.pth       checkpoint of the best validation, if a value is monitored
checkpoint-epoch<E>.pth   the final checkpoint, and those that save_period asks for
metrics.json         the test results; written last, it marks the step as finished
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from configs.options import Config, TrainCall, load_config
from data_loader.data_loaders import StepData
from trainer.evaluate import evaluate
from utils.checkpoint import final_checkpoint, numbered_checkpoints, save_checkpoint, write_json
from utils.config import differences
from utils.distributed import barrier, rank
from utils.errors import UserError
from utils.logging import log
from utils.metrics import format_table

if TYPE_CHECKING:
    from trainer.base import Trainer


# Before training: what is there.


def is_finished(config: Config) -> bool:
    """True if the step has its results; UserError if they come from other settings."""
    folder = config.step_dir()
    if not ((folder / "metrics.json").is_file() and (folder / "config.json").is_file()):
        return False
    changed = differences(load_config(folder / "config.json")[0], config)
    if changed:
        raise UserError(
            f"{folder} holds a finished step with other settings ({', '.join(changed)}): choose "
            "another --name or --save_dir, or --overwrite it"
        )
    return True


def where_to_start(config: Config, call: TrainCall) -> Path | None:
    """Checkpoint to resume from, or None to start anew; refuses to lose a started run."""
    folder = config.step_dir()
    last = folder / "last.pth"
    if call.overwrite:
        return None
    if call.resume and call.resume != "auto":
        return _resume_from(Path(call.resume), folder, config)
    if call.resume and last.is_file():
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


def previous_checkpoint(config: Config, call: TrainCall) -> Path:
    """The model that step t >= 1 starts from: --prev_checkpoint, or step t-1's final one."""
    if call.prev_checkpoint:
        return Path(call.prev_checkpoint)
    step = config.task.step - 1
    folder = config.step_dir(step)
    path = final_checkpoint(folder)
    if path is None or not (folder / "metrics.json").is_file():
        raise UserError(
            f"step {step} is not finished in {folder}: train it first (--task_step {step}), or give "
            "its model with --prev_checkpoint FILE"
        )
    return path


def begin(config: Config, resumed: bool, overwrite: bool) -> None:
    """Start to write: from here on the step is unfinished. Old output goes, unless it is resumed.

    The memory stays, unless it is to be drawn anew (overwrite): a run that was killed after drawing it
    goes on with it.
    """
    folder = config.step_dir()
    if not resumed:
        # what marks the step as finished goes first: a kill in between leaves an unfinished step
        for pattern in ("metrics.json", "last.pth", "model_best.pth", "checkpoint-epoch*.pth"):
            for path in folder.glob(pattern):
                path.unlink()
        if overwrite:
            shutil.rmtree(folder / "memory", ignore_errors=True)
        later = config.step_dir(config.task.step + 1)
        if later.is_dir():
            log.warning(
                f"{later} was trained from the step that is trained anew here: --overwrite it too"
            )
    write_json(folder / "config.json", config.to_dict())


# During training, and after it.


def checkpoint(trainer: "Trainer") -> dict:
    """All that is needed to go on bit for bit; the randomness follows from seed and epoch."""
    config, data = trainer.config, trainer.data
    return {
        "format": "eir-1",
        "arch": {"backbone": config.arch.args.backbone, "classes": trainer.model.classes},
        "order": list(data.task.seen(data.step)),
        "state_dict": trainer.model.state_dict(),
        "epoch": trainer.epoch,
        "optimizer": trainer.optimizer.state_dict(),
        "lr_scheduler": trainer.scheduler.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "best": trainer.validation.best,
        "stale": trainer.validation.stale,
        "ac": config.hyperparameter.ac,
    }


def restore(trainer: "Trainer", content: dict, path: Path) -> None:
    """Put a trainer where a checkpoint left it; UserError if that does not fit."""
    try:
        trainer.optimizer.load_state_dict(content["optimizer"])
        trainer.scheduler.load_state_dict(content["lr_scheduler"])
        if trainer.scaler.is_enabled() and content["scaler"]:
            trainer.scaler.load_state_dict(content["scaler"])
        trainer.epoch = content["epoch"]
        if trainer.epoch > trainer.config.trainer.epochs:
            raise ValueError(f"it is at epoch {trainer.epoch} already")
        if not trainer.config.trainer.reset_best_mnt:
            trainer.validation.best, trainer.validation.stale = content["best"], content["stale"]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path} cannot be resumed from: its training state does not fit ({error}); "
            "--overwrite trains the step anew"
        ) from None
    log.info(f"resumed after epoch {trainer.epoch} from {path}")


def save(trainer: "Trainer", improved: bool) -> None:
    """Write the checkpoints of an epoch; improved: its validation was the best so far.

    Raises UserError, and writes nothing, if a weight is not finite.
    """
    settings, folder = trainer.config.trainer, trainer.folder
    if not all(bool(value.isfinite().all()) for value in trainer.model.state_dict().values()):
        raise UserError(
            f"weights are not finite after epoch {trainer.epoch}: nothing was saved; the last good "
            "checkpoint stands (a smaller --lr may help)"
        )
    if rank() == 0:
        content = checkpoint(trainer)
        if improved:
            save_checkpoint(folder / "model_best.pth", content)
        if settings.save_period > 0 and trainer.epoch % settings.save_period == 0:
            save_checkpoint(_numbered(trainer), content)
        save_checkpoint(folder / "last.pth", content)
    barrier()


def finish(trainer: "Trainer") -> None:
    """Keep the final checkpoint, evaluate, and write what marks the step as finished."""
    folder = trainer.folder
    if rank() == 0:
        save_checkpoint(_numbered(trainer), checkpoint(trainer))
        for later in numbered_checkpoints(folder, trainer.epoch + 1):
            later.unlink()  # of a longer run that was gone back from
    metrics = evaluate(trainer.model, trainer.data, "test", trainer.device)
    if rank() == 0:
        write_json(folder / "metrics.json", metrics)
    log.info("\n" + format_table(metrics, *trainer.data.groups))
    log.info(f"\ncheckpoint  {_numbered(trainer)}")
    log.info(f"metrics     {folder / 'metrics.json'}")
    log.info(f"log         {trainer.config.step_dir(kind='log')}")


def _numbered(trainer):
    return trainer.folder / f"checkpoint-epoch{trainer.epoch}.pth"


def check_order(content: dict, data: StepData, path: Path) -> None:
    """Raise UserError if a checkpoint learned other classes, or in another order."""
    order = content.get("order")
    if order is not None and order != list(data.task.order[: len(order)]):
        raise UserError(
            f"{path} learned other classes than {data.task.name} has there, or in another order"
        )
