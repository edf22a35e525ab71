"""t-SNE of pixel features: which pixels, under which models, and that the seed decides."""

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from configs.options import load_config
from data_loader.dataset import normalize
from scripts import tsne
from scripts.tsne import main
from tests.helpers import error_line
from utils.checkpoint import write_json


@pytest.fixture
def drawn(monkeypatch):
    """The pixels of each picture that is drawn."""
    kept, choose = [], tsne.choose_pixels

    def keep(*arguments):
        kept.append((arguments, choose(*arguments)))
        return kept[-1][1]

    monkeypatch.setattr(tsne, "choose_pixels", keep)
    return kept


def test_the_same_pixels_under_two_steps_and_twice_the_same_picture(steps, tmp_path, run, drawn):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        flags = ("-r", steps[1], steps[0], "--pixels", 12, "--seed", seed)
        result = run(main, *flags, "--output", tmp_path / f"{name}.png")
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        assert [line[:7] for line in lines[:2]] == ["step 0:", "step 1:"] and len(lines) == 3
        assert all("% of the pixels of step 0's classes recognised; by" in line for line in lines[:2])
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    assert Image.open(tmp_path / "a.png").width > 1200

    (models, data, *_), pixels = drawn[0]
    assert [model.step for model in models] == [0, 1]
    assert np.bincount(pixels.classes, minlength=9).max() <= 12
    dataset, _ = data.evaluation("test")
    for i in set(pixels.images):
        sample, chosen = dataset[int(i)], pixels.images == i
        assert np.bincount(pixels.classes[chosen]).max() <= 10
        for k, model in enumerate(models):
            with torch.no_grad():
                everywhere = model.model.features(normalize(sample["image"][None]))[0]
            cells = {cell.numpy().tobytes(): cell for cell in everywhere.flatten(1).T}
            assert everywhere.shape == (256, 4, 4)
            assert all(row.tobytes() in cells for row in pixels.features[k][chosen])
    assert pixels.predicted[0].max() <= 5


def test_labels_are_those_under_the_features():
    label = torch.zeros(64, 47, dtype=torch.uint8)
    label[32:48, 16:32] = 7
    found = tsne.at_stride_16(label)
    assert found.reshape(4, 3).tolist() == [[0, 0, 0], [0, 0, 0], [0, 7, 0], [0, 0, 0]]


def test_what_is_recognised_and_how_it_is_marked(steps, tmp_path, run, drawn, monkeypatch):
    """A dot where the class is recognised, else a cross; the share is that of the old classes."""
    marks, scatter = [], Axes.scatter

    def keep(axes, *at, **how):
        if len(at[0]) and "label" not in how:
            marks.append((how["marker"], len(at[0])))
        return scatter(axes, *at, **how)

    monkeypatch.setattr(Axes, "scatter", keep)
    flags = ("-r", *steps, "--pixels", 12, "--output", tmp_path / "a.png")
    result = run(main, *flags)
    assert result.returncode == 0, result.stderr
    pixels = drawn[0][1]
    dots, crosses = (sum(n for marker, n in marks if marker == kind) for kind in "ox")
    right = [predicted == pixels.classes for predicted in pixels.predicted]
    assert (dots, crosses) == (sum(r.sum() for r in right), sum((~r).sum() for r in right))
    old = (pixels.classes >= 1) & (pixels.classes <= 5)
    for line, found in zip(result.stdout.splitlines(), right, strict=False):
        assert line[8:].startswith(f"{found[old].sum() / old.sum():.0%} of the pixels of step 0's")
    assert dots and crosses


def test_the_second_model_starts_where_the_first_one_ended(monkeypatch):
    starts = []

    class Layout:
        def __init__(self, init, **_):
            starts.append(init)

        def fit_transform(self, features):
            return features[:, :2] + 1

    monkeypatch.setattr(tsne, "TSNE", Layout)
    features = [np.arange(12.0).reshape(4, 3), np.arange(12.0).reshape(4, 3) ** 2]
    first, _ = tsne.embed(features, 0)
    assert starts[0] == "pca" and np.allclose(starts[1], 1e-4 * first / first.std())


def test_what_it_refuses(steps, tmp_path, run):
    output = tmp_path / "a.png"
    flags = ("-r", steps[0], "--output")
    assert "give the name of a .png" in error_line(run(main, *flags, tmp_path / "a.jpg"))
    assert "--pixels starts at 1" in error_line(run(main, *flags, output, "--pixels", 0))
    assert "--seed goes from 0" in error_line(run(main, *flags, output, "--seed", 2**32))
    assert "data root nowhere" in error_line(run(main, *flags, output, "--data_root", "nowhere"))
    three = ("-r", *steps, steps[0], "--output", output)
    assert "3 checkpoints: give one" in error_line(run(main, *three))
    assert not output.exists()


def test_steps_of_different_tasks_are_no_pair(steps, tmp_path, run):
    config = load_config(steps[0].parent / "config.json")[0]
    other = tmp_path / "other"
    config.data.dataset.classes = dict(reversed(config.data.dataset.classes.items()))
    write_json(other / "config.json", config.to_dict())
    torch.save({"state_dict": torch.load(steps[0])["state_dict"]}, other / "c.pth")
    flags = ("-r", other / "c.pth", steps[1], "--output", tmp_path / "a.png")
    assert "are no steps of one task" in error_line(run(main, *flags))
