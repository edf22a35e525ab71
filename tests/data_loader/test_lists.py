"""Lists as people and tools write them, images in both lists, and what a step lacks."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_loader import data_loaders, data_root
from data_loader.data_loaders import StepData
from data_loader.data_root import DataRoot
from scripts.show_splits import main as show_splits
from tests.helpers import small_config
from utils.errors import UserError


def list_file(root: Path, name: str) -> Path:
    return root / "ImageSets" / "Segmentation" / f"{name}.txt"


def refusal(root: Path, split: str = "val") -> str:
    """The one line with which a list is refused."""
    with pytest.raises(UserError) as refused:
        DataRoot(root).read_list(split)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def add_val_to_train(root: Path, count: int) -> list[str]:
    """Add the first images of val to the training list; their ids."""
    lines = list_file(root, "val").read_text().splitlines()[:count]
    path = list_file(root, "train_aug")
    path.write_text(path.read_text() + "\n".join(lines))
    return [Path(line.split()[0]).stem for line in lines]


@pytest.fixture
def logged(monkeypatch):
    """What data_loaders.py writes to the log, as pairs of level and line."""
    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            data_loaders.log, level, lambda text, level=level: lines.append((level, text))
        )
    return lines


class TestHowAListIsWritten:
    @pytest.mark.parametrize(
        "write",
        {
            "windows": lambda text: text.replace("\n", "\r\n").encode(),
            "old macintosh": lambda text: text.replace("\n", "\r").encode(),
            "byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
            "spaces": lambda text: text.replace("\n", " \t\n  ").encode(),
            "blank lines": lambda text: ("\n\n" + text.replace("\n", "\n \n")).encode(),
            "no last line end": lambda text: text.rstrip().encode(),
            "no first slash": lambda text: text.replace(" /", " ").encode(),
            "backslashes": lambda text: text.replace("/", "\\").encode(),
            "doubled slashes and dots": lambda text: text.replace("/", "//./").encode(),
        }.items(),
        ids=lambda item: item[0],
    )
    def test_what_editors_and_tools_make_of_it_is_the_same_list(self, own_root, write):
        path = list_file(own_root, "val")
        before = DataRoot(own_root).read_list("val")
        path.write_bytes(write[1](path.read_text()))
        assert DataRoot(own_root).read_list("val") == before

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
    def test_a_list_in_another_encoding_is_refused_in_one_line(self, own_root, encoding):
        path = list_file(own_root, "val")
        path.write_bytes((path.read_text() + "é").encode(encoding))
        message = refusal(own_root)
        assert str(path) in message and "UTF-8" in message and message.isprintable()

    def test_characters_that_cannot_be_seen_are_named(self, own_root):
        list_file(own_root, "val").write_text("2008_000001\u200b\n", encoding="utf-8")
        assert r"'2008_000001\u200b'" in refusal(own_root)

    def test_a_folder_in_place_of_a_list(self, own_root):
        path = list_file(own_root, "val")
        path.unlink()
        path.mkdir()
        assert refusal(own_root) == f"cannot read the list {path}: Is a directory"

    def test_a_list_that_may_not_be_read(self, own_root, monkeypatch):
        def forbid(path):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "read_bytes", forbid)
        assert refusal(own_root).endswith("val.txt: Permission denied")


class TestWhatAListNames:
    @pytest.mark.parametrize(
        "line",
        [
            "/../outside.jpg /SegmentationClassAug/2008_000001.png",
            "/JPEGImages/2008_000001.jpg ../../outside.png",
            "JPEGImages/../../outside.jpg SegmentationClassAug/2008_000001.png",
            r"..\outside.jpg SegmentationClassAug\2008_000001.png",
            "../../outside",
        ],
    )
    def test_files_outside_the_data_root_are_refused(self, own_root, line):
        Image.new("RGB", (8, 8)).save(own_root.parent / "outside.jpg")
        Image.new("L", (8, 8)).save(own_root.parent / "outside.png")
        list_file(own_root, "val").write_text(line + "\n")
        assert "which is outside the data root" in refusal(own_root)

    def test_absolute_names_are_below_the_data_root(self, own_root, tmp_path):
        Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg")
        line = f"{tmp_path}/x.jpg /SegmentationClassAug/2008_000001.png\n"
        list_file(own_root, "val").write_text(line)
        assert f"missing: {own_root}{tmp_path}/x.jpg" in refusal(own_root)

    def test_absolute_names_inside_the_data_root_are_taken(self, own_root):
        path = list_file(own_root, "val")
        before = DataRoot(own_root).read_list("val")
        path.write_text(path.read_text().replace("/JPEG", f"{own_root}/JPEG"))
        assert DataRoot(own_root).read_list("val") == before

    def test_a_repeated_image_is_refused_however_it_is_written(self, own_root):
        path = list_file(own_root, "val")
        ids = DataRoot(own_root).read_list("val").ids
        again = f"{ids[4]}\n./JPEGImages//{ids[2]}.jpg /SegmentationClassAug/{ids[2]}.png\n{ids[4]}\n"
        path.write_text(path.read_text() + again)
        message = refusal(own_root)
        assert message.startswith(f"2 images stand in the list {path} more than once, {ids[2]} first")

    @pytest.mark.parametrize(
        ("label_of", "words"),
        [
            (lambda i: 0, "1 labels stand in the list {} more than once, 2008_000000 first"),
            (
                lambda i: i - 1,
                "the list {} gives 20 images the label of another one, 2008_000000 that of ",
            ),
        ],
        ids=["the same for all", "moved by a line"],
    )
    def test_labels_of_other_images_are_refused(self, own_root, label_of, words):
        path = list_file(own_root, "val")
        pairs = [line.split() for line in path.read_text().splitlines()]
        lines = [f"{image} {pairs[label_of(i)][1]}" for i, (image, _) in enumerate(pairs)]
        path.write_text("\n".join(lines))
        assert refusal(own_root).startswith(words.format(path))

    def test_images_of_one_name_in_two_folders_are_two_images(self, own_root):
        for folder in ("JPEGImages", "SegmentationClassAug"):
            (own_root / folder / "more").mkdir()
        lines = []
        for line in list_file(own_root, "val").read_text().splitlines()[:3]:
            image, label = (word.lstrip("/") for word in line.split())
            copies = [str(Path(f).parent / "more" / Path(f).name) for f in (image, label)]
            for source, copy in zip((image, label), copies, strict=True):
                (own_root / copy).write_bytes((own_root / source).read_bytes())
            lines += [f"{image} {label}", " ".join(copies)]
        list_file(own_root, "val").write_text("\n".join(lines))
        ids = DataRoot(own_root).read_list("val").ids
        assert len({*ids}) == 6 and ids[0] == image_of(lines[0]) and ids[1] == image_of(lines[1])


def image_of(line):
    """The id of a line's image that shares its name with another: its path, so that files differ."""
    return line.split()[0].removesuffix(".jpg").replace("/", "+")


class TestValidationImagesInTraining:
    def test_they_are_refused_with_their_number_and_the_way_out(self, own_root, tmp_path):
        ids = add_val_to_train(own_root, 7)
        with pytest.raises(UserError) as refused:
            StepData(small_config(own_root, tmp_path))
        message = str(refused.value)
        assert message.startswith("7 validation images are in the training list too")
        assert f"{ids[0]} first" in message and "--allow_val_in_train on" in message

    def test_a_list_made_by_listing_the_label_folder_is_refused(self, own_root, tmp_path):
        names = sorted(os.listdir(own_root / "SegmentationClassAug"))
        list_file(own_root, "train_aug").write_text("\n".join(Path(name).stem for name in names))
        with pytest.raises(UserError, match=r"^20 validation images are in the training list"):
            StepData(small_config(own_root, tmp_path))

    def test_they_are_trained_on_where_that_is_asked_for(self, own_root, tmp_path, logged):
        ids = add_val_to_train(own_root, 7)
        data = StepData(small_config(own_root, tmp_path, task_name="joint", allow_val_in_train=True))
        assert set(ids) <= set(data.training().ids)
        data.describe()
        assert ("warning", f"7 validation images are trained on, {ids[0]} first") in logged

    def test_show_splits_refuses_them_alike(self, own_root, capsys):
        ids = add_val_to_train(own_root, 2)
        flags = ["--data_root", str(own_root), "--task_name", "joint", "--json"]
        with pytest.raises(UserError, match="2 validation images are in the training list"):
            show_splits(flags)
        assert show_splits([*flags, "--allow_val_in_train", "on"]) == 0
        assert capsys.readouterr().out.count(ids[0]) == 3

    def test_show_splits_reads_of_them_in_the_configuration(self, own_root, tmp_path):
        add_val_to_train(own_root, 2)
        file, index = tmp_path / "own.json", tmp_path / "index"
        data = {"allow_val_in_train": True, "task": {"name": "joint", "idxs_path": str(index)}}
        file.write_text(json.dumps({"data_loader": {"args": data}}))
        flags = ["-c", str(file), "--data_root", str(own_root)]
        assert show_splits(flags) == 0 and any(index.iterdir())
        with pytest.raises(UserError, match="2 validation images are in the training list"):
            show_splits([*flags, "--allow_val_in_train", "off"])


class TestDescription:
    """What the log says of a step's data."""

    def test_nothing_is_doubtful_about_a_whole_data_set(self, voc_root, tmp_path, logged):
        StepData(small_config(voc_root, tmp_path, task_name="joint")).describe()
        assert [line for level, line in logged if level == "warning"] == []

    def test_other_numbers_of_images_than_voc_has(self, voc_root, tmp_path, logged):
        data = StepData(small_config(voc_root, tmp_path))
        data.describe()
        line = "training and validation images: 60 and 20 (the whole of VOC 2012: 10,582 and 1,449)"
        assert ("info", line) in logged
        logged.clear()
        for name, counts in (("VOC 2012", [60, 20]), ("another set", [])):
            data.set.name, data.set.counts = name, counts
            data.describe()
        assert not [line for _, line in logged if "the whole of" in line]

    @staticmethod
    def erase(root, list_name, *classes):
        """Make some classes background in all labels of a list."""
        for line in list_file(root, list_name).read_text().splitlines():
            path = root / line.split()[1].lstrip("/")
            label = np.array(Image.open(path))
            label[np.isin(label, classes)] = 0
            Image.fromarray(label).save(path)

    def test_labels_whose_ids_are_all_too_high_by_one(self, own_root, tmp_path, logged):
        for path in DataRoot(own_root).read_list("train").labels:
            label = np.array(Image.open(path))
            Image.fromarray(np.where(label < 20, label + 1, 255).astype(np.uint8)).save(path)
        StepData(small_config(own_root, tmp_path, task_name="joint")).describe()
        line = "no training label has id 0, the background: are all ids too high by one?"
        assert ("warning", line) in logged

    def test_classes_of_the_step_without_a_training_image(self, own_root, tmp_path, logged):
        self.erase(own_root, "train_aug", 7, 8, 12)
        StepData(small_config(own_root, tmp_path, task_step=1)).describe()
        warnings = [line for level, line in logged if level == "warning"]
        assert len(warnings) == 1
        assert warnings[0].startswith("no training image of step 1 shows car, cat: ")

    def test_classes_that_the_test_cannot_show(self, own_root, tmp_path, logged):
        self.erase(own_root, "val", 2, 6, 12)
        StepData(small_config(own_root, tmp_path, task_step=1)).describe()
        warnings = [line for level, line in logged if level == "warning"]
        assert len(warnings) == 1
        assert warnings[0].startswith("no test image shows bicycle, bus: an IoU of 0 is no error")

    def test_a_label_that_is_not_used_stops_nothing(self, own_root, tmp_path, logged):
        name = DataRoot(own_root).read_list("val").labels[3].name
        (own_root / "SegmentationClass").mkdir()
        (own_root / "SegmentationClass" / name).write_bytes(b"no image")
        StepData(small_config(own_root, tmp_path)).describe()
        warnings = [line for level, line in logged if level == "warning"]
        assert len(warnings) == 1 and "not used" in warnings[0] and name in warnings[0]


class TestFilesThatCannotBeFound:
    """The list is as it should be, but the operating system has something against a file."""

    @pytest.fixture
    def image(self, own_root):
        return DataRoot(own_root).read_list("val").images[3]

    def test_a_link_whose_target_is_gone(self, own_root, image):
        image.unlink()
        image.symlink_to("/no/such/disk/x.jpg")
        message = refusal(own_root)
        assert message.startswith("1 files named by")
        assert f"{image} (a link to /no/such/disk/x.jpg: No such file or directory)" in message

    def test_a_link_to_itself(self, own_root, image):
        image.unlink()
        image.symlink_to(image)
        assert "symbolic links" in refusal(own_root)

    def test_a_link_to_a_file_is_as_good_as_the_file(self, own_root, image, tmp_path):
        before = DataRoot(own_root).read_list("val")
        image.rename(tmp_path / "elsewhere.jpg")
        image.symlink_to(tmp_path / "elsewhere.jpg")
        assert DataRoot(own_root).read_list("val") == before

    @pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
    def test_a_folder_or_a_pipe_in_place_of_a_file(self, own_root, image, make):
        image.unlink()
        make(image)
        assert f"{image} (not a file)" in refusal(own_root)

    def test_a_folder_that_may_not_be_read(self, own_root, monkeypatch):
        def forbid(path):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(data_root.os, "scandir", forbid)
        message = refusal(own_root)
        assert message == f"cannot read the folder {own_root / 'JPEGImages'}: Permission denied"

    def test_a_file_that_is_gone_once_the_list_is_read(self, own_root, image):
        data = DataRoot(own_root)
        images = data.read_list("val")
        image.unlink()
        with pytest.raises(UserError, match=f"^cannot read the file {image}: No such file"):
            data.index(images)

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (PermissionError(13, "Permission denied"), "Permission denied"),
            (OSError(116, "Stale file handle"), "Stale file handle"),
        ],
    )
    def test_a_data_root_that_may_not_be_looked_into(self, own_root, monkeypatch, error, reason):
        def forbid(path, **_):
            raise error

        monkeypatch.setattr(data_root.os, "stat", forbid)
        with pytest.raises(UserError, match=f"^cannot read the data root {own_root}: {reason}$"):
            DataRoot(own_root)

    @pytest.mark.parametrize("root", ["a\0b", "~nobody_of_that_name/x", "x" * 5000])
    def test_a_data_root_that_no_system_has(self, root):
        with pytest.raises(UserError):
            DataRoot(root)
