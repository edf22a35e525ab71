"""Transforms of an image and its label together, on uint8 tensors (torchvision v2).

Images are resampled bilinearly with antialiasing, labels to the nearest pixel centre as Pillow does
it: torchvision's own resampling of masks is shifted against that, so labels are passed as images
with interpolation nearest-exact.
"""

import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

NEAREST, BILINEAR = InterpolationMode.NEAREST_EXACT, InterpolationMode.BILINEAR
Pair = tuple[torch.Tensor, torch.Tensor]


class TrainTransform:
    """Random resized crop (area 0.5 to 2, aspect 3/4 to 4/3) and flip, from torch's generator.

    Called with an image uint8 [3, H, W] and a label uint8 [H, W], or several [K, H, W]; returns them at
    crop_size.
    """

    def __init__(self, crop_size: int):
        self.size = [crop_size, crop_size]
        self.crop = v2.RandomResizedCrop(crop_size, scale=(0.5, 2.0))

    def window(self, height: int, width: int) -> dict[str, int]:
        """The part of an image of that size that is shown: top, left, height, width in its pixels."""
        return self.crop.make_params([torch.empty((1, height, width), device="meta")])

    def __call__(self, image: torch.Tensor, label: torch.Tensor) -> Pair:
        box = self.window(*image.shape[-2:])
        image = F.resized_crop(image, **box, size=self.size, interpolation=BILINEAR, antialias=True)
        label = F.resized_crop(label[None], **box, size=self.size, interpolation=NEAREST)[0]
        if torch.rand(()) < 0.5:
            image, label = F.horizontal_flip(image), F.horizontal_flip(label)
        return image, label


class EvalTransform:
    """Shorter side to crop_size, then the centre crop; shapes as in TrainTransform."""

    def __init__(self, crop_size: int):
        self.size = [crop_size]

    def scaled(self, images: torch.Tensor) -> torch.Tensor:
        """Images uint8 [..., 3, H, W] whose shorter side is crop_size."""
        return F.resize(images, self.size, interpolation=BILINEAR, antialias=True)

    def __call__(self, image: torch.Tensor, label: torch.Tensor) -> Pair:
        image = self.scaled(image)
        label = F.resize(label[None], self.size, interpolation=NEAREST)
        return F.center_crop(image, self.size), F.center_crop(label, self.size)[0]


def whole(image: torch.Tensor, label: torch.Tensor) -> Pair:
    """The image at its own size."""
    return image, label
