"""What the teacher believes the background of new images to be (METHOD 5, 1)."""

import torch

from models.deeplabv3 import upsample_logits
from utils.visualize import VOID


def pseudo_labels(labels: torch.Tensor, teacher: torch.Tensor, threshold: float) -> torch.Tensor:
    """Labels uint8 [N, H, W] in which background takes the teacher's confident classes.

    teacher: logits [N, S, h, w] at stride 16. A background pixel takes the arg max channel of the
    sigmoid scores if that is foreground and its score reaches the threshold (METHOD 5, 1).
    Goes image by image, so that full-size logits of the batch never exist together.
    """
    filled = torch.empty_like(labels)
    for i, label in enumerate(labels):
        best, channel = upsample_logits(teacher[i : i + 1].float(), label.shape)[0].max(dim=0)
        confident = (label == 0) & (channel > 0) & (best.sigmoid() >= threshold)
        filled[i] = torch.where(confident, channel.to(labels.dtype), label)
    return filled


def ignore_doubtful(
    labels: torch.Tensor, teacher: torch.Tensor, threshold: float, weights: torch.Tensor
) -> torch.Tensor:
    """Labels uint8 [N, H, W] in which background that may be an old class is void.

    Void becomes background that has no pseudo label and no pasted instance (weights float
    [N, K, H, W], as in Composite), and where an old class scores the threshold or more, even if the
    background scores higher. teacher as in pseudo_labels.
    Such pixels leave the BCE, but stay in its divisor: the weight of all other pixels, and of the
    distillation beside them, does not depend on how many are doubtful.
    """
    kept = torch.empty_like(labels)
    for i, label in enumerate(labels):
        logits = upsample_logits(teacher[i : i + 1].float(), label.shape)[0]
        score = logits[1:].amax(dim=0).sigmoid()
        free = (label == 0) & (weights[i].sum(dim=0) == 0)
        kept[i] = torch.where(free & (score >= threshold), VOID, label)
    return kept
