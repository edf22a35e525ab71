"""DeepLabV3 with one classifier per step, from torchvision's parts, with the keys of DKD and EIR."""

from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import ResNet50_Weights, ResNet101_Weights, resnet50, resnet101
from torchvision.models.segmentation.deeplabv3 import ASPP

from utils.checkpoint import read_file
from utils.errors import UserError

RESNETS = {
    "resnet101": (resnet101, ResNet101_Weights.IMAGENET1K_V1),
    "resnet50": (resnet50, ResNet50_Weights.IMAGENET1K_V1),
}


class Head(ASPP):
    """torchvision's ASPP (rates 6, 12, 18; dropout 0.1), then a 3x3 conv-BN-ReLU."""

    def __init__(self, channels: int):
        super().__init__(channels, atrous_rates=(6, 12, 18), out_channels=256)
        self.project[3].p = 0.1
        self.last_conv = nn.Sequential(
            nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU()
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.last_conv(super().forward(features))


class DeepLabV3(nn.Module):
    """Segmentation network of continual learning: logits of the background and of each class.

    classes: number of classes of each step, such as [5, 3]. ``cls.0`` is the background; ``cls.i``
    holds the classes of step i-1. The background classifier reads detached features: it learns,
    but does not shape them.
    """

    def __init__(self, classes: list[int], backbone: str = "resnet101", pretrained: bool = False):
        super().__init__()
        self.classes = list(classes)
        self.backbone, channels = _make_backbone(backbone)
        self.aspp = Head(channels)
        self.cls = nn.ModuleList(nn.Conv2d(256, n, 1) for n in [1, *classes])
        for part in (self.aspp, self.cls):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.01
        if pretrained:
            self.backbone.load_state_dict(imagenet_weights(backbone))

    def forward(self, images: torch.Tensor, upsample: bool = True) -> torch.Tensor:
        """Logits [N, 1 + classes, H, W] of images [N, 3, H, W]; upsample=False: at stride 16."""
        features = self.aspp(self.backbone(images))
        logits = [self.cls[0](features.detach())]
        logits += [classifier(features) for classifier in self.cls[1:]]
        logits = torch.cat(logits, dim=1)
        return upsample_logits(logits, images.shape[-2:]) if upsample else logits


def upsample_logits(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Logits [N, C, h, w] at the size of the image, bilinear."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def predict(logits: torch.Tensor, score: float = 0.5) -> torch.Tensor:
    """Channels int64 [N, H, W]: the best foreground class if its sigmoid exceeds the score, else 0."""
    best, channel = logits[:, 1:].max(dim=1)
    return torch.where(best > torch.tensor(score).logit().item(), channel + 1, 0)


def freeze_bn(model: nn.Module) -> None:
    """Batch normalisation in evaluation mode and without gradients; again after every model.train()."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval().requires_grad_(False)


def stop_dropout(model: nn.Module) -> None:
    """Dropout off; to be called again after every model.train()."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()


def _make_backbone(name):
    """The feature network and its number of channels."""
    if name == "tiny":
        return _tiny(), 128
    if name not in RESNETS:
        raise UserError(f"unknown backbone {name!r}: choose {', '.join(RESNETS)} or tiny")
    # Without ImageNet weights, residual branches that start at zero keep the network stable until
    # its batch normalisation has seen enough data.
    net = RESNETS[name][0](replace_stride_with_dilation=[False, False, True], zero_init_residual=True)
    layers = OrderedDict(net.named_children())
    del layers["avgpool"], layers["fc"]
    return nn.Sequential(layers), 2048


def _tiny():
    """A small stride-16 network for tests and demonstrations on the CPU."""
    widths = (3, 24, 48, 96, 128)
    layers = [
        nn.Sequential(
            nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(b),
            nn.ReLU(),
            nn.Conv2d(b, b, 3, padding=1, bias=False),
            nn.BatchNorm2d(b),
            nn.ReLU(),
        )
        for a, b in pairwise(widths)
    ]
    return nn.Sequential(*layers)


def imagenet_weights(backbone: str, file: str | Path | None = None) -> dict[str, torch.Tensor]:
    """ImageNet weights of a backbone, without its classifier: from a file or torchvision's server.

    Raises UserError where there are none, the download fails, or the file does not fit.
    """
    if backbone not in RESNETS:
        raise UserError(
            f"there are no ImageNet weights for the backbone {backbone}: --backbone_weights none"
        )
    _, weights = RESNETS[backbone]
    if file:
        state = read_file(file, "backbone weights")
    else:
        try:
            state = weights.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"cannot download the ImageNet weights of {backbone} ({error}): fetch {weights.url} "
                "elsewhere and give it with --backbone_weights FILE, or --backbone_weights none"
            ) from None
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in _make_backbone(backbone)[0].state_dict().items()}
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    found = {k: getattr(v, "shape", ()) for k, v in state.items()}
    wrong = [k for k in {**shapes, **found} if shapes.get(k) != found.get(k)]
    # files written before BatchNorm counted its batches lack that key
    wrong = [k for k in wrong if not k.endswith("num_batches_tracked")]
    if wrong:
        raise UserError(f"{file} holds no weights of {backbone}: {wrong[0]} is missing or differs")
    not_finite = [k for k, v in state.items() if not v.isfinite().all()]
    if not_finite:
        raise UserError(f"{file} holds weights that are not finite: {not_finite[0]}")
    counts = {k: torch.tensor(0) for k in shapes if k.endswith("num_batches_tracked")}
    return {**counts, **state}
