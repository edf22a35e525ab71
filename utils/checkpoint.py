"""Files of a run: written whole, read checked, and locked against a second run."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Have write(file) fill a temporary file, sync it, and rename it to path.

    Whatever happens, path holds what it held before or all that was written, also where two processes
    write it at once: each has a temporary file of its own, and the last one stays. Raises UserError
    where the operating system refuses, which names the path and the space that is left.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.unfinished")
    try:
        if path.exists() and not path.is_file():  # a rename would put a file in place of a device
            raise OSError(errno.EEXIST, "it is no regular file")
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
            raise cannot_write(path, error) from None
        raise


def cannot_write(path: Path, error: OSError) -> UserError:
    """The error for what could not be written: what, why, and if there is no room, how much is free."""
    what = f"cannot write {path}: {error.strerror or error}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{what}. What was saved before stands")
    free = ""
    with contextlib.suppress(OSError):
        existing = next(parent for parent in Path(path).absolute().parents if parent.is_dir())
        free = f"; {shutil.disk_usage(existing).free / 2**20:.0f} MiB are free there"
    return UserError(
        f"{what}{free}. What was saved before stands; run the same command again once there is room "
        "(a training with --resume auto)"
    )


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a checkpoint so that path holds the old one or the whole new one."""

    def write(file):
        failures = []

        class Remembers:
            """torch.save hides what ended it, such as a full disk, in an error of its own."""

            def write(self, data):
                try:
                    return file.write(data)
                except BaseException as error:
                    failures.append(error)
                    raise

            def flush(self):
                file.flush()

        try:
            torch.save(content, Remembers())
        except RuntimeError:
            if failures:
                raise failures[0] from None
            raise

    write_atomically(path, write)


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file, whole or not at all; numbers to their last digit."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def json_digest(content: Any) -> str:
    """A digest of what a JSON file holds, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json_object(path: Path) -> dict | None:
    """The object in a JSON file; None if there is no such file, or no object in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def content_digest(path: Path) -> str:
    """A digest of a checkpoint's content, from the checksums in its archive: quick for large files.

    Raises UserError if the file is no such archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = [f"{part.filename.split('/', 1)[-1]} {part.CRC}" for part in archive.infolist()]
    except Exception as error:  # zipfile raises many kinds on a damaged archive
        raise UserError(f"cannot read {path}: {error}") from None
    return hashlib.sha256("\n".join(parts).encode(errors="replace")).hexdigest()


class _NumpyType:
    """Stands in for numpy.dtype while a checkpoint is read: it keeps the name of a type of numbers."""

    def __init__(self, code, *_):
        if not isinstance(code, str) or not re.fullmatch(r"[biufc]\d{1,2}", code):
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL numpy.dtype of {code!r}")
        self.code, self.order = code, "="

    def __setstate__(self, state):
        self.order = ">" if state[1] == ">" else "<"


def _numpy_number(kind, data):
    """Stands in for the function that makes a NumPy scalar from its bytes: a Python number."""
    if not isinstance(kind, _NumpyType) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("Unsupported global: GLOBAL numpy scalar of other data")
    return np.frombuffer(data, np.dtype(kind.order + kind.code), count=1)[0].item()


# Trainers often store a NumPy number (the best IoU, say). What its pickle calls is replaced by the
# functions above, so that no code of NumPy sees what a stranger wrote.
NUMPY_NUMBERS = [
    (_NumpyType, "numpy.dtype"),
    (_numpy_number, "numpy.core.multiarray.scalar"),
    (_numpy_number, "numpy._core.multiarray.scalar"),
]


def read_file(path: str | Path, what: str = "checkpoint") -> dict:
    """A dictionary written by torch.save, tensors on the CPU; nothing in it is executed.

    Numbers of NumPy become Python's. Raises UserError if there is no such file, a checksum in its
    archive is wrong (torch does not look at them), or it holds anything but data.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError(f"no {what} at {path}")
        if zipfile.is_zipfile(path):  # as all files of torch.save since 1.6
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise UserError(f"{path} is damaged: the checksum of {damaged} in it is wrong")
        with torch.serialization.safe_globals(NUMPY_NUMBERS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, on files that are refused in one line
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch.load raises many kinds on a file that is not its own
        if kind := _other_kind(path):
            raise UserError(f"{path} is {kind}") from None
        foreign = _foreign_objects(path, str(error))
        if foreign:
            raise UserError(
                f"{path} holds objects besides data ({foreign}), which are not loaded, since that "
                "would run code of the file. If you trust it, load it once with "
                "torch.load(..., weights_only=False) and save its state_dict alone"
            ) from None
        kind = type(error).__name__
        raise UserError(f"{path} is damaged, or no {what} that can be read safely ({kind})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no {what}: a dictionary is needed")
    return content


def _other_kind(path):
    """What a file is that lies where a checkpoint should, and the way to one; None where it is none of
    the kinds that people often have there.
    """
    with contextlib.suppress(OSError), open(path, "rb") as file:
        start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            return "a pointer of Git LFS and not the file itself: fetch that with git lfs pull"
        if start.lstrip()[:1] == b"<":
            return "a web page and not the file itself: download that again, and look at what comes"
        if start[8:9] == b"{":
            return (
                "a safetensors file: save its weights for torch, with torch.save("
                '{"state_dict": safetensors.torch.load_file(FILE)}, NEW_FILE)'
            )


def _foreign_objects(path, error):
    """Names of the objects for which torch.load refused a file; empty where the reason is another."""
    if "TorchScript" in error:
        return "a TorchScript program"
    if "Unsupported operand" in error and zipfile.is_zipfile(path):  # else it is no checkpoint at all
        return "in another pickle protocol than PyTorch's"
    found = re.search(r"(?:GLOBAL|global|class|function) `?([\w.]+)`?", error)
    if not found or "weights_only" not in error.lower():
        return ""
    names = {found[1]}
    with contextlib.suppress(Exception):  # the old format of torch.save names the first one only
        known = {name for _, name in NUMPY_NUMBERS}
        names |= {*torch.serialization.get_unsafe_globals_in_checkpoint(path)} - known
    return ", ".join(sorted(names))


def read_checkpoint(path: str | Path, what: str = "checkpoint") -> dict:
    """A checkpoint with its `state_dict`, freed of what wrappers of modules add to its keys.

    A file that is a bare state_dict is taken as a checkpoint with nothing else in it. Raises UserError
    where there is none, or two weights have the same key without the wrappers.
    """
    content = read_file(path, what)
    if content and _is_state_dict(content):
        content = {"state_dict": content}
    if not _is_state_dict(content.get("state_dict")):
        inside = ", ".join(map(str, content)) or "nothing"
        raise UserError(
            f"{path} has no state_dict: it is no checkpoint of a model (in it: {inside}). If its "
            'weights have another name, save them as {"state_dict": weights}'
        )
    weights = {}
    for key, value in content["state_dict"].items():
        name = key.replace("_orig_mod.", "").removeprefix("module.")  # torch.compile; several GPUs
        if name in weights:
            raise UserError(f"{path} has two weights for {name}: it is no checkpoint of one model")
        weights[name] = value
    content["state_dict"] = weights
    return content


def _is_state_dict(content):
    return isinstance(content, dict) and all(
        isinstance(key, str) and torch.is_tensor(value) for key, value in content.items()
    )


# Types of tensors that weights have: not complex, quantised, or too short to compute with.
WEIGHTS = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32}


def check_weight(key: str, value: torch.Tensor, path: str | Path) -> None:
    """Raise UserError unless a weight of a file is a plain tensor of finite numbers."""
    if value.dtype not in WEIGHTS or value.layout != torch.strided or value.is_meta:
        kind = f"{value.layout} {value.dtype} {value.device}".replace("torch.", "")
        raise UserError(f"{path} holds {key} as a tensor of another kind ({kind}) than weights are")
    if not value.isfinite().all():
        raise UserError(f"{path} holds weights that are not finite: {key}")


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
        check_weight(key, state[key], path)
        if state[key].is_floating_point() != own[key].is_floating_point():
            raise UserError(f"{path} holds {key} as {state[key].dtype}, the model as {own[key].dtype}")
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


@contextlib.contextmanager
def locked(folder: Path, busy: str) -> Iterator[int | None]:
    """Hold a lock on a folder, which is made if need be; it dies with this process.

    Gives the lock's file descriptor: a child that inherits it holds the lock too. Raises
    UserError(busy) while another process holds it. Where the system or the file system has no such
    locks (Windows, some network file systems), nothing is locked and None is given.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise cannot_write(folder, error) from None
    try:
        held = descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        except (OSError, AttributeError):  # no locks on this file system; no fcntl
            held = None
        yield held
    finally:
        os.close(descriptor)
