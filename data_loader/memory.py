"""The instance memory (METHOD 4): draw, store, load.

An entry is an object of old classes without its background: the crop of its image around its visible
classes, black elsewhere, and the label map of that crop, with its place and the size of its canvas.
On disk that is two PNG files an entry, which a person can open, and one manifest.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils.errors import UserError

FILL = (124, 116, 104)  # ImageNet's mean colour: zero after normalisation
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Entry:
    """One stored instance. Classes are VOC numbers; place and sizes in pixels."""

    id: str
    drawn_for: int
    classes: list[int]
    top: int
    left: int
    height: int
    width: int
    canvas: list[int]
    file: str
    sha256: list[str]


@dataclass(frozen=True)
class Candidate:
    """What may be drawn: an image of step t-1 (index into the list), or a stored entry."""

    classes: tuple[int, ...]
    image: int | None = None
    entry: int | None = None


class Memory:
    """A stored memory, loaded: packed crops and their labels in channels."""

    def __init__(self, folder: Path, table: np.ndarray):
        """table: uint8 [256] from VOC classes to channels. UserError if the store is damaged."""
        self.folder = folder
        manifest = read_manifest(folder)
        self.instances = manifest["kind"] == "instance"
        self.entries = [Entry(**row) for row in manifest["entries"]]
        self.images, self.labels = [], []
        for entry in self.entries:
            image, label = _read_crop(folder, entry)
            self.images.append(image)
            self.labels.append(table[label])
        self.channel_of = [int(table[entry.drawn_for]) for entry in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def replay(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Entry i on its canvas: image uint8 [3, H, W], label uint8 [H, W] in channels.

        Around an instance the image has ImageNet's mean colour, so that resampling at its border
        mixes with what is zero after normalisation.
        """
        entry, label = self.entries[i], self.labels[i]
        rows = slice(entry.top, entry.top + entry.height)
        columns = slice(entry.left, entry.left + entry.width)
        canvas = np.zeros(entry.canvas, dtype=np.uint8)
        canvas[rows, columns] = label
        image = np.empty((*entry.canvas, 3), dtype=np.uint8)
        image[:] = FILL
        image[rows, columns] = self.filled(i)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(canvas)

    def filled(self, i: int) -> np.ndarray:
        """Crop uint8 [h, w, 3] of entry i, with the mean colour where it shows no class."""
        if not self.instances:
            return self.images[i]
        return np.where(self.labels[i][..., None] > 0, self.images[i], np.uint8(FILL))


def read_manifest(folder: Path) -> dict:
    """The manifest of a stored memory; UserError if it is missing or unreadable."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the memory in {folder} ({error}): remove the folder to draw it anew"
        ) from None


def _read_crop(folder, entry):
    arrays = []
    for suffix, digest in zip(("image", "label"), entry.sha256, strict=True):
        path = folder / f"{entry.file}_{suffix}.png"
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != digest:
            raise UserError(
                f"{path} is missing or was changed: remove {folder} to draw the memory anew"
            )
        with Image.open(path) as image:
            arrays.append(np.array(image))
    return arrays
