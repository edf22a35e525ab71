"""The losses of METHOD 3 and 5 by their formulas: whole batches at full size, one-hot targets."""

import torch
import torch.nn.functional as F

VOID = 255


def upsampled(logits, size):
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def soft_labels(base, classes, weights, channels):
    """Dense soft labels [N, C, H, W] of base labels [N, H, W], pasted classes and their weights."""
    planes = [(base == c).to(weights.dtype) for c in range(channels)]
    soft = torch.stack(planes, dim=1) * (1 - weights.sum(dim=1, keepdim=True))
    for n in range(len(base)):
        for k, c in enumerate(classes[n].tolist()):
            soft[n, c] = soft[n, c] + weights[n, k]
    return soft


def bce(logits, soft, base, pos_weight=1.0):
    """L_bce per image [N], summed over channels and non-void pixels; all [N, C, H, W] at full size."""
    factor = torch.full((logits.shape[1], 1, 1), pos_weight, dtype=logits.dtype)
    factor[0] = 1
    cost = F.binary_cross_entropy_with_logits(logits, soft, reduction="none", pos_weight=factor)
    return (cost.sum(dim=1) * (base != VOID)).sum(dim=(1, 2))


def auxiliary(logits, base):
    """L_ac per image [N]: binary cross entropy of channel 0 with zeros over non-void pixels."""
    zeros = torch.zeros_like(logits[:, 0])
    cost = F.binary_cross_entropy_with_logits(logits[:, 0], zeros, reduction="none")
    return (cost * (base != VOID)).sum(dim=(1, 2))


def distillation(logits, teacher, base, covered, mode, region="all"):
    """Distillation per image [N], by probabilities; logits [N, C, H, W], teacher [N, S, H, W]."""
    old = teacher.shape[1]
    p_student, p_teacher = logits.softmax(dim=1), teacher.softmax(dim=1)
    background = p_student[:, 0]
    new = p_student[:, old:].sum(dim=1)
    shows_new = torch.zeros_like(base, dtype=torch.bool)
    for c in range(old, logits.shape[1]):
        shows_new |= base == c
    new_region, both_true = shows_new & ~covered, shows_new & covered
    if mode == "unbiased":
        background = background + new
    elif mode == "rskd":
        elsewhere = background * (~shows_new)
        background = elsewhere + new * new_region + (background + new) * both_true
    q = torch.cat([background[:, None], p_student[:, 1:old]], dim=1)
    cost = -(p_teacher * q.log()).sum(dim=1) / old
    counted = new_region if region == "new" else base != VOID
    return torch.where(counted, cost, 0).sum(dim=(1, 2))
