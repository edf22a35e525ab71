"""Checkpoints: atomic writes, safe reads, strict loading."""

import contextlib
import json
import os
import re
from pathlib import Path

import torch
from torch import nn

from utils.errors import UserError


def write_atomically(path: Path, write) -> None:
    """Have write(file) fill a temporary file, sync it, and rename it to path."""
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None
        raise


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a checkpoint so that path holds the old one or the whole new one."""
    write_atomically(path, lambda file: torch.save(content, file))


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file, whole or not at all; numbers to their last digit."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_file(path: str | Path, what: str = "checkpoint") -> dict:
    """A dictionary written by torch.save, tensors on the CPU; nothing in it is executed.

    Raises UserError if there is no such file, it is torn, or it holds anything but data.
    """
    if not Path(path).is_file():
        raise UserError(f"no {what} at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds on a file that is not its own
        kind = type(error).__name__
        raise UserError(f"{path} is damaged, or no {what} that can be read safely ({kind})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no {what}: a dictionary is needed")
    return content


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint with its `state_dict`, freed of the prefix that parallel wrappers add."""
    content = read_file(path)
    state = content.get("state_dict")
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()
    ):
        raise UserError(f"{path} has no state_dict: it is no checkpoint of a model")
    content["state_dict"] = {key.removeprefix("module."): v for key, v in state.items()}
    return content


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load a state_dict strictly; UserError naming the first key that does not fit."""
    own = model.state_dict()
    for key in [*own, *state]:
        if key not in state:
            raise UserError(f"{path} is of another architecture: it has no {key}")
        if key not in own:
            raise UserError(f"{path} is of another architecture: the model has no {key}")
        if own[key].shape != state[key].shape:
            shapes = f"{list(state[key].shape)} in the file, {list(own[key].shape)} in the model"
            raise UserError(f"{path} is of another architecture: {key} is {shapes}")
    model.load_state_dict(state)


def numbered_checkpoints(folder: Path, first: int = 0) -> list[Path]:
    """Each checkpoint-epoch<E>.pth with E >= first in a step's folder, by E."""
    found = {}
    for path in folder.glob("checkpoint-epoch*.pth"):
        match = re.fullmatch(r"checkpoint-epoch(\d+)\.pth", path.name)
        if match and int(match[1]) >= first:
            found[int(match[1])] = path
    return [found[epoch] for epoch in sorted(found)]


def final_checkpoint(folder: Path) -> Path | None:
    """The checkpoint-epoch<E>.pth of the highest E in a step's folder."""
    return next(reversed(numbered_checkpoints(folder)), None)
