"""What a step sees, against a reading of the label maps, and which samples form which batch."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_loader import data_loaders
from data_loader.data_loaders import EvalBatches, StepData, TrainBatches
from tests.helpers import PROJECT, small_config
from utils.errors import UserError

ORDER_B = [12, 9, 20, 7, 15, 8, 14, 16, 5, 19, 4, 1, 13, 2, 11, 17, 3, 6, 18, 10]
TASKS = {
    "5-3": (list(range(1, 21)), [5, 3, 3, 3, 3, 3]),
    "15-1": (list(range(1, 21)), [15, 1, 1, 1, 1, 1]),
    "15-5": (list(range(1, 21)), [15, 5]),
    "19-1": (list(range(1, 21)), [19, 1]),
    "10-10": (list(range(1, 21)), [10, 10]),
    "joint": (list(range(1, 21)), [20]),
    "15-1_b": (ORDER_B, [15, 1, 1, 1, 1, 1]),
}


def read_root(root, name):
    """Pairs of id and label map, in the order of a list."""
    lines = (root / f"ImageSets/Segmentation/{name}.txt").read_text().splitlines()
    labels = [root / line.split()[1].lstrip("/") for line in lines]
    return [(path.stem, np.array(Image.open(path))) for path in labels]


def brute_force(pairs, order, sizes, setting, step, split):
    """Ids and labels in channels of a split of a step, straight from the definitions."""
    starts = np.cumsum([0, *sizes])
    now = set(order[starts[step] : starts[step + 1]])
    seen = set(order[: starts[step + 1]])
    result = []
    for name, label in pairs:
        shown = set(np.unique(label).tolist()) - {0, 255}
        if split == "train":
            chosen = shown & now and (setting == "overlap" or not shown - seen)
            visible = seen if setting == "sequential" else now
        else:
            chosen, visible = shown & (now if split == "val" else seen), seen
        if chosen:
            channels = np.zeros_like(label)
            for position, c in enumerate(order, start=1):
                if c in visible:
                    channels[label == c] = position
            channels[label == 255] = 255
            result.append((name, channels))
    return result


@pytest.mark.parametrize("setting", ["overlap", "disjoint", "sequential"])
@pytest.mark.parametrize("task", TASKS)
def test_splits_and_labels_equal_a_reading_of_the_label_maps(voc_root, tmp_path, task, setting):
    order, sizes = TASKS[task]
    pairs = {name: read_root(voc_root, name) for name in ("train_aug", "val")}
    first = sizes[0] + 1
    for step in range(len(sizes)):
        config = small_config(voc_root, tmp_path, task_name=task, task_setting=setting, task_step=step)
        data = StepData(config)
        assert data.classes == sizes[: step + 1]
        assert data.groups == ([*range(first)], [*range(first, 1 + sum(data.classes))])
        for split in ("train", "val", "test"):
            source = pairs["train_aug" if split == "train" else "val"]
            expected = brute_force(source, order, sizes, setting, step, split)
            if split == "train" and not expected:
                with pytest.raises(UserError, match="no training image"):
                    data.training()
                continue
            dataset = data.training() if split == "train" else data.evaluation(split)[0]
            assert dataset.ids == [name for name, _ in expected], (step, split)
            for i, (_, label) in enumerate(expected):
                assert np.array_equal(dataset.load(i)[1].numpy(), label)


@pytest.mark.parametrize("split", ["train", "test"])
def test_hidden_classes_can_be_void(voc_root, tmp_path, split):
    """In the split whose masking_value says so, and in no other one."""
    changes = {f"data_loader__args__{split}__args__masking_value": 255}
    data = StepData(small_config(voc_root, tmp_path, **changes))
    for name, images in (("train", data.training()), ("test", data.evaluation("test")[0])):
        hidden = 0
        for i in range(len(images)):
            raw = np.array(Image.open(images.labels[i]))
            void = raw > 5 if name == split else raw == 255
            assert np.array_equal(images.load(i)[1].numpy() == 255, void)
            hidden += int(((raw > 5) & (raw < 255)).sum())
        assert hidden


def test_doubtful_validation_labels_are_in_the_log(own_root, tmp_path, monkeypatch):
    found = []
    for level in ("info", "warning"):
        keep = lambda text, level=level: found.append((level, text))  # noqa: E731
        monkeypatch.setattr(data_loaders.log, level, keep)

    def described():
        found.clear()
        config = small_config(own_root, tmp_path, data_loader__args__dataset__name="drawn")
        StepData(config).describe()
        return found

    used, other = own_root / "SegmentationClassAug", own_root / "SegmentationClass"
    shutil.copytree(used, other)
    counts = {"training": 60, "validation": 20}
    expected = [
        ("info", f"labels of the {name} images: SegmentationClassAug ({count})")
        for name, count in counts.items()
    ]
    assert described() == expected
    name = sorted(path.stem for path in other.glob("2008*"))[3]
    label = np.array(Image.open(other / f"{name}.png"))
    Image.fromarray(np.zeros_like(label)).save(other / f"{name}.png")
    *first, (level, warning) = described()
    assert first == expected and level == "warning"
    assert "1 validation images have labels with other classes" in warning
    assert f"{name} first: {used} is used" in warning


@pytest.mark.parametrize("samples", [24, 29])
@pytest.mark.parametrize(("size", "processes"), [(8, 1), (4, 2), (3, 3)])
def test_batches_of_all_processes_are_one_order_cut_in_pieces(samples, size, processes):
    def order(processes, size, epoch, seed=7):
        parts = []
        for rank in range(processes):
            batches = TrainBatches(samples, size, seed, rank, processes)
            batches.epoch = epoch
            parts.append(list(batches))
            assert len(batches) == len(parts[-1]) == samples // (size * processes)
            assert batches.sizes() == [size] * processes
        return [[key for part in parts for key in part[b]] for b in range(len(parts[0]))]

    for epoch in (0, 5):
        batches = order(processes, size, epoch)
        assert batches == order(1, size * processes, epoch)
        keys = [key for batch in batches for key in batch]
        assert {e for e, _ in keys} == {epoch}
        indices = [i for _, i in keys]
        assert len(set(indices)) == len(indices) and set(indices) <= set(range(samples))
        assert indices != sorted(indices)
    assert order(1, 8, 0) != [[(0, i) for _, i in batch] for batch in order(1, 8, 5)]
    assert order(1, 8, 0) != order(1, 8, 0, seed=8)


def test_a_small_training_set_is_one_smaller_batch_with_a_warning(monkeypatch):
    warnings = []
    monkeypatch.setattr(data_loaders.log, "warning", warnings.append)
    ranks = [TrainBatches(5, 4, 1, rank, 2) for rank in range(2)]
    assert ranks[0].sizes() == [3, 2]
    assert [len(next(iter(r))) for r in ranks] == [3, 2]
    assert sorted(i for r in ranks for _, i in next(iter(r))) == [0, 1, 2, 3, 4]
    assert "one batch of 5 instead of 8" in warnings[0]
    warnings.clear()
    TrainBatches(8, 4, 1, 0, 2)
    assert not warnings


def test_fewer_images_than_processes_is_an_error():
    with pytest.raises(UserError, match="2 training images cannot be shared by 3 processes"):
        TrainBatches(2, 4, 1, 0, 3)


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("samples", [1, 19])
def test_evaluation_counts_every_image_once_in_the_same_batches(samples, processes):
    parts = [list(EvalBatches(samples, 4, rank, processes)) for rank in range(processes)]
    batches = sorted(batch for part in parts for batch in part)
    assert batches == list(EvalBatches(samples, 4))
    assert [i for batch in batches for i in batch] == list(range(samples))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_workers_that_have_no_core_are_not_started_and_that_is_said_once(monkeypatch):
    found = []
    monkeypatch.setattr(data_loaders.log, "warning", found.append)
    monkeypatch.setattr(data_loaders, "cores", lambda: 3)
    data_loaders._clipped.cache_clear()
    for asked, started in ((2, 2), (3, 3), (7, 3), (7, 3)):
        assert data_loaders.make_loader([0], [[0]], asked, pin=False).num_workers == started
    assert len(found) == 1 and found[0].startswith("3 loader processes instead of 7 (--num_workers)")


def test_processes_of_a_loader_are_not_forked_from_the_one_that_trains():
    """What Python 3.12 warns of, and the tests' configuration makes an error."""
    loader = data_loaders.make_loader([4, 5], [[0], [1]], 1, pin=False)
    assert loader.multiprocessing_context.get_start_method() != "fork"
    assert [int(batch) for batch in loader] == [4, 5]


PARENT = """
from data_loader.data_loaders import make_loader

if __name__ == "__main__":
    batches = iter(make_loader(range(8), [[i] for i in range(8)], 1, pin=False))
    next(batches)
    print(*(worker.pid for worker in batches._workers), flush=True)
    input()
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_processes_of_a_loader_end_with_one_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, script], stdin=pipe, stdout=pipe, env=environment) as parent:
        workers = [Path("/proc", pid) for pid in parent.stdout.readline().decode().split()]
        assert workers and all(worker.exists() for worker in workers)
        parent.kill()
    limit = time.monotonic() + 60
    while any(worker.exists() for worker in workers):
        assert time.monotonic() < limit, "a process of a loader outlives the one it works for"
        time.sleep(0.05)


@pytest.mark.parametrize("split", ["val", "test"])
def test_each_split_has_its_own_crop(voc_root, tmp_path, split):
    config = small_config(voc_root, tmp_path)
    getattr(config.data, split).args.transform_args.crop_size = 48
    data = StepData(config)
    assert data.evaluation(split)[0][0]["image"].shape == (3, 48, 48)
    assert data.training().transform.size == [64, 64]
