"""From the archives that people download to the VOC 2012 folder that training reads, and a check of it.

python scripts/prepare_voc.py --root data/VOC2012 --archives ~/Downloads
python scripts/prepare_voc.py --root data/VOC2012 --check

--archives names a folder with VOCtrainval_11-May-2012.tar and with the labels of SBD, which are either
SegmentationClassAug.zip or SBD's own benchmark.tgz; each may be unpacked already. Without --archives,
what is missing is downloaded into ROOT/archives. A file that is there is not overwritten, so that a run
that was stopped goes on with the same command. (Labels in colour are converted; the originals are kept
in ROOT/labels_in_colour.) The exit code is 0 if training can start, and 2 if not.
"""

import collections
import functools
import io
import os
import re
import shlex
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils.program

import numpy as np
from PIL import Image
from scipy.io import loadmat
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import SBDataset
from torchvision.datasets.utils import download_url
from torchvision.datasets.voc import DATASET_YEAR_DICT
from tqdm import tqdm

from data_loader.data_loaders import cores
from data_loader.data_root import (
    SPLITS,
    WORTH_PROCESSES,
    DataRoot,
    ImageList,
    Scanner,
    read_image,
    read_lines,
    reading,
)
from utils.checkpoint import locked, write_atomically
from utils.config import Parser
from utils.distributed import loader_processes
from utils.errors import UserError
from utils.visualize import VOID, label_image, voc_palette

AUGMENTED, PLAIN, LISTS = "SegmentationClassAug", "SegmentationClass", "ImageSets/Segmentation"
VOC = {key: DATASET_YEAR_DICT["2012"][key] for key in ("filename", "url", "md5")}
SBD = {key: getattr(SBDataset, key) for key in ("filename", "url", "md5")}
# Archives and unpacked folders are known by their names, the files in them by the ends of their paths.
SOURCE = re.compile("VOC|SegmentationClass|benchmark|dataset|SBD|cls|JPEGImages|ImageSets", re.I)
ARCHIVE_ENDS = (".tar", ".tar.gz", ".tgz", ".zip")
VOC_FILE = re.compile(
    r"(?:^|/)(JPEGImages/\d{4}_\d{6}\.jpg|SegmentationClass(?:Aug)?/\d{4}_\d{6}\.png"
    r"|ImageSets/Segmentation/\w+\.txt)$"
)
OTHER_YEAR = re.compile(r"(?:^|/)VOC(?!2012/)\d{4}/")  # whose lists are others by the same names
SBD_FILE = re.compile(r"(?:^|/)cls/(\d{4}_\d{6})\.mat$")


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    write_atomically(path, lambda file: file.write(data))


def as_png(label: np.ndarray) -> bytes:
    """A label map uint8 [H, W] as a PNG file with VOC's palette."""
    file = io.BytesIO()
    label_image(label).save(file, "PNG")
    return file.getvalue()


def sbd_label(data: bytes, name: str) -> bytes:
    """The class ids in one of SBD's .mat files as a palette PNG; UserError if there are none in it."""
    with reading("the label", name):
        ids = loadmat(io.BytesIO(data))["GTcls"]["Segmentation"][0, 0]
        return as_png(np.ascontiguousarray(ids, dtype=np.uint8))


def without_colours(data: bytes, name: str) -> bytes:
    """A label that is a colour image as a palette PNG; the file as it is if it is of another mode.

    Raises UserError for a colour that is not exactly that of a class or of void.
    """
    with reading("the label", name), Image.open(io.BytesIO(data)) as image:
        if image.mode not in ("RGB", "RGBA"):
            return data
        pixels = np.array(image.convert("RGB"))
    as_number = np.array([1 << 16, 1 << 8, 1])
    known, unknown = [*range(21), VOID], 21
    ids = np.full(1 << 24, unknown, dtype=np.uint8)
    ids[voc_palette()[known] @ as_number] = known
    label = ids[pixels @ as_number]
    if (label == unknown).any():
        row, column = np.argwhere(label == unknown)[0]
        colour = tuple(pixels[row, column].tolist())
        raise UserError(
            f"the label {name} is a colour image, and its colour {colour}, in row {row} and column "
            f"{column}, is no class of VOC: take the original file"
        )
    return as_png(label)


def find_sources(folder: Path) -> list[Path]:
    """The archives and unpacked folders of VOC and SBD that lie in a folder, by their names."""
    found = sorted(path for path in folder.glob("*") if SOURCE.match(path.name))
    return [path for path in found if path.is_dir() or path.name.lower().endswith(ARCHIVE_ENDS)]


def members(source: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Each file of an archive or of an unpacked folder: its name there, and what reads it.

    A reader is to be called before the next member is asked for. Raises UserError as safe_name does.
    """
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if path.is_file())
        for path in tqdm(paths, desc=source.name, unit="file", disable=None):
            yield path.relative_to(source).as_posix(), path.read_bytes
        return
    bar = {"total": source.stat().st_size, "desc": source.name, "disable": None}
    with open(source, "rb") as file, tqdm.wrapattr(file, "read", **bar) as watched:
        if source.suffix.lower() == ".zip":
            with zipfile.ZipFile(watched) as archive:
                for entry in archive.infolist():
                    name = safe_name(entry.filename, source)
                    if not entry.is_dir():
                        yield name, functools.partial(archive.read, entry)
            return
        with tarfile.open(fileobj=watched) as archive:
            for entry in archive:
                name = safe_name(entry.name, source)
                if entry.isfile():  # links lead to other members, if not out of the archive
                    yield name, archive.extractfile(entry).read
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("its end is missing")  # which tarfile does not ask for


def safe_name(name: str, source: Path) -> str:
    """The name of an archive's member, with slashes; UserError if it leads out of the archive.

    Nothing is ever written under such a name (see VOC_FILE), but who packed it meant no good.
    """
    parts = name.replace("\\", "/").split("/")
    if not parts[0] or ".." in parts or ":" in parts[0]:
        raise UserError(
            f"the archive {source} has a member {name!r}, which would be written outside the folder of "
            "the archive: it is not the original one, fetch that"
        )
    return "/".join(parts)


def take(source: Path, home: Path, sbd: bool) -> None:
    """Write the files of a source that the VOC folder `home` lacks: SBD's labels, or else VOC's files.

    Raises UserError for an archive that is damaged, incomplete or unsafe, and for a label that is none.
    """
    taken, top = 0, source.name if source.is_dir() else source.name.split(".")[0]
    try:
        for name, read in members(source):
            found = (SBD_FILE if sbd else VOC_FILE).search(f"{top}/{name}")
            if not found or OTHER_YEAR.search(f"{top}/{name}"):
                continue
            target = home / (f"{AUGMENTED}/{found[1]}.png" if sbd else found[1])
            if target.exists():
                continue
            data = read()
            if target.suffix == ".png":
                data = (sbd_label if sbd else without_colours)(data, f"{name} of {source}")
            write(target, data)
            taken += 1
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as error:
        raise UserError(
            f"the archive {source} is damaged or not complete ({error}): fetch it again, and run the "
            "same command; what was unpacked of it is kept"
        ) from None
    if taken:
        print(f"{source}: {taken:,} files taken")


def unpack(sources: list[Path], home: Path) -> None:
    """Fill the VOC folder `home` from all sources; what is there already stays as it is.

    Labels that VOC has drawn itself, with a void border, go before those of SBD.
    """
    for source in sources:
        take(source, home, sbd=False)
    for path in sorted((home / PLAIN).glob("[0-9]*.png")):
        copy = home / AUGMENTED / path.name
        if not copy.exists():
            write(copy, without_colours(path.read_bytes(), str(path)))
    if val_ids(home):  # else VOC's own labels are still to come
        for source in sources:
            take(source, home, sbd=True)


def listed(home: Path, name: str) -> set[str]:
    """The ids in a list of the VOC folder; none if there is no such list."""
    path = home / LISTS / name
    lines = read_lines(path, f"list {name}") if path.is_file() else []
    return {PurePosixPath(words[0]).stem for words in lines}


def labelled(home: Path, folder: str = AUGMENTED) -> set[str]:
    """The ids of the images that have a label in a folder."""
    return {path.stem for path in (home / folder).glob("[0-9]*.png")}


def val_ids(home: Path) -> set[str]:
    """The ids of VOC's validation images; none if its lists are missing."""
    return listed(home, "val.txt") or listed(home, "trainval.txt") - listed(home, "train.txt")


def lacking(home: Path) -> list[dict]:
    """Those of the two archives of which the VOC folder has nothing."""
    of_voc = labelled(home, PLAIN) | val_ids(home) | listed(home, "train.txt")
    no_voc = not val_ids(home) or not any((home / "JPEGImages").glob("[0-9]*.jpg"))
    return [VOC] * no_voc + [SBD] * (not labelled(home) - of_voc)


def download(archive: dict, folder: Path) -> None:
    """Download an archive from where torchvision has it; its name is given to what has its checksum."""
    unfinished = folder / f".{archive['filename']}.unfinished"
    download_url(archive["url"], str(folder), unfinished.name, archive["md5"])
    os.replace(unfinished, folder / archive["filename"])


def fill(root: Path, home: Path, archives: Path | None) -> None:
    """Unpack what the VOC folder lacks, or download it first; UserError where that cannot be done."""
    folder = archives or root / "archives"
    beside = [
        path for path in find_sources(home.parent) if path.name in (AUGMENTED, "benchmark_RELEASE")
    ]
    unpack([*find_sources(folder), *find_sources(root), *beside], home)
    missing = lacking(home)
    for i, archive in enumerate(missing):
        names = " and ".join(
            ("SegmentationClassAug.zip or else SBD's " if a is SBD else "")
            + f"{a['filename']} ({a['url']})"
            for a in missing[i:]
        )
        advice = f"put {names} into {folder} and run the same command again"
        if archives:
            raise UserError(f"{archives} has not all that is needed: {advice}")
        try:
            download(archive, folder)
        except Exception as error:  # no net, no such page, a wrong checksum: many kinds
            raise UserError(f"cannot download {archive['filename']} ({error}): {advice}") from None
    if missing:
        unpack(find_sources(folder), home)


def mend_colours(home: Path) -> None:
    """Convert the labels of the VOC folder that are colour images, and keep the originals elsewhere."""
    for folder in (AUGMENTED, PLAIN):
        mended = 0
        paths = sorted((home / folder).glob("[0-9]*.png"))
        for path in tqdm(paths, desc=f"modes of {folder}", unit="file", disable=None):
            data = path.read_bytes()
            if data[25:26] not in (b"\2", b"\6"):  # the colour type of a PNG: neither RGB nor RGBA
                continue
            label = without_colours(data, str(path))
            write(home / "labels_in_colour" / folder / path.name, data)
            write(path, label)
            mended += 1
        if mended:
            print(f"{home / folder}: {mended:,} labels in colour converted, kept in labels_in_colour")


def write_lists(home: Path) -> None:
    """Write val.txt and train_aug.txt, which has all labelled images but those of val, if missing."""
    val = val_ids(home)
    pairs = {f"/JPEGImages/{name}.jpg /{AUGMENTED}/{name}.png" for name in labelled(home) - val}
    for path, lines in ((home / LISTS / "val.txt", val), (home / LISTS / "train_aug.txt", pairs)):
        if not path.exists():
            write(path, "".join(f"{line}\n" for line in sorted(lines)).encode())
            print(f"{path}: written, {len(lines):,} images")


def prepare(root: Path, archives: Path | None) -> None:
    """Bring a data root into VOC's layout, taking from the folder `archives` what it lacks.

    Without `archives` it is ROOT/archives, into which what is missing is downloaded. Raises UserError
    if an archive is missing, damaged or unsafe, or a label cannot be read.
    """
    try:
        home = DataRoot(root).root
    except UserError:  # nothing is there yet
        home = root
    with locked(home, f"another prepare_voc.py is at work in {home}"):
        for left in home.rglob(".*.unfinished"):  # of a run that was killed while it wrote them
            left.unlink()
        try:
            DataRoot(home).read_lists(allow_val_in_train=True)
        except UserError:  # a list, or a file that a list names, is missing
            fill(root, home, archives)
        mend_colours(home)
        write_lists(home)


class Inspection(Dataset):
    """For each image: the pixels of each class and the mode of its label, or what is wrong with it."""

    def __init__(self, images: ImageList, scanner: Scanner):
        self.images, self.scanner = images, scanner

    def __len__(self):
        return len(self.images.ids)

    def __getitem__(self, i) -> tuple[np.ndarray, str, None] | tuple[None, None, str]:
        try:
            pixels = self.scanner[i][0]
            read_image(self.images.images[i])
            with Image.open(self.images.labels[i]) as label:
                return pixels, label.mode, None
        except UserError as error:
            return None, None, str(error)


def by_kind(problems: list[str]) -> list[str]:
    """One line for problems that differ in nothing but paths and numbers."""
    kinds = collections.defaultdict(list)
    for problem in problems:
        kinds[re.sub(r"\S*[/\\]\S*|\d+", "", problem)].append(problem)
    return [
        same[0] + (f" (and {len(same) - 1:,} more like it)" if len(same) > 1 else "")
        for same in kinds.values()
    ]


def check(root: Path) -> bool:
    """Print a report on a data root; returns whether training can start. Writes nothing."""
    data, lists, results, problems, notes = DataRoot(root), {}, [], [], []
    print(f"\n{data.root}")
    for split, whole in zip(SPLITS, data.set.whole, strict=True):
        try:
            images = lists[split] = data.read_list(split)
        except UserError as error:
            problems.append(str(error))
            continue
        count, name = len(images.ids), Path(getattr(data.set, f"{split}_list")).name
        print(f"  {name:<14}{count:>7,} images of {whole:,}")
        if count != whole:
            notes.append(
                f"{name} has {count:,} lines instead of {whole:,}, so that results cannot be compared "
                "with published ones; if that is not meant, delete it, and this script, with "
                "--archives, takes what is missing and writes it anew"
            )
        inspection = Inspection(images, Scanner(images, data.set))
        processes = loader_processes(cores() if len(inspection) >= WORTH_PROCESSES else 0)
        loader = DataLoader(inspection, batch_size=32, collate_fn=list, **processes)
        for batch in tqdm(loader, desc=f"check of {name}", unit="batch", disable=None):
            results += batch
    if len(lists) == len(SPLITS):
        try:
            data.read_lists()
        except UserError as error:
            problems.append(f"{error}; or delete the list, and this script writes it")
    wrong = [problem for _, _, problem in results if problem]
    good = [(pixels, mode) for pixels, mode, problem in results if not problem]
    modes = collections.Counter(mode for _, mode in good)
    print(
        f"  labels        {modes['P']:>7,} in palette mode, {modes['L']:,} grey, {len(wrong):,} wrong"
    )
    if good:
        seen = sum(pixels for pixels, _ in good)
        unseen = ", ".join(name for name, c in data.set.classes.items() if not seen[c])
        notes += [f"no label shows {unseen}"] if unseen else []
    problems += by_kind(wrong)
    for line in [f"note: {note}" for note in notes] + [f"problem: {line}" for line in problems[:8]]:
        print(line)
    if len(problems) > 8:
        print(f"problem: and {len(problems) - 8} more kinds of them")
    if wrong:
        print("Without --check, this script takes files that you delete from the archives again, and")
        print("converts labels that are images in VOC's colours.")
    return not problems


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = Parser(None, __doc__)
    parser.add_argument(
        "--root",
        type=utils.program.a_path,
        required=True,
        help="the VOC 2012 folder, made if it does not exist",
    )
    parser.add_argument(
        "--archives", type=utils.program.a_path, help="folder of the archives (ROOT/archives)"
    )
    parser.add_argument("--check", action="store_true", help="check only: nothing is written")
    args = parser.parse_args(argv)
    root, archives = args.root, args.archives
    try:
        if archives and not archives.is_dir():
            raise UserError(f"--archives {archives} is no folder")
        if not args.check:
            prepare(root, archives)
        if not check(root):
            raise UserError("training cannot start: the report names what to mend")
    except KeyboardInterrupt:
        raise UserError("interrupted: the same command goes on where it was") from None
    quoted = shlex.quote(str(root))
    print(f"Training can start: python train_voc.py -c configs/config_voc.json --data_root {quoted}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
