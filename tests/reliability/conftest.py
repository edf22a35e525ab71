"""Undisturbed runs, with which the disturbed ones are compared."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_loader.data_root import DataRoot
from scripts.make_synthetic_voc import make_synthetic_voc
from tests.reliability.runs import RUN, STEP_1, copy, flags, kill_before, note_changes, result, run


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 24 images with its label index, to be read only."""
    root = make_synthetic_voc(tmp_path_factory.mktemp("reliability") / "voc", 24, 8, 64, 3)
    voc = DataRoot(root)
    for split in ("train", "val"):
        voc.index(voc.read_list(split))
    return root


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied after the test: the runs of a test write gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def undisturbed(root: Path, folder: Path, start: Path | None = None, **changes) -> SimpleNamespace:
    """A run of one step in folder, which starts as a copy of `start`.

    folder; points: what it changes, in words, in this order; result.
    """
    if start:
        copy(start, folder)
    noted = folder.with_name(f"{folder.name}.points")
    outcome = run(flags(root, folder, **changes), prepare=note_changes(noted))
    assert outcome.returncode == 0, outcome.stderr
    points = noted.read_text().splitlines()
    step = changes.get("task_step", 0)
    return SimpleNamespace(folder=folder, points=points, result=result(folder, step))


@pytest.fixture(scope="session")
def step_0(root: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Step 0, undisturbed."""
    return undisturbed(root, tmp_path_factory.mktemp("step_0") / "saved")


@pytest.fixture(scope="session")
def step_1(root: Path, step_0: SimpleNamespace, tmp_path_factory) -> SimpleNamespace:
    """Steps 0 and 1, undisturbed."""
    folder = tmp_path_factory.mktemp("step_1") / "saved"
    return undisturbed(root, folder, step_0.folder, **STEP_1)


@pytest.fixture(scope="session")
def other(root: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Steps 0 and 1 of another experiment: another seed."""
    folder = tmp_path_factory.mktemp("other") / "saved"
    undisturbed(root, folder, seed=2)
    return undisturbed(root, folder, **STEP_1, seed=2)


@pytest.fixture(scope="session")
def halfway(root: Path, step_0: SimpleNamespace, step_1: SimpleNamespace, tmp_path_factory) -> Path:
    """Step 1, killed right after the checkpoint of its first epoch."""
    folder = copy(step_0.folder, tmp_path_factory.mktemp("halfway") / "saved")
    writes = [i for i, what in enumerate(step_1.points) if what == "open a metrics.jsonl"]
    outcome = run(flags(root, folder, **STEP_1), prepare=kill_before(writes[1]))
    assert outcome.returncode == -9
    assert (folder / "models" / RUN / "step_1" / "last.pth").is_file()
    return folder
