"""The instance memory (METHOD 4): draw, store, load.

An entry is an object of old classes without its background: the crop of its image around its visible
classes, black elsewhere, and the label map of that crop, with its place and the size of its canvas. On
request (--surroundings) a margin of the image around it is kept.
On disk that is two PNG files an entry, which a person can open, and one manifest.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from data_loader.data_root import ImageList, LabelIndex, read_image, read_label
from utils.checkpoint import cannot_write, json_digest, write_json
from utils.errors import UserError
from utils.logging import log
from utils.visualize import VOID, label_image

FILL = (124, 116, 104)  # ImageNet's mean colour: zero after normalisation
MANIFEST = "manifest.json"
PARTS = ("image", "label")
# Nobody is told to delete a memory: the instances of the oldest classes exist nowhere else.
DRAW_ANEW = (
    "restore it from a copy, or train that step anew with --overwrite, which draws its memory again "
    "from the step before it, the same one by the same seed"
)


@dataclass(frozen=True)
class Entry:
    """One stored instance. Classes are ids as in label maps; place and sizes in pixels."""

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


class Memory:
    """A stored memory, loaded: crops and their labels in channels."""

    def __init__(self, folder: Path, table: np.ndarray):
        """table: uint8 [256] from classes to channels. UserError if the store is damaged."""
        self.folder = folder
        manifest = read_manifest(folder)
        self.digest = manifest["sha256"]
        # instances without anything around them
        self.alone = manifest.get("kind") == "instance" and not manifest.get("surroundings")
        self.entries = manifest["entries"]
        self.images, self.labels = [], []
        for entry in self.entries:
            image, label = _read_crop(folder, entry)
            self.images.append(image)
            self.labels.append(table[label])
        self.drawn_for = [int(table[entry.drawn_for]) for entry in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def replay(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Entry i on its canvas: image uint8 [3, H, W], label uint8 [H, W] in channels.

        Around what is stored the image has ImageNet's mean colour, so that resampling at its border
        mixes with what is zero after normalisation.
        """
        entry, label = self.entries[i], self.labels[i]
        rows = slice(entry.top, entry.top + entry.height)
        columns = slice(entry.left, entry.left + entry.width)
        canvas = np.zeros(entry.canvas, dtype=np.uint8)
        canvas[rows, columns] = label
        image = np.empty((*entry.canvas, 3), dtype=np.uint8)
        image[:] = FILL
        shown = label[..., None] > 0 if self.alone else True
        image[rows, columns] = np.where(shown, self.images[i], np.uint8(FILL))
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(canvas)


def read_manifest(folder: Path) -> dict:
    """The manifest of a stored memory, entries as Entry, with the digest of all of it as `sha256`.

    Raises UserError if it is missing, damaged, or was changed by another program.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        stored = manifest.pop("sha256", None)
        manifest["sha256"] = json_digest(manifest)
        if stored is not None and stored != manifest["sha256"]:
            raise ValueError("its digest differs")
        if stored is None:
            log.warning(f"{folder / MANIFEST} has no digest, as former versions wrote it: not checked")
        entries = [Entry(**row) for row in manifest["entries"]]
        for entry in entries:
            _check_entry(entry)
        return {**manifest, "entries": entries}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"cannot read the memory in {folder} ({error}): {DRAW_ANEW}") from None


def _check_entry(entry):
    """Raise ValueError for an entry that no memory can have."""
    if not entry.file or Path(entry.file).name != entry.file or len(entry.sha256) != len(PARTS):
        raise ValueError(f"an entry names the file {entry.file!r}")
    place = [entry.top, entry.left, entry.height, entry.width, *entry.canvas]
    numbers = [entry.drawn_for, *entry.classes, *place]
    if not all(type(n) is int and n >= 0 for n in numbers) or len(entry.canvas) != 2:
        raise ValueError(f"the entry {entry.file} has numbers that are none")
    if max(entry.drawn_for, *entry.classes) >= VOID:
        raise ValueError(f"the entry {entry.file} is of a class that no label map has")
    if entry.top + entry.height > entry.canvas[0] or entry.left + entry.width > entry.canvas[1]:
        raise ValueError(f"the entry {entry.file} does not fit on its canvas")


def _read_crop(folder, entry):
    """Image uint8 [h, w, 3] and label uint8 [h, w] of an entry, as stored."""
    image, label = (np.array(Image.open(io.BytesIO(data))) for data in _read_files(folder, entry))
    if label.shape != (entry.height, entry.width) or image.shape != (*label.shape, 3):
        raise UserError(f"the entry {entry.file} in {folder} has another size than stored: {DRAW_ANEW}")
    return image, label


def _read_files(folder, entry):
    """The bytes of an entry's two files; UserError unless they are those of the manifest."""
    files = []
    for part, digest in zip(PARTS, entry.sha256, strict=True):
        path = folder / f"{entry.file}_{part}.png"
        files.append(path.read_bytes() if path.is_file() else b"")
        if hashlib.sha256(files[-1]).hexdigest() != digest:
            raise UserError(f"{path} is missing or was changed since it was stored: {DRAW_ANEW}")
    return files


@dataclass(frozen=True)
class Source:
    """Where a memory is drawn from: the training images of step t-1, and the memory before it.

    chosen: indices of those images in the list; visible: the classes whose labels they show;
    previous: folder of the memory of step t-1, None where there is none; names: of all classes.
    seen: gives, for each of those images, further classes that count for it as a candidate, though they
    are not labelled (DKD-M).
    """

    files: ImageList
    index: LabelIndex
    chosen: np.ndarray
    visible: tuple[int, ...]
    previous: Path | None
    names: dict[int, str]
    seen: Callable[[], list[set[int]]] | None = None


def draw_memory(
    folder: Path,
    source: Source,
    old_classes: tuple[int, ...],
    kind: str,
    budget: int,
    seed: int,
    surroundings: float = 0.0,
    anew: bool = False,
) -> Path:
    """Draw a memory beside `folder`, where `put_in_place` can take it from; returns where it is.

    kind: "instance" (crops without background) or "image" (whole images). surroundings: the margin
    around an instance, as a share of its box. Where the folder has the memory already, nothing is
    drawn, unless it is to be drawn anew. Raises UserError where it holds another memory, or the
    previous memory is of another kind, has other surroundings or is damaged.
    """
    settings = {"kind": kind, "budget": budget, "seed": seed, "classes": list(old_classes)}
    settings["surroundings"] = surroundings if kind == "instance" else 0.0
    if (folder / MANIFEST).is_file() and not anew:
        manifest = {"surroundings": 0.0, **read_manifest(folder)}  # which former versions did not write
        changed = [key for key, value in settings.items() if manifest.get(key) != value]
        if not changed:
            return folder
        raise UserError(
            f"{folder} holds a memory drawn with another {', '.join(changed)}: choose another --name, "
            "or --overwrite the step"
        )
    images, entries = candidates(source, kind, settings["surroundings"])
    shown = [*(classes for _, classes in images), *(tuple(e.classes) for e in entries)]
    lists = balanced_draw(shown, old_classes, budget, np.random.default_rng((seed, len(old_classes))))
    _report({source.names[c]: len(picks) for c, picks in lists.items()}, budget)

    drawn = beside(folder)
    stored = []
    try:
        shutil.rmtree(drawn, ignore_errors=True)
        drawn.mkdir(parents=True)
        for c, picks in lists.items():
            for pick in picks:
                name = f"{len(stored):03d}"
                if pick < len(images):
                    i, classes = images[pick]
                    stored.append(_store(drawn, name, source, i, classes, c, settings))
                else:
                    entry = entries[pick - len(images)]
                    stored.append(_carry(drawn, name, source.previous, entry, c))
    except OSError as error:
        raise cannot_write(drawn, error) from None
    numbers = {source.names[c]: [k for k, e in enumerate(stored) if e.drawn_for == c] for c in lists}
    manifest = {**settings, "lists": numbers, "entries": [asdict(entry) for entry in stored]}
    manifest["sha256"] = json_digest(manifest)
    write_json(drawn / MANIFEST, manifest)
    return drawn


def beside(folder: Path) -> Path:
    """Where what takes the place of a folder (memory, pseudo labels) is made, until it is complete."""
    return folder.with_name(f"{folder.name}.unfinished")


def put_in_place(folder: Path) -> None:
    """Bring what was made beside a folder there; a kill in between leaves none."""
    try:
        remove_memory(folder)
        os.replace(beside(folder), folder)
    except OSError as error:
        raise cannot_write(folder, error) from None


def remove_memory(folder: Path) -> None:
    """Remove the memory in a folder, if it has one."""
    with contextlib.suppress(OSError):
        (folder / MANIFEST).unlink()  # without it, what is left is no memory
    shutil.rmtree(folder, ignore_errors=True)


def candidates(
    source: Source, kind: str, surroundings: float = 0.0
) -> tuple[list[tuple[int, tuple[int, ...]]], list[Entry]]:
    """What may be drawn: (image, the classes that count for it) of step t-1, and the stored entries.

    Instances need every visible class of the image to be one connected region.
    """
    visible = np.array(source.visible)
    seen = source.seen() if source.seen else [set()] * len(source.chosen)
    images = []
    for i, further in zip(source.chosen, seen, strict=True):
        shown = source.index.pixels[i, visible] > 0
        if kind == "instance" and (source.index.regions[i, visible][shown] != 1).any():
            continue
        labelled = [int(c) for c in visible[shown]]
        images.append((int(i), (*labelled, *sorted(further - set(labelled)))))
    if source.previous is None:
        return images, []
    return images, stored_entries(source.previous, kind, surroundings)


def read_memory(folder: Path) -> dict:
    """The manifest of a stored memory, as read_manifest; UserError if any of its files is damaged."""
    manifest = read_manifest(folder)
    for entry in manifest["entries"]:
        _read_files(folder, entry)
    return manifest


def stored_entries(folder: Path, kind: str, surroundings: float = 0.0) -> list[Entry]:
    """The entries of a memory; UserError if it is damaged or was stored otherwise."""
    manifest = read_memory(folder)
    if manifest.get("kind") != kind:
        raise UserError(
            f"the memory in {folder} is of kind {manifest.get('kind')}, this step needs {kind}: train "
            "all steps with the same --replay"
        )
    stored = manifest.get("surroundings", 0.0)
    if stored != surroundings:
        raise UserError(
            f"the memory in {folder} has surroundings of {stored}, this step needs {surroundings}: "
            "train all steps with the same --surroundings"
        )
    return manifest["entries"]


def balanced_draw(
    shown: list[tuple[int, ...]], classes: tuple[int, ...], budget: int, generator: np.random.Generator
) -> dict[int, list[int]]:
    """Class-balanced draw of at most `budget` candidates: class -> indices into `shown`.

    The classes, shuffled, take turns; in its turn a class takes one random remaining candidate that
    shows it. A class without one leaves the round; the draw ends when all have left.
    """
    lists = {c: [] for c in classes}
    remaining = {c: [i for i, s in enumerate(shown) if c in s] for c in classes}
    taken: set[int] = set()
    waiting = [classes[i] for i in generator.permutation(len(classes))]
    while waiting and len(taken) < budget:
        c = waiting.pop(0)
        remaining[c] = [i for i in remaining[c] if i not in taken]
        if remaining[c]:
            pick = remaining[c][generator.integers(len(remaining[c]))]
            lists[c].append(pick)
            taken.add(pick)
            waiting.append(c)
    return lists


def _report(counts, budget):
    """Write to the log how many entries were drawn for each class, by its name."""
    text = ", ".join(f"{name} {count}" for name, count in counts.items())
    total = sum(counts.values())
    log.info(f"memory: {total} entries ({text})")
    if total < budget:
        log.warning(f"only {total} of {budget} entries: the candidates ran out ({text})")
    empty = [name for name, count in counts.items() if not count]
    if empty and budget >= len(counts):
        log.warning(f"no entry at all for {', '.join(empty)}: no candidate was left that shows one")


def _store(folder, name, source, i, classes, drawn_for, settings) -> Entry:
    """Write image i of the list as an entry, with the labels that are visible."""
    files = source.files
    image = read_image(files.images[i]).permute(1, 2, 0).numpy()
    label = read_label(files.labels[i], files.zero)
    canvas = list(label.shape)
    keep = np.isin(label, source.visible)
    box = (slice(None), slice(None))
    if settings["kind"] == "instance":
        box = _with_margin(bounding_box(keep), settings["surroundings"])
    image, label, keep = image[box], label[box], keep[box]
    top, left = (part.start or 0 for part in box)
    if settings["kind"] == "instance" and not settings["surroundings"]:
        image, label = image * keep[..., None], label * keep
    else:
        label = np.where(keep | (label == VOID), label, 0).astype(np.uint8)
    file = f"{name}_{files.ids[i]}"
    Image.fromarray(np.ascontiguousarray(image)).save(folder / f"{file}_image.png")
    label_image(label).save(folder / f"{file}_label.png")
    written = [folder / f"{file}_{part}.png" for part in PARTS]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in written]
    height, width = label.shape
    return Entry(
        files.ids[i], drawn_for, list(classes), top, left, height, width, canvas, file, digests
    )


def bounding_box(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the smallest box around the true pixels of a mask [H, W]; there are some."""
    return ndimage.find_objects(mask.astype(np.uint8))[0]


def _with_margin(box, share):
    """A box enlarged on each side by a share of its height and width, as far as there is an image."""
    margins = (int(share * (part.stop - part.start)) for part in box)
    return tuple(
        slice(max(part.start - margin, 0), part.stop + margin)
        for part, margin in zip(box, margins, strict=True)
    )


def _carry(folder, name, previous, entry, drawn_for) -> Entry:
    """Copy an entry of the memory before, so that this memory stands alone."""
    file = f"{name}_{entry.id}"
    for part, data in zip(PARTS, _read_files(previous, entry), strict=True):
        (folder / f"{file}_{part}.png").write_bytes(data)
    return replace(entry, file=file, drawn_for=drawn_for)
