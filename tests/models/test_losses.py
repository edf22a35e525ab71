"""The losses, values and gradients, against the plain formulas; extremes; memory."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.deeplabv3 import upsample_logits
from models.losses import auxiliary_sum, bce_sum, distillation_sum, sum_over_images
from scripts.plain import plain_auxiliary, plain_bce, plain_distillation, plain_soft_labels

VOID = 255
MODES = [("plain", "all"), ("unbiased", "all"), ("rskd", "all"), ("rskd", "new")]
SIZE = (33, 40)


def random_case(seed=0, n=3, old=4, new=2, pastes=2, size=SIZE, scale=3.0, dtype=torch.float64):
    """Stride-16 logits of student and teacher, given labels, labels with pseudo labels, pastes."""
    g = torch.Generator().manual_seed(seed)
    h, w = (-(-side // 16) for side in size)
    channels = old + new
    case = SimpleNamespace(n=n, old=old, channels=channels, size=size)
    case.student = scale * torch.randn(n, channels, h, w, generator=g, dtype=torch.float64).to(dtype)
    case.teacher = scale * torch.randn(n, old, h, w, generator=g, dtype=torch.float64).to(dtype)
    values = torch.tensor([0, 0, 1, VOID, *range(old, channels)])
    case.given = values[torch.randint(0, len(values), (n, *size), generator=g)].to(torch.uint8)
    pseudo = torch.randint(0, old, (n, *size), generator=g).to(torch.uint8)
    case.labels = torch.where(case.given == 0, pseudo, case.given)
    case.classes = torch.randint(1, old, (n, pastes), generator=g)
    mask = torch.rand(n, 1, *size, generator=g) < 0.5
    shares = torch.rand(n, pastes + 1, *size, generator=g, dtype=torch.float64)
    case.weights = (shares / shares.sum(dim=1, keepdim=True))[:, :pastes].to(dtype) * mask
    case.covered = case.weights.sum(dim=1) > 0
    case.valid = case.given != VOID
    return case


def fast(case, logits, factors, parts):
    """Loss and parts by the code under test; parts: names, or (mode, region) of a distillation."""

    def part(name, i, z):
        if name == "bce":
            return bce_sum(z, case.labels[i], case.classes[i], case.weights[i].to(z.dtype), 2.0)
        if name == "ac":
            return auxiliary_sum(z, case.labels[i])
        teacher = upsample_logits(case.teacher[i : i + 1].to(z.dtype), case.size)[0]
        return distillation_sum(z, teacher, case.given[i], case.covered[i], *name)

    return sum_over_images(
        logits, case.size, lambda i, z: torch.stack([part(name, i, z) for name in parts]), factors
    )


def plain(case, logits, parts):
    """Each part, per image [P, N], by the formulas."""
    z = upsample_logits(logits, case.size)
    rows = []
    for name in parts:
        if name == "bce":
            weights = case.weights.to(z.dtype)
            soft = plain_soft_labels(case.labels, case.classes, weights, case.channels)
            rows.append(plain_bce(z, soft, case.labels, 2.0))
        elif name == "ac":
            rows.append(plain_auxiliary(z, case.labels))
        else:
            teacher = upsample_logits(case.teacher.to(z.dtype), case.size)
            rows.append(plain_distillation(z, teacher, case.given, case.covered, *name))
    return torch.stack(rows)


def assert_close(found, expected, relative):
    assert (found - expected).abs().max() <= relative * expected.abs().max()


PARTS = [("bce",), ("ac",), *((mode,) for mode in MODES), ("bce", "ac", ("rskd", "all"))]


class TestAgainstTheFormulas:
    @pytest.mark.parametrize("new", [1, 3])
    @pytest.mark.parametrize("parts", PARTS, ids=str)
    @pytest.mark.parametrize(
        ("dtype", "relative"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["64", "32"]
    )
    def test_values_and_gradients(self, parts, new, dtype, relative):
        case = random_case(seed=new, new=new)
        factors = torch.tensor([0.7, 1.9, 0.4][: len(parts)], dtype=dtype) / case.valid.sum()
        logits = case.student.clone().to(dtype).requires_grad_()
        loss, sums = fast(case, logits, factors, parts)
        (3 * loss).backward()

        plain_logits = case.student.clone().requires_grad_()
        rows = plain(case, plain_logits, parts)
        expected = (rows.sum(dim=1) * factors.double()).sum()
        (3 * expected).backward()

        assert loss.dtype == sums.dtype == dtype and not sums.requires_grad
        assert loss.item() == pytest.approx(expected.item(), rel=relative)
        assert sums.tolist() == pytest.approx(rows.sum(dim=1).tolist(), rel=relative)
        assert plain_logits.grad.abs().max() > 0
        assert_close(logits.grad, plain_logits.grad, relative)

    @pytest.mark.parametrize("mode", MODES, ids=str)
    def test_distillation_of_one_image_pixel_by_pixel(self, mode):
        """METHOD's q for single pixels: background, that covered, new, that covered."""
        p_teacher = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
        p_student = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64)
        old_terms = 0.2 * torch.tensor(0.2).log() + 0.3 * torch.tensor(0.3).log()
        narrow, wide, merged = 0.1, 0.4, 0.5
        background = {
            ("plain", "all"): (narrow, narrow, narrow, narrow),
            ("unbiased", "all"): (merged, merged, merged, merged),
            ("rskd", "all"): (narrow, narrow, wide, merged),
            ("rskd", "new"): (None, None, wide, None),
        }[mode]
        for base, covered, q in zip((0, 0, 4, 3), (False, True, False, True), background, strict=True):
            found = distillation_sum(
                p_student.log()[:, None, None],
                p_teacher.log()[:, None, None],
                torch.tensor([[base]], dtype=torch.uint8),
                torch.tensor([[covered]]),
                *mode,
            )
            expected = 0.0 if q is None else -(0.5 * torch.tensor(q).log() + old_terms).item() / 3
            assert found.item() == pytest.approx(expected, abs=1e-6)

    def test_the_modes_differ(self):
        case = random_case()
        values = {float(plain(case, case.student, [mode]).sum()) for mode in MODES}
        assert len(values) == 4
        assert (case.covered & (case.given >= case.old) & case.valid).any()

    @pytest.mark.parametrize("region", ["all", "new"])
    @pytest.mark.parametrize("pixel", [0, 1, 2, 3])
    def test_a_single_new_class_is_finite_everywhere(self, region, pixel):
        case = random_case(new=1, scale=20.0)
        case.given.fill_([0, case.old, case.old, VOID][pixel])
        case.covered = torch.full_like(case.covered, pixel == 2)
        logits = case.student.clone().float().requires_grad_()
        loss, _ = fast(case, logits, torch.ones(1), [("rskd", region)])
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()
        assert (loss > 0) == (pixel == 1 or (region == "all" and pixel != 3))

    def test_images_of_void_alone_count_nothing(self):
        case = random_case()
        case.given.fill_(VOID)
        case.labels.fill_(VOID)
        logits = case.student.clone().requires_grad_()
        loss, sums = fast(case, logits, torch.ones(6).double(), ["bce", "ac", *MODES])
        loss.backward()
        assert loss == 0 and not sums.any() and not logits.grad.any()

    def test_void_pixels_get_no_gradient_whatever_is_pasted_on_them(self):
        case = random_case(size=(8, 8))
        z = torch.randn(case.channels, 8, 8, dtype=torch.float64, requires_grad=True)
        teacher = torch.randn(case.old, 8, 8, dtype=torch.float64)
        loss = bce_sum(z, case.labels[0], case.classes[0], case.weights[0], 2.0)
        loss = loss + auxiliary_sum(z, case.labels[0])
        for mode in MODES:
            loss = loss + distillation_sum(z, teacher, case.given[0], case.covered[0], *mode)
        loss.backward()
        void = ~case.valid[0]
        assert (void & case.covered[0]).any()
        assert not z.grad[:, void].any() and z.grad[:, ~void].any(dim=0).all()


class TestExtremes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("parts", PARTS, ids=str)
    def test_large_logits_stay_finite_and_right(self, parts, dtype):
        case = random_case(new=1)
        case.student = (80 * case.student.sign()).to(dtype)
        case.teacher = (80 * case.teacher.sign()).to(dtype)
        logits = case.student.clone().requires_grad_()
        factors = torch.ones(len(parts)) / case.valid.sum()
        loss, sums = fast(case, logits, factors, parts)
        loss.backward()
        assert sums.dtype == torch.float32 and logits.grad.dtype == dtype
        assert logits.grad.isfinite().all()
        expected = plain(case, case.student.double(), parts).sum(dim=1)
        assert sums.tolist() == pytest.approx(expected.tolist(), rel=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast_around_the_losses_changes_nothing(self, dtype):
        case = random_case(dtype=dtype)
        parts = ["bce", "ac", *MODES]
        results = []
        for enabled in (False, True):
            logits = case.student.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss, sums = fast(case, logits, torch.ones(6), parts)
            loss.backward()
            results.append((sums, logits.grad))
        assert all(map(torch.equal, *results))
        expected = plain(case, case.student.double(), parts).sum(dim=1)
        assert results[0][0].tolist() == pytest.approx(expected.tolist(), rel=1e-5)

    def test_autocast_is_off_inside(self):
        states = []

        def parts_of(i, z):
            states.append(torch.is_autocast_enabled("cpu"))
            return z.sum()[None]

        logits = torch.randn(2, 3, 4, 4, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            sum_over_images(logits, (8, 8), parts_of, torch.ones(1))
        assert states == [False, False]

    @pytest.mark.parametrize("parts", PARTS, ids=str)
    def test_logits_far_beyond_the_usual(self, parts):
        case = random_case(new=1, scale=1e4)
        logits = case.student.clone().float().requires_grad_()
        loss, _ = fast(case, logits, torch.full((len(parts),), 1e-3), parts)
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()


class _Sizes(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


class TestImageByImage:
    PARTS = ("bce", "ac", *MODES)

    def test_images_do_not_influence_one_another(self):
        case = random_case(n=4)
        whole = case.student.clone().requires_grad_()
        factors = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
        loss, sums = fast(case, whole, factors, self.PARTS)
        loss.backward()
        total = torch.zeros_like(sums)
        for i in range(4):
            fields = ("student", "teacher", "given", "labels", "classes", "weights", "covered")
            one = SimpleNamespace(size=case.size, channels=case.channels)
            for name in fields:
                setattr(one, name, getattr(case, name)[i : i + 1])
            logits = one.student.clone().requires_grad_()
            loss, sums_of_one = fast(one, logits, factors, self.PARTS)
            loss.backward()
            total += sums_of_one
            assert torch.allclose(logits.grad[0], whole.grad[i], rtol=1e-12, atol=1e-14)
        assert torch.allclose(total, sums, rtol=1e-12)

    def test_the_largest_tensor_does_not_grow_with_the_batch(self):
        largest = []
        for n in (1, 6):
            case = random_case(n=n, size=(64, 64), dtype=torch.float32)
            logits = case.student.requires_grad_()
            with _Sizes() as sizes:
                loss, _ = fast(case, logits, torch.ones(6), self.PARTS)
                loss.backward()
            largest.append(sizes.largest)
        assert largest[0] == largest[1] == case.channels * 64 * 64

    def test_no_one_hot_targets_are_built(self):
        """Beside the logits and their gradients, nothing has channels at full size for the BCE."""
        case = random_case(n=1, size=(64, 64), pastes=0, dtype=torch.float32)
        seen = []

        class Outputs(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                if isinstance(result, torch.Tensor) and result.numel() >= case.channels * 64 * 64:
                    seen.append(function.overloadpacket.__name__)
                return result

        z = torch.randn(case.channels, 64, 64)
        with Outputs():
            bce_sum(z, case.labels[0])
        assert seen == ["softplus"]

    def test_the_networks_get_the_gradient_scaled_from_outside(self):
        case = random_case()
        gradients = []
        for scale in (1.0, 1024.0):
            features = case.student.clone().requires_grad_()
            loss, _ = fast(case, 2 * features, torch.ones(1).double(), ["bce"])
            (loss * scale).backward()
            gradients.append(features.grad / scale)
        assert torch.allclose(*gradients, rtol=1e-12)


def test_a_loss_scale_saves_the_gradient_of_half_precision_logits():
    size = (512, 512)
    base = torch.zeros(size, dtype=torch.uint8)
    weights = torch.full((1,), 1 / (32 * 512 * 512))

    def gradient(dtype):
        logits = torch.full((1, 9, 32, 32), -8.0, dtype=dtype, requires_grad=True)
        loss, _ = sum_over_images(logits, size, lambda _, z: bce_sum(z, base)[None], weights)
        (65536 * loss).backward()
        return logits.grad.float()

    exact, half = gradient(torch.float32), gradient(torch.float16)
    assert (exact != 0).all()
    torch.testing.assert_close(half, exact, rtol=2e-3, atol=0)
