"""What a training is set up with: precision, batch normalisation, processes, optimiser."""

import random

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from configs.options import Config
from models.backbones import synchronise_bn
from models.deeplabv3 import freeze_bn
from utils.distributed import world_size
from utils.errors import UserError
from utils.logging import log


def seed_everything(seed: int, epoch: int, process: int = 0) -> None:
    """Seed every library for an epoch, so that a resumed run needs no generator states."""
    value = int(np.random.SeedSequence((seed, epoch, process)).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def precision(config: Config, device: torch.device) -> torch.dtype:
    """The type that the networks compute in; float32 where there is no mixed precision."""
    asked = config.amp_dtype if config.use_amp else None
    if device.type != "cuda":
        if asked == "fp16":
            log.warning("--amp_dtype fp16 needs a GPU: computing in float32")
        return torch.bfloat16 if asked == "bf16" else torch.float32
    if asked == "auto":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        asked = "bf16" if native else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(asked, torch.float32)


def _synchronised_bn(config):
    """Whether batch normalisation takes its statistics over all processes; that needs CUDA."""
    several = world_size() > 1 and torch.cuda.is_available()
    return several and config.arch.args.norm_act == "bn_sync"


def micro_batches(config: Config, sizes: list[int]) -> int:
    """How many micro-batches a batch is split into, in every process; sizes: its images in each."""
    return min(config.trainer.accumulate, *sizes)


def bn_images(config: Config, sizes: list[int]) -> int | None:
    """Images that batch normalisation takes its statistics over; None where it is frozen.

    sizes: images of a batch in each process.
    """
    if config.arch.args.freeze_all_bn:
        return None
    pieces = micro_batches(config, sizes)
    images = [size // pieces for size in sizes]
    return sum(images) if _synchronised_bn(config) else min(images)


def check_batch_size(config: Config, sizes: list[int]) -> None:
    """Raise UserError where batches are too small to train batch normalisation on; sizes as above."""
    images = bn_images(config, sizes)
    if images is not None and images < 2:
        raise UserError(
            "batch normalisation cannot train on one image at a time: use a larger --bs, a "
            "smaller --accumulate, more training images, or --freeze_bn"
        )


def prepare_bn(model: nn.Module, config: Config) -> nn.Module:
    """The model with batch normalisation as the configuration asks: frozen, synchronised or plain."""
    if config.arch.args.freeze_all_bn:
        freeze_bn(model)
        return model
    return synchronise_bn(model) if _synchronised_bn(config) else model


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, wrapped where there are several processes so that their gradients are averaged."""
    if world_size() == 1:
        return model
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that are learned: frozen batch normalisation has none."""
    return [p for p in module.parameters() if p.requires_grad]


def make_optimizer(config: Config, groups: list[dict]) -> torch.optim.Optimizer:
    """SGD over parameter groups as torch.optim takes them."""
    args = config.optimizer.args
    optimizer = torch.optim.SGD(
        groups,
        lr=args.lr,
        momentum=args.momentum,
        nesterov=args.nesterov and args.momentum > 0,
        weight_decay=args.weight_decay,
        fused=True,
    )
    # The momentum buffers exist before the first step: should the loss not be finite there, the fused
    # optimiser skips the step, and buffers that it made itself would be left without values.
    if args.momentum > 0:
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


class PolySchedule(torch.optim.lr_scheduler.PolynomialLR):
    """The poly schedule of each parameter group; over the first `warmup` iterations it rises to it."""

    def __init__(self, optimizer: torch.optim.Optimizer, iterations: int, power: float, warmup: int):
        self.warmup = warmup
        super().__init__(optimizer, iterations, power)

    def factor(self, i: int) -> float:
        """What the learning rate of iteration i is multiplied by, in [0, 1]."""
        return min(1, (i + 1) / (self.warmup + 1)) * (1 - i / self.total_iters) ** self.power

    def get_lr(self) -> list[float]:
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]
