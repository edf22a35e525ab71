"""Command-line flags on top of the configuration; help, types and ranges are the options' own."""

import argparse
import dataclasses
import types
import typing

from utils.config import Config
from utils.config_file import check, type_name
from utils.errors import UserError

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
    ("--amp_dtype",): ("amp_dtype",),
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
    ("--ignore_thresh",): ("hyperparameter.ignore_thresh",),
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
        shown = {"True": "on", "False": "off", "None": "not set"}.get(str(default), default)
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
            parent, _, leaf = path.rpartition(".")
            setattr(_get(config, parent), leaf, value)


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
        raise UserError(f"{flag} must be {type_name(allowed[0])}, not {text!r}") from None


def _declared(path):
    """Type and metadata of an option, from its dotted path."""
    cls = Config
    *parents, leaf = path.split(".")
    for name in parents:
        cls = typing.get_type_hints(cls)[name]
    metadata = next(f.metadata for f in dataclasses.fields(cls) if f.name == leaf)
    return typing.get_type_hints(cls)[leaf], metadata


def _get(config, path):
    """The option or section at a dotted path; the configuration itself for an empty one."""
    for name in filter(None, path.split(".")):
        config = getattr(config, name)
    return config
