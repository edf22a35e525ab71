"""What the tests of both kinds of steps do with a trainer."""

from pathlib import Path

import torch

from configs.options import Config, TrainCall
from models.deeplabv3 import DeepLabV3, freeze_bn, stop_dropout
from trainer.base import Trainer
from trainer.meter import Meter
from trainer.run import train
from utils.checkpoint import read_checkpoint, save_checkpoint

# The kinds of steps, by what they change in `small_config`; after step 0 they start from the model of
# `confident_model`.
LATER = {"task_step": 1, "lr": 1e-4, "mem_size": 9, "pseudo_thresh": 0.2, "freeze_bn": True}
KINDS = {
    "base": {"ac": 0.5},
    "incremental": LATER,
    "whole images": {**LATER, "pseudo_labels": "image"},
    "DKD": {**LATER, "method": "dkd", "replay": "none", "ac": 1.0},
}


def run(config: Config, **request) -> None:
    """Train a step as train_voc.py does."""
    train(config, TrainCall(**request))


def raw_batch(trainer: Trainer, number: int = 0) -> dict:
    """A batch of a prepared trainer as its loader gives it."""
    keys = list(trainer.batches)[number]
    return torch.utils.data.default_collate([trainer.dataset[key] for key in keys])


def training_mode(trainer: Trainer) -> None:
    """The modes of a step t >= 1 with frozen batch normalisation."""
    freeze_bn(trainer.model.train())
    stop_dropout(trainer.model)


def silent_meter(trainer: Trainer) -> Meter:
    return Meter("", len(trainer.batches), trainer.device, shown=False)


def confident_model(path: Path) -> Path:
    """Write a model of step 0 of 5-3 that sees each of its classes somewhere, and so pseudo labels."""
    torch.manual_seed(1)
    model = DeepLabV3([5], "tiny")
    torch.nn.init.constant_(model.cls[0].bias, -3.0)
    torch.nn.init.normal_(model.cls[1].weight, std=0.3)
    with torch.no_grad():
        for _ in range(30):  # its batch normalisation learns what images are like
            model(torch.randn(4, 3, 64, 64))
        model.eval()
        model.cls[1].bias -= model(torch.randn(4, 3, 64, 64))[:, 1:].mean(dim=(0, 2, 3))
    save_checkpoint(path, {"format": "eir-1", "ac": 0.0, "state_dict": model.state_dict()})
    return path


def assert_same(a, b, where: str = "checkpoint") -> None:
    """Equality to the last bit, of tensors and of all else."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}.{i}")
    else:
        assert a == b, where


def assert_same_step(folder: Path, other: Path, final: str) -> None:
    """The same final checkpoint, with all its training state, and the same results."""
    one, two = (read_checkpoint(f / final) for f in (folder, other))
    for content in (one, two):  # which are others where one run is validated and the other is not
        content["made_from"].pop("settings")
    assert_same(one, two)
    assert (folder / "metrics.json").read_text() == (other / "metrics.json").read_text()
