"""The sheet of composites: what it shows, where it goes, and that it leaves the run alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from configs.options import TrainCall
from scripts import preview_replay
from scripts.preview_replay import TITLES, preview
from tests.helpers import small_config, snapshot
from trainer.run import train
from utils.errors import UserError
from utils.visualize import voc_palette

pytestmark = pytest.mark.usefixtures("cpu")


def options(output, images=4, epoch=1):
    return SimpleNamespace(output=output, images=images, epoch=epoch)


def test_a_sheet_of_new_and_replayed_images(voc_root, tmp_path, monkeypatch, capsys):
    train(small_config(voc_root, tmp_path, epochs=1), TrainCall())
    before = snapshot(tmp_path / "models")
    drawn, sheet = [], preview_replay.sheet

    def keep(rows, titles):
        drawn.extend(rows)
        return sheet(rows, titles)

    monkeypatch.setattr(preview_replay, "sheet", keep)
    config = small_config(voc_root, tmp_path, task_step=1, mem_size=10)
    output = tmp_path.parent / f"{tmp_path.name}.png"
    preview(config, TrainCall(), options(output))
    assert snapshot(tmp_path / "models") == before
    assert f"4 composites of step 1: {output}" in capsys.readouterr().out
    with Image.open(output) as picture:
        legend = np.array(picture)[-40:].reshape(-1, 3).tolist()
    assert all(voc_palette()[c].tolist() in legend for c in (0, 1, 8, 255))
    assert [len(row) for row in drawn] == 4 * [len(TITLES)]
    grey = np.array([0.485, 0.456, 0.406]) * 255  # of a replayed image, outside its instances
    empty = [(np.abs(row[0] - grey).max(axis=2) < 1).mean() for row in drawn]
    assert sorted(share > 0.2 for share in empty) == [False, False, True, True]
    covered = np.stack([row[4] for row in drawn])
    assert 0 < covered.max() <= 1 and covered.min() == 0
    changed = np.stack([(row[3] != row[0]).any(axis=2) for row in drawn])
    assert changed.any() and not (changed & (covered == 0)).any()


def test_the_samples_are_those_of_the_epoch():
    class Keys(list):  # each key is a sample, so that a batch says which were asked for
        def __getitem__(self, key):
            return torch.tensor(key)

    data = SimpleNamespace(training=lambda: range(5))
    trainer = SimpleNamespace(data=data, dataset=Keys(range(8)), to_device=lambda batch: batch)
    epochs, samples = preview_replay.first_batch(trainer, options("sheet.png", epoch=3)).T
    assert epochs.tolist() == [2, 2, 2, 2]  # the third epoch
    assert sorted(samples >= 5) == [False, False, True, True]


@pytest.mark.parametrize(
    ("step", "wrong", "line"),
    [
        (0, {}, "step 0 replays nothing"),
        (1, {"images": 0}, "from 1 to"),
        (1, {"epoch": 0}, "from 1 to"),
        (1, {"output": "sheet.foo"}, "give the name of a .png file"),
        (1, {"output": "none/sheet.png"}, "no folder"),
        (1, {"method": "dkd"}, "--method dkd pastes nothing"),
        (1, {"replay": "none"}, "--replay none pastes nothing"),
        (1, {}, "step 0 is not finished"),
    ],
)
def test_what_it_refuses(voc_root, tmp_path, step, wrong, line):
    changes = {key: wrong.pop(key) for key in ("method", "replay") if key in wrong}
    config = small_config(voc_root, tmp_path, task_step=step, **changes)
    asked = options(tmp_path / wrong.pop("output", "sheet.png"), **wrong)
    with pytest.raises(UserError, match=line):
        preview(config, TrainCall(), asked)
    assert list(tmp_path.iterdir()) == []
