"""The VOC folder: lists, files, and the label index against a plain flood fill."""

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from data_loader import data_root
from data_loader.data_root import (
    DataRoot,
    Description,
    check_photograph,
    read_image,
    read_label,
    scan_label,
)
from tests.helpers import PROJECT
from utils.errors import UserError
from utils.visualize import voc_palette


def count_by_hand(label: np.ndarray) -> tuple[list[int], list[int]]:
    """Pixels and 4-connected regions of each class, pixel by pixel."""
    rows = label.tolist()
    height, width = label.shape
    pixels, regions = [0] * 21, [0] * 21
    visited = set()
    for y in range(height):
        for x in range(width):
            value = rows[y][x]
            if value == 255:
                continue
            pixels[value] += 1
            if value == 0 or (y, x) in visited:
                continue
            regions[value] += 1
            stack = [(y, x)]
            while stack:
                i, j = stack.pop()
                inside = 0 <= i < height and 0 <= j < width
                if inside and rows[i][j] == value and (i, j) not in visited:
                    visited.add((i, j))
                    stack += [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
    return pixels, regions


def label_files(root: Path, name: str) -> list[Path]:
    lines = (root / f"ImageSets/Segmentation/{name}.txt").read_text().splitlines()
    return [root / line.split()[1].lstrip("/") for line in lines]


def save_label(path: Path, label: np.ndarray) -> None:
    Image.fromarray(label.astype(np.uint8)).save(path)


def png(width: int, depth: int, rows: list[bytes], palette: bytes | None = None) -> bytes:
    """A PNG of grey values, or of palette indices, with `depth` bits for each pixel."""

    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBB", width, len(rows), depth, 0 if palette is None else 3) + bytes(3)
    colours = chunk(b"PLTE", palette) if palette else b""
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + colours + pixels + chunk(b"IEND", b"")


LABELS = arrays(
    np.uint8,
    array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.sampled_from([0, 1, 2, 20, 255]),
)


@settings(deadline=None, max_examples=200)
@example(np.array([[3, 0], [0, 3]], np.uint8))  # diagonal neighbours are two regions
@example(np.array([[3, 255, 3]], np.uint8))  # void does not join two parts
@given(LABELS)
def test_scan_counts_pixels_and_regions_like_a_flood_fill(label):
    pixels, regions = scan_label(label, Path("x.png"), 20)
    assert (pixels.tolist(), regions.tolist()) == count_by_hand(label)


@pytest.mark.parametrize(("split", "name"), [("train", "train_aug"), ("val", "val")])
@pytest.mark.parametrize("workers", [0, 2])
def test_index_of_a_root_equals_a_reading_of_its_label_maps(
    voc_root, tmp_path, monkeypatch, split, name, workers
):
    monkeypatch.setattr(data_root, "WORTH_PROCESSES", 1)
    data = DataRoot(voc_root, tmp_path)
    images = data.read_list(split)
    index = data.index(images, workers)
    assert images.labels == label_files(voc_root, name)
    expected = [count_by_hand(np.array(Image.open(path))) for path in images.labels]
    assert index.pixels.tolist() == [pixels for pixels, _ in expected]
    assert index.regions.tolist() == [regions for _, regions in expected]
    assert index.present.tolist() == [[n > 0 for n in pixels] for pixels, _ in expected]


class TestCache:
    """What is unchanged is not scanned again; what changed is."""

    @pytest.fixture
    def no_scan(self, monkeypatch):
        def forbid():
            def fail(*_):
                raise AssertionError("label maps were scanned")

            monkeypatch.setattr(data_root, "_scan", fail)

        return forbid

    @staticmethod
    def read(root, cache=None):
        data = DataRoot(root, cache)
        return data.index(data.read_list("val"))

    def test_unchanged_root_is_not_scanned_again(self, own_root, no_scan):
        first = self.read(own_root)
        no_scan()
        again = self.read(own_root)
        assert np.array_equal(first.pixels, again.pixels)
        assert np.array_equal(first.regions, again.regions)

    def test_the_cache_lies_in_the_folder_that_was_named(self, own_root, tmp_path, no_scan):
        self.read(own_root, tmp_path / "cache")
        assert not (own_root / "label_index").exists()
        no_scan()
        self.read(own_root, tmp_path / "cache")

    def test_changed_label_is_scanned_again(self, own_root):
        path = label_files(own_root, "val")[4]
        before = self.read(own_root)
        label = np.array(Image.open(path))
        label[:] = 0
        label[2:5, 3:9] = 20
        save_label(path, label)
        after = self.read(own_root)
        assert after.pixels[4].tolist() == count_by_hand(label)[0]
        assert np.array_equal(np.delete(after.pixels, 4, 0), np.delete(before.pixels, 4, 0))

    def test_label_changed_in_nothing_but_its_pixels_is_scanned_again(self, own_root):
        path = label_files(own_root, "val")[4]
        label = np.array(Image.open(path))
        label[:] = 1
        Image.fromarray(label).save(path, compress_level=0)
        times = os.stat(path)
        assert self.read(own_root).pixels[4, 1] == label.size
        label[:] = 2
        Image.fromarray(label).save(path, compress_level=0)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert (os.stat(path).st_size, os.stat(path).st_mtime_ns) == (times.st_size, times.st_mtime_ns)
        assert self.read(own_root).pixels[4, 2] == label.size

    def test_changed_list_is_scanned_again(self, own_root):
        path = own_root / "ImageSets/Segmentation/val.txt"
        before = self.read(own_root)
        path.write_text("\n".join(reversed(path.read_text().splitlines())))
        assert np.array_equal(self.read(own_root).pixels, before.pixels[::-1])
        path.write_text("\n".join(path.read_text().splitlines()[:3]))
        assert len(self.read(own_root).pixels) == 3

    def test_same_lists_of_another_root_are_scanned(self, own_root, voc_root, tmp_path, no_scan):
        self.read(voc_root, tmp_path / "cache")
        no_scan()
        with pytest.raises(AssertionError, match="scanned"):
            self.read(own_root, tmp_path / "cache")

    @pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "flipped"])
    def test_damaged_cache_is_built_anew(self, own_root, damage):
        before = self.read(own_root)
        path = own_root / "label_index" / "val.npz"
        data = path.read_bytes()
        middle = len(data) // 2
        path.write_bytes(
            {
                "empty": b"",
                "cut": data[:middle],
                "garbage": b"no archive" * 20,
                "flipped": data[: middle - 9] + bytes(b ^ 255 for b in data[middle - 9 : middle])
                + data[middle:],
            }[damage]
        )  # fmt: skip
        assert np.array_equal(self.read(own_root).pixels, before.pixels)

    @pytest.mark.parametrize("name", ["pixels", "regions", "digest"])
    def test_forged_cache_is_built_anew(self, own_root, name):
        before = self.read(own_root)
        path = own_root / "label_index" / "val.npz"
        with np.load(path) as stored:
            content = dict(stored)
        if name == "digest":
            content["pixels"] = content["pixels"][::-1]
            content["digest"] = np.array("0" * 64)
        else:
            content[name][2, 3] += 1
        np.savez_compressed(path, **content)
        after = self.read(own_root)
        assert np.array_equal(after.pixels, before.pixels)
        assert np.array_equal(after.regions, before.regions)

    def test_one_that_is_built_while_another_is_stored_does_not_disturb_it(self, own_root, monkeypatch):
        replace, waiting = os.replace, [True]

        def build_another_first(source, target):
            if waiting:
                waiting.clear()
                self.read(own_root)
            replace(source, target)

        monkeypatch.setattr(data_root.os, "replace", build_another_first)
        index = self.read(own_root)
        assert [path.name for path in (own_root / "label_index").iterdir()] == ["val.npz"]
        assert np.array_equal(index.pixels, self.read(own_root).pixels)

    def test_two_processes_build_one_index_at_the_same_time(self, own_root, no_scan):
        script = [sys.executable, "scripts/show_splits.py", "--data_root", str(own_root), "--json"]
        both = [
            subprocess.Popen(script, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(2)
        ]
        outputs = [process.communicate(timeout=300)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0]
        assert outputs[0] == outputs[1] and outputs[0]
        files = sorted(path.name for path in (own_root / "label_index").iterdir())
        assert files == ["train.npz", "val.npz"]
        no_scan()
        self.read(own_root)

    def test_a_disk_that_is_full_only_warns_and_leaves_nothing(self, own_root, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        warnings = []
        monkeypatch.setattr(data_root.log, "warning", warnings.append)
        monkeypatch.setattr(data_root.np, "savez_compressed", full)
        assert len(self.read(own_root).pixels) == 20
        assert len(warnings) == 1 and "No space left on device" in warnings[0]
        assert not list((own_root / "label_index").iterdir())

    def test_unwritable_cache_folder_only_warns(self, own_root, tmp_path, monkeypatch):
        warnings = []
        monkeypatch.setattr(data_root.log, "warning", warnings.append)
        blocked = tmp_path / "a_file"
        blocked.write_text("")
        index = self.read(own_root, blocked)
        assert len(index.pixels) == 20
        assert len(warnings) == 1 and "data_loader.args.task.idxs_path" in warnings[0]
        assert blocked.read_text() == ""


class TestLists:
    def test_bare_ids_name_the_same_files_as_pairs_of_paths(self, own_root):
        path = own_root / "ImageSets/Segmentation/val.txt"
        pairs = DataRoot(own_root).read_list("val")
        path.write_text("\n".join(f" {i} " for i in pairs.ids) + "\n\n")
        assert DataRoot(own_root).read_list("val") == pairs
        assert DataRoot(own_root).other_labels(pairs).ids == []

    @pytest.mark.parametrize(
        ("split", "name", "first"),
        [("train", "train_aug", "SegmentationClassAug"), ("val", "val", "SegmentationClass")],
    )
    def test_a_bare_id_has_its_label_in_one_of_two_folders(self, own_root, split, name, first):
        """In the split's own folder, else in the other one; what the other one has too is known."""
        path = own_root / f"ImageSets/Segmentation/{name}.txt"
        ids = DataRoot(own_root).read_list(split).ids
        path.write_text("\n".join(ids))
        augmented, plain = own_root / "SegmentationClassAug", own_root / "SegmentationClass"
        plain.mkdir()
        (augmented / f"{ids[0]}.png").rename(plain / f"{ids[0]}.png")
        (plain / f"{ids[1]}.png").write_bytes((augmented / f"{ids[1]}.png").read_bytes())
        images = DataRoot(own_root).read_list(split)
        assert images.labels[0] == plain / f"{ids[0]}.png"
        assert images.labels[1] == own_root / first / f"{ids[1]}.png"
        assert images.labels[2] == augmented / f"{ids[2]}.png"
        others = DataRoot(own_root).other_labels(images)
        assert others.ids == [ids[1]] and others.labels[0].parent in (augmented, plain)
        assert others.labels[0] != images.labels[1]

    @pytest.mark.parametrize("above", [".", "VOC2012", "VOCdevkit/VOC2012"])
    def test_the_root_may_be_the_folder_or_the_devkit_above_it(self, own_root, tmp_path, above):
        target = tmp_path / "top" / above
        target.parent.mkdir(parents=True, exist_ok=True)
        own_root.rename(target)
        assert len(DataRoot(tmp_path / "top").read_list("val").ids) == 20

    def test_roots_that_are_none(self, tmp_path):
        with pytest.raises(UserError, match=r"nowhere does not exist: .*--data_root"):
            DataRoot(tmp_path / "nowhere")
        with pytest.raises(UserError, match="has no JPEGImages"):
            DataRoot(tmp_path)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (None, r"no list .*val\.txt"),
            (b"\n", "is empty"),
            (b"a b c\n", "cannot read the line 'a b c'"),
            (b"\xff\xfe\x00", r"cannot read the list .*val\.txt"),
        ],
    )
    def test_lists_that_are_none(self, own_root, content, words):
        path = own_root / "ImageSets/Segmentation/val.txt"
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            DataRoot(own_root).read_list("val")

    def test_missing_files_are_counted_and_the_first_five_named(self, own_root):
        images = DataRoot(own_root).read_list("train")
        gone = [*images.images[3:7], *images.labels[10:13]]
        for path in gone:
            path.unlink()
        with pytest.raises(UserError) as refused:
            DataRoot(own_root).read_list("train")
        message = str(refused.value)
        assert message.startswith("7 files")
        assert all(str(path) in message for path in gone[:5])
        assert not any(str(path) in message for path in gone[5:])


class TestFiles:
    """Files that are not what the format says."""

    @staticmethod
    def refusal(root):
        data = DataRoot(root)
        with pytest.raises(UserError) as refused:
            data.index(data.read_list("train"))
        assert "\n" not in str(refused.value)
        assert not (root / "label_index" / "train.npz").exists()
        return str(refused.value)

    def test_colour_label(self, own_root):
        path = label_files(own_root, "train_aug")[40]
        Image.open(path).convert("RGB").save(path)
        message = self.refusal(own_root)
        assert message.startswith(f"label {path} is a colour image")

    def test_label_of_another_size_than_its_image(self, own_root):
        path = label_files(own_root, "train_aug")[2]
        width, height = Image.open(path).size
        save_label(path, np.zeros((height, width + 1)))
        message = self.refusal(own_root)
        assert f"is {width}x{height} but its label {path} is {width + 1}x{height}" in message

    @pytest.mark.parametrize("value", [21, 254])
    def test_class_id_above_20(self, own_root, value):
        path = label_files(own_root, "train_aug")[2]
        label = np.array(Image.open(path))
        label[0, 0] = value
        save_label(path, label)
        assert self.refusal(own_root).startswith(f"{path} has class id {value}")

    @pytest.mark.parametrize("keep", [0, 60, 0.9])
    def test_torn_label(self, own_root, keep):
        path = label_files(own_root, "train_aug")[2]
        data = path.read_bytes()
        path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
        assert str(path) in self.refusal(own_root)

    @pytest.mark.parametrize("keep", [0, 0.7])
    def test_torn_photograph(self, own_root, keep):
        path = DataRoot(own_root).read_list("train").images[0]
        data = path.read_bytes()
        path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
        with pytest.raises(UserError, match=f"cannot read the image {path}"):
            read_image(path)

    @pytest.mark.parametrize("pixels", [400_000_000, 90_000 * 90_000])
    def test_a_picture_above_pillows_limit_of_size(self, own_root, pixels):
        path = label_files(own_root, "train_aug")[2]
        path.write_bytes(png(pixels // 20_000, 8, [b""] * 20_000))
        assert self.refusal(own_root).startswith(f"cannot read the label {path}: Image size (")

    @pytest.mark.parametrize("kind", ["image", "label"])
    @pytest.mark.parametrize("damage", ["gone", "folder", "forbidden", "short header", "no image"])
    def test_a_file_that_cannot_be_read_in_training_is_one_line(
        self, own_root, monkeypatch, kind, damage
    ):
        images = DataRoot(own_root).read_list("train")
        path = {"image": images.images[0], "label": images.labels[0]}[kind]
        data = path.read_bytes()
        path.unlink()
        if damage == "folder":
            path.mkdir()
        elif damage == "short header":
            path.write_bytes(png(9, 8, [bytes(9)])[:21])
        elif damage == "no image":
            path.write_bytes(data[::-1])
        elif damage == "forbidden":

            def forbid(path):
                raise PermissionError(13, "Permission denied", str(path))

            monkeypatch.setattr(data_root.Image, "open", forbid)
        with pytest.raises(UserError) as refused:
            {"image": read_image, "label": read_label}[kind](path)
        message = str(refused.value)
        assert message.startswith(f"cannot read the {kind} {path}: ") and "\n" not in message
        assert message.count(str(path)) == 1


def palette(**changes: tuple[int, int, int]) -> np.ndarray:
    """VOC's palette with other colours for some ids (id_3=(1, 2, 3))."""
    colours = voc_palette()
    for name, colour in changes.items():
        colours[int(name[3:])] = colour
    return colours


class TestLabelFormats:
    """Forms in which one label map may come: read as it is, or refused when the index is built."""

    LABEL = np.zeros((48, 64), np.uint8)
    LABEL[4:20, 5:30], LABEL[24:40, 5:30], LABEL[24:40, 40:60], LABEL[:3] = 1, 15, 20, 255

    def scan(self, root, write):
        """Write the label with write(path) and build the index; the label's path."""
        data = DataRoot(root)
        images = data.read_list("val")
        path = images.labels[5]
        Image.new("RGB", self.LABEL.shape[::-1]).save(images.images[5])
        write(path)
        index = data.index(images)
        assert index.pixels[5].tolist() == count_by_hand(self.LABEL)[0]
        assert np.array_equal(read_label(path), self.LABEL)
        return path

    def refusal(self, root, write):
        with pytest.raises(UserError) as refused:
            self.scan(root, write)
        message = str(refused.value)
        assert "\n" not in message and DataRoot(root).read_list("val").labels[5].name in message
        return message

    def coloured(self, colours):
        """The label with a palette: uint8 [n, 3]."""
        image = Image.fromarray(self.LABEL)
        image.putpalette(np.asarray(colours, np.uint8).ravel().tolist())
        return image

    @pytest.mark.parametrize(
        "colours",
        {
            "voc": voc_palette(),
            "rounded": np.maximum(voc_palette(), 1) - 1,
            "void is white": palette(id_255=(255, 255, 255)),
            "void is black": palette(id_255=(0, 0, 0)),
            "void has no colour": voc_palette()[:21],
            "classes that do not occur": palette(id_2=(9, 9, 200), id_3=(0, 128, 0)),
            "grey": np.arange(256)[:, None].repeat(3, 1),
            "grey ramp": (np.arange(21) * 255 // 20)[:, None].repeat(3, 1),
        }.items(),
        ids=lambda item: item[0],
    )
    def test_palettes_that_mean_the_ids(self, own_root, colours):
        self.scan(own_root, self.coloured(colours[1]).save)

    def test_grey_and_palette_without_colours(self, own_root):
        self.scan(own_root, Image.fromarray(self.LABEL).save)
        rows = [row.tobytes() for row in self.LABEL]
        self.scan(own_root, lambda path: path.write_bytes(png(64, 8, rows, b"")))

    @pytest.mark.parametrize(
        "tool",
        [
            lambda image: image.convert("RGB").quantize(256),
            lambda image: image.convert("RGB").quantize(8),
            lambda image: image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE),
            lambda image: image.remap_palette([0, 15, 1, 20, 255]),
        ],
    )
    def test_a_palette_that_an_image_tool_renumbered(self, own_root, tool):
        def write(path):
            image = self.coloured(voc_palette())
            again = tool(image)
            assert np.array_equal(np.array(again.convert("RGB")), np.array(image.convert("RGB")))
            again.save(path)

        assert "a tool has renumbered it" in self.refusal(own_root, write)

    def test_a_grey_label_that_an_image_tool_made_a_palette_of(self, own_root):
        write = Image.fromarray(self.LABEL).quantize().save
        assert "a tool has renumbered it" in self.refusal(own_root, write)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            (
                {"id_15": (0, 128, 0)},
                "class id 15 the colour (0, 128, 0), which in VOC's palette means 2",
            ),
            (
                {"id_15": (1, 2, 200)},
                "class id 15 the colour (1, 2, 200), which in VOC's palette means no id",
            ),
            (
                {"id_0": (224, 224, 192)},
                "class id 0 the colour (224, 224, 192), which in VOC's palette means void",
            ),
            (
                {"id_255": (192, 128, 128)},
                "id 255 the colour (192, 128, 128), which in VOC's palette means 15",
            ),
            ({"id_15": (1, 1, 1)}, "class id 15 the colour (1, 1, 1), which in VOC's palette means 0"),
        ],
    )
    def test_the_contradiction_is_named(self, own_root, changes, words):
        assert words in self.refusal(own_root, self.coloured(palette(**changes)).save)

    def test_a_cache_that_was_made_without_looking_at_colours_is_not_enough(self, own_root):
        data = DataRoot(own_root, description=Description(palette="any"))
        images = data.read_list("val")
        Image.new("RGB", self.LABEL.shape[::-1]).save(images.images[5])
        self.coloured(palette(id_15=(0, 128, 0))).save(images.labels[5])
        data.index(images)
        with pytest.raises(UserError, match="means 2"):
            DataRoot(own_root).index(images)

    def test_a_class_without_a_colour(self, own_root):
        message = self.refusal(own_root, self.coloured(voc_palette()[:18]).save)
        assert "class id 20 no colour" in message

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16", "1", "PA"])
    def test_pixels_that_are_no_ids(self, own_root, mode):
        image = Image.fromarray(self.LABEL)
        if mode == "I;16":
            image = Image.fromarray(self.LABEL.astype(np.uint16))
        elif mode != "PA":
            image = image.convert(mode)
        else:
            image = image.convert("P").convert("PA")

        def write(path):
            image.save(path, "TIFF" if mode == "PA" else "PNG")

        self.refusal(own_root, write)

    @pytest.mark.parametrize("depth", [1, 2, 4])
    def test_grey_of_less_than_8_bits_is_shades(self, own_root, depth):
        data = png(64, depth, [b"\x01" * (64 * depth // 8)] * 48)
        message = self.refusal(own_root, lambda path: path.write_bytes(data))
        assert "less than 8 bits of grey" in message

    @pytest.mark.parametrize("bits", [1, 2, 4])
    def test_palette_indices_of_less_than_8_bits_are_ids(self, own_root, bits):
        path = label_files(own_root, "val")[5]
        label = np.array(Image.open(path)) % 2
        image = Image.fromarray(label)
        image.putpalette(voc_palette()[: 2**bits].ravel().tolist())
        image.save(path, bits=bits)
        data = DataRoot(own_root)
        pixels = data.index(data.read_list("val")).pixels[5]
        assert pixels[:2].tolist() == np.bincount(label.ravel(), minlength=2).tolist()

    @pytest.mark.parametrize("kind", ["JPEG", "MPO", "JPEG2000"])
    def test_a_format_that_changes_pixels(self, own_root, kind):
        def write(path):
            Image.fromarray(self.LABEL).save(path, kind)

        assert "does not keep class ids" in self.refusal(own_root, write)

    def test_a_tiff_that_is_compressed_as_a_jpeg_is(self, own_root):
        def write(path):
            Image.fromarray(self.LABEL).save(path, "TIFF", compression="jpeg")

        assert "does not keep class ids" in self.refusal(own_root, write)

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_a_label_that_is_shown_turned(self, own_root, kind):
        def write(path):
            image = Image.fromarray(self.LABEL)
            exif = image.getexif()
            exif[0x0112] = 3
            image.save(path, kind, exif=exif)

        assert "is shown turned or mirrored (EXIF orientation 3)" in self.refusal(own_root, write)

    def test_several_pictures_in_one_label(self, own_root):
        def write(path):
            images = [Image.fromarray(self.LABEL), Image.fromarray(self.LABEL // 2)]
            images[0].save(path, save_all=True, append_images=images[1:])

        assert "holds 2 pictures" in self.refusal(own_root, write)


class TestPhotographFormats:
    """Forms in which a photograph may come: read as one sees it, or refused for the index."""

    PICTURE = np.random.default_rng(1).integers(0, 256, (6, 9, 3), dtype=np.uint8)

    def read(self, path):
        """The pixels uint8 [H, W, 3] of a photograph that is not refused."""
        with Image.open(path) as image:
            check_photograph(image, path)
        return read_image(path).permute(1, 2, 0).numpy()

    def refusal(self, path):
        with pytest.raises(UserError) as refused:
            self.read(path)
        assert "\n" not in str(refused.value) and str(refused.value).startswith(f"the image {path} ")
        return str(refused.value)

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
    def test_colours_are_read_as_they_are(self, tmp_path, mode):
        image = Image.fromarray(self.PICTURE)
        image = image.quantize(256) if mode == "P" else image.convert(mode)
        image.save(tmp_path / "x.png")
        seen = np.array(image.convert("RGB"))
        assert np.array_equal(self.read(tmp_path / "x.png"), seen)
        assert mode == "P" or np.array_equal(seen, self.PICTURE)

    @pytest.mark.parametrize("mode", ["L", "LA", "1"])
    def test_grey_has_three_equal_channels(self, tmp_path, mode):
        grey = self.PICTURE[..., 0]
        image = Image.fromarray(grey > 99) if mode == "1" else Image.fromarray(grey).convert(mode)
        image.save(tmp_path / "x.png")
        expected = np.where(grey > 99, 255, 0) if mode == "1" else grey
        assert np.array_equal(self.read(tmp_path / "x.png"), expected[..., None].repeat(3, 2))

    def test_cmyk_of_printers_is_seen_in_its_colours(self, tmp_path):
        smooth = np.full((16, 16, 3), (200, 60, 20), np.uint8)
        Image.fromarray(smooth).convert("CMYK").save(tmp_path / "x.jpg", quality=95)
        assert abs(self.read(tmp_path / "x.jpg").astype(int) - smooth).max() < 12

    def test_a_jpeg_with_previews_is_its_first_picture(self, tmp_path):
        first, second = (Image.fromarray(p) for p in (self.PICTURE // 2, self.PICTURE))
        first.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[second])
        first.save(tmp_path / "alone.jpg")
        assert np.array_equal(self.read(tmp_path / "x.jpg"), self.read(tmp_path / "alone.jpg"))

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_16_bits_of_grey(self, tmp_path, kind):
        path = tmp_path / "x.img"
        Image.fromarray(self.PICTURE[..., 0].astype(np.uint16) * 257).save(path, kind)
        assert "has pixels of mode I;16" in self.refusal(path)

    @pytest.mark.parametrize("dtype", [np.int32, np.float32])
    def test_numbers_of_32_bits(self, tmp_path, dtype):
        Image.fromarray(self.PICTURE[..., 0].astype(dtype)).save(tmp_path / "x.tif")
        assert "has pixels of mode" in self.refusal(tmp_path / "x.tif")

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
    def test_transparent_pixels(self, tmp_path, mode):
        image = Image.fromarray(self.PICTURE)
        if mode == "P":
            image.quantize(16).save(tmp_path / "x.png", transparency=3)
        else:
            image = image.convert(mode)
            image.putalpha(Image.fromarray(self.PICTURE[..., 0]))
            image.save(tmp_path / "x.png")
        assert "has transparent pixels" in self.refusal(tmp_path / "x.png")

    def test_several_pictures(self, tmp_path):
        images = [Image.fromarray(self.PICTURE), Image.fromarray(self.PICTURE // 2)]
        images[0].save(tmp_path / "x.png", save_all=True, append_images=images[1:])
        assert "holds 2 pictures" in self.refusal(tmp_path / "x.png")

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
    @pytest.mark.parametrize(
        ("turned", "shape", "fits"),
        [
            (1, (6, 9), True),
            (3, (6, 9), False),
            (6, (6, 9), True),
            (6, (6, 6), False),
            (0, (6, 6), True),
        ],
    )
    def test_exif_that_turns_it_where_its_label_fits_both_ways(
        self, tmp_path, kind, turned, shape, fits
    ):
        image = Image.fromarray(self.PICTURE[: shape[0], : shape[1]])
        exif = image.getexif()
        exif[0x0112] = turned
        image.save(tmp_path / "x.img", kind, exif=exif)
        if fits:  # a TIFF is turned by Pillow as it is read
            shape = shape[::-1] if kind == "TIFF" and turned == 6 else shape
            assert self.read(tmp_path / "x.img").shape[:2] == shape
        else:
            assert f"(EXIF orientation {turned})" in self.refusal(tmp_path / "x.img")

    def test_a_label_that_was_drawn_on_the_turned_photograph(self, own_root):
        images = DataRoot(own_root).read_list("val")
        image = Image.new("RGB", (40, 30))
        exif = image.getexif()
        exif[0x0112] = 8
        image.save(images.images[2], exif=exif)
        save_label(images.labels[2], np.zeros((40, 30)))
        with pytest.raises(
            UserError, match=r"is 40x30 \(it is shown turned, .*8\) but its label .* 30x40"
        ):
            DataRoot(own_root).index(images)

    @pytest.mark.parametrize(
        "junk", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff1"]
    )
    @pytest.mark.filterwarnings("ignore:Corrupt EXIF")
    def test_damaged_exif_does_no_harm(self, tmp_path, junk):
        Image.fromarray(self.PICTURE).save(tmp_path / "x.jpg", exif=junk)
        assert self.read(tmp_path / "x.jpg").shape == (6, 9, 3)
