"""Data of a known size: drawn photographs and regions, in folders like those of VOC 2012."""

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.make_synthetic_voc import outlines
from utils.visualize import label_image


def photograph(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise of all scales, coarse ones strongest, as in photographs: uint8 [height, width, 3]."""
    pixels = np.full((height, width, 3), 128.0)
    cell = max(height, width)
    while cell >= 1:
        coarse = rng.normal(size=(-(-height // cell) + 1, -(-width // cell) + 1, 3)) * cell**0.4 * 8
        grey = coarse.mean(axis=2, keepdims=True)
        levels = np.clip(128 + grey + 0.3 * coarse, 0, 255).astype(np.uint8)
        layer = Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)
        pixels += np.asarray(layer) - 128.0
        cell //= 2
    return np.clip(pixels, 0, 255).astype(np.uint8)


def regions(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth regions of three classes with void between: uint8 [height, width], 0..20 and 255."""
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5), dtype=np.uint8))
    levels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) // 64
    label = np.array([0, *rng.integers(1, 21, 3)], dtype=np.uint8)[levels]
    label[outlines(levels, 2)] = 255
    return label


def write_photographs(root: Path, count: int, height: int = 375, width: int = 500) -> Path:
    """A VOC root of photographs, the same images as train and val list."""
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    ids = [f"2007_{i:06d}" for i in range(count)]
    for name in ids:
        picture = Image.fromarray(photograph(rng, height, width))
        picture.save(root / f"JPEGImages/{name}.jpg", quality=95)
        label = label_image(regions(rng, height, width))
        label.save(root / f"SegmentationClassAug/{name}.png")
    for file in ("train_aug", "val"):
        (root / f"ImageSets/Segmentation/{file}.txt").write_text("\n".join(ids) + "\n")
    return root


def multiply(root: Path, count: int) -> Path:
    """Copy the training images of a VOC root until its list names `count` of them."""
    path = root / "ImageSets/Segmentation/train_aug.txt"
    originals = [Path(line.split()[0]).stem for line in path.read_text().splitlines()]
    names = [f"2009_{i:06d}" for i in range(count)]
    for name, original in zip(names, cycle(originals), strict=False):
        for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png")):
            shutil.copy(root / folder / f"{original}.{suffix}", root / folder / f"{name}.{suffix}")
    path.write_text("\n".join(names) + "\n")
    return root


@contextmanager
def data_root(args: argparse.Namespace, count: int) -> Iterator[Path]:
    """The root given with --data_root, or a temporary one of `count` photographs."""
    if args.data_root:
        yield Path(args.data_root)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield write_photographs(Path(folder) / "voc", count)
