"""DeepLabV3 with one classifier per step, from torchvision's parts, with the keys of DKD and EIR."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.segmentation.deeplabv3 import ASPP

from models.backbones import imagenet_weights, make_backbone


class SampleDropout(nn.Dropout):
    """Dropout whose mask follows, for each image of a batch, from a seed of its own.

    So it depends neither on the other images of the batch nor on how many processes share it. `seeds`
    has one for each image (see `seed_dropout`); with None it is nn.Dropout.
    """

    seeds: list[int] | None = None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if not self.training or self.seeds is None:
            return super().forward(features)
        mask, generator = torch.empty_like(features), torch.Generator(features.device)
        for row, seed in zip(mask, self.seeds, strict=True):
            row.bernoulli_(1 - self.p, generator=generator.manual_seed(seed))
        return features * mask.div_(1 - self.p)


class Head(ASPP):
    """torchvision's ASPP (rates 6, 12, 18; dropout 0.1), then a 3x3 conv-BN-ReLU."""

    def __init__(self, channels: int):
        super().__init__(channels, atrous_rates=(6, 12, 18), out_channels=256)
        self.project[3] = SampleDropout(0.1)
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
        self.backbone, channels = make_backbone(backbone)
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

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the classifiers read: features [N, 256, h, w] at stride 16 of images [N, 3, H, W]."""
        return self.aspp(self.backbone(images))

    def forward(
        self, images: torch.Tensor, upsample: bool = True, with_features: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, 1 + classes, H, W] of images [N, 3, H, W]; upsample=False: at stride 16.

        with_features: returns (logits, features) of one pass, the features as the method of that name.
        """
        features = self.features(images)
        logits = [self.cls[0](features.detach())]
        logits += [classifier(features) for classifier in self.cls[1:]]
        logits = torch.cat(logits, dim=1)
        if upsample:
            logits = upsample_logits(logits, images.shape[-2:])
        return (logits, features) if with_features else logits


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


def seed_dropout(model: nn.Module, seeds: list[int]) -> None:
    """Let the masks of the next forward pass in training follow from these seeds, one an image."""
    for module in model.modules():
        if isinstance(module, SampleDropout):
            module.seeds = seeds


def stop_dropout(model: nn.Module) -> None:
    """Dropout off; to be called again after every model.train()."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
