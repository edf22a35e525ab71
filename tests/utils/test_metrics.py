"""Metrics against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, recall_score

from utils.metrics import ConfusionMatrix, compute_metrics, format_table

CPU = torch.device("cpu")


def random_pixels(seed: int, channels: int, absent: tuple[int, ...] = (), shape=(3, 40, 40)):
    """Targets with void and predictions that are right half of the time."""
    rng = np.random.default_rng(seed)
    kinds = [c for c in range(channels) if c not in absent]
    target = rng.choice([*kinds, 255], size=shape)
    wrong = rng.integers(channels, size=shape)
    prediction = np.where((rng.random(shape) < 0.5) & (target < 255), target, wrong)
    return target.astype(np.uint8), prediction


def counted(target: np.ndarray, prediction: np.ndarray, channels: int) -> np.ndarray:
    matrix = ConfusionMatrix(channels, CPU)
    for t, p in zip(target, prediction, strict=True):
        matrix.update(torch.from_numpy(t), torch.from_numpy(p))
    return matrix.counts.numpy()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("absent", [(), (2,), (0, 4), (1, 2, 3, 4, 5)])
def test_confusion_matrix_equals_scikit_learn(seed, absent):
    target, prediction = random_pixels(seed, 6, absent)
    known = target != 255
    expected = confusion_matrix(target[known], prediction[known], labels=range(6))
    assert np.array_equal(counted(target, prediction, 6), expected)


def test_void_alone_counts_nothing():
    void = np.full((1, 4, 4), 255, np.uint8)
    assert counted(void, np.ones((1, 4, 4), np.int64), 3).sum() == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("absent", [(), (3,), (1, 5)])
def test_values_equal_scikit_learn(seed, absent):
    channels = 6
    target, prediction = random_pixels(seed, channels, absent)
    if seed == 1:
        prediction[np.isin(prediction, absent)] = 0
    names = list("abcdef")
    old, new = [0, 1, 2], [3, 4, 5]
    metrics = compute_metrics(counted(target, prediction, channels), names, old, new)

    known = target != 255
    truth, guess = target[known], prediction[known]
    every = {"labels": range(channels), "average": None, "zero_division": 0}
    iou = 100 * jaccard_score(truth, guess, **every)
    recall = 100 * recall_score(truth, guess, **every)
    for metric, values in (
        ("Mean_Intersection_over_Union", iou),
        ("Pixel_Accuracy_Class", recall),
    ):
        found = metrics[metric]
        assert list(found["by_class"]) == names
        assert list(found["by_class"].values()) == pytest.approx(values.tolist())
        assert found["overall"] == pytest.approx(values.mean())
        assert found["old"] == pytest.approx(values[old].mean())
        assert found["new"] == pytest.approx(values[new].mean())
        a, b = found["old"], found["new"]
        assert found["harmonic"] == pytest.approx(2 / (1 / a + 1 / b))
    accuracy = metrics["Pixel_Accuracy"]
    assert accuracy["overall"] == pytest.approx(100 * accuracy_score(truth, guess))
    for group, members in (("old", old), ("new", new)):
        some = np.isin(truth, members)
        assert accuracy[group] == pytest.approx(100 * accuracy_score(truth[some], guess[some]))
    assert "by_class" not in accuracy


def test_a_class_without_a_pixel_counts_as_zero():
    counts = np.diag([5, 7, 0])
    iou = compute_metrics(counts, ["a", "b", "c"], [0, 1], [2])["Mean_Intersection_over_Union"]
    assert iou["by_class"] == {"a": 100.0, "b": 100.0, "c": 0.0}
    assert iou["overall"] == pytest.approx(200 / 3)
    assert (iou["old"], iou["new"], iou["harmonic"]) == (100.0, 0.0, 0.0)


def test_no_pixel_at_all_is_zero_and_not_nan():
    metrics = compute_metrics(np.zeros((3, 3), np.int64), ["a", "b", "c"], [0, 1], [2])
    values = [metrics[m][g] for m in metrics for g in ("overall", "old", "new", "harmonic")]
    assert values == [0.0] * len(values)


def test_without_new_classes_new_and_harmonic_are_undefined():
    metrics = compute_metrics(np.diag([5, 7]), ["a", "b"], [0, 1], [])
    for values in metrics.values():
        assert values["new"] is None and values["harmonic"] is None
        assert values["old"] == values["overall"] == 100.0


def test_counts_beyond_float32_stay_exact():
    counts = np.array([[2**40 + 1, 0], [0, 2**40]])
    accuracy = compute_metrics(counts, ["a", "b"], [0], [1])["Pixel_Accuracy"]["overall"]
    assert math.isclose(accuracy, 100.0, rel_tol=0, abs_tol=1e-12)


def test_table_names_each_class_with_its_group_and_value():
    counts = np.array([[6, 2, 0], [0, 4, 0], [3, 0, 1]])
    metrics = compute_metrics(counts, ["background", "cat", "dog"], [0, 1], [2])
    lines = format_table(metrics, [0, 1], [2]).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["background", "old", "54.55", "75.00"],
        ["cat", "old", "66.67", "100.00"],
        ["dog", "new", "25.00", "25.00"],
    ]
    means = next(line for line in lines if line.startswith("Mean_Intersection_over_Union"))
    assert means.split()[1:] == ["48.74", "60.61", "25.00", "35.40"]


def test_table_shows_undefined_means_as_dashes():
    lines = format_table(compute_metrics(np.eye(2), ["a", "b"], [0, 1], []), [0, 1], []).splitlines()
    assert lines[-1].split()[1:] == ["100.00", "100.00", "-", "-"]


def test_table_marks_a_class_whose_zero_is_no_error():
    metrics = compute_metrics(
        np.diag([6, 4, 0, 0]), ["background", "cat", "dog", "cow"], [0, 1], [2, 3]
    )
    plain = format_table(metrics, [0, 1], [2, 3])
    metrics["Mean_Intersection_over_Union"]["without_images"] = ["dog"]
    lines = format_table(metrics, [0, 1], [2, 3]).splitlines()
    assert "*" not in plain and [line for line in lines if "*" in line] == [lines[3], lines[5]]
    assert lines[3].split() == ["dog", "new", "0.00*", "0.00"]
    assert lines[5].startswith("* ") and "no error of the model" in lines[5]
    assert len({len(line) for line in lines[:5]}) == 1
