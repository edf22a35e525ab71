"""Exported networks: what they say of themselves, and that they are the network of the checkpoint."""

import json
import sys

import numpy as np
import pytest
import torch

from configs.options import VOC_CLASSES
from data_loader.dataset import normalize
from scripts import export
from scripts.export import main
from tests.helpers import error_line
from utils.checkpoint import read_checkpoint

NAMES = ["background", *list(VOC_CLASSES)[:8]]


def test_a_dictionary_of_weights_is_evaluated_as_the_checkpoint(steps, tmp_path, run, command):
    output = tmp_path / "net.pth"
    result = run(main, "-r", steps[1], "--output", output)
    assert result.returncode == 0, result.stderr
    assert "9 classes with the background" in result.stdout and "differ" in result.stdout
    content, before = read_checkpoint(output), read_checkpoint(steps[1])
    assert list(content["classes"]) == NAMES and list(content["classes"].values()) == list(range(9))
    assert all(content[key] == before[key] for key in ("arch", "order", "format", "ac"))
    assert all(torch.equal(v, before["state_dict"][k]) for k, v in content["state_dict"].items())
    written = []
    for path in (steps[1], output):
        flags = ("-r", path, "-c", steps[1].parent / "config.json", "--output", tmp_path / "m.json")
        assert command("eval_voc.py", *flags).returncode == 0
        written.append((tmp_path / "m.json").read_text())
    assert written[0] == written[1]


def test_safetensors_name_the_classes(steps, tmp_path, run):
    safetensors = pytest.importorskip("safetensors")
    output = tmp_path / "net.safetensors"
    assert run(main, "-r", steps[1], "--output", output).returncode == 0
    with safetensors.safe_open(output, "pt") as file:
        said = {key: json.loads(value) for key, value in file.metadata().items()}
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert list(said["classes"]) == NAMES
    assert said["arch"] == {"backbone": "tiny", "classes": [5, 3]}
    config = json.loads((steps[1].parent / "config.json").read_text())
    assert (
        said["crop_size"]
        == config["data_loader"]["args"]["train"]["args"]["transform_args"]["crop_size"]
    )
    before = read_checkpoint(steps[1])["state_dict"]
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[key], before[key]) for key in before)
    zero = normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).flatten()
    assert torch.allclose(-torch.tensor(said["mean"]) / torch.tensor(said["std"]), zero)


@pytest.mark.parametrize("evaluator", ["onnxruntime", "onnx's reference evaluator"])
def test_onnx_takes_images_of_any_size(steps, tmp_path, run, monkeypatch, evaluator):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    if evaluator != "onnxruntime":
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    output = tmp_path / "net.onnx"
    result = run(main, "-r", steps[1], "--output", output)
    assert result.returncode == 0, result.stderr
    assert f"its logits, by {evaluator}, differ" in result.stdout
    said = {entry.key: json.loads(entry.value) for entry in onnx.load(output).metadata_props}
    assert list(said["classes"]) == NAMES
    session = runtime.InferenceSession(output)
    found = session.run(None, {"images": np.zeros((2, 3, 47, 130), dtype=np.float32)})[0]
    assert found.shape == (2, 9, 47, 130)


@pytest.mark.parametrize(
    ("name", "missing", "words"),
    [
        ("net.onnx", "onnx", ".onnx needs the package onnx: pip install onnx"),
        ("net.safetensors", "safetensors.torch", ".safetensors needs the package safetensors"),
        ("net.foo", None, "give the name of a .safetensors, .pth, .onnx file"),
    ],
)
def test_what_is_missing_is_named(steps, tmp_path, run, monkeypatch, name, missing, words):
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    assert words in error_line(run(main, "-r", steps[0], "--output", tmp_path / name))
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_and_a_file_of_other_output_are_not_written(steps, tmp_path, run, monkeypatch):
    line = error_line(run(main, "-r", steps[0], "--output", steps[0]))
    assert "is the checkpoint itself" in line
    other, before = steps[1], steps[1].read_bytes()
    assert "belongs to a step of a run" in error_line(run(main, "-r", steps[0], "--output", other))
    assert other.read_bytes() == before
    beside = other.with_name("checkpoint-epoch99.pth")  # would be taken for the step's final one
    assert "belongs to a step of a run" in error_line(run(main, "-r", steps[0], "--output", beside))
    assert not beside.exists()
    output = tmp_path / "net.pth"
    for value in (0.0, float("nan")):
        found = torch.full((1,), value)
        monkeypatch.setattr(export, "with_weights", lambda *_, found=found: lambda images: found)
        assert f"{output} is not written" in error_line(run(main, "-r", steps[0], "--output", output))
        assert not output.exists()
