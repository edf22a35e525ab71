"""Pictures of labels: the VOC palette and coloured label maps."""

import numpy as np
from PIL import Image


def voc_palette() -> np.ndarray:
    """Colour map of VOC: uint8 [256, 3]; label 255 is cream, label 0 black.

    The bits of a label are dealt out to red, green and blue in turn, from the highest bit down.
    """
    labels = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for place in range(8):
        for channel in range(3):
            bit = labels >> (3 * place + channel) & 1
            colours[:, channel] |= (bit << (7 - place)).astype(np.uint8)
    return colours


def label_image(label: np.ndarray) -> Image.Image:
    """A label map uint8 [H, W] as a palette image."""
    image = Image.fromarray(label)
    image.putpalette(voc_palette().ravel().tolist())
    return image
