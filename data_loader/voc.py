"""The VOC 2012 folder: lists, files, and the label index. Knows nothing of steps.

The *label index* holds, for each image of a list and each class, the number of pixels and of
4-connected regions. It is built once, in parallel, and cached; every split and every memory draw is
an array operation on it.
"""

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data_loader.tasks import NUM_CLASSES
from utils.errors import UserError
from utils.logging import log
from utils.visualize import VOID

LABEL_FOLDERS = ("SegmentationClassAug", "SegmentationClass")
LISTS = {"train": "train_aug.txt", "val": "val.txt"}


@dataclass(frozen=True)
class ImageList:
    """Images and labels of one list, in the list's order."""

    name: str
    ids: list[str]
    images: list[Path]
    labels: list[Path]


@dataclass(frozen=True)
class LabelIndex:
    """Per image and VOC class: pixels int64 [images, 21] and 4-connected regions, the same."""

    pixels: np.ndarray
    regions: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """bool [images, 21]: the image shows the class."""
        return self.pixels > 0


class VOC2012:
    """A VOC2012 folder, or the VOCdevkit above it."""

    def __init__(self, root: str | Path, cache_dir: str | Path | None = None):
        self.root = _find_root(Path(root).expanduser())
        self.cache_dir = Path(cache_dir) if cache_dir else self.root / "label_index"

    def read_list(self, split: str) -> ImageList:
        """The list of `train` (train_aug.txt) or `val` (val.txt); all its files exist.

        Lines are `/JPEGImages/x.jpg /SegmentationClassAug/x.png` or a bare id. The label of a bare id
        is in SegmentationClassAug, for val in SegmentationClass (as in the release's
        VOCSegmentationIncremental), or else in the other of the two.
        Raises UserError for a missing or empty list, or files that it names and that are missing.
        """
        path = self.root / "ImageSets" / "Segmentation" / LISTS[split]
        if not path.is_file():
            raise UserError(f"no list {path}: put the {split} list of VOC 2012 there")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the list {path}: {error}") from None
        lines = [line.split() for line in text.splitlines() if line.strip()]
        if not lines:
            raise UserError(f"the list {path} is empty")
        files = _Folder(self.root)
        images, labels = zip(*(self._pair(words, path, files, split) for words in lines), strict=True)
        missing = [str(self.root / f) for f in (*images, *labels) if not files.has(f)]
        if missing:
            more = ", ..." if len(missing) > 5 else ""
            raise UserError(
                f"{len(missing)} files named by {path} are missing: {', '.join(missing[:5])}{more}"
            )
        images, labels = ([self.root / f for f in column] for column in (images, labels))
        return ImageList(split, [f.stem for f in images], images, labels)

    def _pair(self, words, path, files, split):
        """Image and label of a line, relative to the root."""
        if len(words) == 2:
            return tuple(word.lstrip("/") for word in words)
        if len(words) > 2:
            raise UserError(f"{path}: cannot read the line {' '.join(words)!r}: image and label")
        first, other = (f"{f}/{words[0]}.png" for f in LABEL_FOLDERS[:: -1 if split == "val" else 1])
        label = other if files.has(other) and not files.has(first) else first
        return f"JPEGImages/{words[0]}.jpg", label

    def other_labels(self, images: ImageList) -> ImageList:
        """The images of a list that have a label in the other label folder too, with that label."""
        files, rows = _Folder(self.root), []
        for i, label in enumerate(images.labels):
            if label.parent.name in LABEL_FOLDERS:
                other = LABEL_FOLDERS[1 - LABEL_FOLDERS.index(label.parent.name)]
                if files.has(f"{other}/{label.name}"):
                    rows.append((images.ids[i], images.images[i], self.root / other / label.name))
        columns = zip(*rows, strict=True) if rows else ([], [], [])
        return ImageList(f"{images.name}_other", *map(list, columns))

    def index(self, images: ImageList, workers: int = 0) -> LabelIndex:
        """The label index of a list, from the cache if lists and files are unchanged."""
        key = _fingerprint(images)
        cached = self.cache_dir / f"{images.name}.npz"
        try:
            with np.load(io.BytesIO(cached.read_bytes())) as stored:
                if str(stored["key"]) == key:
                    return LabelIndex(stored["pixels"], stored["regions"])
        except Exception:  # no cache, or a damaged one, which raises many kinds: build it anew
            pass
        index = _scan(images, workers)
        _store(cached, key, index)
        return index


class _Folder:
    """Which files exist below a root, read one directory at a time."""

    def __init__(self, root):
        self.root, self.names = root, {}

    def has(self, file):
        """Whether a file, named relative to the root, exists."""
        folder, _, name = file.rpartition("/")
        if folder not in self.names:
            path = self.root / folder
            self.names[folder] = set(os.listdir(path)) if path.is_dir() else set()
        return name in self.names[folder]


def _find_root(root):
    for candidate in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (candidate / "JPEGImages").is_dir():
            return candidate
    what = "has no JPEGImages folder" if root.is_dir() else "does not exist"
    raise UserError(
        f"data root {root} {what}: give the VOC2012 folder or the VOCdevkit above it (--data_root)"
    )


def _fingerprint(images):
    """Place, names, sizes and times of the files."""
    digest = hashlib.sha256(f"2 {images.images[0].parent.resolve()}".encode())
    for image, label in zip(images.images, images.labels, strict=True):
        status = os.stat(image), os.stat(label)
        digest.update(f"{image.name} {label.parent.name}/{label.name}".encode())
        digest.update(b"".join(b" %d %d" % (s.st_size, s.st_mtime_ns) for s in status))
    return digest.hexdigest()


def _store(path, key, index):
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez_compressed(file, key=key, pixels=index.pixels, regions=index.regions)
        os.replace(temporary, path)
    except OSError as error:
        log.warning(
            f"cannot cache the label index in {path.parent} ({error.strerror}): name a folder for it "
            "in data_loader.args.task.idxs_path"
        )


class _Scanner(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images.ids)

    def __getitem__(self, i):
        with open_image(self.images.images[i]) as image:
            size = image.size
        label = read_label(self.images.labels[i])
        if label.shape != size[::-1]:
            raise UserError(
                f"{self.images.images[i]} is {size[0]}x{size[1]} but its label "
                f"{self.images.labels[i]} is {label.shape[1]}x{label.shape[0]}"
            )
        return scan_label(label, self.images.labels[i])


def _scan(images, workers):
    loader = DataLoader(_Scanner(images), batch_size=32, num_workers=workers, collate_fn=np.stack)
    bar = tqdm(loader, desc=f"label index of {images.name}", unit="batch", disable=None)
    rows = np.concatenate(list(bar))
    return LabelIndex(rows[:, 0], rows[:, 1])


def scan_label(label: np.ndarray, path: Path) -> np.ndarray:
    """Pixels and 4-connected regions of each class: int64 [2, 21], from a label map uint8 [H, W].

    Raises UserError for a value that is no class of VOC.
    """
    pixels = np.bincount(label.ravel(), minlength=256)
    wrong = [value for value in np.flatnonzero(pixels) if NUM_CLASSES < value < VOID]
    if wrong:
        raise UserError(f"{path} has class id {wrong[0]}: VOC labels are 0..20 and 255")
    regions = np.zeros(NUM_CLASSES + 1, dtype=np.int64)
    boxes = ndimage.find_objects(np.where(label == VOID, 0, label), max_label=NUM_CLASSES)
    for c, box in enumerate(boxes, start=1):
        if box is not None:
            regions[c] = ndimage.label(label[box] == c)[1]
    return np.stack([pixels[: NUM_CLASSES + 1], regions])


def open_image(path: Path) -> Image.Image:
    """An image file, opened but not decoded; UserError if it is no image."""
    try:
        return Image.open(path)
    except OSError as error:
        raise UserError(f"cannot read the image {path}: {error}") from None


def read_image(path: Path) -> torch.Tensor:
    """A photograph: uint8 [3, H, W], channels last in memory."""
    with open_image(path) as image:
        try:
            pixels = np.array(image.convert("RGB"))
        except OSError as error:
            raise UserError(f"cannot read the image {path}: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_label(path: Path) -> np.ndarray:
    """A label map of VOC classes: uint8 [H, W]; UserError for a colour image or a damaged file."""
    with open_image(path) as image:
        if image.mode not in ("P", "L"):
            colour = image.mode in ("RGB", "RGBA", "CMYK", "YCbCr")
            kind = "a colour image" if colour else f"an image of mode {image.mode}"
            raise UserError(
                f"label {path} is {kind}; class ids are needed (palette or grey PNG, 0..20 and 255)"
            )
        try:
            return np.array(image)
        except (OSError, SyntaxError) as error:
            raise UserError(f"cannot read the label {path}: {error}") from None
