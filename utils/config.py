"""Options as typed dataclasses: read from JSON, set by flags, compared.

An option is a dataclass field made with `option`, where its default, its help, its flag and what is
allowed stand once. Dataclasses nest as the JSON objects do (`section`), and an option is named by its
path, such as "trainer.epochs". This module declares none; configs/options.py declares all of them.
"""

import argparse
import copy
import dataclasses
import difflib
import json
import os
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from utils.errors import UserError

T = TypeVar("T")
TYPE_NAMES = {
    int: "an integer", float: "a number", str: "a string", bool: "true or false", dict: "an object"
}  # fmt: skip

LARGEST = 3.4e38  # number of the tensors' type, float32


def no_path(text: str) -> str | None:
    """What keeps a text from being a path; None where it is one."""
    if not text:
        return "give a path, . for the folder of the call"
    if not text.isprintable():
        return "a path must be printable, in one line"
    try:
        Path(text).expanduser()
    except RuntimeError:
        return "there is no such user, whose home it could begin with"


def option(
    default: Any,
    help: str,
    flag: str | tuple[str, ...] = (),
    *,
    choices: tuple | None = None,
    low: float | None = None,
    high: float | None = None,
    complain: Callable[[Any], str | None] | None = None,
    switch: bool = False,
    bare: bool = False,
    incidental: bool = False,
    old: dict[bool, Any] | None = None,
    used: tuple[Callable[[Any], bool], str] | None = None,
) -> Any:
    """A dataclass field that is an option.

    flag: its name or names on the command line, none if it has no flag there. An option that several
    sections have (such as the crop size) is set in all of them by its one flag.
    choices: the values that are allowed; for a list, those that it may hold. low, high: the least and
    the greatest number. complain: returns what is wrong with a value, or None.
    switch: a bool whose flag takes no value and means true. bare: the flag may stand without a value,
    which then means None. incidental: another value does not make another experiment.
    used: whether a configuration makes any use of the option, and when it does, in words.
    old: what true and false mean in configuration files of former versions, where it was a bool.
    """
    flags = (flag,) if isinstance(flag, str) else flag
    metadata = dict(
        help=help, flags=flags, choices=choices, low=low, high=high, complain=complain,
        switch=switch, bare=bare, incidental=incidental, old=old or {}, used=used,
    )  # fmt: skip
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type[T]) -> T:
    """A dataclass field that is a section: a dataclass of options, one JSON object."""
    return field(default_factory=cls)


@dataclass(frozen=True)
class Option:
    """A declared option: its path, its type, whether None is allowed, and what `option` was told."""

    path: str
    kind: type
    optional: bool
    metadata: dict[str, Any]

    def checked(self, value: Any, name: str) -> Any:
        """The value in the option's type; UserError where it is not allowed, calling it `name`."""
        told = self.metadata
        if value is None and self.optional:
            return None
        if isinstance(value, bool) and value in told["old"]:
            return told["old"][value]
        if self.kind is float and type(value) is int:
            value = _as_float(value, name)
        if type(value) is not self.kind:
            wanted = TYPE_NAMES.get(self.kind, f"a {self.kind.__name__}")
            raise UserError(f"{name} must be {wanted}, not {json.dumps(value)}")
        if isinstance(value, float) and not abs(value) <= LARGEST:
            raise UserError(f"{name} is {value}; it must be finite, also in single precision")
        if told["complain"] and (complaint := told["complain"](value)):
            raise UserError(f"{name} is {value!r}; {complaint}")
        if told["complain"] is no_path:
            return os.path.expanduser(value)
        if told["choices"]:
            wrong = [v for v in (value if self.kind is list else [value]) if v not in told["choices"]]
            if wrong:
                verb = "has" if self.kind is list else "is"
                allowed = ", ".join(map(str, told["choices"]))
                raise UserError(f"{name} {verb} {wrong[0]!r}; allowed: {allowed}")
        if told["low"] is not None and value < told["low"]:
            raise UserError(f"{name} is {value}; it must be at least {told['low']}")
        if told["high"] is not None and value > told["high"]:
            raise UserError(f"{name} is {value}; it must be at most {told['high']}")
        return value

    def parsed(self, text: str, flag: str) -> Any:
        """The value that a text on the command line means, checked."""
        if text == "":
            if self.metadata["bare"]:
                return None
            raise UserError(f"{flag} needs a value")
        if self.kind is bool:
            if text not in ("on", "off"):
                raise UserError(f"{flag} is {text!r}; allowed: on, off")
            return text == "on"
        if text == "none" and self.optional and self.kind is not str:
            return None
        try:
            if self.kind is not str and not text.isascii():  # Python reads the digits of all scripts
                raise ValueError
            value = self.kind(text)
        except ValueError:
            raise UserError(f"{flag} must be {TYPE_NAMES[self.kind]}, not {text!r}") from None
        return self.checked(value, flag)


def _as_float(value, name):
    try:
        return float(value)
    except OverflowError:
        raise UserError(f"{name} is a number of {len(str(value))} digits; it must be finite") from None


def options(cls: type, prefix: str = "") -> Iterator[Option]:
    """The options of a configuration class, depth first in the order of their declaration."""
    hints = typing.get_type_hints(cls)
    for declared in dataclasses.fields(cls):
        path, hint = prefix + declared.name, hints[declared.name]
        if dataclasses.is_dataclass(hint):
            yield from options(hint, f"{path}.")
        else:
            allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            kind = typing.get_origin(allowed[0]) or allowed[0]
            yield Option(path, kind, type(None) in allowed, declared.metadata)


def get(config: Any, path: str) -> Any:
    """The value of the option or section at a path."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def put(config: Any, path: str, value: Any) -> None:
    """Set the option at a path."""
    *parents, name = path.split(".")
    setattr(get(config, ".".join(parents)) if parents else config, name, value)


def load_json(path: str | Path) -> Any:
    """The content of a JSON file; UserError if it is missing, malformed, or has a key twice."""

    def each_key_once(pairs):
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [key for key, _ in pairs]
            twice = next(key for key in names if names.count(key) > 1)
            raise UserError(f"{path}: the key {json.dumps(twice)} stands twice in one object")
        return content

    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=each_key_once)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def read_json(cls: type[T], path: str | Path, accepted: dict[str, tuple | None]) -> tuple[T, list[str]]:
    """A configuration of class `cls` from a JSON file, checked key by key.

    accepted: path -> values, for keys that are no options. With None any value is accepted, and the key
    is ignored; else one of those values must stand there, and 0 or false is ignored too. A key of an
    option may stand in `accepted` too: the option is read, and the path is among the ignored ones, from
    which the caller takes it where the option has an effect.
    Returns the configuration and the paths that were ignored.
    Raises UserError for a missing or malformed file, unknown keys, wrong types, values not allowed.
    """
    data = load_json(path)
    config, ignored = cls(), []
    known = {o.path: o for o in options(cls)}
    try:
        _read_object(config, data, "", known, accepted, ignored)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config, ignored


def _read_object(config, data, where, known, accepted, ignored):
    """Set the options of one JSON object, and of those inside it."""
    if not isinstance(data, dict):
        raise UserError(f"{where or 'the file'} must be a JSON object, not {json.dumps(data)}")
    for key, value in data.items():
        path = f"{where}.{key}" if where else key
        if path in known:
            put(config, path, known[path].checked(value, path))
            if path in accepted:
                ignored.append(path)
        elif any(other.startswith(f"{path}.") for other in known):
            _read_object(config, value, path, known, accepted, ignored)
        elif path not in accepted:
            raise UserError(f"unknown key {path}: {_nearest(key, where, known)}")
        elif accepted[path] is None:
            ignored.append(path)
        elif value not in accepted[path]:
            allowed = json.dumps(accepted[path][0])
            raise UserError(f"{path} is {json.dumps(value)}; allowed: {allowed}, or leave it out")
        elif value == 0:
            ignored.append(path)


def _nearest(key, where, known):
    """A hint at what an unknown key may have meant, among those beside it."""
    inside = f"{where}." if where else ""
    beside = dict.fromkeys(
        path.removeprefix(inside).split(".")[0] for path in known if path.startswith(inside)
    )
    near = difflib.get_close_matches(key, beside, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(beside)}"


class Parser(argparse.ArgumentParser):
    """A command line whose help shows its description as it stands, with examples; whose errors are
    UserErrors; and whose flags are never abbreviated."""

    def __init__(self, program: str | None, description: str, **settings):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(
            program, description=description, formatter_class=form, allow_abbrev=False, **settings
        )

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists the flags)")

    def parse_known_args(self, args=None, namespace=None):
        """As in argparse; what its own code trips over (such as `--seed --`) is a UserError too."""
        try:
            return super().parse_known_args(args, namespace)
        except IndexError:
            self.error("a flag lacks its value")

    def parse_args(self, args=None, namespace=None):
        """As in argparse; a flag whose value is lost (such as `--seed=--`) is a UserError too."""
        parsed = super().parse_args(args, namespace)
        if any(isinstance(value, list) and not value for value in vars(parsed).values()):
            self.error("a flag lacks its value")
        return parsed


def add_flags(parser: argparse.ArgumentParser, config: Any) -> None:
    """Give a parser the flags of all options of a configuration, which shows their defaults."""
    seen = set()
    for declared in options(type(config)):
        told = declared.metadata
        if not told["flags"] or told["flags"] in seen:
            continue
        seen.add(told["flags"])
        default = get(config, declared.path)
        text = f"{told['help']} (default: {_shown(default)})".replace("%", "%%")
        settings = {"dest": declared.path, "default": argparse.SUPPRESS, "help": text}
        if told["switch"]:
            parser.add_argument(*told["flags"], action="store_true", **settings)
            continue
        choices = ("on", "off") if declared.kind is bool else told["choices"]
        metavar = "{" + ",".join(map(str, choices)) + "}" if choices else "VALUE"
        bare = {"nargs": "?", "const": ""} if told["bare"] else {}
        parser.add_argument(*told["flags"], metavar=metavar, **bare, **settings)


def _shown(value):
    """A value of an option as its flag takes it."""
    return {"True": "on", "False": "off", "None": "not set"}.get(str(value), value)


def apply_flags(config: Any, arguments: argparse.Namespace) -> None:
    """Write the flags that were given into a configuration; UserError for values not allowed."""
    given = vars(arguments)
    first = {}
    for declared in options(type(config)):
        flags = declared.metadata["flags"]
        path = first.setdefault(flags, declared.path) if flags else None
        if path in given:
            value = given[path]
            put(config, declared.path, declared.parsed(value, flags[0]) if value is not True else True)


def without_effect(config: Any, arguments: argparse.Namespace) -> list[str]:
    """The flags that were given and that the configuration makes no use of, each with the reason."""
    given = vars(arguments)
    return [
        f"{o.metadata['flags'][0]} (only {o.metadata['used'][1]})"
        for o in options(type(config))
        if o.path in given and o.metadata["used"] and not o.metadata["used"][0](config)
    ]


def same(old: Any, new: Any) -> bool:
    """Whether two values of an option are equal; the order of a dict, such as of classes, counts."""
    return old == new and (not isinstance(old, dict) or [*old] == [*new])


def settings(config: Any) -> dict[str, Any]:
    """The options that make an experiment, by their paths: of those that the configuration uses."""
    return {
        o.path: get(config, o.path)
        for o in options(type(config))
        if not o.metadata["incidental"]
        and not (o.metadata["used"] and not o.metadata["used"][0](config))
    }


def changes(cls: type, before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """How the values that both of two records of a configuration's options have differ, by path.

    In words: `--crop_size 96, now 128`, the same ones for all options of a flag.
    """
    found = {}
    for o in options(cls):
        if o.path in before and o.path in now and not same(before[o.path], now[o.path]):
            name = o.metadata["flags"][0] if o.metadata["flags"] else o.path
            words = f"{name} {_shown(before[o.path])}, now {_shown(now[o.path])}"
            found[o.path] = words if len(words) < 120 else f"another {name}"
    return found


def differences(old: Any, new: Any) -> dict[str, str]:
    """How the options of two configurations differ that make another experiment; as in `changes`.

    One that only one of them makes use of is left out, since what decides about that is another option,
    which differs. Where none does, such options have switched each other off, or themselves.
    """
    cls, one, other = type(new), settings(old), settings(new)
    found = changes(cls, one, other)
    if not found.keys() - {"name"}:
        switched = one.keys() ^ other.keys()
        found |= changes(cls, *({p: get(config, p) for p in switched} for config in (old, new)))
    return found
