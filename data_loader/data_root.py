"""The folder of a data set: lists, files, and the label index. Knows nothing of steps.

The *label index* holds, for each image of a list and each class, the number of pixels and of
4-connected regions. It is built once, in parallel, and cached; every split and every memory draw is
an array operation on it.
"""

import collections
import contextlib
import errno
import hashlib
import io
import os
import posixpath
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from scipy import ndimage
from torch.utils.data import DataLoader, Dataset

from configs.options import DataSet as Description
from utils.checkpoint import write_atomically
from utils.distributed import loader_processes
from utils.errors import UserError
from utils.logging import log, progress
from utils.visualize import VOID, voc_palette

PROJECT = Path(__file__).resolve().parents[1]
SPLITS = ("train", "val")
LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")  # formats that may change a class id
WORTH_PROCESSES = 256  # images of a list, from which it pays to start processes to scan them
PHOTOGRAPH_MODES = ("RGB", "L", "P", "1", "CMYK", "YCbCr", "RGBA", "LA", "PA")  # 8 bits or less


@contextlib.contextmanager
def reading(what: str, path: Path) -> Iterator[None]:
    """Turn whatever keeps this block from reading a file into one line: UserError.

    what: the kind of thing that `path` is, for the message. The operating system, Pillow and its
    decoders raise many kinds of exceptions on a file that is not what it should be (OSError,
    SyntaxError, ValueError, struct.error, DecompressionBombError), so all of them are caught.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, UnidentifiedImageError):
            reason = "it is no image file, or its beginning is damaged"
        else:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"cannot read {what} {path}: {reason or type(error).__name__}") from None


@dataclass(frozen=True)
class ImageList:
    """Images and labels of one list, in the list's order; zero: what id 0 means in the labels."""

    name: str
    ids: list[str]
    images: list[Path]
    labels: list[Path]
    zero: str = "background"


@dataclass(frozen=True)
class LabelIndex:
    """Per image and id: pixels int64 [images, 1 + highest id] and 4-connected regions, the same."""

    pixels: np.ndarray
    regions: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """bool [images, 1 + highest id]: the image shows the class."""
        return self.pixels > 0

    def digest(self, key: str) -> str:
        """A digest of the counts, and of what the files are known by."""
        digest = hashlib.sha256(key.encode())
        for array in (self.pixels, self.regions):
            digest.update(f" {array.dtype.str} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()


class DataRoot:
    """A data set in its folder; without a description, VOC 2012."""

    def __init__(
        self,
        root: str | Path,
        cache_dir: str | Path | None = None,
        description: Description | None = None,
    ):
        """Raises UserError if the folder of the images is not found, or a class has no id in labels."""
        self.set = description or Description()
        for name, id in self.set.classes.items():
            if id > self.set.highest_id:
                raise UserError(
                    f"{self.set.name}: {name} has the id {id}, above its highest_id of "
                    f"{self.set.highest_id}: mend one of them"
                )
        self.root = _find_root(Path(os.path.expanduser(root)), self.set)
        self.cache_dir = Path(cache_dir) if cache_dir else self.root / "label_index"

    def read_lists(self, allow_val_in_train: bool = False) -> dict[str, ImageList]:
        """The lists `train` and `val`.

        Raises UserError as read_list does, and for images that are in both lists, unless
        allow_val_in_train.
        """
        lists = {split: self.read_list(split) for split in SPLITS}
        both = in_both(lists["train"], lists["val"])
        if both and not allow_val_in_train:
            raise UserError(
                f"{len(both)} validation images are in the training list too, {both[0]} first: take "
                "them out of it, or train on what is evaluated with --allow_val_in_train on"
            )
        return lists

    def read_list(self, split: str) -> ImageList:
        """The list of `train` or `val`; all its files exist, none twice.

        Lines are `/JPEGImages/x.jpg /SegmentationClassAug/x.png` or a bare id; blank lines, line ends
        of other systems and a byte order mark are left out. The label of a bare id is where the
        description says; of VOC, in SegmentationClassAug, for val in SegmentationClass (as in the
        release's VOCSegmentationIncremental), or else in the other of the two. Where the description
        names no list, all images are taken, in the order of their names.
        Raises UserError for a list that is missing, empty or no text, for an image or a label that
        stands in it twice, for the label of another image, and for files that are outside the data
        root or cannot be found.
        """
        files = _Folder(self.root)
        path, lines = self._lines(split, files)
        images, labels = zip(*(self._pair(words, path, files, split) for words in lines), strict=True)
        missing = [self.root / f for f in (*images, *labels) if not files.has(f)]
        if missing:
            named = ", ".join(_why_missing(file) for file in missing[:5])
            more = ", ..." if len(missing) > 5 else ""
            raise UserError(
                f"{len(missing)} files named by {path} are missing: {named}{more} (for VOC, "
                "scripts/prepare_voc.py --check says what to mend)"
            )
        _refuse_repeated(images, "images", path)
        _refuse_repeated(labels, "labels", path)
        _refuse_exchanged(images, labels, path)
        names = [posixpath.splitext(file)[0] for file in images]
        counts = collections.Counter(map(posixpath.basename, names))
        ids = [posixpath.basename(name) for name in names]  # with its folders where two have one name
        ids = [
            id if counts[id] == 1 else name.replace("/", "+")
            for id, name in zip(ids, names, strict=True)
        ]
        images, labels = ([self.root / f for f in column] for column in (images, labels))
        return ImageList(split, ids, images, labels, self.set.zero)

    def _lines(self, split, files):
        """The words of each line of a list and its path, or the ids of all images and their folder."""
        listed = getattr(self.set, f"{split}_list")
        if listed is None:
            folder, _, file = getattr(self.set, f"{split}_images").rpartition("/")
            start, end = file.split("{}")
            names = sorted(n for n in files.names_in(folder) if n.startswith(start) and n.endswith(end))
            if not names:
                raise UserError(f"no image {file.replace('{}', '*')} in {self.root / folder}")
            return self.root / folder, [[name[len(start) : len(name) - len(end)]] for name in names]
        path = self.root / listed
        if not path.exists() and (PROJECT / listed).is_file():
            path = PROJECT / listed
        return path, read_lines(path, f"{split} list of {self.set.name}")

    def _pair(self, words, path, files, split):
        """Image and label of a line, relative to the root."""
        if len(words) > 2:
            raise UserError(f"{path}: cannot read the line {' '.join(words)!r}: image and label")
        if len(words) == 2:
            return tuple(self._inside(word, path) for word in words)
        patterns = getattr(self.set, f"{split}_images"), *getattr(self.set, f"{split}_labels")
        image, *labels = (self._inside(pattern.format(words[0]), path) for pattern in patterns)
        return image, next((label for label in labels if files.has(label)), labels[0])

    def _inside(self, name, path):
        """A file that a list names, relative to the root and always written in the same way."""
        name = name.replace("\\", "/").removeprefix(f"{self.root.absolute().as_posix()}/")
        file = posixpath.normpath(name.lstrip("/"))
        if file.split("/")[0] == "..":
            raise UserError(
                f"{path} names {name}, which is outside the data root {self.root}: name files in it"
            )
        return file

    def other_labels(self, images: ImageList) -> ImageList:
        """The images of a list that have a label at another of its paths too, with that label."""
        patterns, files, rows = getattr(self.set, f"{images.name}_labels"), _Folder(self.root), []
        for name, image, label in zip(images.ids, images.images, images.labels, strict=True):
            names = [pattern.format(name) for pattern in patterns]
            others = [file for file in names if self.root / file != label]
            found = next((file for file in others if files.has(file)), None)
            if found and len(others) < len(names):
                rows.append((name, image, self.root / found))
        columns = zip(*rows, strict=True) if rows else ([], [], [])
        return ImageList(f"{images.name}_other", *map(list, columns), self.set.zero)

    def index(self, images: ImageList, workers: int = 0) -> LabelIndex:
        """The label index of a list, from the cache if lists and files are unchanged."""
        key = _fingerprint(images, self.set)
        cached = self.cache_dir / f"{images.name}.npz"
        try:
            with np.load(io.BytesIO(cached.read_bytes())) as stored:
                index = LabelIndex(stored["pixels"], stored["regions"])
                if str(stored["digest"]) == index.digest(key):
                    return index
        except Exception:  # no cache, or a damaged one, which raises many kinds: build it anew
            pass
        index = _scan(images, workers, self.set)
        _store(cached, key, index)
        return index


def in_both(train: ImageList, val: ImageList) -> list[str]:
    """Ids of the images of val that are images of train too, in val's order."""
    shared = {image.with_suffix("") for image in train.images}
    return [
        name for name, image in zip(val.ids, val.images, strict=True) if image.with_suffix("") in shared
    ]


def read_lines(path: Path, what: str) -> list[list[str]]:
    """The words of each line of a list that is not blank; UserError for a file that is no such list.

    what: which list it is, for the message.
    """
    with reading("the list", path):
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except FileNotFoundError:
            raise UserError(
                f"no list {path}: put the {what} there (for VOC, scripts/prepare_voc.py writes it)"
            ) from None
        except UnicodeDecodeError:
            raise UserError(
                f"cannot read the list {path}: it is no text in UTF-8, save it as such"
            ) from None
    lines = [line.split() for line in text.splitlines() if line.strip()]
    strange = next((word for words in lines for word in words if not word.isprintable()), None)
    if strange:
        raise UserError(
            f"the list {path} names {strange[:60]!r}, which has characters that cannot be seen: "
            "save it as plain text in UTF-8"
        )
    if not lines:
        raise UserError(f"the list {path} is empty")
    return lines


def _refuse_repeated(files, what, path):
    names = [posixpath.splitext(file)[0] for file in files]
    counts = collections.Counter(names)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise UserError(
            f"{len(repeated)} {what} stand in the list {path} more than once, "
            f"{posixpath.basename(repeated[0])} first: keep one line of each"
        )


def _refuse_exchanged(images, labels, path):
    """Refuse a list that gives an image the label with another image's name."""
    pairs = [(Path(image).stem, Path(label).stem) for image, label in zip(images, labels, strict=True)]
    known = {name for name, _ in pairs}
    wrong = [(name, other) for name, other in pairs if name != other and other in known]
    if wrong:
        name, other = wrong[0]
        raise UserError(
            f"the list {path} gives {len(wrong)} images the label of another one, {name} that of "
            f"{other} first: pair each image with its own"
        )


def _why_missing(path):
    """A path at which there is no file, with what is there instead, if anything is."""
    if not os.path.lexists(path):
        return str(path)
    target = f"a link to {os.readlink(path)}: " if os.path.islink(path) else ""
    try:
        os.stat(path)
        return f"{path} ({target}not a file)"
    except OSError as error:
        return f"{path} ({target}{error.strerror})"


class _Folder:
    """Which files exist below a root, read one directory at a time."""

    def __init__(self, root):
        self.root, self.names = root, {}

    def has(self, file):
        """Whether a file, named relative to the root, exists; a link whose target is gone does not."""
        folder, _, name = file.rpartition("/")
        return name in self.names_in(folder)

    def names_in(self, folder):
        """Names of the files in a folder below the root; empty if there is none."""
        if folder not in self.names:
            self.names[folder] = self._files(self.root / folder)
        return self.names[folder]

    def _files(self, path):
        with reading("the folder", path):
            try:
                with os.scandir(path) as entries:
                    return {entry.name for entry in entries if _is_file(entry)}
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                    raise
                return set()


def _is_file(entry):
    try:
        return entry.is_file()
    except OSError:  # a link to where one may not look, or to itself
        return False


def _find_root(root, description):
    images = posixpath.dirname(description.train_images)
    with reading("the data root", root):
        for candidate in (root / folder for folder in description.folders):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if stat.S_ISDIR(os.stat(candidate / images).st_mode):
                    return candidate
    what = f"has no {images} folder" if root.is_dir() else "does not exist"
    above = " or ".join(f for f in description.folders if f)
    below = f", or the one that has {above}" if above else ""
    raise UserError(
        f"data root {root} {what}: give the folder of {description.name}{below} (--data_root)"
    )


def _fingerprint(images, description):
    """Place, names, sizes and times of the files, and what is asked of the ids in them.

    st_ctime, the time at which a file's content or attributes changed, cannot be set back as st_mtime
    can, so that a label that was exchanged is noticed even where size and st_mtime are as before.
    """
    asked = f"5 {description.highest_id} {description.zero} {description.palette}"
    digest = hashlib.sha256(f"{asked} {images.images[0].parent.resolve()}".encode())
    for image, label in zip(images.images, images.labels, strict=True):
        digest.update(f"{image.name} {label.parent.name}/{label.name}".encode())
        for path in (image, label):
            with reading("the file", path):
                status = os.stat(path)
            times = (status.st_mtime_ns, status.st_ctime_ns)
            digest.update(b" %d %d %d" % (status.st_size, *times))
    return digest.hexdigest()


def _store(path, key, index):
    """Write the cache; a warning where that cannot be done."""
    arrays = {"digest": index.digest(key), "pixels": index.pixels, "regions": index.regions}
    try:
        write_atomically(path, lambda file: np.savez_compressed(file, **arrays))
    except UserError as error:
        log.warning(
            f"cannot cache the label index ({error}): name a folder for it in "
            "data_loader.args.task.idxs_path"
        )


class Scanner(Dataset):
    """What scan_label counts in each label of a list; UserError where label or photograph is wrong."""

    def __init__(self, images: ImageList, description: Description):
        self.images, self.set = images, description

    def __len__(self):
        return len(self.images.ids)

    def __getitem__(self, i):
        photograph, path = self.images.images[i], self.images.labels[i]
        with reading("the image", photograph), Image.open(photograph) as image:
            size, turned = image.size, orientation(image)
            check_photograph(image, photograph)
        with reading("the label", path), Image.open(path) as image:
            check_label(image, path)
            label = _class_ids(image, path)
            counts = scan_label(label, path, self.set.highest_id)
            if self.set.palette == "voc":
                check_palette(image, path, self.set.highest_id)
        if label.shape != size[::-1]:
            hint = f" (it is shown turned, by its EXIF orientation {turned})" if turned > 1 else ""
            raise UserError(
                f"{photograph} is {size[0]}x{size[1]}{hint} but its label {path} is "
                f"{label.shape[1]}x{label.shape[0]}"
            )
        return counts


def _scan(images, workers, description):
    scanner = Scanner(images, description)
    workers = workers if len(scanner) >= WORTH_PROCESSES else 0
    loader = DataLoader(scanner, batch_size=32, collate_fn=np.stack, **loader_processes(workers))
    rows = np.concatenate(list(progress(loader, f"label index of {images.name}", "batch")))
    return LabelIndex(rows[:, 0], rows[:, 1])


def scan_label(label: np.ndarray, path: Path, highest_id: int) -> np.ndarray:
    """Pixels and 4-connected regions of each id: int64 [2, 1 + highest_id], from a label map uint8
    [H, W]. Of id 0 the regions are not counted.

    Raises UserError for a value between highest_id and 255.
    """
    pixels = np.bincount(label.ravel(), minlength=256)
    wrong = [value for value in np.flatnonzero(pixels) if highest_id < value < VOID]
    if wrong:
        raise UserError(
            f"{path} has class id {wrong[0]}: the labels of this data set are 0..{highest_id} and 255"
        )
    regions = np.zeros(highest_id + 1, dtype=np.int64)
    boxes = ndimage.find_objects(np.where(label == VOID, 0, label), max_label=highest_id)
    for c, box in enumerate(boxes, start=1):
        if box is not None:
            regions[c] = ndimage.label(label[box] == c)[1]
    return np.stack([pixels[: highest_id + 1], regions])


def orientation(image: Image.Image) -> int:
    """How an opened picture is to be turned when it is shown: EXIF's 1 (as stored) to 8."""
    stored = "exif" in image.info or image.format == "TIFF"  # else, asking a PNG would decode it
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) if stored else 1
    return turned if turned in range(1, 9) else 1


def check_photograph(image: Image.Image, path: Path, labelled: bool = True) -> None:
    """Refuse an opened photograph whose pixels, as read_image reads them, are not what one sees.

    Pillow would cut 16-bit values off at 255 and show the colours that lie under transparent pixels.
    A photograph that viewers turn has a label for its pixels as stored or as shown: where the two have
    the same size, nobody can tell. labelled: whether it has a label.
    """
    turned = orientation(image)
    if image.mode not in PHOTOGRAPH_MODES:
        wrong = f"has pixels of mode {image.mode}: save it with 8 bits a channel, in RGB or grey"
    elif getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a JPEG and its previews
        wrong = f"holds {image.n_frames} pictures: save the one that its label belongs to"
    elif labelled and (turned in (2, 3, 4) or (turned > 4 and image.width == image.height)):
        wrong = (
            f"is shown turned or mirrored (EXIF orientation {turned}), and its label may be for either "
            "form: turn its pixels if the label is as shown, and take the EXIF data out"
        )
    elif image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        wrong = "has transparent pixels: save it without"
    else:
        return
    raise UserError(f"the image {path} {wrong}")


def check_label(image: Image.Image, path: Path) -> None:
    """Refuse an opened label in a format whose values, as read_label reads them, may be no ids."""
    depth = image.tile[0][3] if image.format == "PNG" and image.tile else None
    lossy = image.format in LOSSY or image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp")
    if lossy:
        wrong = f"is a {image.format} file, which does not keep class ids as they are: save it as PNG"
    elif (turned := orientation(image)) > 1:
        wrong = f"is shown turned or mirrored (EXIF orientation {turned}): save it as PNG without EXIF"
    elif depth in ("1", "L;2", "L;4"):
        wrong = "has less than 8 bits of grey, which are shades and no class ids: save it with 8 bits"
    elif getattr(image, "n_frames", 1) > 1:
        wrong = f"holds {image.n_frames} pictures: save the one that belongs to its image"
    else:
        return
    raise UserError(f"the label {path} {wrong}")


def check_palette(image: Image.Image, path: Path, highest_id: int) -> None:
    """Refuse a palette label whose colours say other classes than its ids.

    A tool that saves a label anew may renumber its colours: the picture looks the same, and every class
    is wrong. The colours of the ids that occur must be VOC's, or grey levels equal to the ids; a grey
    ramp of all classes and a label without colours are fine as well. Void may have any colour but that
    of a class: it is often white or black.
    """
    palette = np.array(image.getpalette() if image.mode == "P" else [], dtype=int).reshape(-1, 3)
    count = len(palette)
    ramp = palette[: highest_id + 1]
    rises = len(ramp) > highest_id and (np.diff(ramp[:, 0]) > 0).all()
    if not count or (rises and (ramp == ramp[:, :1]).all()):
        return
    colours = voc_palette()[[*range(highest_id + 1), VOID]].astype(int)
    for value in np.flatnonzero(image.histogram()):
        colour = palette[value] if value < count else np.full(3, -255)
        meant = np.flatnonzero((abs(colours - colour) <= 8).all(axis=1))  # tools round differently
        if value == VOID:
            fits = not any(0 < c <= highest_id for c in meant)
        else:
            fits = value in meant or (colour == value).all()
        if not fits:
            shown = f"the colour ({', '.join(map(str, colour))})" if value < count else "no colour"
            other = [*range(highest_id + 1), "void"][meant[0]] if len(meant) else "no id"
            raise UserError(
                f"the label {path} gives class id {value} {shown}, which in VOC's palette means "
                f"{other}: a tool has renumbered it. Use the original file, or save it in grey if the "
                'ids are right; a data set with a palette of its own has "palette": "any" in its '
                "description, data_loader.args.dataset"
            )


def read_image(path: Path) -> torch.Tensor:
    """A photograph: uint8 [3, H, W], channels last in memory; UserError if it cannot be read."""
    with reading("the image", path), Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_label(path: Path, zero: str = "background") -> np.ndarray:
    """A label map of class ids: uint8 [H, W]; UserError for a colour image or a damaged file.

    zero: what id 0 means; where it is void, it becomes 255.

    What is wrong with its ids or colours was found when the label index was built (check_palette).
    """
    with reading("the label", path), Image.open(path) as image:
        label = _class_ids(image, path)
    if zero == "void":
        label[label == 0] = VOID
    return label


def read_checked_label(path: Path, dataset: Description) -> np.ndarray:
    """As read_label, for a label that is in no label index: UserError for what that would refuse."""
    with reading("the label", path), Image.open(path) as image:
        check_label(image, path)
        if dataset.palette == "voc":
            check_palette(image, path, dataset.highest_id)
    return read_label(path, dataset.zero)


def _class_ids(image, path):
    """The pixels of an opened label."""
    if image.mode not in ("P", "L"):
        colour = image.mode in ("RGB", "RGBA", "CMYK", "YCbCr")
        kind = "a colour image" if colour else f"an image of mode {image.mode}"
        raise UserError(
            f"label {path} is {kind}; class ids are needed (palette or grey PNG, 255 for void)"
        )
    return np.array(image)
