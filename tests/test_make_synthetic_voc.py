"""The synthetic VOC2012-format data set: same pixels everywhere, right format, right content."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from scripts import make_synthetic_voc as script
from scripts.make_synthetic_voc import TRAIN, VAL, main, make_synthetic_voc, render
from tests.helpers import code_of
from utils.errors import UserError
from utils.visualize import voc_palette

PINNED = {
    (0, TRAIN, 0, 128): "b8a083021d5fe37e3eb677053a32767bfd28cf0e85e5c527747fc38044a7cc53",
    (0, VAL, 5, 128): "9f682ae3f3c587a7bbe32937d6813fdc73b9b70956329144d6f4e96d9296b1b3",
    (7, TRAIN, 1234, 96): "f12ff731d221ced84b85bb326c09112e7ea9cf3786303cba71c1a4eaad97c23c",
    (2**40, VAL, 21, 300): "0a29fca47b1016213e49579b7d073a547aa20c31b07f2c0eeff0bead38cf24a6",
}


@pytest.fixture(scope="module")
def labels() -> list[np.ndarray]:
    """Labels of the first 200 training images: uint8 [H, W] each."""
    return [render(0, TRAIN, index, 128)[1] for index in range(200)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 6 training and 3 validation images at size 64, seed 5."""
    return make_synthetic_voc(tmp_path_factory.mktemp("synthetic"), 6, 3, 64, 5)


def objects(labels: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Masks, bool [H, W], one for each class of each image."""
    for label in labels:
        yield from (label == class_id for class_id in classes(label))


def classes(label: np.ndarray) -> set[int]:
    """Class ids in a label, without background and void."""
    return set(np.unique(label).tolist()) - {0, 255}


def large_pieces(mask: np.ndarray) -> int:
    """How many 4-connected pieces of at least 20 pixels a mask, bool [H, W], has."""
    return int(np.sum(np.bincount(ndimage.label(mask)[0][mask]) >= 20))


def pairs(root: Path, name: str) -> list[tuple[Path, Path]]:
    """Image and label paths of a list."""
    lines = (root / f"ImageSets/Segmentation/{name}.txt").read_text().splitlines()
    return [tuple(Path(f"{root}{part}") for part in line.split(" ")) for line in lines]


@pytest.mark.parametrize("arguments", PINNED)
def test_pixels_are_the_pinned_ones(arguments: tuple[int, int, int, int]) -> None:
    digest = hashlib.sha256()
    for array in render(*arguments):
        digest.update(repr((array.shape, str(array.dtype))).encode() + array.tobytes())
    assert digest.hexdigest() == PINNED[arguments]


def test_an_image_does_not_depend_on_how_many_are_made(root: Path, tmp_path: Path) -> None:
    fewer = make_synthetic_voc(tmp_path / "fewer", train=2, val=1, size=64, seed=5)
    made = [path.relative_to(fewer) for path in fewer.rglob("*.*g")]
    assert len(made) == 6
    assert all((fewer / path).read_bytes() == (root / path).read_bytes() for path in made)


def test_lists_name_the_files_in_voc_form(root: Path) -> None:
    train = (root / "ImageSets/Segmentation/train_aug.txt").read_text().splitlines()
    assert train[1] == "/JPEGImages/2007_000001.jpg /SegmentationClassAug/2007_000001.png"
    assert len(set(train)) == 6
    val = pairs(root, "val")
    assert [image.stem for image, _ in val] == ["2008_000000", "2008_000001", "2008_000002"]
    listed = {path for name in ("train_aug", "val") for pair in pairs(root, name) for path in pair}
    assert listed == set(root.rglob("*.jpg")) | set(root.rglob("*.png"))


def test_files_hold_what_was_rendered(root: Path) -> None:
    for split, name in ((TRAIN, "train_aug"), (VAL, "val")):
        for index, (jpeg, png) in enumerate(pairs(root, name)):
            image, label = render(5, split, index, 64)
            with Image.open(jpeg) as photo, Image.open(png) as mask:
                assert (photo.format, photo.mode) == ("JPEG", "RGB")
                assert (mask.format, mask.mode) == ("PNG", "P")
                assert photo.size == mask.size
                assert np.array_equal(np.asarray(mask), label)
                assert np.abs(np.asarray(photo, float) - image).mean() < 12


def test_palette_is_the_voc_colour_map(root: Path) -> None:
    with Image.open(pairs(root, "train_aug")[0][1]) as mask:
        palette = np.array(mask.getpalette()).reshape(-1, 3)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    for index, colour in (known | {255: (224, 224, 192)}).items():
        assert tuple(palette[index]) == colour
    assert len(np.unique(palette, axis=0)) == 256


def test_all_classes_are_there_about_equally_often(labels: list[np.ndarray]) -> None:
    assert set().union(*map(classes, labels[:100])) == set(range(1, 21))
    counts = np.bincount([c for label in labels for c in classes(label)], minlength=21)[1:]
    assert counts.min() >= 10 and counts.max() < 2.5 * counts.min()


def test_sizes_are_those_asked_for_and_several(labels: list[np.ndarray]) -> None:
    shapes = {label.shape for label in labels}
    assert {max(shape) for shape in shapes} == {128, 144, 160}
    assert len(shapes) >= 10
    assert {np.sign(height - width) for height, width in shapes} == {-1, 0, 1}


def test_one_and_several_classes_an_image(labels: list[np.ndarray]) -> None:
    numbers = np.bincount([len(classes(label)) for label in labels], minlength=5)
    assert numbers[0] == 0 and numbers[5:].sum() == 0
    assert (numbers[1:] >= 10).all()


def test_some_objects_are_cut_by_the_edge_and_some_are_in_pieces(labels: list[np.ndarray]) -> None:
    masks = list(objects(labels))
    cut = [mask[0].any() or mask[-1].any() or mask[:, [0, -1]].any() for mask in masks]
    pieces = [large_pieces(mask) for mask in masks]
    assert 0.2 < np.mean(cut) < 0.8
    assert 0.1 < np.mean(np.array(pieces) > 1) < 0.4
    alone = [mask for label in labels if len(classes(label)) == 1 for mask in objects([label])]
    assert np.mean([large_pieces(mask) > 1 for mask in alone]) > 0.07


@pytest.mark.parametrize(("size", "steps"), [(128, 1), (256, 2)])
def test_void_lies_between_all_ids_and_nowhere_else(size: int, steps: int) -> None:
    plus = ndimage.generate_binary_structure(2, 1)
    for index in range(10):
        label = render(2, TRAIN, index, size)[1]
        for ids in (label, label.T):
            one, other = ids[1:], ids[:-1]
            assert ((one == other) | (one == 255) | (other == 255)).all()
        inside = ndimage.binary_erosion(label == 255, plus, iterations=steps + 1)
        assert 0.005 < np.mean(label == 255) < 0.15
        assert inside.sum() < 0.02 * np.sum(label == 255)


def test_a_folder_with_something_in_it_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "note.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert code_of(lambda: main(["--output", str(tmp_path), "--train", "1", "--val", "1"])) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(tmp_path) in message and "new folder" in message
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "note.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("flag", "value"), [("--train", "-1"), ("--val", "-3"), ("--size", "31"), ("--seed", "-1")]
)
def test_impossible_values_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    assert code_of(lambda: main(["--output", str(tmp_path / "new"), flag, value])) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and flag in message and value in message
    assert not (tmp_path / "new").exists()


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, script.__file__, "--output", str(tmp_path / "a" / "b")]
    command += ["--train", "2", "--val", "1", "--size", "32", "--seed", "9"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path}/a/b: 2 training and 1 validation images\n"
    assert done.stderr == ""
    assert len(list(tmp_path.rglob("*.jpg"))) == 3
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "not empty" in again.stderr


def test_other_numbers_of_classes(tmp_path: Path) -> None:
    root = make_synthetic_voc(tmp_path / "many", train=150, val=0, size=64, classes=150)
    shown = set()
    for _, label in pairs(root, "train_aug"):
        shown |= classes(np.array(Image.open(label)))
    assert max(shown) > 140 and len(shown) > 100


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with label maps and no photographs."""
    root = make_synthetic_voc(tmp_path_factory.mktemp("real"), 8, 4, 96, 2)
    for path in (root / "JPEGImages").iterdir():
        path.unlink()
    return root


@pytest.fixture(scope="module")
def painted(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_synthetic_voc(tmp_path_factory.mktemp("painted"), 5, 4, 64, 1, labels=real)


class TestPainting:
    """Label maps of a VOC root, painted; here those of synthetic images."""

    def test_labels_are_those_of_the_root_at_the_new_size(self, real: Path, painted: Path) -> None:
        expected = []
        for _, path in pairs(real, "val"):
            label = Image.open(path)
            scale = 64 / max(label.size)
            size = [int(side * scale + 0.5) for side in label.size]
            expected.append(np.array(label.resize(size, Image.Resampling.NEAREST)))
        found = [np.array(Image.open(label)) for _, label in pairs(painted, "val")]
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_a_list_that_names_its_labels_has_these(self, real: Path) -> None:
        """Whatever lies in the folder that a bare id would mean."""
        other = real / "SegmentationClass"
        other.mkdir()
        named = [label for _, label in pairs(real, "val")]
        try:
            for path in named:
                (other / path.name).write_bytes(path.read_bytes())
            assert script.label_files(real, "val") == named
        finally:
            for path in other.iterdir():
                path.unlink()
            other.rmdir()

    def test_what_is_drawn_is_different_labels_of_the_list(self, real: Path, painted: Path) -> None:
        labels = [path.read_bytes() for path in sorted((painted / "SegmentationClassAug").iterdir())]
        assert len(pairs(painted, "train_aug")) == 5 and len(set(labels)) == 9

    def test_it_is_the_same_again_and_another_with_another_seed(
        self, real: Path, painted: Path, tmp_path: Path
    ) -> None:
        def pixels(root):
            return [path.read_bytes() for path in sorted((root / "JPEGImages").iterdir())]

        assert pixels(make_synthetic_voc(tmp_path / "a", 5, 4, 64, 1, labels=real)) == pixels(painted)
        assert pixels(make_synthetic_voc(tmp_path / "b", 5, 4, 64, 2, labels=real)) != pixels(painted)

    def test_objects_have_their_colours_and_void_is_painted(self, painted: Path) -> None:
        for image, label in pairs(painted, "train_aug"):
            colours, label = np.array(Image.open(image)).astype(int), np.array(Image.open(label))
            saturation = np.ptp(colours, axis=-1)
            objects = ndimage.binary_erosion((label > 0) & (label < 255), iterations=2)
            assert saturation[objects].mean() > saturation[label == 0].mean() + 40

    def test_a_label_that_training_would_refuse_is_refused(self, real: Path, tmp_path: Path) -> None:
        shutil.copytree(real, tmp_path / "real")
        for path in (tmp_path / "real/SegmentationClassAug").iterdir():
            label = Image.open(path)
            label.putpalette(voc_palette()[::-1].ravel().tolist())
            label.save(path)
        with pytest.raises(UserError, match="a tool has renumbered it"):
            make_synthetic_voc(tmp_path / "new", 5, 4, 64, 1, labels=tmp_path / "real")

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--train", "9"], "--train must be at most 8"),
            (["--classes", "7"], "not be given with --labels"),
        ],
    )
    def test_bad_input_is_one_line(self, real: Path, tmp_path: Path, capsys, flags, message) -> None:
        flags = ["--output", str(tmp_path / "new"), "--labels", str(real), "--val", "2", *flags]
        assert code_of(lambda: main(["--train", "2", *flags])) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

    def test_a_root_without_lists_is_one_line(self, tmp_path: Path, capsys) -> None:
        flags = ["--output", str(tmp_path / "new"), "--labels", str(tmp_path / "nowhere")]
        assert code_of(lambda: main(flags)) == 2
        assert "no list" in capsys.readouterr().err
