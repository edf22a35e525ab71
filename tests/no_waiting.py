"""A guard that refuses what would wait for the device, or touch a file."""

import pathlib
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(BaseException):
    """An operation that would wait for the device; no handler of errors takes it for one of its own."""


class NoWaiting(TorchDispatchMode):
    """Refuses operations that wait for the device, or whose result's size depends on data."""

    READS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero")
    SIZES = ("unique", "unique_dim", "unique_consecutive", "_unique", "_unique2", "bincount")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name.startswith("nonzero") or name in self.READS + self.SIZES:
            raise Waits(name)
        indices = args[1] if name in ("index", "index_put", "index_put_", "_unsafe_index") else ()
        if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
            raise Waits(f"{name} with a mask")
        source = next((a for a in args if isinstance(a, torch.Tensor)), None)
        device = kwargs.get("device")
        if name == "_to_copy" and device is not None and torch.device(device) != source.device:
            raise Waits(f"copy to {device}")
        if name == "copy_" and args[0].device != args[1].device:
            raise Waits("copy_ between devices")
        return function(*args, **kwargs)


@contextmanager
def no_waiting():
    """No operation that waits for a device, and no file, is used inside."""

    def refuse(*args, **kwargs):
        raise Waits(f"file access: {args}")

    with (
        NoWaiting(),
        mock.patch("builtins.open", refuse),
        mock.patch("io.open", refuse),
        mock.patch.object(pathlib.Path, "open", refuse),
    ):
        yield
