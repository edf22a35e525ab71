"""Reading a JSON configuration, checked key by key, and comparing two."""

import dataclasses
import difflib
import json
import math
import types
import typing
from pathlib import Path

from utils.config import Config
from utils.errors import UserError

# Keys of DKD and EIR that mean nothing here, each with the values that are harmless (None: any).
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

    Returns the configuration and the keys that were ignored.
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
        raise UserError(f"{where} must be {type_name(kind)}, not {json.dumps(value)}")
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
    if where in ("name", "--name") and (
        not value.strip(".") or "/" in value or len(value.encode()) > 200
    ):
        raise UserError(f"{where} is {value!r}; it must be a name that a folder can have")
    if low is not None and not value >= low:
        raise UserError(f"{where} is {value}; it must be at least {low}")
    if high is not None and not value <= high:
        raise UserError(f"{where} is {value}; it must be at most {high}")


def type_name(kind):
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return names.get(kind, f"a {kind.__name__}")


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


def _flatten(tree, prefix=""):
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
