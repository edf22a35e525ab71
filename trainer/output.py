"""What a step leaves in its folder, and what a later call finds there.

config.json          the settings
made_from.json       what the step was made from (`made_from`): digests of the model before, the memory
                     and the lists, its settings and batch; once it is finished, also digests of its own
                     model and of its results, and how many validation images there were
memory/              the memory that the step replays (data_loader/memory.py)
pseudo_labels/       what the teacher sees in each whole image (--pseudo_labels image)
last.pth             checkpoint of the latest epoch, to resume from
model_best.pth       checkpoint of the best validation, if a value is monitored
checkpoint-epoch<E>.pth   the final checkpoint, and those that save_period asks for
metrics.json         the test results; written last, it marks the step as finished
"""

import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from configs.options import Config, TrainCall, load_config
from data_loader.data_loaders import StepData
from data_loader.data_root import SPLITS
from data_loader.memory import beside, put_in_place, read_memory, remove_memory
from data_loader.tasks import Task
from models.deeplabv3 import DeepLabV3
from trainer.evaluate import evaluate
from trainer.setup import bn_images
from utils.checkpoint import (
    content_digest,
    final_checkpoint,
    json_digest,
    load_weights,
    locked,
    numbered_checkpoints,
    read_checkpoint,
    read_json_object,
    save_checkpoint,
    write_json,
)
from utils.config import changes, differences, settings
from utils.distributed import barrier, rank, world_size
from utils.errors import UserError
from utils.logging import log
from utils.metrics import GROUPS, METRICS, format_table

if TYPE_CHECKING:
    from trainer.base import Trainer


# Before training: what is there.


def check_places(config: Config) -> None:
    """Raise UserError where a folder lies in place of a file that a step writes, or the other way
    round: found only when it is written, that would be after the old output is gone.
    """
    folder, logs = config.step_dir(), config.step_dir(kind="log")
    names = (".lock", "config.json", "made_from.json", "metrics.json", "last.pth", "model_best.pth")
    files = [*(folder / name for name in names), *folder.glob("checkpoint-epoch*.pth")]
    for path in (*files, logs / "log.txt", logs / "metrics.jsonl"):
        if path.is_dir():
            raise UserError(f"{path} is a folder: move it away, the step has a file of that name")
    for path in (folder / "memory", folder / "pseudo_labels"):
        for place in (path, beside(path)):
            if os.path.lexists(place) and not place.is_dir():
                raise UserError(f"{place} is no folder: move it away, the step has one of that name")


def _said(changed):
    """The words of differences by path: each once, though several options have one flag."""
    return [*dict.fromkeys(changed.values())]


def read_record(folder: Path) -> dict:
    """What made_from.json in a step's folder says; empty where it is missing or damaged."""
    return read_json_object(folder / "made_from.json") or {}


def is_finished(
    config: Config,
    processes: int | None = None,
    start: Path | None = None,
    previous: str | None = None,
) -> bool:
    """True if the step has its results; UserError if they come from other settings or another model.

    processes: of this call, which share its batch; None for as many as the step was trained by.
    start: the model that its step 1 starts from where that is another run's, None if it is not known.
    previous: the model that the step is asked to start from (--prev_checkpoint), if there is one.
    The data set is not looked at.
    """
    folder = config.step_dir()
    if not has_results(folder) or not (folder / "config.json").exists():
        return False
    changed = _said(differences(load_config(folder / "config.json")[0], config))
    made = read_record(folder)
    batch, processes = made.get("batch"), processes or made.get("processes")
    asked = processes and processes * config.data.train.batch_size
    if asked and batch not in (None, asked):
        changed.append(f"a batch of {batch} images, not {asked}, over all processes")
    if changed:
        raise UserError(
            f"{folder} holds a finished step with other settings ({'; '.join(changed)}): choose "
            "another --name or --save_dir, or --overwrite it"
        )
    _check_unchanged(folder)
    check_not_stale(config, config.task.step, start)
    known = made.get("previous")
    if previous and known is not None and content_digest(Path(previous)) != known:
        raise UserError(
            f"{folder} holds a finished step that started from another model than {previous}: choose "
            "another --name, or --overwrite it"
        )
    return True


def trained_otherwise(config: Config, processes: int | None = None) -> list[str]:
    """How a finished step was trained otherwise than asked for now, though it counts as the same.

    On another data root, since folders move, but what is in them may be something else; relative ones
    are taken from the present folder. With batch normalisation over other images, since a batch may be
    shared by other GPUs now; processes as in is_finished.
    """
    folder, found = config.step_dir(), []
    root, made = load_config(folder / "config.json")[0].data.data_root, read_record(folder)
    if Path(root).resolve() != Path(config.data.data_root).resolve():
        found.append(f"on {root}, not on {config.data.data_root}")
    bs, accumulate = config.data.train.batch_size, config.trainer.accumulate
    each, processes = bs // min(accumulate, bs), processes or made.get("processes") or 1
    other = (made.get("bs"), made.get("accumulate")) != (bs, accumulate)
    if other and made.get("bn_batch") not in (None, each, each * processes):
        found.append(
            f"with batch normalisation over {made['bn_batch']} images, which --bs and "
            "--accumulate do not give now"
        )
    return found


def read_results(folder: Path) -> dict | None:
    """The content of a finished step's metrics.json; None where it is missing, damaged, or not as it
    was written."""
    metrics = read_json_object(folder / "metrics.json") or {}
    known = read_record(folder).get("metrics")
    if known is not None and known != json_digest(metrics):
        return None
    values = [metrics[m] for m in METRICS if isinstance(metrics.get(m), dict)]
    whole = [v for v in values if v.keys() >= {*GROUPS} and isinstance(v["overall"], (int, float))]
    return metrics if len(whole) == len(METRICS) else None


def has_results(folder: Path) -> bool:
    """True if the step in a folder is finished: its results are there, and as they were written."""
    return read_results(folder) is not None


def was_replaced(path: Path) -> bool:
    """Whether a step's final checkpoint, at path, is known to be another one than it ended with."""
    known = read_record(path.parent).get("final")
    return known is not None and path == final_checkpoint(path.parent) and content_digest(path) != known


def _check_unchanged(folder):
    """Raise UserError if the final checkpoint of a finished step is not the one that it ended with."""
    path = final_checkpoint(folder)
    if path and was_replaced(path):
        raise UserError(
            f"{path} has changed since its step was finished: restore it from a copy, or train the "
            "step anew with --overwrite"
        )


def model_before(folder: Path) -> Path | None:
    """The model of the run's own step before, which the step in a folder started from; None if it was
    another one, or is gone."""
    if not read_record(folder).get("own_previous"):
        return None
    return final_checkpoint(folder.with_name(f"step_{int(folder.name[5:]) - 1}"))


def is_stale(folder: Path, before: Path | None) -> bool:
    """Whether the step in a folder was trained from another model than `before`; None is unknown."""
    return before is not None and content_digest(before) != read_record(folder).get("previous")


def check_not_stale(config: Config, step: int, start: Path | None = None) -> None:
    """Raise UserError if a step, or one that it goes back to, was trained from another model than the
    one before it is now; start as in is_finished."""
    for later in range(step, 0, -1):
        folder = config.step_dir(later)
        before = model_before(folder) or (start if later == 1 else None)
        if before is None:
            return
        if is_stale(folder, before):
            raise UserError(
                f"{folder} was trained from another model of step {later - 1} than {before} is now: "
                f"train it anew (--task_step {later} --overwrite)"
            )


def where_to_start(config: Config, call: TrainCall) -> Path | None:
    """Checkpoint to resume from, or None to start anew; refuses to lose a started run."""
    folder = config.step_dir()
    last = folder / "last.pth"
    if not last.is_file() and (folder / "made_from.json").is_file():
        last = final_checkpoint(folder) or last  # killed in between: the same content, written first
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
        changed.pop("name", None)
        if changed:
            raise UserError(
                f"{path} was trained with other settings ({'; '.join(_said(changed))}): resume with "
                "the same ones, or --overwrite trains anew"
            )
    return path


def previous_checkpoint(config: Config, call: TrainCall) -> Path:
    """The model that step t >= 1 starts from: --prev_checkpoint, or step t-1's final one."""
    if call.prev_checkpoint:
        return Path(call.prev_checkpoint)
    step = config.task.step - 1
    folder = config.step_dir(step)
    path = final_checkpoint(folder)
    if path is None or not has_results(folder):
        raise UserError(
            f"step {step} is not finished in {folder}: train it first (--task_step {step}), or give "
            "its model with --prev_checkpoint FILE"
        )
    _check_unchanged(folder)
    check_not_stale(config, step)
    return path


def mend_memory(data: StepData, folder: Path) -> None:
    """Draw the memory of a finished step again where it is missing or damaged: its seed decides it.

    data: of a later step of the same run. Nothing is done where made_from.json does not know the digest
    of the memory that the step was trained with. Raises UserError where another one comes out.
    """
    if rank() == 0:
        _mend_memory(data, folder)
    barrier()


def _mend_memory(data, folder):
    known, place = read_record(folder).get("memory"), folder / "memory"
    try:
        if known is None or read_memory(place)["sha256"] == known:
            return
    except UserError:
        pass
    was = load_config(folder / "config.json")[0]
    before = folder.with_name(f"step_{was.task.step - 1}")
    _mend_memory(data, before)
    with locked(folder, f"another process is training {folder}: wait for it, or end it"):
        try:
            data.draw(was.task.step, was.data.memory, was.seed, place, before / "memory", anew=True)
            if read_memory(beside(place))["sha256"] != known:
                raise UserError(
                    f"{place} is missing or damaged, and cannot be drawn again as it was from {before} "
                    "and the data set: restore it from a copy, or train that step anew "
                    f"(--task_step {was.task.step} --overwrite)"
                )
            put_in_place(place)
        finally:
            shutil.rmtree(beside(place), ignore_errors=True)
    log.warning(f"{place} was missing or damaged: it was drawn again, the same by its digest")


def read_model(path: Path, data: StepData, backbone: str, step: int) -> tuple[DeepLabV3, dict]:
    """The model of a step of the data's task, from a checkpoint, and the checkpoint.

    Raises UserError if the file is no checkpoint, is damaged, is of another architecture, or learned
    other classes or the same in another order.
    """
    content = read_checkpoint(path)
    return make_model(content, path, data.task, backbone, step), content


def make_model(content: dict, path: Path, task: Task, backbone: str, step: int) -> DeepLabV3:
    """The model of a step of a task, from the content of the checkpoint at path; errors as above."""
    order, known = content.get("order"), content.get("made_from", {})
    if not isinstance(known, dict) or not isinstance(known.get("settings", {}), dict):
        raise UserError(f"{path} is damaged: what it was made from is no record")
    if order is not None and not isinstance(order, (list, tuple)):
        raise UserError(f"{path} is damaged: its order of classes is no list")
    if order is not None and [*order] != list(task.order[: len(order)]):
        raise UserError(f"{path} learned other classes than {task.name} has there, or in another order")
    expected = sum(len(classes) for classes in task.steps[: step + 1])
    if order and len(order) != expected:
        raise UserError(
            f"{path} learned {len(order)} classes, and step {step} of {task.name} has {expected}: give "
            "the --task_name and --task_step that it was trained with, or another file"
        )
    arch = content.get("arch")
    if isinstance(arch, dict) and arch.get("backbone", backbone) != backbone:
        raise UserError(f"{path} has the backbone {arch['backbone']}, not {backbone}: give that one")
    classes = known.get("settings", {}).get("data_loader.args.dataset.classes")
    learned = task.order[: len(order)] if order else ()
    if isinstance(classes, dict) and any(
        classes.get(name) != id for name, id in zip(task.named(learned), learned, strict=True)
    ):
        raise UserError(f"{path} learned classes of other names than those of {task.name} here")
    model = DeepLabV3([len(classes) for classes in task.steps[: step + 1]], backbone)
    load_weights(model, content["state_dict"], path)
    return model


def begin(trainer: "Trainer") -> None:
    """Start to write: from here on the step is unfinished. Old output goes, unless it is resumed.

    The trainer is prepared: nothing that it was asked for is refused any more. A memory that was drawn
    takes its place, and so do pseudo labels; a resumed run goes on with its own.
    To be called by all processes, of which the first one writes.
    """
    if rank() == 0:
        _begin(trainer)
    barrier()
    if trainer.dataset.pseudo:
        trainer.dataset.pseudo.folder = trainer.folder / "pseudo_labels"


def _begin(trainer):
    config, folder, memory = trainer.config, trainer.folder, trainer.dataset.memory
    # what marks the step as finished goes first: a kill in between leaves an unfinished step
    (folder / "metrics.json").unlink(missing_ok=True)
    if not trainer.resume and not memory:
        remove_memory(folder / "memory")
    if memory and memory.folder != folder / "memory":
        put_in_place(folder / "memory")
    if trainer.dataset.pseudo and trainer.dataset.pseudo.folder != folder / "pseudo_labels":
        put_in_place(folder / "pseudo_labels")
    if not trainer.resume:
        for pattern in ("last.pth", "model_best.pth", "checkpoint-epoch*.pth", "made_from.json"):
            for path in folder.glob(pattern):
                path.unlink()
        later = config.step_dir(config.task.step + 1)
        if later.is_dir():
            log.warning(
                f"{later} was trained from the step that is trained anew here: --overwrite it too"
            )
    for place in (folder, config.step_dir(kind="log")):  # of a run that was killed while it wrote them
        for unfinished in place.glob(".*.unfinished"):
            unfinished.unlink(missing_ok=True)
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
        "made_from": trainer.made_from,
    }


def made_from(trainer: "Trainer") -> dict:
    """What a step is made from, beside its settings.

    previous, own_previous: digest of the model before, and whether that is the final one of the own
    run's step t-1;
    memory: digest of the memory's manifest; batch: images of an update, over all processes; bn_batch:
    images that batch normalisation takes its statistics over, None where it is frozen; processes, bs,
    accumulate: how the batch was shared; precision: of the networks; train, val: digests of the data
    set's lists and of the classes in their labels; settings: the options that make an experiment, by
    their paths.
    """
    config, previous = trainer.config, trainer.previous
    own = previous and final_checkpoint(config.step_dir(trainer.data.step - 1))
    memory = trainer.dataset.memory
    return {
        "previous": content_digest(previous) if previous else None,
        "own_previous": bool(own) and previous.resolve() == own.resolve(),
        "memory": memory.digest if memory else None,
        "batch": config.data.train.batch_size * world_size(),
        "bn_batch": bn_images(config, trainer.batches.sizes()),
        "processes": world_size(),
        "bs": config.data.train.batch_size,
        "accumulate": config.trainer.accumulate,
        "precision": str(trainer.amp_dtype),
        **{split: trainer.data.digest(split) for split in SPLITS},
        "settings": {path: value for path, value in settings(config).items() if path != "name"},
    }


# What a difference in made_from means to somebody who resumes, and the way out.
CANNOT_GO_ON = {
    "previous": "the model of the step before has changed since; --overwrite trains this step anew",
    "memory": "its memory has changed since then; --overwrite trains this step anew",
    "bn_batch": "batch normalisation took its statistics over {old} images, now over {new}: resume "
    "with {processes} process(es), --bs {bs} and --accumulate {accumulate}",
    "batch": "an update took {old} images over all processes, now {new}: resume with {processes} "
    "process(es) and --bs {bs}, or, where batch normalisation is frozen, with others that make {old}",
    "train": "the training list or its labels have changed since; --overwrite trains this step anew",
    "val": "the validation list or its labels have changed since; --overwrite trains this step anew",
}

# Settings that step 1 should share with step 0. Others differ by design (learning rate, memory), or
# would not fit (classes, backbone). A step from 2 on should share them all with the one before it.
SHARED = (
    "method",
    "seed",
    *(f"data_loader.args.{part}." for part in ("dataset", "task", *SPLITS, "test")),
)


def other_conditions(before: dict, now: dict) -> list[str]:
    """In which conditions a step differs from the one before it, in words.

    before, now: what the two are made from (`made_from`); empty where that is not known.
    """
    former, step = before.get("settings", {}), "data_loader.args.task.step"
    found = changes(Config, former, now["settings"])
    all_of_them = bool(former.get(step))
    shared = [p for p in found if p != step and (all_of_them or p.startswith(SHARED))]
    words = _said({p: found[p] for p in shared})
    if before.get("batch", now["batch"]) != now["batch"]:
        words.append(f"updates of {before['batch']} images, now {now['batch']}")
    for split in SPLITS:
        if before.get(split, now[split]) != now[split]:
            words.append(f"another {split} list, or other labels")
    return words


def restore(trainer: "Trainer", content: dict, path: Path) -> None:
    """Put a trainer where a checkpoint left it; UserError if that does not fit."""
    try:
        old, new = content.get("made_from", {}), trainer.made_from
        changed = changes(Config, old.get("settings", {}), new["settings"])
        if changed:
            raise UserError(
                f"{path} cannot be resumed from: it has other settings ({'; '.join(_said(changed))})"
            )
        for key, reason in CANNOT_GO_ON.items():
            if key in old and old[key] != new[key]:
                reason = reason.format(**{**old, "old": old[key], "new": new[key]})
                raise UserError(f"{path} cannot be resumed from: {reason}")
        if old.get("precision", new["precision"]) != new["precision"]:
            log.warning(f"{path} was trained in {old['precision']}, and goes on in {new['precision']}")
        if type(content["epoch"]) is not int:
            raise ValueError(f"its epoch is {content['epoch']!r}")
        if not 0 <= content["epoch"] <= trainer.config.trainer.epochs:
            raise ValueError(f"it is at epoch {content['epoch']} already")
        _restore_optimizer(trainer.optimizer, content["optimizer"])
        _restore_schedule(trainer, content["lr_scheduler"], content["epoch"] * len(trainer.batches))
        if trainer.scaler.is_enabled() and content["scaler"]:
            trainer.scaler.load_state_dict(content["scaler"])
        trainer.epoch = content["epoch"]
        if not trainer.config.trainer.reset_best_mnt:
            best, stale = content["best"], content["stale"]
            if type(stale) is not int or not isinstance(best, (float, type(None))):
                raise ValueError(f"its best validation is {best!r}, {stale!r} validations ago")
            trainer.validation.best, trainer.validation.stale = best, stale
    except (ArithmeticError, LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} cannot be resumed from: its training state does not fit ({error}); "
            "--overwrite trains the step anew"
        ) from None
    log.info(f"resumed after epoch {trainer.epoch} from {path}")


def _restore_optimizer(optimizer, state):
    """Momentum and learning rates from a checkpoint, all else of the optimiser from the settings.

    ValueError where a momentum is none of its parameter.
    """
    own = dict(optimizer.state)
    groups = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in optimizer.param_groups]
    stored = [value for buffers in state["state"].values() for value in buffers.values()]
    if any(torch.is_tensor(value) and not value.is_floating_point() for value in stored):
        raise ValueError("a momentum has no real numbers")
    optimizer.load_state_dict(state)
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update(saved)
    for parameter, buffers in own.items():
        found = optimizer.state[parameter].get("momentum_buffer")
        if not torch.is_tensor(found) or found.shape != parameter.shape:
            raise ValueError("a momentum has another shape than its parameter, or is missing")
        if not found.isfinite().all():
            raise ValueError("a momentum is not finite")
        buffers["momentum_buffer"].copy_(found)
        optimizer.state[parameter] = buffers


def _restore_schedule(trainer, state, done):
    """The schedule after so many iterations; ValueError where the checkpoint's is elsewhere."""
    scheduler = trainer.scheduler
    if state["total_iters"] != scheduler.total_iters:
        raise ValueError(
            f"its schedule has {state['total_iters']} iterations, this run's {scheduler.total_iters}"
        )
    if state["last_epoch"] != done:
        raise ValueError(f"its schedule is at iteration {state['last_epoch']}, its weights at {done}")
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    for rate, base in zip(rates, scheduler.base_lrs, strict=True):
        planned = base * scheduler.factor(done)
        if not math.isclose(rate, planned, rel_tol=1e-5, abs_tol=1e-12):
            raise ValueError(f"its learning rate is {rate}, where the schedule has {planned}")
    place = {"last_epoch": done, "_step_count": done + 1, "_last_lr": rates}
    scheduler.load_state_dict({**scheduler.state_dict(), **place})


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
        ends = {
            "final": content_digest(_numbered(trainer)),
            "metrics": json_digest(metrics),
            "val_images": len(trainer.data.lists["val"].ids),
        }
        write_json(folder / "made_from.json", {**trainer.made_from, **ends})
        write_json(folder / "metrics.json", metrics)
    log.info("\n" + format_table(metrics, *trainer.data.groups))
    log.info(f"\ncheckpoint  {_numbered(trainer)}")
    log.info(f"metrics     {folder / 'metrics.json'}")
    log.info(f"log         {trainer.config.step_dir(kind='log')}")


def _numbered(trainer):
    return trainer.folder / f"checkpoint-epoch{trainer.epoch}.pth"
