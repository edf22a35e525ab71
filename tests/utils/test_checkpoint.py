"""Checkpoints: atomic writes, safe reads, strict loading."""

import argparse
import importlib.util
import io
import os
import pickle
import sys
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import PROJECT
from utils import checkpoint
from utils.checkpoint import (
    content_digest,
    final_checkpoint,
    load_weights,
    locked,
    read_checkpoint,
    save_checkpoint,
    write_atomically,
)
from utils.errors import UserError


class Opens:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_what_is_saved_is_read_back(tmp_path):
    """But for the prefixes that wrappers of modules add; a bare state_dict is a checkpoint too."""
    content = {"state_dict": {"module.a": torch.randn(3)}, "epoch": 4, "best": None, "names": ["x"]}
    save_checkpoint(tmp_path / "new" / "c.pth", content)
    found = read_checkpoint(tmp_path / "new" / "c.pth")
    assert torch.equal(found.pop("state_dict")["a"], content.pop("state_dict")["module.a"])
    assert found == content
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["c.pth"]
    for wrapped in ("_orig_mod.module.a.b", "module._orig_mod.a.b", "a._orig_mod.b", "module.a.b"):
        torch.save({wrapped: torch.ones(2)}, tmp_path / "bare.pth")
        assert torch.equal(read_checkpoint(tmp_path / "bare.pth")["state_dict"]["a.b"], torch.ones(2))
    torch.save({"module.a": torch.ones(2), "a": torch.ones(2)}, tmp_path / "twice.pth")
    with pytest.raises(UserError, match="has two weights for a"):
        read_checkpoint(tmp_path / "twice.pth")


NUMBERS = {
    "float64": np.float64(1.5),
    "float32": np.float32(-2.5),
    "half": np.float16(0.5),
    "int": np.int64(-7),
    "byte": np.uint8(200),
    "bool": np.bool_(True),
    "complex": np.complex64(1 + 2j),
    "big endian": np.array([7], ">i4")[0],
}


@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_of_numpy_are_numbers(tmp_path, zipped):
    """Other trainers keep the best IoU as one; files of NumPy 1 call it by another name."""
    path = tmp_path / "c.pth"
    content = {"state_dict": {"a": torch.ones(1)}, "type": np.dtype("float32"), **NUMBERS}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(path)
    assert {name: found[name] for name in NUMBERS} == {k: v.item() for k, v in NUMBERS.items()}
    assert not any(isinstance(value, np.generic) for value in found.values())
    if not zipped:
        path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))
        assert read_checkpoint(path)["int"] == -7


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"args": argparse.Namespace(lr=1), "path": PurePosixPath("x")}, "argparse.Namespace"),
        ({"array": np.ones(2)}, "numpy._core.multiarray._reconstruct"),
        ({"best": np.str_("x")}, "numpy.dtype"),
        ({"type": np.dtype("O")}, "numpy.dtype"),
        ({"type": np.dtype([("a", "f4")])}, "numpy.dtype"),
        ({"model": nn.Linear(1, 1)}, "torch.nn.modules.linear.Linear"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_objects_are_refused_by_their_names(tmp_path, content, name, zipped):
    torch.save({"state_dict": {}, **content}, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="holds objects besides data") as error:
        read_checkpoint(tmp_path / "c.pth")
    assert name in str(error.value) and "weights_only=False" in str(error.value)
    assert ("PurePosixPath" in str(error.value)) == (zipped and "path" in content)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_program_and_weights_of_another_name_are_said(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "c.pth")
    with pytest.raises(UserError, match="a TorchScript program"):
        read_checkpoint(tmp_path / "c.pth")
    torch.save({"model": {"a": torch.ones(1)}, "epoch": 3}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"no state_dict: .*\(in it: model, epoch\)"):
        read_checkpoint(tmp_path / "c.pth")
    torch.save({"state_dict": {}, "x": b"x"}, tmp_path / "c.pth", pickle_protocol=4)
    with pytest.raises(UserError, match="another pickle protocol"):
        read_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a pointer of Git LFS"),
        (b"\n<!DOCTYPE html>\n<title>404</title>", "a web page and not the file itself"),
        (b"\x02\0\0\0\0\0\0\0{}", "a safetensors file: save its weights for torch"),
    ],
    ids=["git lfs", "web page", "safetensors"],
)
def test_what_lies_in_place_of_a_checkpoint_is_said(tmp_path, start, words):
    path = tmp_path / "a.pth"
    path.write_bytes(start)
    with pytest.raises(UserError, match=f"{path} is {words}"):
        read_checkpoint(path)


class Calls:
    """Pickled as a call of a function, and a state that is set afterwards."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("place", ["type", "state", "bytes", "kind"])
def test_what_numbers_of_numpy_are_made_of_is_not_executed(tmp_path, place):
    trap = Opens(tmp_path / "trap")
    scalar, kind = np._core.multiarray.scalar, np.dtype("f8")
    number = {
        "type": Calls(np.dtype, (trap, False, True)),
        "state": Calls(np.dtype, ("f8", False, True), trap),
        "bytes": Calls(scalar, (kind, trap)),
        "kind": Calls(scalar, (trap, b"12345678")),
    }[place]
    torch.save({"state_dict": {}, "best": number}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="objects besides data"):
        read_checkpoint(tmp_path / "c.pth")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    "number",
    [
        Calls(np._core.multiarray.scalar, (np.dtype("f8"), b"123")),
        Calls(np._core.multiarray.scalar, (7, b"12345678")),
        Calls(np.dtype, ("V8", False, True), (3, "|", None, None, None, 8, 1, 0)),
        Calls(np.dtype, ("f8", False, True), 7),
        Calls(np.dtype, ()),
    ],
)
def test_forged_numbers_of_numpy_are_refused(tmp_path, number):
    torch.save({"state_dict": {}, "best": number}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"damaged, or no checkpoint that can|objects besides data"):
        read_checkpoint(tmp_path / "c.pth")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "c.pth"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half of the new")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["c.pth"]


def test_two_that_write_one_file_at_once_both_write_it_whole(tmp_path):
    """As two evaluations with one --output, or two runs where the file system has no locks."""
    path = tmp_path / "c.json"

    def interrupted(file):
        file.write(b"first, ")
        write_atomically(path, lambda other: other.write(b"second"))
        assert path.read_bytes() == b"second"
        file.write(b"whole")

    write_atomically(path, interrupted)
    assert path.read_bytes() == b"first, whole"
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]


def test_a_full_disk_is_one_clear_error(tmp_path):
    def fail(file):
        raise OSError(28, "No space left on device")

    words = r"cannot write .*c\.pth: No space left on device; \d+ MiB are free there.*--resume auto"
    with pytest.raises(UserError, match=words):
        write_atomically(tmp_path / "c.pth", fail)
    assert not list(tmp_path.iterdir())


def test_an_interruption_while_a_checkpoint_is_written_stays_one(tmp_path, monkeypatch):
    """torch.save would make an error of its archive of it."""
    calls = []

    class Interrupted(io.BytesIO):
        def write(self, data):
            calls.append(len(data))
            if len(calls) == 5:
                raise KeyboardInterrupt
            return super().write(data)

    monkeypatch.setattr(checkpoint, "write_atomically", lambda path, write: write(Interrupted()))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "c.pth", {"weights": torch.zeros(100_000)})


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # as a device, such as /dev/null, would be where root writes
    with pytest.raises(
        UserError, match=r"cannot write .*pipe: it is no regular file\. What was saved before stands$"
    ):
        write_atomically(tmp_path / "pipe", lambda file: file.write(b"x"))
    assert (tmp_path / "pipe").is_fifo() and len([*tmp_path.iterdir()]) == 1


def test_the_content_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (steps.append("sync"), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("rename"), replace(a, b)))
    write_atomically(tmp_path / "c", lambda file: file.write(b"x"))
    assert steps == ["sync", "rename"]


@pytest.mark.parametrize("write", ["protocol 0", "protocol 2", "protocol 5", "zipped"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_in_a_pickle_is_executed(tmp_path, write):
    path, trap = tmp_path / "c.pth", tmp_path / "trap"
    content = {"state_dict": {}, "x": Opens(trap)}
    if write == "zipped":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=int(write[-1])))
    with pytest.raises(UserError, match=r"damaged, or no checkpoint that can|objects besides data"):
        read_checkpoint(path)
    assert not trap.exists()
    carelessly = torch.load(path, weights_only=False) if write == "zipped" else None
    (carelessly or pickle.loads(path.read_bytes()))["x"].close()
    assert trap.exists()


@pytest.mark.parametrize(
    "content",
    [
        [1],
        {},
        {"state_dict": [torch.ones(1)]},
        {"state_dict": {"a": 1}},
        {"state_dict": {1: torch.ones(1)}},
    ],
)
def test_files_without_a_state_dict_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(UserError, match=str(tmp_path / "c.pth")):
        read_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_torn_files_are_refused(tmp_path, keep):
    path = tmp_path / "c.pth"
    save_checkpoint(path, {"state_dict": {"a": torch.randn(1000)}})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="is damaged"):
        read_checkpoint(path)
    with pytest.raises(UserError, match=r"no checkpoint at .*nowhere\.pth"):
        read_checkpoint(tmp_path / "nowhere.pth")


def test_a_wrong_byte_is_found_by_its_checksum(tmp_path):
    path = tmp_path / "c.pth"
    save_checkpoint(path, {"state_dict": {"a": torch.full((1000,), 3.0)}})
    before, content = content_digest(path), bytearray(path.read_bytes())
    content[content.index(torch.tensor([3.0, 3.0]).numpy().tobytes()) + 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged: the checksum of .* in it is wrong"):
        read_checkpoint(path)
    save_checkpoint(path, {"state_dict": {"a": torch.full((1000,), 4.0)}})
    assert content_digest(path) != before
    save_checkpoint(tmp_path / "copy.pth", {"state_dict": {"a": torch.full((1000,), 3.0)}})
    assert content_digest(tmp_path / "copy.pth") == before
    (tmp_path / "c.txt").write_text("no archive")
    with pytest.raises(UserError, match=r"cannot read .*c\.txt"):
        content_digest(tmp_path / "c.txt")


def test_a_lock_is_held_until_its_block_ends(tmp_path):
    with (
        locked(tmp_path / "step", "busy"),
        pytest.raises(UserError, match=r"^busy$"),
        locked(tmp_path / "step", "busy"),
    ):
        pass
    with locked(tmp_path / "step", "busy") as descriptor:
        assert os.fstat(descriptor).st_ino == (tmp_path / "step" / ".lock").stat().st_ino
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"), locked(tmp_path / "file", "busy"):
        pass


def test_modules_that_windows_lacks_are_not_needed(tmp_path, monkeypatch):
    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)
    copies = []
    for name in ("checkpoint", "distributed"):
        spec = importlib.util.spec_from_file_location("copy", PROJECT / "utils" / f"{name}.py")
        copies.append(importlib.util.module_from_spec(spec))
        spec.loader.exec_module(copies[-1])
    with copies[0].locked(tmp_path, "busy") as held:
        assert held is None
    assert copies[1].resource is None and copies[1].peak_memory() >= 0


def test_without_locks_nothing_is_locked(tmp_path, monkeypatch):
    """As on Windows, where Python has no fcntl."""
    monkeypatch.setattr(checkpoint, "fcntl", None)
    with locked(tmp_path, "busy") as outer, locked(tmp_path, "busy") as inner:
        assert outer is None and inner is None


class TestLoading:
    def test_values_arrive(self):
        source, target = nn.Linear(2, 3), nn.Linear(2, 3)
        load_weights(target, source.state_dict(), "c.pth")
        assert torch.equal(source.weight, target.weight) and torch.equal(source.bias, target.bias)

    @pytest.mark.parametrize(
        ("other", "words"),
        [
            (nn.Linear(2, 4), r"weight is \[4, 2\] in the file, \[3, 2\] in the model"),
            (nn.Linear(2, 3, bias=False), "it has no bias"),
            (nn.BatchNorm1d(3), r"weight is \[3\] in the file"),
            (nn.Bilinear(2, 1, 3), r"weight is \[3, 2, 1\] in the file"),
            (nn.ModuleDict(), "it has no weight"),
        ],
    )
    def test_another_architecture_is_refused_and_changes_nothing(self, other, words):
        model = nn.Linear(2, 3)
        before = model.weight.clone()
        with pytest.raises(UserError, match=f"c.pth is of another architecture: {words}"):
            load_weights(model, other.state_dict(), "c.pth")
        assert torch.equal(model.weight, before)

    def test_keys_too_many_are_refused(self):
        state = {**nn.Linear(2, 3).state_dict(), "extra": torch.ones(1)}
        with pytest.raises(UserError, match="the model has no extra"):
            load_weights(nn.Linear(2, 3), state, "c.pth")

    def test_weights_that_are_not_finite_are_refused(self):
        state = {**nn.Linear(2, 3).state_dict(), "bias": torch.tensor([1.0, float("nan"), 1.0])}
        with pytest.raises(UserError, match=r"c\.pth holds weights that are not finite: bias"):
            load_weights(nn.Linear(2, 3), state, "c.pth")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda w: w.to_sparse(), "another kind .sparse_coo float32 cpu"),
            (lambda w: w.to(torch.complex64), "another kind .strided complex64 cpu"),
            (lambda w: w.to(torch.float8_e4m3fn), "another kind .strided float8_e4m3fn cpu"),
            (lambda w: w.to("meta"), "another kind .strided float32 meta"),
            (lambda w: w.long(), r"bias as torch\.int64, the model as torch\.float32"),
        ],
    )
    def test_tensors_that_are_no_weights_are_refused(self, change, words):
        state = nn.Linear(2, 3).state_dict()
        with pytest.raises(UserError, match=words):
            load_weights(nn.Linear(2, 3), {**state, "bias": change(state["bias"])}, "c.pth")


def test_the_final_checkpoint_is_that_of_the_highest_epoch(tmp_path):
    assert final_checkpoint(tmp_path) is None
    for name in (
        "checkpoint-epoch9.pth",
        "checkpoint-epoch10.pth",
        "checkpoint-epochx.pth",
        "last.pth",
    ):
        (tmp_path / name).touch()
    assert final_checkpoint(tmp_path).name == "checkpoint-epoch10.pth"
