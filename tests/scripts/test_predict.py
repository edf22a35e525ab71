"""Predictions for photographs: the evaluation's own, and what is refused."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resize

from configs.options import load_config
from data_loader.data_loaders import StepData
from data_loader.data_root import read_label
from data_loader.dataset import normalize
from data_loader.tasks import task_of
from models.deeplabv3 import predict, upsample_logits
from scripts.predict import main
from tests.helpers import error_line
from trainer.evaluate import confusion_matrix
from trainer.output import read_model
from utils.checkpoint import write_json
from utils.visualize import overlay, side_by_side, voc_palette, with_legend


@pytest.fixture
def photographs(voc_root, tmp_path):
    """A folder with two photographs of the data set and a file that is none."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name in sorted((voc_root / "JPEGImages").glob("*.jpg"))[:2]:
        shutil.copy(name, folder)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_label_maps_are_what_the_evaluation_counts(voc_root, steps, tmp_path, run):
    """Of a model that is tested on whole images."""
    config = load_config(steps[1].parent / "config.json")[0]
    config.data.test.args.transform = False
    write_json(tmp_path / "whole.json", config.to_dict())
    data = StepData(config)
    model, _ = read_model(steps[1], data, "tiny", 1)
    expected = confusion_matrix(model, data, "test", torch.device("cpu"), 0.45)
    dataset, _ = data.evaluation("test")
    assert len({image.shape for image, _ in map(dataset.load, range(len(dataset)))}) > 1
    images = tmp_path / "images"
    images.mkdir()
    for path in dataset.images:
        shutil.copy(path, images)
    flags = ("-c", tmp_path / "whole.json", "--input", images, "--output", tmp_path / "out")
    result = run(main, "-r", steps[1], *flags, "--score", 0.45)
    assert result.returncode == 0, result.stderr
    counts = np.zeros((9, 9), dtype=np.int64)
    for i, name in enumerate(dataset.ids):
        label, found = dataset.load(i)[1].numpy(), Image.open(tmp_path / f"out/{name}_labels.png")
        assert found.mode == "P" and found.getpalette() == voc_palette().ravel().tolist()
        known = label != 255
        np.add.at(counts, (label[known], np.array(found)[known]), 1)
    assert np.array_equal(counts, expected)
    assert np.count_nonzero(counts.sum(axis=0)) > 2


def test_a_photograph_is_seen_at_the_scale_of_the_test(photographs, steps, tmp_path, run):
    path = min(photographs.glob("*.jpg"))
    with Image.open(path) as image:
        image.resize((3 * image.width, 3 * image.height)).save(large := tmp_path / "large.png")
    run(main, "-r", steps[1], "--input", large, "--output", tmp_path / "out", "--score", 0.45)
    config = load_config(steps[1].parent / "config.json")[0]
    model, _ = read_model(steps[1], StepData(config), "tiny", 1)
    pixels = torch.from_numpy(np.array(Image.open(large))).permute(2, 0, 1)[None]
    side = config.data.test.args.transform_args.crop_size
    assert config.data.test.args.transform and min(pixels.shape[-2:]) > 2 * side
    seen = resize(pixels, [side], antialias=True)
    with torch.inference_mode():
        logits = upsample_logits(model.eval()(normalize(seen), upsample=False), pixels.shape[-2:])
    found = np.array(Image.open(tmp_path / "out/large_labels.png"))
    expected = np.array([0, *task_of(config.data).seen(1)])[predict(logits, 0.45)[0]]
    assert (found == expected).mean() > 0.999 and len(np.unique(expected)) > 1


def test_labels_that_training_would_refuse_are_refused(photographs, steps, tmp_path, run):
    min(photographs.glob("*.jpg")).rename(photographs / "one.jpg")
    with Image.open(photographs / "one.jpg") as image:
        label = Image.new("P", image.size, 1)
    label.putpalette([0, 0, 0, *voc_palette()[12]])  # id 1 in the colour of a dog
    label.save(tmp_path / "one.png")
    flags = ("--input", photographs / "one.jpg", "--output", tmp_path / "out", "--labels", tmp_path)
    line = error_line(run(main, "--compare", "-r", steps[1], *flags))
    assert "a tool has renumbered it" in line and not (tmp_path / "out").exists()


def test_an_overlay_has_the_photograph_and_a_legend(photographs, steps, tmp_path, run):
    path = min(photographs.glob("*.jpg"))
    result = run(main, "-r", steps[0], "--input", path, "--output", tmp_path / "out")
    label = np.array(Image.open(tmp_path / f"out/{path.stem}_labels.png"))
    drawn, photograph = (
        np.array(Image.open(p).convert("RGB"))
        for p in (tmp_path / f"out/{path.stem}_overlay.png", path)
    )
    height, width = label.shape
    assert (
        photograph.shape == (height, width, 3) and drawn.shape[0] > height and drawn.shape[1] >= width
    )
    same = (drawn[:height, :width] == photograph).all(axis=2)
    assert same[label == 0].mean() > 0.5 and same[label > 0].mean() < 0.5
    colours = {tuple(colour) for colour in drawn[height:].reshape(-1, 3)}
    found = np.unique(label[label > 0])
    assert all(tuple(voc_palette()[c]) in colours for c in found)
    assert result.stdout.startswith(f"{path.name}: ") and result.stdout.count("%") == len(found)


def test_steps_are_compared_on_one_sheet(voc_root, photographs, steps, tmp_path, run, monkeypatch):
    """Photographs outside the data set have no label, unless a folder of labels is named."""
    seen = []

    def keep(pictures):
        seen.append([title for title, _ in pictures])
        if "label" in seen[-1]:
            label = read_label(voc_root / f"SegmentationClassAug/{stem}.png")
            drawn = np.array(pictures[1][1].convert("RGB"))
            assert label.any() and (drawn == voc_palette()[label]).all()
        return side_by_side(pictures)

    monkeypatch.setattr("scripts.predict.side_by_side", keep)
    flags = ("--compare", "-r", steps[1], steps[0], "--output", tmp_path / "out")
    stem = min(photographs.glob("*.jpg")).stem
    predicted = ["step 0: 5 classes", "step 1: + bus, car, cat"]
    for image, labels, titles in (
        (photographs / f"{stem}.jpg", (), ["photograph", *predicted]),
        (voc_root / f"JPEGImages/{stem}.jpg", (), ["photograph", "label", *predicted]),
        (
            photographs / f"{stem}.jpg",
            ("--labels", voc_root / "SegmentationClassAug"),
            ["photograph", "label", *predicted],
        ),
    ):
        result = run(main, *flags, "--input", image, *labels)
        assert result.returncode == 0, result.stderr
        assert seen[-1] == titles
        assert Image.open(tmp_path / f"out/{stem}_compare.png").width == 328 * len(titles) + 8


def test_two_runs_are_compared_at_the_same_step(photographs, steps, tmp_path, run, monkeypatch):
    """Neither takes the place of the other: the name of the run stands above each."""
    runs, seen = [], []
    for name in ("EIR-seed1", "image-replay-with-a-long-name"):
        runs.append(shutil.copytree(steps[1].parent, tmp_path / name) / steps[1].name)
        config = load_config(runs[-1].parent / "config.json")[0]
        config.name = name
        write_json(runs[-1].parent / "config.json", config.to_dict())
    monkeypatch.setattr(
        "scripts.predict.side_by_side", lambda pictures: seen.extend(pictures) or pictures[0][1]
    )
    path = min(photographs.glob("*.jpg"))
    result = run(main, "--compare", "-r", *runs, steps[0], "--input", path, "--output", tmp_path / "o")
    assert result.returncode == 0, result.stderr
    assert [title for title, _ in seen] == [
        "photograph",
        "step 0: 5 classes",
        "EIR-seed1, step 1: + 3 classes",
        "...eplay-with-a-long-name, step 1",
    ]


def test_a_label_of_another_size_is_refused(photographs, steps, tmp_path, run):
    path = min(photographs.glob("*.jpg"))
    (tmp_path / "labels").mkdir()
    Image.new("L", (3, 2)).save(tmp_path / f"labels/{path.stem}.png")
    flags = ("-r", steps[0], "--compare", "--input", path, "--output", tmp_path / "out")
    line = error_line(run(main, *flags, "--labels", tmp_path / "labels"))
    assert f"{path.stem}.png is 3x2" in line


def test_what_cannot_be_read_is_named_and_the_others_are_predicted(photographs, steps, tmp_path, run):
    (photographs / "broken.jpg").write_bytes(b"no image")
    Image.new("I;16", (20, 20)).save(photographs / "deep.png")
    pages = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    pages[0].save(photographs / "pages.tif", save_all=True, append_images=pages[1:])
    result = run(main, "-r", steps[0], "--input", photographs, "--output", tmp_path / "out")
    assert "3 of 5 photographs have no prediction" in error_line(result)
    assert f"warning: the image {photographs / 'pages.tif'} holds 2 pictures" in result.stderr
    assert f"warning: cannot read the image {photographs / 'broken.jpg'}" in result.stderr
    assert f"warning: the image {photographs / 'deep.png'} has pixels of mode I;16" in result.stderr
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_a_photograph_is_turned_as_viewers_show_it(steps, tmp_path, run, monkeypatch):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "phone.jpg", exif=turned)
    monkeypatch.setenv("HOME", str(steps[0].parent))  # as a shell leaves ~ in --resume=~/...
    checkpoint = f"~/{steps[0].name}"
    run(main, "-r", checkpoint, "--input", tmp_path / "phone.jpg", "--output", tmp_path / "out")
    assert Image.open(tmp_path / "out/phone_labels.png").size == (40, 60)
    turned[0x0112] = 3  # upside down: whose label, if it had one, could be for either form
    Image.new("RGB", (60, 40)).save(tmp_path / "phone.jpg", exif=turned)
    flags = ("-r", steps[0], "--input", tmp_path / "phone.jpg", "--output", tmp_path / "out")
    assert run(main, *flags).returncode == 0
    assert "its label may be for either" in error_line(run(main, *flags, "--compare"))


def test_a_single_pixel_and_a_file_of_the_familys_layout(steps, tmp_path, run):
    """A bare file needs the configuration and the task; how many steps it has learned is seen in it."""
    state = torch.load(steps[1])["state_dict"]
    content = {"arch": "DeepLabV3", "epoch": 60, "monitor_best": np.float64(61.5)}
    state = {f"module.{key}": value for key, value in state.items()}
    torch.save({**content, "state_dict": state}, tmp_path / "family.pth")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    flags = [
        "-r",
        tmp_path / "family.pth",
        "--input",
        tmp_path / "dot.png",
        "--output",
        tmp_path / "out",
    ]
    assert "no config.json beside" in error_line(run(main, *flags))
    flags += ["-c", "configs/config_voc.json", "--backbone", "tiny"]
    assert "another architecture" in error_line(run(main, *flags, "--task_name", "15-1"))
    assert "another architecture" in error_line(
        run(main, *flags, "--task_name", "5-3", "--task_step", 2)
    )
    for step in ([], ["--task_step", 1]):
        result = run(main, *flags, "--task_name", "5-3", *step)
        assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "out/dot_labels.png").size == (1, 1)


def test_what_it_refuses(photographs, steps, tmp_path, run):
    out = ("--output", tmp_path / "out")
    both = ("-r", *steps, "--input", photographs)
    one = ("-r", steps[0], "--input")
    assert "several checkpoints are for --compare" in error_line(run(main, *both, *out))
    assert "no image in" in error_line(run(main, *one, tmp_path, *out))
    assert "the photographs lie in" in error_line(run(main, *one, photographs, "--output", photographs))
    (file := tmp_path / "a_file").touch()
    assert "is a file" in error_line(run(main, *one, photographs, "--output", file))
    assert "cannot read the image" in error_line(run(main, *one, tmp_path / "no.jpg", *out))
    assert "and --compare with it" in error_line(run(main, *one, photographs, *out, "--labels", "."))
    none = ("--compare", "--labels", tmp_path / "none")
    assert "none: give a folder that is there" in error_line(run(main, *one, photographs, *out, *none))
    assert "--score is 2.0" in error_line(run(main, *one, photographs, *out, "--score", 2))
    shutil.copy(min(photographs.glob("*.jpg")), photographs / "a.jpg")
    shutil.copy(min(photographs.glob("*.jpg")), photographs / "a.jpeg")
    assert "several photographs a:" in error_line(run(main, *one, photographs, *out))
    assert not (tmp_path / "out").exists()


def test_a_legend_breaks_into_lines_and_outlines_are_white():
    names = {c: f"class {c}" for c in (1, 2, 3, 15)}
    wide, narrow = (with_legend(Image.new("RGB", (width, 10)), names) for width in (600, 50))
    assert wide.width == 600 and narrow.width > 50 and narrow.height > wide.height > 10
    label = np.zeros((4, 4), dtype=np.uint8)
    label[:, 2:] = 15
    drawn = np.array(overlay(np.full((4, 4, 3), 100, dtype=np.uint8), label))
    assert drawn[0].tolist() == [[100] * 3, [100] * 3, [255] * 3, [146, 114, 114]]
