"""Binary cross entropy on sparse labels against the plain formula on one-hot targets."""

from types import SimpleNamespace

import pytest
import torch

from models.losses import auxiliary_sum, bce_sum, sum_over_images


def plain_bce(logits, target, valid, pos_weight):
    """Per image: sum over channels and non-void pixels; logits, target [N, C, H, W] float64."""
    p = torch.sigmoid(logits)
    positive = torch.full_like(logits, pos_weight)
    positive[:, 0] = 1.0
    cost = -(positive * target * torch.log(p) + (1 - target) * torch.log(1 - p))
    return (cost.sum(dim=1) * valid).sum(dim=(1, 2))


def one_hot(base, channels):
    planes = [(base == c).double() for c in range(channels)]
    return torch.stack(planes, dim=1)


def random_case(seed, n=3, c=6, h=20, w=17, pastes=0):
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, c, h // 4, w // 4, dtype=torch.float64, generator=g)
    base = torch.randint(0, c + 1, (n, h, w), generator=g).to(torch.uint8)
    base[base == c] = 255
    classes = torch.stack([torch.randperm(c - 1, generator=g)[:pastes] + 1 for _ in range(n)])
    shares = torch.rand(n, pastes + 1, h, w, dtype=torch.float64, generator=g)
    weights = (shares / shares.sum(1, keepdim=True))[:, :pastes]
    return logits, SimpleNamespace(base=base, classes=classes, weights=weights)


def up(logits, size):
    return torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("pos_weight", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("pastes", [0, 1, 3])
def test_loss_and_gradient_equal_the_plain_formula(pos_weight, pastes):
    logits, target = random_case(7, pastes=pastes)
    size = target.base.shape[-2:]
    valid = target.base != 255
    factor = torch.tensor([1.7 / valid.sum()], dtype=torch.float64)

    fast = logits.clone().requires_grad_()
    loss, parts = sum_over_images(
        fast,
        size,
        lambda i, z: bce_sum(
            z, target.base[i], target.classes[i], target.weights[i], pos_weight
        )[None],
        factor,
    )  # fmt: skip
    (3 * loss).backward()

    plain = logits.clone().requires_grad_()
    soft = one_hot(target.base, 6) * (1 - target.weights.sum(1, keepdim=True))
    for n in range(len(soft)):
        for k in range(pastes):
            soft[n, target.classes[n, k]] += target.weights[n, k]
    per_image = plain_bce(up(plain, size), soft, valid, pos_weight)
    expected = per_image.sum() * factor[0]
    (3 * expected).backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert parts.item() == pytest.approx(per_image.sum().item(), rel=1e-12)
    assert not parts.requires_grad
    assert (fast.grad - plain.grad).abs().max() < 1e-12 + 1e-9 * plain.grad.abs().max()


def test_pos_weight_leaves_the_background_alone():
    base = torch.zeros(4, 4, dtype=torch.uint8)
    logits = torch.randn(5, 4, 4, dtype=torch.float64)
    assert bce_sum(logits, base, pos_weight=1.0) == bce_sum(logits, base, pos_weight=9.0)


def test_void_pixels_do_not_count_at_all():
    logits = torch.randn(5, 4, 4, dtype=torch.float64, requires_grad=True)
    base = torch.ones(4, 4, dtype=torch.uint8)
    base[1] = 255
    loss = bce_sum(logits, base, pos_weight=2.0)
    loss.backward()
    assert logits.grad[:, 1].abs().max() == 0
    assert logits.grad[:, 0].abs().min() > 0
    rest = [0, 2, 3]
    expected = bce_sum(logits[:, rest].detach(), base[rest], pos_weight=2.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-14)


def test_auxiliary_loss_is_the_cross_entropy_of_the_background_with_zeros():
    logits, target = random_case(5)
    z, base = up(logits, target.base.shape[-2:])[0], target.base[0]
    known = base != 255
    assert 0 < known.sum() < known.numel()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        z[0][known], torch.zeros_like(z[0][known]), reduction="sum"
    )
    assert auxiliary_sum(z, base).item() == pytest.approx(expected.item(), rel=1e-12)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([1e4, -1e4, 1e4])[:, None, None].expand(3, 2, 2).clone().requires_grad_()
    base = torch.ones(2, 2, dtype=torch.uint8)
    loss = bce_sum(logits, base, pos_weight=2.0)
    loss.backward()
    assert loss.item() == pytest.approx(4 * (1e4 + 2e4 + 1e4))
    assert logits.grad.isfinite().all()


def test_half_precision_logits_are_summed_in_float32():
    logits, target = random_case(3)
    half = logits.half().requires_grad_()
    size = target.base.shape[-2:]

    def parts_of(i, z):
        assert z.dtype == torch.float32
        return bce_sum(z, target.base[i])[None]

    loss, _ = sum_over_images(half, size, parts_of, torch.ones(1))
    loss.backward()
    expected = plain_bce(
        up(half.detach().double(), size), one_hot(target.base, 6), target.base != 255, 1.0
    ).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert half.grad.dtype == torch.float16
