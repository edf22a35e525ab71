"""Label maps: the void label, the VOC palette, and pictures of them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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


def overlay(photograph: np.ndarray, label: np.ndarray) -> Image.Image:
    """A photograph uint8 [H, W, 3] with the classes of its label map uint8 [H, W] tinted and outlined.

    Background, which is label 0, is shown as it is.
    """
    colours = voc_palette()[label].astype(int)
    tinted = np.where(label[..., None] > 0, (photograph + colours) // 2, photograph).astype(np.uint8)
    edges = np.zeros(label.shape, dtype=bool)
    edges[1:] |= label[1:] != label[:-1]
    edges[:, 1:] |= label[:, 1:] != label[:, :-1]
    tinted[edges] = 255
    return Image.fromarray(tinted)


def with_legend(picture: Image.Image, names: dict[int, str], size: int = 14) -> Image.Image:
    """A picture with a legend below it: the colour of each label and its name, in letters of that size.

    The legend breaks into lines at the width of the picture, which becomes wider for a name that does
    not fit.
    """
    font, colours = _font(size), voc_palette().tolist()
    lengths = {label: int(2 * size + font.getlength(name)) for label, name in names.items()}
    width = max(picture.width, size + max(lengths.values(), default=0))
    places, x, y = {}, size // 2, picture.height + size // 2
    for label, length in lengths.items():
        if x > size // 2 and x + length > width:
            x, y = size // 2, y + 3 * size // 2
        places[label] = (x, y)
        x += length
    result = Image.new("RGB", (width, y + 3 * size // 2 if names else picture.height), "white")
    result.paste(picture)
    draw = ImageDraw.Draw(result)
    for label, (x, y) in places.items():
        box = (x, y, x + size, y + size)
        draw.rectangle(box, fill=tuple(colours[label]), outline="black")
        draw.text((x + 5 * size // 4, y + size // 2), names[label], "black", font, anchor="lm")
    return result


def side_by_side(
    pictures: list[tuple[str, Image.Image]], width: int = 320, columns: int = 6
) -> Image.Image:
    """Pictures of one size in rows, each brought to that width, with its caption above it."""
    size, gap = 16, 8
    height = max(1, round(width * pictures[0][1].height / pictures[0][1].width))
    columns, rows = min(columns, len(pictures)), -(-len(pictures) // columns)
    step_x, step_y = width + gap, height + 2 * size + gap
    result = Image.new("RGB", (columns * step_x + gap, rows * step_y + gap), "white")
    draw = ImageDraw.Draw(result)
    for i, (caption, picture) in enumerate(pictures):
        x, y = gap + i % columns * step_x, gap + i // columns * step_y
        draw.text((x, y + size), caption, "black", _font(size), anchor="lm")
        result.paste(picture.resize((width, height)).convert("RGB"), (x, y + 2 * size))
    return result


def _font(size):
    """The font that comes with matplotlib, which has more alphabets than Pillow's."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def sheet(rows: list[list[np.ndarray]], titles: list[str]) -> Image.Image:
    """Pictures in rows and titled columns.

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
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    plt.close(figure)
    return Image.open(drawn).convert("RGB")
