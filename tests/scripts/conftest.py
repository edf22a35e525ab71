"""Two steps of a task with weights of no training, and scripts that are called in this process."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms.functional import resize

from data_loader.data_root import read_image
from data_loader.dataset import normalize
from models import DeepLabV3
from tests.helpers import code_of, small_config
from utils.checkpoint import save_checkpoint, write_json


def random_model(classes: list[int], root: Path, seed: int) -> DeepLabV3:
    """A network of random weights that finds a class in half of the pixels of a data set's images."""
    torch.manual_seed(seed)
    model = DeepLabV3(classes, "tiny").train()
    paths = sorted((root / "JPEGImages").glob("*.jpg"))[:8]
    images = normalize(torch.stack([resize(read_image(path), [64, 64]) for path in paths]))
    with torch.no_grad():
        for _ in range(20):
            model(images)
        middle = model.eval()(images)[:, 1:].amax(dim=1).median()
        for classifier in model.cls[1:]:
            classifier.bias -= middle
    return model


@pytest.fixture(scope="session")
def steps(voc_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of steps 0 and 1 of 5-3, each with its config.json beside it."""
    paths = []
    for step, classes in enumerate(([5], [5, 3])):
        config = small_config(voc_root, tmp_path_factory.mktemp("saved"), task_step=step)
        model = random_model(classes, voc_root, seed=step)
        paths.append(config.step_dir() / "checkpoint-epoch2.pth")
        content = {
            "format": "eir-1",
            "ac": 0.0,
            "arch": {"backbone": "tiny", "classes": classes},
            "order": list(range(1, 1 + sum(classes))),
        }
        save_checkpoint(paths[-1], {**content, "state_dict": model.state_dict()})
        write_json(config.step_dir() / "config.json", config.to_dict())
    return paths


@pytest.fixture
def run(cpu: None, capsys: pytest.CaptureFixture) -> Callable[..., SimpleNamespace]:
    """Call a script's main with these arguments: returncode, stdout, stderr; other exceptions pass."""

    def call(main, *arguments) -> SimpleNamespace:
        capsys.readouterr()
        code = code_of(lambda: main([str(argument) for argument in arguments]))
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return call
