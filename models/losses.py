"""Losses on stride-16 logits: BCE on sparse soft labels, and distillation.

Soft labels are sparse: a base label and, per pasted instance, a class and a weight map. BCE is linear
in its target, so that no tensor of one-hot targets is ever built. The losses go through the batch
image by image, taking the gradient of each image at once, so that full-size logits of the whole batch
never exist together and memory does not grow with the batch. All arithmetic is float32 or wider.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from models.deeplabv3 import upsample_logits

VOID = 255


def bce_sum(
    logits: torch.Tensor,
    base: torch.Tensor,
    classes: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    pos_weight: float = 1.0,
) -> torch.Tensor:
    """Binary cross entropy of one image, summed over channels and non-void pixels (METHOD 3).

    logits [C, H, W]. The soft label of a pixel is weights[k] (float [K, H, W]) for channel classes[k]
    (int64 [K]) and the rest for its base label (uint8 [H, W], 255 void); without pastes, the base
    label alone. pos_weight p multiplies the positive term of the foreground channels.
    A channel with target t costs softplus(z) + t * gain(z), gain(z) = (p - 1) * softplus(z) - p * z,
    and t is zero for all channels but those named.
    """
    valid = base != VOID
    base = torch.where(valid, base, 0).long()[None]
    named = _gain(logits.gather(0, base)[0], torch.where(base[0] > 0, pos_weight, 1.0), pos_weight)
    if classes is not None:
        gains = _gain(logits[classes], pos_weight, pos_weight)
        named = named * (1 - weights.sum(dim=0)) + (weights * gains).sum(dim=0)
    return ((F.softplus(logits).sum(dim=0) + named) * valid).sum()


def _gain(z, p, pos_weight):
    """What a positive target changes in the cost of a channel; p = 1 for all needs no softplus."""
    return -z if pos_weight == 1 else (p - 1) * F.softplus(z) - p * z


def auxiliary_sum(logits: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """L_ac of one image: binary cross entropy of channel 0 with zeros, summed like bce_sum."""
    return (F.softplus(logits[0]) * (base != VOID)).sum()


def distillation_sum(
    logits: torch.Tensor,
    teacher: torch.Tensor,
    base: torch.Tensor,
    covered: torch.Tensor,
    mode: str = "rskd",
    region: str = "all",
) -> torch.Tensor:
    """Distillation of one image, summed over non-void pixels (METHOD 5, L_rskd).

    logits [C, H, W] of the student, teacher [S, H, W]: channels S..C-1 are the new classes.
    base: uint8 [H, W] given labels. covered: bool [H, W], where an instance was pasted.
    The cost of a pixel is -(1/S) sum_c p_teacher(c) log q(c), with p and q from the softmax over all
    channels and q(c) = p_student(c) for old classes. q(background) is, by mode:
    plain: p_student(background); unbiased: that plus the new classes; rskd: as plain, but on new
    pixels the new classes alone, or where an instance covers them, as unbiased.
    region "new" counts only new pixels that no instance covers.
    """
    old = teacher.shape[0]
    valid = base != VOID
    is_new = valid & (base >= old)
    background, known, new = logits.split([1, old - 1, len(logits) - old])
    background, new = background[0], new.logsumexp(dim=0)
    both = torch.logaddexp(background, new)
    normalizer = torch.logaddexp(known.logsumexp(dim=0), both)
    if mode == "unbiased":
        background = both
    elif mode == "rskd":
        background = torch.where(is_new, torch.where(covered, both, new), background)
    p = teacher.softmax(dim=0)
    expected = p[0] * background + (p[1:] * known).sum(dim=0)
    counted = is_new & ~covered if region == "new" else valid
    return ((normalizer - expected) * counted).sum() / old


class _ImageByImage(torch.autograd.Function):
    """Sum over images of weighted loss parts; the gradient is taken image by image on the way."""

    @staticmethod
    def forward(ctx, logits, size, parts_of, weights):
        gradient = torch.empty_like(logits, dtype=weights.dtype)
        total = torch.zeros_like(weights)
        for i in range(len(logits)):
            with torch.enable_grad(), torch.autocast(logits.device.type, enabled=False):
                leaf = logits[i : i + 1].detach().to(weights.dtype).requires_grad_()
                parts = parts_of(i, upsample_logits(leaf, size)[0])
                (gradient[i : i + 1],) = torch.autograd.grad((parts * weights).sum(), leaf)
            total += parts.detach()
        ctx.save_for_backward(gradient)  # in full precision: a loss scale is still to come
        ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(total)
        return (total * weights).sum(), total

    @staticmethod
    def backward(ctx, outer, _):
        (gradient,) = ctx.saved_tensors
        return (gradient * outer).to(ctx.dtype), None, None, None


def sum_over_images(
    logits: torch.Tensor,
    size: tuple[int, int],
    parts_of: Callable[[int, torch.Tensor], torch.Tensor],
    weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and parts of a batch, image by image.

    logits [N, C, h, w]; parts_of(i, full-size logits [C, H, W] of image i) gives the loss parts [P];
    weights [P], float32 or float64, sets the precision. Returns the weighted sum, differentiable
    with respect to logits, and the parts summed over images, [P], without gradient.
    """
    return _ImageByImage.apply(logits, size, parts_of, weights)
