"""show_splits against a brute-force reading of every label map."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_loader.tasks import get_task
from scripts.make_synthetic_voc import make_synthetic_voc
from scripts.show_splits import main
from tests.helpers import code_of

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "show_splits.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 60 training and 30 validation images."""
    return make_synthetic_voc(tmp_path_factory.mktemp("voc") / "root", 60, 30, 32, 3)


def classes_by_id(root: Path, name: str) -> dict[str, set[int]]:
    """VOC classes of each image of a list, read from its label map."""
    lines = (root / "ImageSets" / "Segmentation" / f"{name}.txt").read_text().split()
    labels = [root / word.lstrip("/") for word in lines if word.endswith(".png")]
    return {path.stem: set(np.unique(Image.open(path)).tolist()) - {0, 255} for path in labels}


def brute_force(root: Path, task_name: str, setting: str) -> list[dict]:
    """The steps of the JSON, from sets of classes."""
    train, val = classes_by_id(root, "train_aug"), classes_by_id(root, "val")
    seen, steps = set(), []
    for step, classes in enumerate(get_task(task_name, setting).steps):
        new = set(classes)
        seen = seen | new
        shows_new = {i: c for i, c in train.items() if c & new}
        steps.append(
            {
                "step": step,
                "classes": list(classes),
                "train": [i for i, c in shows_new.items() if setting == "overlap" or c <= seen],
                "val": [i for i, c in val.items() if c & new],
                "test": [i for i, c in val.items() if c & seen],
            }
        )
    return steps


@pytest.mark.parametrize("setting", ["overlap", "disjoint", "sequential"])
@pytest.mark.parametrize("task", ["5-3", "15-1_b", "joint"])
def test_json_equals_a_brute_force_reading(root, task, setting, capsys):
    flags = ["--data_root", str(root), "--task_name", task, "--task_setting", setting, "--json"]
    assert main(flags) == 0
    expected = {"task": task, "setting": setting, "steps": brute_force(root, task, setting)}
    assert json.loads(capsys.readouterr().out) == expected


def test_json_is_all_there_is_on_standard_output(root, tmp_path):
    flags = ["--data_root", root, "--task_name", "5-3", "--task_setting", "overlap", "--json"]
    command = [sys.executable, SCRIPT, *flags, "--idxs_path", tmp_path / "fresh"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    report = json.loads(result.stdout)
    assert list(report) == ["task", "setting", "steps"]
    assert report["steps"] == brute_force(root, "5-3", "overlap")


def test_the_table_counts_images_of_steps_and_classes(root, capsys):
    assert main(["--data_root", str(root), "--task_name", "5-3", "--task_setting", "disjoint"]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = brute_force(root, "5-3", "disjoint")
    rows = [line.split() for line in lines[3:] if line[:4].strip()]
    sizes = [[s["step"], *(len(s[split]) for split in ("train", "val", "test"))] for s in expected]
    assert [[int(cell) for cell in row[:4]] for row in rows] == sizes
    labels = classes_by_id(root, "train_aug")
    aeroplanes = sum(1 in labels[i] for i in expected[0]["train"])
    assert f"aeroplane {aeroplanes}," in lines[3]


def test_classes_that_no_image_shows_are_a_warning(root, tmp_path, capsys):
    data_set = {"name": "mine", "classes": {"ape": 1, "bee": 2, "owl": 40}, "highest_id": 40}
    config = {"data_loader": {"args": {"dataset": data_set, "task": {"name": "2-1"}}}}
    (tmp_path / "mine.json").write_text(json.dumps(config))
    flags = ["-c", str(tmp_path / "mine.json"), "--data_root", str(root)]
    assert main(flags) == 0
    out, err = capsys.readouterr()
    assert "owl 0" in out
    assert err == "warning: no training image shows owl: are their ids right?\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task_name", "7-4"], "unknown task '7-4'"),
        (["--task_setting", "half"], "--task_setting is 'half'"),
        (["--data_root", "nowhere"], "data root nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line_and_code_2(flags, message, capsys):
    assert code_of(lambda: main(flags)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"error: {message}") and output.err.count("\n") == 1
