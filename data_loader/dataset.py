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
    """Training images of a step, followed by the entries of its memory.

    pseudo: called with a sample's name and size, gives what the teacher sees in all of it (uint8
    [H, W], channels); None where the teacher looks at the crops. It is not asked about instances
    without surroundings: they have no background.
    """

    def __init__(self, images: LabelledImages, memory: Memory | None, seed: int):
        self.images, self.memory, self.seed = images, memory, seed
        self.pseudo: Callable[[str, tuple[int, int]], torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.images) + (len(self.memory) if self.memory else 0)

    def name(self, i: int) -> str:
        """What sample i is called beside the others: an image's id, or memory/ and an entry's file.

        An id does not tell entries from images, nor from each other: several may show parts of one.
        """
        stored = i - len(self.images)
        return f"memory/{self.memory.entries[stored].file}" if stored >= 0 else self.images.ids[i]

    def load(self, i: int) -> tuple[torch.Tensor, torch.Tensor, str]:
        """Image uint8 [3, H, W], label uint8 [H, W] in channels, and id, before the transform."""
        stored = i - len(self.images)
        if stored >= 0:
            return *self.memory.replay(stored), self.memory.entries[stored].id
        return *self.images.load(i), self.images.ids[i]

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Sample of (epoch, index).

        image uint8 [3, S, S], label uint8 [S, S], id str, epoch and index int, replayed bool (from the
        memory), alone bool (an instance without background: the image counts only where label > 0);
        with pseudo labels of whole images also pseudo uint8 [S, S], their part, 0 where there is none.
        """
        epoch, i = key
        image, label, name = self.load(i)
        replayed = i >= len(self.images)
        alone = replayed and self.memory.alone
        labels = [label]
        if self.pseudo:
            labels.append(torch.zeros_like(label) if alone else self.pseudo(self.name(i), label.shape))
        with torch.random.fork_rng(devices=[]):
            generator = np.random.default_rng((self.seed, epoch, i))
            torch.default_generator.manual_seed(int(generator.integers(2**62)))
            image, labels = self.images.transform(image, torch.stack(labels))
        return {
            "image": image.contiguous(),
            **dict(zip(("label", "pseudo"), labels, strict=False)),
            "id": name,
            "epoch": epoch,
            "index": i,
            "replayed": replayed,
            "alone": alone,
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
