"""Fixtures that every test file may use."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from configs.options import parse_eval, parse_train
from data_loader import data_root
from scripts.make_synthetic_voc import make_synthetic_voc
from tests.helpers import code_of
from trainer.run import evaluate_checkpoint, train
from utils.distributed import launch

torch.set_num_threads(1)  # more threads slow small networks down where cores are shared

COMMANDS = {"train_voc.py": (parse_train, train), "eval_voc.py": (parse_eval, evaluate_checkpoint)}


@pytest.fixture(scope="session")
def voc_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic data set, to be read only."""
    return make_synthetic_voc(tmp_path_factory.mktemp("voc"), train=60, val=20, size=64, seed=3)


@pytest.fixture
def own_root(voc_root: Path, tmp_path: Path) -> Path:
    """A copy of the synthetic data set that a test may change."""
    ignore = shutil.ignore_patterns("label_index")
    return Path(shutil.copytree(voc_root, tmp_path / "own_voc", ignore=ignore))


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, whatever the machine has: bit for bit comparisons are made on the CPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def command(
    cpu: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., SimpleNamespace]:
    """Run an entry point in this process: returncode, stdout, stderr; other exceptions pass.

    Labels are scanned without workers: those of a loader that an error ended are slow to collect.
    """
    scan = data_root._scan
    monkeypatch.setattr(data_root, "_scan", lambda images, _, description: scan(images, 0, description))

    def call(script: str, *arguments) -> SimpleNamespace:
        parse, work = COMMANDS[script]
        capsys.readouterr()
        words = [str(argument) for argument in arguments]
        code = code_of(lambda: launch(work, *parse(words)))
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return call
