"""Configuration: the family's JSON shape as typed dataclasses, with command-line flags on top.

Each option is declared once, in its dataclass: name, type, default, allowed values, help. The flag
table at the end names the options that have a flag; its help and its types come from there.
"""

import argparse
import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from utils.errors import UserError


def option(default, help, choices=None, low=None, high=None):
    """A dataclass field with its help text and the values that are allowed."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata=metadata)


def section(cls):
    return field(default_factory=cls)


@dataclass
class ArchArgs:
    output_stride: int = option(16, "output stride of the features", choices=(16,))
    norm_act: str = option(
        "bn_sync",
        "batch normalisation: synchronised over CUDA processes, or plain",
        choices=("bn_sync", "bn"),
    )
    backbone: str = option("resnet101", "feature network", choices=("resnet101", "resnet50", "tiny"))
    backbone_pretrained: bool = option(True, "start step 0 from ImageNet weights")
    backbone_weights: str | None = option(
        None,
        "file with the backbone's ImageNet weights, or 'none' to start from scratch; "
        "without it torchvision downloads them",
    )
    freeze_all_bn: bool = option(False, "batch normalisation frozen, dropout off")


@dataclass
class Arch:
    type: str = option("DeepLabV3", "network", choices=("DeepLabV3",))
    args: ArchArgs = section(ArchArgs)


@dataclass
class TaskArgs:
    name: str = option("15-5", "task: A-B (A classes, then B at a time), 15-1_b .. 15-1_w, or joint")
    step: int = option(0, "step of the task, from 0", low=0)
    setting: str = option(
        "overlap",
        "which images and labels a step sees",
        choices=("overlap", "disjoint", "sequential"),
    )
    idxs_path: str | None = option(
        None, "folder for the cached label index (default: inside the data root)"
    )


@dataclass
class TransformArgs:
    crop_size: int = option(512, "side of the square crop, pixels", low=32)


@dataclass
class TrainSetArgs:
    transform: bool = option(True, "random resized crop and flip", choices=(True,))
    transform_args: TransformArgs = section(TransformArgs)
    masking_value: int = option(0, "label of hidden classes: background or void", choices=(0, 255))


@dataclass
class EvalSetArgs:
    transform: bool = option(
        True, "shorter side to crop_size and centre crop; false: whole images at their own size"
    )
    transform_args: TransformArgs = section(TransformArgs)
    masking_value: int = option(0, "label of hidden classes: background or void", choices=(0, 255))


@dataclass
class TrainSet:
    args: TrainSetArgs = section(TrainSetArgs)
    batch_size: int = option(32, "images per batch and process", low=1)


@dataclass
class EvalSet:
    args: EvalSetArgs = section(EvalSetArgs)
    batch_size: int = option(8, "images per evaluation batch", low=1)


@dataclass
class Memory:
    mem_size: int = option(100, "stored instances in all, 0: no memory", low=0)
    replay: str = option(
        "eir",
        "what the memory is used for: nothing, whole stored images, instances shown alone, "
        "or instances shown and pasted (EIR)",
        choices=("none", "image", "instance", "eir"),
    )


@dataclass
class DataArgs:
    data_root: str = option("data/VOC2012", "VOC2012 folder, or the VOCdevkit above it")
    task: TaskArgs = section(TaskArgs)
    train: TrainSet = section(TrainSet)
    val: EvalSet = section(EvalSet)
    test: EvalSet = section(EvalSet)
    num_workers: int = option(4, "loader processes per training process", low=0)
    pin_memory: bool = option(True, "pinned host memory for copies to the GPU")
    memory: Memory = section(Memory)


@dataclass
class DataLoaderSection:
    type: str = option("VOCIncrementalDataLoader", "loader", choices=("VOCIncrementalDataLoader",))
    args: DataArgs = section(DataArgs)


@dataclass
class OptimizerArgs:
    lr: float = option(1e-3, "learning rate of the backbone; ASPP and classifiers x10", low=0)
    weight_decay: float = option(1e-4, "weight decay; at steps >= 1 new classifier only", low=0)
    momentum: float = option(0.9, "momentum", low=0, high=1)
    nesterov: bool = option(True, "Nesterov momentum")


@dataclass
class Optimizer:
    type: str = option("SGD", "optimiser", choices=("SGD",))
    args: OptimizerArgs = section(OptimizerArgs)


@dataclass
class Paste:
    """Switches of EIR's paste (METHOD 5, 2-5); the defaults are the paper's."""

    pastes: int = option(3, "instances pasted into an image, at most", low=1, high=20)
    cell: int = option(
        250, "side of a cell in pixels at crop 512, scaled with the crop", low=1, high=512
    )
    beta: float = option(1.0, "parameter of the Beta distribution of lambda", low=1e-3)
    lambda_min: float = option(0.0, "lower bound of lambda", low=0, high=1)
    class_combination: bool = option(True, "potential old classes first; off: random classes")
    position: bool = option(True, "cells with most background first; off: random cells")
    fusion: bool = option(True, "mix instance and image by lambda; off: lambda 1")
    fill_in: str = option(
        "best",
        "cell of the random fill-in classes; none: no fill-ins",
        choices=("best", "next", "none"),
    )
    max_upscale: float | None = option(None, "largest magnification of an instance", low=0.01)
    on_replay: bool = option(True, "paste on replay images too")
    augment: bool = option(True, "mirror and stretch an instance at each paste")


@dataclass
class Hyperparameter:
    pos_weight: float = option(1.0, "weight of the positive BCE term, foreground channels", low=0)
    mbce: float = option(1.0, "weight of the BCE loss", low=0)
    kd: float = option(5.0, "weight of the distillation", low=0)
    ac: float = option(0.0, "weight of the auxiliary classifier loss (DKD)", low=0)
    pseudo_thresh: float = option(0.7, "score from which a pseudo label is taken", low=0, high=1)
    pseudo_labels: bool = option(True, "pseudo labels of the old classes from the teacher")
    kd_mode: str = option("rskd", "distillation", choices=("none", "plain", "unbiased", "rskd"))
    rskd_region: str = option("all", "pixels that count in rskd", choices=("all", "new"))
    paste: Paste = section(Paste)


@dataclass
class PolyArgs:
    power: float = option(0.9, "exponent of the poly schedule", low=0)


@dataclass
class LRScheduler:
    type: str = option("PolyLR", "schedule, per iteration", choices=("PolyLR",))
    args: PolyArgs = section(PolyArgs)


@dataclass
class Evaluator:
    type: str = option("Evaluator", "evaluator", choices=("Evaluator",))
    args: dict = field(default_factory=dict, metadata={"help": "no arguments"})


METRICS = ("Pixel_Accuracy", "Pixel_Accuracy_Class", "Mean_Intersection_over_Union")


@dataclass
class TrainerSection:
    epochs: int = option(60, "epochs", low=1)
    save_dir: str = option("_saved_voc", "folder of all outputs")
    save_period: int = option(-1, "epochs between kept checkpoints, -1: the last only", low=-1)
    validation_period: int = option(-1, "epochs between validations, -1: never", low=-1)
    verbosity: int = option(2, "0: warnings, 1: a line per epoch, 2: progress too", low=0, high=2)
    monitor: str = option(
        "off", "'off', or 'max' or 'min' and a validated metric, with _old or _new to narrow it"
    )
    early_stop: int = option(-1, "validations without improvement before stopping, -1: off", low=-1)
    reset_best_mnt: bool = option(False, "forget the best value when resuming")
    tensorboard: bool = option(False, "TensorBoard events, if it is installed")
    accumulate: int = option(1, "micro-batches that a batch is split into", low=1)
    log_interval: int = option(10, "iterations between progress reports", low=1)


@dataclass
class Config:
    name: str = option("EIR", "name of the run, part of its folder")
    seed: int = option(1, "seed of everything random", low=0)
    use_amp: bool = option(True, "mixed precision (on CUDA)")
    amp_dtype: str = option(
        "auto",
        "type of mixed precision; auto: bf16 where the GPU has it",
        choices=("auto", "bf16", "fp16"),
    )
    multiprocessing_distributed: bool = option(False, "one process per visible GPU")
    rank: int = option(0, "index of this node", low=0)
    world_size: int = option(1, "number of nodes", low=1)
    dist_backend: str = option("nccl", "backend on CUDA (the CPU has gloo)", choices=("nccl", "gloo"))
    dist_url: str | None = option(None, "tcp://host:port of the first process; none: a free port")
    n_gpu: int = option(1, "accepted from the family's files; the visible GPUs decide", low=0)
    arch: Arch = section(Arch)
    data_loader: DataLoaderSection = section(DataLoaderSection)
    optimizer: Optimizer = section(Optimizer)
    hyperparameter: Hyperparameter = section(Hyperparameter)
    lr_scheduler: LRScheduler = section(LRScheduler)
    evaluator: Evaluator = section(Evaluator)
    metrics: list[str] = field(
        default_factory=lambda: list(METRICS), metadata={"help": "reported", "each": METRICS}
    )
    trainer: TrainerSection = section(TrainerSection)

    @property
    def data(self) -> DataArgs:
        return self.data_loader.args

    @property
    def task(self) -> TaskArgs:
        return self.data_loader.args.task

    def step_dir(self, step: int | None = None, kind: str = "models") -> Path:
        """<save_dir>/<kind>/<setting>_<task>_<name>/step_<t>, t being the config's own step."""
        task = self.task
        run = f"{task.setting}_{task.name}_{self.name}"
        step = task.step if step is None else step
        return Path(self.trainer.save_dir).expanduser() / kind / run / f"step_{step}"

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


# Keys of the family that mean nothing here, each with the values that are harmless (None: any).
IGNORED = {
    "test": None,
    "data_loader.args.val.cross_val": (False,),
    "mix_mask": None,
    "proto_channels": None,
    "proto_layer": None,
    "margin": None,
    "hyperparameter.dkd_pos": None,
    "hyperparameter.dkd_neg": None,
    "hyperparameter.fc": None,
    "hyperparameter.fs": None,
    "hyperparameter.loss_lovasz": (0,),
}


def load_config(path: str | Path) -> tuple[Config, list[str]]:
    """Read a JSON configuration.

    Returns the configuration and the family's keys that were ignored.
    Raises UserError for a missing or malformed file, unknown keys, wrong types, impossible values.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    ignored = []
    try:
        return _build(Config, data, "", ignored), ignored
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _build(cls, data, path, ignored):
    """A dataclass from a JSON object, checked key by key."""
    if not isinstance(data, dict):
        raise UserError(f"{path or 'the file'} must be a JSON object, not {json.dumps(data)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in data.items():
        where = f"{path}.{key}" if path else key
        if key not in fields:
            _ignore_or_refuse(where, key, value, fields, ignored)
        elif dataclasses.is_dataclass(hints[key]):
            values[key] = _build(hints[key], value, where, ignored)
        else:
            values[key] = check(where, value, hints[key], fields[key].metadata)
    return cls(**values)


def _ignore_or_refuse(where, key, value, fields, ignored):
    if where in IGNORED:
        harmless = IGNORED[where]
        if harmless is not None and value not in harmless:
            allowed = json.dumps(harmless[0])
            raise UserError(f"{where} is not supported here: set it to {allowed} or leave it out")
        ignored.append(where)
        return
    near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(fields)}"
    raise UserError(f"unknown key {where}: {hint}")


def check(where: str, value, hint, metadata):
    """The value in its declared type, or UserError naming the key and what is allowed."""
    if where == "arch.args.norm_act" and value == "iabn_sync":
        raise UserError(
            "arch.args.norm_act iabn_sync needs the inplace_abn package, which is not used here: "
            "choose bn_sync or bn"
        )
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    kind = typing.get_origin(allowed[0]) or allowed[0]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{where} must be {_name(kind)}, not {json.dumps(value)}")
    _check_range(where, value, metadata)
    return value


def _check_range(where, value, metadata):
    choices, low, high = (metadata.get(key) for key in ("choices", "low", "high"))
    if choices and value not in choices:
        raise UserError(f"{where} is {value!r}; allowed: {', '.join(map(str, choices))}")
    if isinstance(value, list):
        wrong = [item for item in value if item not in metadata["each"]]
        if wrong:
            raise UserError(f"{where} has {wrong[0]!r}; allowed: {', '.join(metadata['each'])}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} is {value}; it must be finite")
    if where in ("name", "--name") and (not value.strip(".") or "/" in value):
        raise UserError(f"{where} is {value!r}; it must be a name that a folder can have")
    if low is not None and not value >= low:
        raise UserError(f"{where} is {value}; it must be at least {low}")
    if high is not None and not value <= high:
        raise UserError(f"{where} is {value}; it must be at most {high}")


def _name(kind):
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return names.get(kind, f"a {kind.__name__}")


# flags -> the options they set
_SPLITS = ("train", "val", "test")
FLAGS = {
    ("--name",): ("name",),
    ("--seed",): ("seed",),
    ("--save_dir",): ("trainer.save_dir",),
    ("--data_root",): ("data_loader.args.data_root",),
    ("--task_name",): ("data_loader.args.task.name",),
    ("--task_setting",): ("data_loader.args.task.setting",),
    ("--task_step",): ("data_loader.args.task.step",),
    ("--epochs", "--ep"): ("trainer.epochs",),
    ("--lr", "--learning_rate"): ("optimizer.args.lr",),
    ("--bs", "--batch_size"): ("data_loader.args.train.batch_size",),
    ("--accumulate",): ("trainer.accumulate",),
    ("--crop_size",): tuple(
        f"data_loader.args.{split}.args.transform_args.crop_size" for split in _SPLITS
    ),
    ("--num_workers",): ("data_loader.args.num_workers",),
    ("--backbone",): ("arch.args.backbone",),
    ("--backbone_weights",): ("arch.args.backbone_weights",),
    ("--freeze_bn",): ("arch.args.freeze_all_bn",),
    ("--mem_size",): ("data_loader.args.memory.mem_size",),
    ("--replay",): ("data_loader.args.memory.replay",),
    ("--pos_weight",): ("hyperparameter.pos_weight",),
    ("--mbce",): ("hyperparameter.mbce",),
    ("--kd",): ("hyperparameter.kd",),
    ("--ac",): ("hyperparameter.ac",),
    ("--kd_mode",): ("hyperparameter.kd_mode",),
    ("--rskd_region",): ("hyperparameter.rskd_region",),
    ("--pseudo_labels",): ("hyperparameter.pseudo_labels",),
    ("--pseudo_thresh",): ("hyperparameter.pseudo_thresh",),
    ("--pastes",): ("hyperparameter.paste.pastes",),
    ("--class_combination",): ("hyperparameter.paste.class_combination",),
    ("--position",): ("hyperparameter.paste.position",),
    ("--fusion",): ("hyperparameter.paste.fusion",),
    ("--lambda_min",): ("hyperparameter.paste.lambda_min",),
    ("--fill_in",): ("hyperparameter.paste.fill_in",),
    ("--max_upscale",): ("hyperparameter.paste.max_upscale",),
    ("--paste_on_replay",): ("hyperparameter.paste.on_replay",),
    ("--paste_augment",): ("hyperparameter.paste.augment",),
    ("--multiprocessing_distributed",): ("multiprocessing_distributed",),
    ("--dist_url",): ("dist_url",),
}
# flags that need no value: present means true
SWITCHES = ("--freeze_bn", "--multiprocessing_distributed")


def add_config_flags(parser: argparse.ArgumentParser, config: Config) -> None:
    """One flag per row of FLAGS, with help and default from the configuration."""
    for flags, paths in FLAGS.items():
        hint, metadata = _declared(paths[0])
        default = _get(config, paths[0])
        shown = {"True": "on", "False": "off", "None": "none"}.get(str(default), default)
        text = f"{metadata['help']} (default: {shown})".replace("%", "%%")
        dest = paths[0].replace(".", "__")
        settings = {"dest": dest, "default": argparse.SUPPRESS, "help": text}
        if flags[0] in SWITCHES:
            parser.add_argument(*flags, action="store_true", **settings)
            continue
        if flags[0] == "--dist_url":
            settings.update(nargs="?", const="")
        choices = ("on", "off") if hint is bool else metadata.get("choices")
        metavar = "{" + ",".join(map(str, choices)) + "}" if choices else "VALUE"
        parser.add_argument(*flags, metavar=metavar, **settings)


def apply_flags(config: Config, arguments: argparse.Namespace) -> None:
    """Write the flags that were given into the configuration, checked like the file's values."""
    for flags, paths in FLAGS.items():
        text = getattr(arguments, paths[0].replace(".", "__"), None)
        if text is None:
            continue
        hint, metadata = _declared(paths[0])
        value = check(flags[0], _parse(flags[0], text, hint), hint, metadata)
        for path in paths:
            *parents, leaf = path.split(".")
            target = config
            for name in parents:
                target = getattr(target, name)
            setattr(target, leaf, value)


def _parse(flag, text, hint):
    """Command-line text as a value of the declared type."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(text, bool) or (allowed[0] is str and text != ""):
        return text
    if text in ("", "none") and type(None) in allowed:
        return None
    if allowed[0] is bool:
        if text not in ("on", "off"):
            raise UserError(f"{flag} is {text!r}; allowed: on, off")
        return text == "on"
    try:
        return allowed[0](text)
    except ValueError:
        raise UserError(f"{flag} must be {_name(allowed[0])}, not {text!r}") from None


def _declared(path):
    """Type and metadata of an option, from its dotted path."""
    cls = Config
    *parents, leaf = path.split(".")
    for name in parents:
        cls = typing.get_type_hints(cls)[name]
    metadata = next(f.metadata for f in dataclasses.fields(cls) if f.name == leaf)
    return typing.get_type_hints(cls)[leaf], metadata


def _get(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


# Options that may change between runs without making it another experiment.
_INCIDENTAL = (
    "n_gpu", "rank", "world_size", "dist_url", "dist_backend", "multiprocessing_distributed",
    "metrics", "data_loader.args.data_root", "data_loader.args.num_workers",
    "data_loader.args.pin_memory", "data_loader.args.task.idxs_path", "trainer.save_dir",
    "trainer.save_period", "trainer.verbosity", "trainer.tensorboard", "trainer.log_interval",
    "trainer.reset_best_mnt",
)  # fmt: skip


def differences(old: Config, new: Config) -> list[str]:
    """Dotted names of the options that differ and make it another experiment."""
    flat_old, flat_new = _flatten(old.to_dict()), _flatten(new.to_dict())
    keys = {**flat_old, **flat_new}
    return [k for k in keys if flat_old.get(k) != flat_new.get(k) and k not in _INCIDENTAL]


def _flatten(tree, prefix=""):
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
