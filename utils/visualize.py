"""Label maps: the void label, the VOC palette, and pictures of them."""

from pathlib import Path

import numpy as np
from PIL import Image

VOID = 255  # the label of pixels that count in no loss and in no metric


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


def sheet(path: Path, rows: list[list[np.ndarray]], titles: list[str]) -> None:
    """Write a PNG of pictures in rows and titled columns.

    A picture is uint8 [H, W, 3], or float [H, W] in [0, 1], shown as a heat map.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (2.4 * len(titles), 2.4 * len(rows) + 0.3)
    figure, grid = plt.subplots(len(rows), len(titles), figsize=size, squeeze=False)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title)
    for axes, picture in zip(grid.flat, (p for row in rows for p in row), strict=True):
        axes.imshow(picture, vmin=0, vmax=1, cmap="magma")
        axes.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)
