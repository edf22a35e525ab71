"""Pseudo labels and doubtful background against plain loops over pixels."""

import pytest
import torch

from scripts.plain import plain_ignore_doubtful, plain_pseudo_labels
from trainer.pseudo_labels import ignore_doubtful, pseudo_labels

VOID = 255


def random_case(seed, n=3, channels=5, size=(24, 20)):
    g = torch.Generator().manual_seed(seed)
    teacher = 2.5 * torch.randn(n, channels, size[0] // 4, size[1] // 4, generator=g)
    labels = torch.randint(0, 4, (n, *size), generator=g)
    labels = torch.tensor([0, 0, 7, VOID])[labels].to(torch.uint8)
    return labels, teacher


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_pseudo_labels_equal_the_plain_ones(seed, threshold):
    labels, teacher = random_case(seed)
    before = labels.clone()
    found = pseudo_labels(labels, teacher, threshold)
    assert torch.equal(found, plain_pseudo_labels(labels, teacher, threshold))
    assert torch.equal(labels, before) and found.dtype == torch.uint8
    assert torch.equal(found[labels != 0], labels[labels != 0])
    assert (found != labels).any()


def test_the_threshold_itself_is_enough():
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    teacher = torch.full((1, 3, 2, 2), -9.0)
    teacher[:, 2] = 0.9
    score = float(torch.tensor(0.9).sigmoid())
    assert (pseudo_labels(labels, teacher, score) == 2).all()
    assert not pseudo_labels(labels, teacher, score + 1e-6).any()


def test_background_that_wins_keeps_its_pixels():
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    teacher = torch.full((1, 3, 2, 2), 3.0)
    teacher[:, 0] = 4.0
    assert not pseudo_labels(labels, teacher, 0.7).any()
    teacher[:, 0] = 2.0
    teacher[:, 1] = 3.5
    assert (pseudo_labels(labels, teacher, 0.7) == 1).all()


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_doubtful_background_equals_the_plain(seed, threshold):
    labels, teacher = random_case(seed)
    before = labels.clone()
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(labels), 2, *labels.shape[1:], generator=g)
    weights *= torch.rand(weights.shape, generator=g) < 0.2
    found = ignore_doubtful(labels, teacher, threshold, weights)
    assert torch.equal(found, plain_ignore_doubtful(labels, teacher, threshold, weights))
    assert torch.equal(labels, before) and found.dtype == torch.uint8
    changed = found != labels
    assert changed.any() and (found[changed] == VOID).all() and (labels[changed] == 0).all()
    covered = (labels == 0) & weights.any(dim=1)
    assert covered.any() and not found[covered].any()


def test_the_threshold_of_doubt_itself_is_enough():
    labels = torch.tensor([0, 0, 5, VOID], dtype=torch.uint8).repeat(1, 8, 2)
    teacher = torch.full((1, 3, 2, 2), -9.0)
    teacher[:, 0], teacher[:, 2] = 4.0, 0.4  # the background's own score does not matter
    score = float(torch.tensor(0.4).sigmoid())
    nothing = torch.zeros(1, 0, 8, 8)
    expected = torch.where(labels == 0, VOID, labels)
    assert torch.equal(ignore_doubtful(labels, teacher, score, nothing), expected)
    assert torch.equal(ignore_doubtful(labels, teacher, score + 1e-6, nothing), labels)
