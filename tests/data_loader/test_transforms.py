"""Transforms against Pillow, and samples that depend on (seed, epoch, index) alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from data_loader.data_loaders import StepData, TrainBatches, make_loader
from data_loader.dataset import TrainDataset, normalize
from data_loader.transforms import EvalTransform, TrainTransform
from tests.helpers import small_config

SIZES = [(50, 80), (81, 47), (64, 64), (375, 500), (500, 334)]


def random_pair(height, width, seed=0):
    """A smooth photograph and a label map of blocks, as tensors and as Pillow images."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    photo = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    blocks = rng.choice([0, 1, 2, 20, 255], (height // 3 + 1, width // 3 + 1)).astype(np.uint8)
    label = np.repeat(np.repeat(blocks, 3, 0), 3, 1)[:height, :width]
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    return image, torch.from_numpy(label.copy()), photo, Image.fromarray(label)


def as_array(image):
    return image.permute(1, 2, 0).numpy().astype(int)


def assert_close(image, photo):
    difference = np.abs(as_array(image) - np.array(photo).astype(int))
    assert difference.max() <= 2
    assert difference.mean() < 0.3


def assert_same_labels(label, expected, source, resized, offset=(0, 0)):
    """Equal but for pixels whose centre lies on the border of two source pixels.

    There Pillow takes either, as rounding has it. source, resized: sizes (height, width) before and
    after resampling; offset: of `label` in the resized map.
    """
    clear = []
    for before, after, first, n in zip(source, resized, offset, label.shape, strict=True):
        positions = range(first, first + n)
        clear.append([i - first for i in positions if (2 * i + 1) * before % (2 * after)])
    assert len(clear[0]) > 0.6 * len(label) and len(clear[1]) > 0.6 * label.shape[1]
    assert np.array_equal(label[np.ix_(*clear)], expected[np.ix_(*clear)])


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("crop", [48, 129, 512])
def test_eval_transform_equals_pillow(height, width, crop):
    image, label, photo, mask = random_pair(height, width)
    image, label = EvalTransform(crop)(image, label)
    shorter = min(height, width)
    size = (int(crop * width / shorter), int(crop * height / shorter))
    left, top = round((size[0] - crop) / 2), round((size[1] - crop) / 2)
    box = (left, top, left + crop, top + crop)
    assert image.shape == (3, crop, crop) and image.dtype == torch.uint8
    expected = np.array(mask.resize(size, Image.Resampling.NEAREST).crop(box))
    assert_same_labels(label.numpy(), expected, (height, width), size[::-1], (top, left))
    assert_close(image, photo.resize(size, Image.Resampling.BILINEAR).crop(box))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("seed", [1, 2])
def test_train_transform_equals_pillow(height, width, seed):
    image, label, photo, mask = random_pair(height, width)
    transform = TrainTransform(96)
    boxes, window = [], transform.window
    transform.window = lambda *size: boxes.append(window(*size)) or boxes[-1]
    torch.manual_seed(seed)
    image, label = transform(image, label)
    top, left, h, w = (boxes[0][key] for key in ("top", "left", "height", "width"))
    crop = (left, top, left + w, top + h)
    expected = np.array(mask.crop(crop).resize((96, 96), Image.Resampling.NEAREST))
    photo = photo.crop(crop).resize((96, 96), Image.Resampling.BILINEAR)
    label = label.numpy()
    if (label != expected).mean() > 0.3:
        label, image = label[:, ::-1], image.flip(2)
    assert_same_labels(label, expected, (h, w), (96, 96))
    assert_close(image, photo)


def test_train_transform_draws_boxes_and_flips_as_the_method_says():
    transform = TrainTransform(8)
    boxes, window = [], transform.window
    transform.window = lambda *size: boxes.append(window(*size)) or boxes[-1]
    torch.manual_seed(0)
    image = torch.arange(120, dtype=torch.uint8).expand(3, 100, 120)
    label = torch.zeros(100, 120, dtype=torch.uint8)
    flips = 0
    for _ in range(400):
        out, _ = transform(image, label)
        flips += int(out[0, 0, 0] > out[0, 0, -1])
    areas = np.array([box["height"] * box["width"] / 12000 for box in boxes])
    aspects = np.array([box["width"] / box["height"] for box in boxes])
    assert areas.min() > 0.47 and areas.max() > 0.9
    assert transform.crop.scale == (0.5, 2.0)
    assert aspects.min() > 0.72 and aspects.max() < 1.37
    assert aspects.min() < 0.8 and aspects.max() > 1.25
    assert len({(box["top"], box["left"]) for box in boxes}) > 100
    assert 150 < flips < 250


def test_normalize_is_imagenets_and_blanks_what_stands_alone():
    image = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    label = torch.tensor([0, 1, 255, 20, 0], dtype=torch.uint8).expand(2, 4, 5)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (image.permute(0, 2, 3, 1).numpy() / 255 - mean) / std
    found = normalize(image, label, torch.tensor([False, True]))
    assert found.dtype == torch.float32
    found = found.permute(0, 2, 3, 1).numpy()
    assert np.allclose(found[0], expected[0], atol=1e-5)
    shown = [1, 3]
    assert np.allclose(found[1][:, shown], expected[1][:, shown], atol=1e-5)
    assert (found[1][:, [0, 2, 4]] == 0).all()
    assert np.allclose(normalize(image).permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


class TestSamples:
    """Everything random about a sample comes from (seed, epoch, index)."""

    @pytest.fixture
    def dataset(self, voc_root, tmp_path):
        training = StepData(small_config(voc_root, tmp_path)).training()
        return lambda seed=1: TrainDataset(training, None, seed)

    @staticmethod
    def same(a, b):
        return torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])

    def test_seed_epoch_and_index_decide_and_nothing_else(self, dataset):
        torch.manual_seed(0)
        first = dataset()[0, 3]
        torch.manual_seed(99)
        np.random.seed(99)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        assert self.same(first, dataset()[0, 3])
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])
        for other in (dataset()[1, 3], dataset(seed=2)[0, 3], dataset()[0, 4]):
            assert not self.same(first, other)

    def test_workers_change_nothing(self, dataset):
        loaded = []
        for workers in (0, 2):
            batches = TrainBatches(len(dataset()), 4, seed=1)
            batches.epoch = 1
            torch.manual_seed(workers)
            loaded.append(list(make_loader(dataset(), batches, workers, pin=False)))
        assert [b["id"] for b in loaded[0]] == [b["id"] for b in loaded[1]]
        assert all(self.same(a, b) for a, b in zip(*loaded, strict=True))
