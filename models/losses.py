"""Losses on stride-16 logits: BCE on sparse soft labels, and distillation.

Soft labels are sparse: a label and, per pasted instance, a class and a weight map. BCE is linear
in its target, so that no tensor of one-hot targets is ever built. The losses go through the batch
image by image, taking the gradient of each image at once, so that full-size logits of the whole batch
never exist together and memory does not grow with the batch. All arithmetic is float32 or wider.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from models.deeplabv3 import upsample_logits
from utils.visualize import VOID


def bce_sum(
    logits: torch.Tensor,
    labels: torch.Tensor,
    classes: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    pos_weight: float = 1.0,
) -> torch.Tensor:
    """Binary cross entropy of one image, summed over channels and pixels that are not void (METHOD 3).

    logits [C, H, W]; labels uint8 [H, W], channels and void; classes int64 [K], the channels of the
    pasted instances, and weights float [K, H, W], their shares of each pixel's soft label: the label
    has the rest. Without pastes the label has all of it. pos_weight multiplies the positive term of
    the foreground channels. Returns a scalar.

    A channel with target t costs softplus(z) + t * gain(z), gain(z) = (p - 1) * softplus(z) - p * z
    with p = pos_weight, and t is zero for all channels but those named.
    """
    valid = labels != VOID
    labels = torch.where(valid, labels, 0).long()[None]
    of_label = logits.gather(0, labels)[0]
    if pos_weight == 1:
        gain = -of_label
    else:
        gain = _gain(of_label, torch.where(labels[0] > 0, pos_weight, 1.0))
    if classes is not None:
        of_pastes = -logits[classes] if pos_weight == 1 else _gain(logits[classes], pos_weight)
        gain = gain * (1 - weights.sum(dim=0)) + (weights * of_pastes).sum(dim=0)
    return ((F.softplus(logits).sum(dim=0) + gain) * valid).sum()


def _gain(z, p):
    """What a positive target changes in the cost of a channel of logit z; -z where p is 1."""
    return (p - 1) * F.softplus(z) - p * z


def auxiliary_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """L_ac of one image: binary cross entropy of channel 0 with zeros, over pixels that are not void.

    logits [C, H, W]; labels uint8 [H, W]. Returns the sum, a scalar.
    """
    return (F.softplus(logits[0]) * (labels != VOID)).sum()


def new_class_sum(
    logits: torch.Tensor, labels: torch.Tensor, first: int, pos_weight: float = 1.0
) -> torch.Tensor:
    """DKD's binary cross entropy of one image, summed over channels and all pixels (METHOD 7).

    logits [K, H, W] of the channels first, first + 1, ..; labels uint8 [H, W]. The target of a channel
    is 1 where the label names it and 0 everywhere else, on void too. pos_weight multiplies the
    positive term. Returns a scalar.
    """
    channel = labels.long() - first
    named = (channel >= 0) & (channel < len(logits))
    of_label = logits.gather(0, torch.where(named, channel, 0)[None])[0]
    return F.softplus(logits).sum() + (_gain(of_label, pos_weight) * named).sum()


def soft_target_sum(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy of logits with the sigmoid of the teacher's as target, summed over all.

    logits and teacher of the same shape, whatever it is. Returns a scalar.
    """
    return (F.softplus(logits) - teacher.sigmoid() * logits).sum()


def distillation_sum(
    logits: torch.Tensor,
    teacher: torch.Tensor,
    given: torch.Tensor,
    covered: torch.Tensor,
    mode: str = "rskd",
    region: str = "new",
) -> torch.Tensor:
    """Distillation of one image, summed over pixels that are not void (METHOD 5, L_rskd).

    logits [C, H, W] of the student, teacher [S, H, W]: channels S..C-1 are the new classes.
    given: uint8 [H, W], the labels of the data set, without pseudo labels. covered: bool [H, W], where
    an instance was pasted. Returns a scalar.

    The cost of a pixel is -(1/S) sum_c p_teacher(c) log q(c), with p and q from the softmax over all
    channels and q(c) = p_student(c) for old classes. q(background) and the pixels depend on the mode:
    plain: p_student(background), all pixels.
    unbiased: p_student(background) plus that of the new classes, all pixels.
    rskd: on pixels given to a new class, p_student of the new classes. With region new these are the
        only ones, with an instance on them or not (the paper's configuration: the formula of the
        release's RSKnowledgeDistillationLoss, on the mask that it assigns first). With region all the
        other pixels count as in plain, and those of a new class under an instance as in unbiased,
        since both are there in part.
    """
    old = teacher.shape[0]
    valid = given != VOID
    is_new = valid & (given >= old)
    background, known, new = logits.split([1, old - 1, len(logits) - old])
    background, new = background[0], new.logsumexp(dim=0)
    both = torch.logaddexp(background, new)
    log_partition = torch.logaddexp(known.logsumexp(dim=0), both)
    if mode == "unbiased":
        background = both
    elif mode == "rskd":
        if region == "all":
            new = torch.where(covered, both, new)
        background = torch.where(is_new, new, background)
    p = teacher.softmax(dim=0)
    expected = p[0] * background + (p[1:] * known).sum(dim=0)
    counted = is_new if (mode, region) == ("rskd", "new") else valid
    return ((log_partition - expected) * counted).sum() / old


class _ImageByImage(torch.autograd.Function):
    """Sum over images of loss terms; the gradient is taken image by image on the way."""

    @staticmethod
    def forward(ctx, logits, size, terms_of, scale):
        gradient = torch.empty_like(logits, dtype=scale.dtype)
        total = 0
        for i in range(len(logits)):
            with torch.enable_grad(), torch.autocast(logits.device.type, enabled=False):
                # channel by channel in memory, however the network left them: sums over full-size
                # channels are then not strided
                leaf = logits[i : i + 1].detach().to(scale.dtype).contiguous().requires_grad_()
                terms = terms_of(i, upsample_logits(leaf, size)[0])
                (gradient[i : i + 1],) = torch.autograd.grad((terms * scale).sum(), leaf)
            total = total + terms.detach()
        ctx.save_for_backward(gradient)  # in full precision: a loss scale is still to come
        ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(total)
        return (total * scale).sum(), total

    @staticmethod
    def backward(ctx, outer, _):
        (gradient,) = ctx.saved_tensors
        return (gradient * outer).to(ctx.dtype), None, None, None


def sum_over_images(
    logits: torch.Tensor,
    size: tuple[int, int],
    losses: Callable[[int, torch.Tensor], dict[str, torch.Tensor]],
    scale: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a batch, and its terms by name, image by image.

    logits [N, C, h, w] at stride 16, upsampled here to size (H, W); losses(i, logits [C, H, W] of image
    i) gives the weighted terms of its loss, scalars by name, the same names for each image; scale, a
    scalar, float32 or float64, multiplies their sum and sets the precision of it all.
    Returns the scaled sum, differentiable with respect to logits, and the terms summed over images,
    neither scaled nor differentiable.
    """
    names = []

    def terms_of(i, z):
        terms = losses(i, z)
        names[:] = terms
        return torch.stack(list(terms.values()))

    loss, total = _ImageByImage.apply(logits, size, terms_of, scale)
    return loss, dict(zip(names, total.unbind(), strict=True))
