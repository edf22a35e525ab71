"""docs/results/depthwise: the gradients of its convolutions are as exact as the library's."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

FILE = Path(__file__).parents[1] / "docs/results/depthwise/sitecustomize.py"


@pytest.fixture
def replaced(monkeypatch):
    """F.conv2d as the file leaves it; before and after the test it is the library's."""
    spec = importlib.util.spec_from_file_location("depthwise", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr("sys.meta_path", sys.meta_path.copy())  # which the file adds to
    monkeypatch.setattr(F, "conv2d", F.conv2d)
    spec.loader.exec_module(module)
    plain = F.conv2d
    module.replace_convolution()
    assert F.conv2d is not plain
    return plain


def gradients(conv2d, x, w, g, stride, dilation):
    """dL/dx and dL/dw in float64, where dL/dy is g; and by what they are made."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    padding = dilation * (w.shape[-1] - 1) // 2
    y = conv2d(x, w, None, stride, padding, dilation, len(w))
    return y.grad_fn.name(), *(t.double() for t in torch.autograd.grad(y, (x, w), g.to(y.dtype)))


@pytest.mark.parametrize(
    ("size", "stride", "dilation"), [(3, 1, 1), (5, 1, 1), (3, 2, 1), (5, 2, 1), (5, 1, 2)]
)
def test_gradients_are_as_near_to_float64_as_those_of_the_library(replaced, size, stride, dilation):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4, 24, 20, 20, generator=random).bfloat16()
    w = torch.randn(24, 1, size, size, generator=random).bfloat16()
    g = torch.randn(4, 24, -(-20 // stride), -(-20 // stride), generator=random).bfloat16()
    exact = gradients(replaced, x.double(), w.double(), g, stride, dilation)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = gradients(replaced, x.float(), w.float(), g, stride, dilation)
        ours = gradients(F.conv2d, x.float(), w.float(), g, stride, dilation)
    assert ["Depthwise" in made[0] for made in (exact, theirs, ours)] == [False, False, True]
    for right, library, found in zip(exact[1:], theirs[1:], ours[1:], strict=True):
        assert (found - right).norm() <= 1.1 * (library - right).norm()
        assert (found - right).norm() <= 0.005 * right.norm()


def test_other_convolutions_are_left_to_the_library(replaced):
    x, w = torch.randn(1, 4, 8, 8), torch.randn(4, 1, 3, 3, requires_grad=True)
    ours = F.conv2d(x, w, None, 1, 1, 1, 4)  # depthwise, but in float32
    assert torch.equal(ours, replaced(x, w, None, 1, 1, 1, 4))
    assert "Depthwise" not in ours.grad_fn.name()
    with torch.autocast("cpu", torch.bfloat16):
        assert "Depthwise" in F.conv2d(x, w, None, 1, 1, 1, 4).grad_fn.name()
        w = torch.randn(6, 4, 3, 3, requires_grad=True)
        assert "Depthwise" not in F.conv2d(x, w, None, 1, 1).grad_fn.name()
