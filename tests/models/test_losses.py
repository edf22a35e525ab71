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
ALL = {"bce": 0.7, "ac": 1.9, **dict.fromkeys(MODES, 0.4)}  # each term with a weight
TERMS = [{name: weight} for name, weight in ALL.items()] + [ALL]
SIZE = (33, 40)
SINGLE, DOUBLE = torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64)


def random_case(seed=0, n=3, old=4, new=2, pastes=2, size=SIZE, scale=3.0, pos_weight=2.0):
    """Stride-16 logits of student and teacher, given labels, labels with pseudo labels, pastes."""
    g = torch.Generator().manual_seed(seed)
    h, w = (-(-side // 16) for side in size)
    channels = old + new
    case = SimpleNamespace(n=n, old=old, channels=channels, size=size, pos_weight=pos_weight)
    case.student = scale * torch.randn(n, channels, h, w, generator=g, dtype=torch.float64)
    case.teacher = scale * torch.randn(n, old, h, w, generator=g, dtype=torch.float64)
    values = torch.tensor([0, 0, 1, VOID, *range(old, channels)])
    case.given = values[torch.randint(0, len(values), (n, *size), generator=g)].to(torch.uint8)
    pseudo = torch.randint(0, old, (n, *size), generator=g).to(torch.uint8)
    case.labels = torch.where(case.given == 0, pseudo, case.given)
    case.classes = torch.randint(1, old, (n, pastes), generator=g)
    mask = torch.rand(n, 1, *size, generator=g) < 0.5
    shares = torch.rand(n, pastes + 1, *size, generator=g, dtype=torch.float64)
    case.weights = (shares / shares.sum(dim=1, keepdim=True))[:, :pastes] * mask
    case.covered = case.weights.sum(dim=1) > 0
    case.valid = case.given != VOID
    return case


def fast(case, logits, scale, weights):
    """Loss and terms by the code under test; weights: by name, a distillation's is (mode, region)."""

    def term(name, i, z):
        if name == "bce":
            shares = case.weights[i].to(z.dtype)
            return bce_sum(z, case.labels[i], case.classes[i], shares, case.pos_weight)
        if name == "ac":
            return auxiliary_sum(z, case.labels[i])
        teacher = upsample_logits(case.teacher[i : i + 1].to(z.dtype), case.size)[0]
        return distillation_sum(z, teacher, case.given[i], case.covered[i], *name)

    def losses(i, z):
        return {name: weight * term(name, i, z) for name, weight in weights.items()}

    return sum_over_images(logits, case.size, losses, scale)


def plain(case, logits, weights):
    """Each weighted term by the formulas, in float64: by name, summed over images."""
    z = upsample_logits(logits.double(), case.size)
    found = {}
    for name, weight in weights.items():
        if name == "bce":
            soft = plain_soft_labels(case.labels, case.classes, case.weights, case.channels)
            rows = plain_bce(z, soft, case.labels, case.pos_weight)
        elif name == "ac":
            rows = plain_auxiliary(z, case.labels)
        else:
            teacher = upsample_logits(case.teacher.double(), case.size)
            rows = plain_distillation(z, teacher, case.given, case.covered, *name)
        found[name] = weight * rows.sum()
    return found


def assert_terms(found, expected, relative):
    assert list(found) == list(expected)
    assert [v.item() for v in found.values()] == pytest.approx(
        [v.item() for v in expected.values()], rel=relative
    )


class TestAgainstTheFormulas:
    @pytest.mark.parametrize("new", [1, 3])
    @pytest.mark.parametrize("weights", TERMS, ids=str)
    @pytest.mark.parametrize(
        ("dtype", "relative"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["64", "32"]
    )
    def test_values_and_gradients(self, weights, new, dtype, relative):
        case = random_case(seed=new, new=new)
        scale = 1.7 / case.valid.sum().to(dtype)
        logits = case.student.clone().to(dtype).requires_grad_()
        loss, terms = fast(case, logits, scale, weights)
        (3 * loss).backward()

        plain_logits = case.student.clone().requires_grad_()
        expected = plain(case, plain_logits, weights)
        total = sum(expected.values()) * scale.double()
        (3 * total).backward()

        assert loss.dtype == dtype and not any(term.requires_grad for term in terms.values())
        assert loss.item() == pytest.approx(total.item(), rel=relative)
        assert_terms(terms, expected, relative)
        largest = plain_logits.grad.abs().max()
        assert (logits.grad - plain_logits.grad).abs().max() <= relative * largest and largest > 0

    @pytest.mark.parametrize("pos_weight", [1.0, 0.5])
    @pytest.mark.parametrize("pastes", [0, 1, 3])
    def test_bce_of_other_weights_and_pastes(self, pos_weight, pastes):
        case = random_case(pastes=pastes, pos_weight=pos_weight)
        logits, plain_logits = (case.student.clone().requires_grad_() for _ in range(2))
        loss, _ = fast(case, logits, DOUBLE, {"bce": 1.0})
        loss.backward()
        expected = plain(case, plain_logits, {"bce": 1.0})["bce"]
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        assert torch.allclose(logits.grad, plain_logits.grad, rtol=1e-9, atol=1e-12)

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
            ("rskd", "new"): (None, None, wide, wide),
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

    def test_pos_weight_leaves_the_background_alone(self):
        base = torch.zeros(4, 4, dtype=torch.uint8)
        logits = torch.randn(5, 4, 4, dtype=torch.float64)
        assert bce_sum(logits, base, pos_weight=1.0) == bce_sum(logits, base, pos_weight=9.0)

    @pytest.mark.parametrize("region", ["all", "new"])
    @pytest.mark.parametrize("pixel", [0, 1, 2, 3])
    def test_a_single_new_class_is_finite_everywhere(self, region, pixel):
        case = random_case(new=1, scale=20.0)
        case.given.fill_([0, case.old, case.old, VOID][pixel])
        case.covered = torch.full_like(case.covered, pixel == 2)
        logits = case.student.clone().float().requires_grad_()
        loss, _ = fast(case, logits, SINGLE, {("rskd", region): 1.0})
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()
        assert (loss > 0) == (pixel in (1, 2) or (region == "all" and pixel == 0))

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

    def test_images_of_void_alone_count_nothing(self):
        case = random_case()
        case.given.fill_(VOID)
        case.labels.fill_(VOID)
        logits = case.student.clone().requires_grad_()
        loss, terms = fast(case, logits, DOUBLE, ALL)
        loss.backward()
        assert loss == 0 and not any(terms.values()) and not logits.grad.any()


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("weights", TERMS, ids=str)
    def test_large_logits_stay_finite_and_right(self, weights, dtype):
        case = random_case(new=1)
        case.student = (80 * case.student.sign()).to(dtype)
        case.teacher = (80 * case.teacher.sign()).to(dtype)
        logits = case.student.clone().requires_grad_()
        loss, terms = fast(case, logits, 1 / case.valid.sum().float(), weights)
        loss.backward()
        assert {term.dtype for term in terms.values()} == {torch.float32} and logits.grad.dtype == dtype
        assert logits.grad.isfinite().all()
        assert_terms(terms, plain(case, case.student, weights), 1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast_around_the_losses_changes_nothing(self, dtype):
        case = random_case()
        case.student, case.teacher = case.student.to(dtype), case.teacher.to(dtype)
        results = []
        for enabled in (False, True):
            logits = case.student.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss, terms = fast(case, logits, SINGLE, ALL)
            loss.backward()
            results.append((*terms.values(), logits.grad))
        assert all(map(torch.equal, *results))
        assert_terms(terms, plain(case, case.student, ALL), 1e-5)

    @pytest.mark.parametrize("weights", TERMS, ids=str)
    def test_logits_far_beyond_the_usual(self, weights):
        case = random_case(new=1, scale=1e4)
        logits = case.student.clone().float().requires_grad_()
        loss, _ = fast(case, logits, torch.tensor(1e-3), weights)
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()

    def test_a_loss_scale_saves_the_gradient_of_half_precision_logits(self):
        size = (512, 512)
        base = torch.zeros(size, dtype=torch.uint8)

        def gradient(dtype):
            logits = torch.full((1, 9, 32, 32), -8.0, dtype=dtype, requires_grad=True)
            losses = lambda _, z: {"bce": bce_sum(z, base)}  # noqa: E731
            loss, _ = sum_over_images(logits, size, losses, SINGLE / (32 * 512 * 512))
            (65536 * loss).backward()
            return logits.grad.float()

        exact, half = gradient(torch.float32), gradient(torch.float16)
        assert (exact != 0).all()
        torch.testing.assert_close(half, exact, rtol=2e-3, atol=0)


class Outputs(TorchDispatchMode):
    """Records the operations' names and the number of elements that they return."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.seen.append((tensor.numel(), function.overloadpacket.__name__))
        return result


class TestImageByImage:
    def test_images_do_not_influence_one_another(self):
        case = random_case(n=4)
        whole = case.student.clone().requires_grad_()
        loss, terms = fast(case, whole, DOUBLE, ALL)
        loss.backward()
        total = dict.fromkeys(ALL, 0)
        for i in range(4):
            fields = ("student", "teacher", "given", "labels", "classes", "weights", "covered")
            one = SimpleNamespace(**vars(case))
            for name in fields:
                setattr(one, name, getattr(case, name)[i : i + 1])
            logits = one.student.clone().requires_grad_()
            loss, terms_of_one = fast(one, logits, DOUBLE, ALL)
            loss.backward()
            total = {name: total[name] + value for name, value in terms_of_one.items()}
            assert torch.allclose(logits.grad[0], whole.grad[i], rtol=1e-12, atol=1e-14)
        assert_terms(total, terms, 1e-12)

    def test_the_largest_tensor_does_not_grow_with_the_batch(self):
        largest = []
        for n in (1, 6):
            case = random_case(n=n, size=(64, 64))
            case.weights = case.weights.float()
            logits = case.student.float().requires_grad_()
            with Outputs() as outputs:
                loss, _ = fast(case, logits, SINGLE, ALL)
                loss.backward()
            largest.append(max(outputs.seen)[0])
        assert largest[0] == largest[1] == case.channels * 64 * 64

    def test_no_one_hot_targets_are_built(self):
        """Beside the logits and their gradients, nothing has channels at full size for the BCE."""
        z = torch.randn(6, 64, 64)
        with Outputs() as outputs:
            bce_sum(z, torch.ones(64, 64, dtype=torch.uint8))
        assert [name for size, name in outputs.seen if size >= z.numel()] == ["softplus"]
