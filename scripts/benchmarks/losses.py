"""The losses of an incremental step."""

import argparse

import torch

from models.deeplabv3 import upsample_logits
from models.losses import bce_sum, distillation_sum, sum_over_images
from scripts.benchmarks.timing import Row, measure, ratio
from scripts.plain import plain_bce, plain_distillation, plain_soft_labels
from utils.distributed import device


def loss(args: argparse.Namespace) -> list[Row]:
    """Both losses with their gradient: on sparse labels, and by the plain one-hot formulas."""
    where, size, n = device(), (args.crop, args.crop), args.batch
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.rand(*shape, generator=generator).to(where)

    old, channels, k = args.channels - 3, args.channels, 3
    side = -(-args.crop // 16)
    logits = (8 * random(n, channels, side, side) - 4).requires_grad_()
    teacher = 8 * random(n, old, side, side) - 4
    base = (random(n, *size) * channels).to(torch.uint8)
    classes = (random(n, k) * (old - 1)).long() + 1
    weights = random(n, k, *size) * (random(n, k, *size) < 0.25) / k
    scale = (1 / (base != 255).sum().float()).expand(2)

    def sparse():
        def parts_of(i, z):
            known = upsample_logits(teacher[i : i + 1], size)[0]
            covered = weights[i].sum(dim=0) > 0
            bce = bce_sum(z, base[i], classes[i], weights[i])
            return torch.stack([bce, distillation_sum(z, known, base[i], covered)])

        sum_over_images(logits, size, parts_of, scale)[0].backward()

    def one_hot():
        full, known = upsample_logits(logits, size), upsample_logits(teacher, size)
        soft = plain_soft_labels(base, classes, weights, channels)
        kd = plain_distillation(full, known, base, weights.sum(dim=1) > 0, "rskd")
        ((plain_bce(full, soft, base) + kd).sum() * scale[0]).backward()

    title = f"batch {n}, crop {args.crop}, {channels} channels"
    rows = [
        measure("loss", f"sparse labels, {title}", sparse, args),
        measure("loss", f"plain one-hot, {title}", one_hot, args),
    ]
    return [*rows, ratio("loss", "sparse labels / plain one-hot", *rows)]
