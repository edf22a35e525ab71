"""Datasets: uint8 images and labels in channel space, one sample per (epoch, index).

All randomness of a sample comes from (seed, epoch, index), so that it does not depend on workers,
processes or the position in a batch. Normalisation happens on the device (`normalize`).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from data_loader.data_root import read_image, read_label
from data_loader.memory import Memory
from utils.visualize import VOID

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB in [0, 1]
STD = (0.229, 0.224, 0.225)

Transform = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class LabelledImages(Dataset):
    """Images of one split with their labels in channel space."""

    def __init__(self, ids, images: list[Path], labels: list[Path], table, transform: Transform):
        self.ids, self.images, self.labels = ids, images, labels
        self.table, self.transform = table, transform

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image uint8 [3, H, W] and label uint8 [H, W] in channels, before the transform."""
        label = self.table[read_label(self.labels[i])]
        return read_image(self.images[i]), torch.from_numpy(label)

    def __getitem__(self, i: int) -> dict:
        """image uint8 [3, H, W], label uint8 [H, W], id str."""
        image, label = self.transform(*self.load(i))
        return {"image": image.contiguous(), "label": label, "id": self.ids[i]}


class TrainDataset(Dataset):
    """Training images of a step, followed by the entries of its memory."""

    def __init__(self, images: LabelledImages, memory: Memory | None, seed: int):
        self.images, self.memory, self.seed = images, memory, seed

    def __len__(self) -> int:
        return len(self.images) + (len(self.memory) if self.memory else 0)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Sample of (epoch, index).

        image uint8 [3, S, S], label uint8 [S, S], id str, epoch and index int, replayed bool (from the
        memory), alone bool (an instance without background: the image counts only where label > 0).
        """
        epoch, i = key
        stored = i - len(self.images)
        replayed = stored >= 0
        if replayed:
            image, label = self.memory.replay(stored)
            name = self.memory.entries[stored].id
        else:
            image, label = self.images.load(i)
            name = self.images.ids[i]
        with torch.random.fork_rng(devices=[]):
            generator = np.random.default_rng((self.seed, epoch, i))
            torch.default_generator.manual_seed(int(generator.integers(2**62)))
            image, label = self.images.transform(image, label)
        return {
            "image": image.contiguous(),
            "label": label,
            "id": name,
            "epoch": epoch,
            "index": i,
            "replayed": replayed,
            "alone": replayed and self.memory.instances,
        }


def normalize(
    image: torch.Tensor, label: torch.Tensor | None = None, alone: torch.Tensor | None = None
) -> torch.Tensor:
    """uint8 [N, 3, H, W] to float32, ImageNet mean and std.

    Images marked in `alone` (bool [N]) become exactly 0 where label (uint8 [N, H, W]) shows no
    class: replayed instances have no background.
    """
    pixels = image.to(torch.float32)
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        pixels[:, channel].sub_(255 * mean).div_(255 * std)
    if alone is not None:
        empty = alone[:, None, None] & ((label == 0) | (label == VOID))
        pixels.masked_fill_(empty[:, None], 0.0)
    return pixels
