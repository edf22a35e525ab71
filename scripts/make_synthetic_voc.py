"""Write a small synthetic data set in the VOC2012 segmentation layout.

python scripts/make_synthetic_voc.py --output data/synthetic
python scripts/make_synthetic_voc.py --output data/painted --labels data/VOC2012 --size 160

With --labels, the label maps of a VOC root are painted: real sizes, outlines and company of the
classes, with the looks of the synthetic ones.

Each class has a look of its own: a hue (with 20 classes, those next to each other in id are 126
degrees apart), a shape and a texture, pastel for even ids and saturated for odd ones. Two classes
that are next to each other in hue differ in all the rest. Backgrounds and distractors use the same
shapes and textures with hardly any colour.

The pixels before encoding are a function of (seed, split, index, size) alone, the same on every
machine: the random numbers are integers and 53-bit fractions of PCG64, rotations are rational
(c = (1 - t^2) / (1 + t^2), s = 2t / (1 + t^2)), and arrays see nothing but + - * /, floor, abs
and comparisons, for which IEEE 754 leaves no choice of rounding. `Generator.uniform`, `sin`, `pow`
and sums over arrays are left out on purpose: compilers and SIMD units may round them differently.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils.program

import numpy as np
from numpy.random import Generator, default_rng
from PIL import Image
from scipy import ndimage

from configs.options import DataSet
from data_loader.data_root import read_checked_label, read_lines
from utils.config import Parser
from utils.errors import UserError
from utils.visualize import VOID, label_image

Spot = tuple[float, float]
CLASSES = 20  # unless other many are asked for
TRAIN, VAL = 0, 1
OBJECT_COUNTS = (1, 1, 1, 2, 2, 2, 2, 3, 3, 4)


def fraction(x: np.ndarray) -> np.ndarray:
    """The part after the point, float64 in [0, 1)."""
    return x - np.floor(x)


def bump(x: np.ndarray) -> np.ndarray:
    """One parabola a period: 0 at whole numbers, 1/4 half way between, float64."""
    return fraction(x) * (1 - fraction(x))


# Bool [...], inside the shape, from coordinates right and down, float64 [...], in radii.
SHAPES = (
    lambda u, v: u * u + v * v <= 1,  # disc
    lambda u, v: (abs(u) <= 1) & (abs(v) <= 0.75),  # box
    lambda u, v: (v <= 0.85) & (2 * abs(u) <= 1.1 * v + 1.25),  # triangle
    lambda u, v: (abs(u) <= 0.42) & (abs(v) <= 1.1) | (abs(u) <= 1.1) & (abs(v) <= 0.42),  # cross
    lambda u, v: abs(u) + abs(v) <= 1.25,  # diamond
    lambda u, v: abs(u * u + v * v - 0.7) <= 0.5,  # ring
    lambda u, v: (u * u + v * v <= 1.3) & (u * u + v * v - 1.5 * u >= 0.04),  # crescent
)
# Bool [...], where the pattern colour goes, from the same coordinates in periods.
TEXTURES = (
    lambda a, b: a > np.inf,  # plain
    lambda a, b: fraction(a) < 0.5,  # stripes
    lambda a, b: bump(a) + bump(b) > 0.39,  # dots
    lambda a, b: (fraction(a) < 0.5) ^ (fraction(b) < 0.5),  # checks
    lambda a, b: fraction(0.4 * (a * a + b * b)) < 0.5,  # rings
)


def between(rng: Generator, low: float, high: float) -> float:
    """A uniform number in [low, high), rounded the same way on every machine."""
    return low + (high - low) * float(rng.random())


def hsv_to_rgb(hue: float, saturation: float, value: float) -> list[float]:
    """Red, green and blue in 0..255 for a hue in degrees, saturation and value in 0..1."""
    turns = ((offset + hue / 60) % 6 for offset in (5, 3, 1))
    return [255 * value * (1 - saturation * max(0.0, min(k, 4 - k, 1.0))) for k in turns]


def class_tones(rng: Generator, class_id: int, classes: int) -> np.ndarray:
    """Ground and pattern colour of one object of a class: float64 [2, 3] in 0..255."""
    hue = 360 / classes * (7 * class_id % classes) + between(rng, -4, 4)
    saturation, values = (0.92, (0.58, 0.92)) if class_id % 2 else (0.52, (0.94, 0.60))
    saturation += between(rng, -0.06, 0.06)
    light = between(rng, 0.88, 1.06)
    return np.array([hsv_to_rgb(hue, saturation, value * light) for value in values])


def grey_tones(rng: Generator) -> np.ndarray:
    """Two colours of hardly any saturation: float64 [2, 3] in 0..255."""
    hue, saturation = between(rng, 0, 360), between(rng, 0, 0.12)
    return np.array([hsv_to_rgb(hue, saturation, between(rng, 0.2, 0.9)) for _ in range(2)])


def paint(
    rng: Generator,
    image: np.ndarray,
    look: int,
    tones: np.ndarray,
    centre: Spot,
    radius: float,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Draw one object into `image` (float64 [H, W, 3], in place); returns its mask, bool [H, W].

    `look` modulo 35 picks shape and texture, `tones` (float64 [2, 3]) the colours; rotation, aspect,
    shade and texture phase are drawn. One object in eight is cut in two along a diagonal. With a mask,
    that is the object, whatever its look's shape.
    """
    row, column = np.ogrid[: image.shape[0], : image.shape[1]]
    down, right = (row - centre[0]) / radius, (column - centre[1]) / radius
    t = between(rng, -0.4, 0.4)
    cosine, sine = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    stretch, mirror = between(rng, 0.85, 1.18), 1 - 2 * int(rng.integers(2))
    u = (cosine * right + sine * down) * (stretch * mirror)
    v = (cosine * down - sine * right) / stretch
    gap = 0.25 if rng.integers(8) == 0 else 0.0
    if mask is None:
        mask = SHAPES[look % 7](u, v) & (abs(u + v) >= gap)
    u, v = u[mask], v[mask]
    period = between(rng, 0.42, 0.58)
    a, b = (x / period + between(rng, -0.5, 0.5) for x in (u, v))
    shade = 1 + between(rng, -0.12, 0.12) * u + between(rng, -0.12, 0.12) * v
    image[mask] = tones[TEXTURES[look % 5](a, b).astype(np.intp)] * shade[:, None]
    return mask


def background(rng: Generator, height: int, width: int) -> np.ndarray:
    """A gradient of low saturation with coarse noise and grey shapes: float64 [H, W, 3]."""
    row, column = np.ogrid[:height, :width]
    slope = between(rng, 0, 1)
    mix = slope * row / height + (1 - slope) * column / width
    first, second = grey_tones(rng)
    image = first + (second - first) * mix[:, :, None]
    cell = int(rng.integers(3, 13))
    coarse = rng.integers(-20, 21, (height // cell + 1, width // cell + 1))
    image += coarse.repeat(cell, 0).repeat(cell, 1)[:height, :width, None]
    for _ in range(rng.integers(2, 6)):
        centre = between(rng, 0, height), between(rng, 0, width)
        radius = between(rng, 0.1, 0.35) * min(height, width)
        paint(rng, image, int(rng.integers(35)), grey_tones(rng), centre, radius)
    return image


def canvas_size(rng: Generator, size: int) -> tuple[int, int]:
    """(height, width): the longer side between `size` and 1.25 * `size`, square or not."""
    longer = size * int(rng.integers(8, 11)) // 8
    numerator, denominator = ((1, 1), (3, 4), (3, 4), (2, 3))[rng.integers(4)]
    shorter = longer * numerator // denominator
    return (longer, shorter) if rng.integers(3) == 0 else (shorter, longer)


def draw_classes(seed: int, split: int, index: int, count: int, classes: int) -> list[int]:
    """Class ids of the `count` <= 4 objects of an image; twice the same one now and then.

    As many images as there are classes share four shuffled decks of them all, and each object of an
    image takes its card from another deck, so all classes are drawn about equally often.
    """
    block, card = divmod(index, classes)
    decks = np.tile(np.arange(1, classes + 1), (4, 1))
    return default_rng((seed, split, block, 1)).permuted(decks, axis=1)[:count, card].tolist()


def free_spot(rng: Generator, taken: list[Spot], height: int, width: int) -> Spot:
    """The centre (row, column), of five drawn at random, that is farthest from those taken."""

    def clearance(spot: Spot) -> float:
        offsets = ((spot[0] - row, spot[1] - column) for row, column in taken)
        return min((down * down + right * right for down, right in offsets), default=0.0)

    draws = ((between(rng, 0.16, 0.84), between(rng, 0.16, 0.84)) for _ in range(5))
    return max(((down * height, right * width) for down, right in draws), key=clearance)


def outlines(instances: np.ndarray, width: int) -> np.ndarray:
    """Bool [H, W]: pixels at most `width` steps from another instance id (int [H, W])."""
    edge = np.zeros(instances.shape, bool)
    for step in range(1, width + 1):
        for ids, out in ((instances, edge), (instances.T, edge.T)):
            differs = ids[step:] != ids[:-step]
            out[step:] |= differs
            out[:-step] |= differs
    return edge


def render(
    seed: int, split: int, index: int, size: int, classes: int = CLASSES
) -> tuple[np.ndarray, np.ndarray]:
    """Image `index` of a split: pixels uint8 [H, W, 3] and label uint8 [H, W], classes and 255."""
    rng = default_rng((seed, split, index))
    height, width = canvas_size(rng, size)
    image = background(rng, height, width)
    label, instances = np.zeros((2, height, width), np.uint8)
    count = OBJECT_COUNTS[rng.integers(10)]
    taken: list[Spot] = []
    for number, class_id in enumerate(draw_classes(seed, split, index, count, classes), start=1):
        centre = free_spot(rng, taken, height, width)
        taken.append(centre)
        radius = between(rng, 0.22, 0.38) * (1.08 - 0.08 * count) * min(height, width)
        tones = class_tones(rng, class_id, classes)
        mask = paint(rng, image, class_id, tones, centre, radius)
        label[mask], instances[mask] = class_id, number
    label[outlines(instances, max(1, size // 128))] = VOID
    return finished(rng, image), label


def finished(rng: Generator, image: np.ndarray) -> np.ndarray:
    """The image with noise, uint8."""
    image += rng.integers(-9, 10, (*image.shape[:2], 1))
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def render_label(
    seed: int, split: int, index: int, size: int, file: Path
) -> tuple[np.ndarray, np.ndarray]:
    """A real label map, painted: pixels uint8 [H, W, 3] and label uint8 [H, W] as in render.

    file: a label map of VOC's ids, brought to `size` on its longer side with the nearest neighbour.
    Each connected region of a class is an object of its own. Void pixels stay void in the label and are
    painted as what is nearest to them.
    """
    rng = default_rng((seed, split, index))
    stored = Image.fromarray(read_checked_label(file, DataSet()))
    scale = size / max(stored.size)
    shape = [max(1, int(side * scale + 0.5)) for side in stored.size]
    label = np.array(stored.resize(shape, Image.Resampling.NEAREST))
    image = background(rng, *label.shape)
    known = label != VOID
    if known.any():
        nearest = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
        shown = label[tuple(nearest)]
        for class_id in np.unique(shown[shown > 0]).tolist():
            regions, _ = ndimage.label(shown == class_id)
            for number, box in enumerate(ndimage.find_objects(regions), start=1):
                sides = [(s.start + s.stop, s.stop - s.start) for s in box]
                centre = sides[0][0] / 2, sides[1][0] / 2
                radius = max(4.0, max(sides[0][1], sides[1][1]) / 2)
                tones = class_tones(rng, class_id, CLASSES)
                paint(rng, image, class_id, tones, centre, radius, regions == number)
    return finished(rng, image), label


def make_synthetic_voc(
    output: Path,
    train: int = 700,
    val: int = 150,
    size: int = 128,
    seed: int = 0,
    classes: int = CLASSES,
    labels: Path | None = None,
) -> Path:
    """Write the data set into `output`, a new or empty folder, and return `output`.

    labels: a VOC root whose label maps are painted, `train` and `val` of its lists, drawn by the seed.
    Raises UserError for an impossible number, a root that cannot be read, and a folder that is not
    empty.
    """
    least = {"train": (train, 0), "val": (val, 0), "size": (size, 32), "seed": (seed, 0)}
    least["classes"] = (classes, 1)
    if classes > 254 or (labels and classes != CLASSES):
        raise UserError(f"--classes must be at most 254, and not be given with --labels: {classes}")
    for flag, (value, minimum) in least.items():
        if value < minimum:
            raise UserError(f"--{flag} must be at least {minimum}, not {value}")
    if size > 10_000:
        raise UserError(f"--size must be at most 10000, not {size}")
    output = Path(output)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty: name a new folder or empty this one first")
    splits = ((TRAIN, "train_aug", 2007, train), (VAL, "val", 2008, val))
    drawn = [drawn_labels(labels, s, count, seed) if labels else None for s, _, _, count in splits]
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    for (split, name, year, count), files in zip(splits, drawn, strict=True):
        lines = []
        for index in range(count):
            if files:
                image, label = render_label(seed, split, index, size, files[index])
            else:
                image, label = render(seed, split, index, size, classes)
            jpeg = f"/JPEGImages/{year}_{index:06d}.jpg"
            png = f"/SegmentationClassAug/{year}_{index:06d}.png"
            Image.fromarray(image).save(f"{output}{jpeg}", quality=92)
            label_image(label).save(f"{output}{png}")
            lines.append(f"{jpeg} {png}\n")
        (output / f"ImageSets/Segmentation/{name}.txt").write_text("".join(lines))
    return output


def drawn_labels(root: Path, split: int, count: int, seed: int) -> list[Path]:
    """`count` label maps of a split of a VOC root, drawn by the seed, in the order of their list."""
    name = ("train", "val")[split]
    files = label_files(root, name)
    if count > len(files):
        raise UserError(
            f"--{name} must be at most {len(files)}, the {name} list of {root}, not {count}"
        )
    drawn = default_rng((seed, split)).permutation(len(files))[:count]
    return [files[i] for i in sorted(drawn.tolist())]


def label_files(root: Path, split: str) -> list[Path]:
    """The label maps of a list of a VOC root; its photographs need not be there."""
    description = DataSet()
    lines = read_lines(root / getattr(description, f"{split}_list"), f"{split} list")
    files = []
    for words in lines:
        if len(words) == 2:
            files.append(root / words[1].lstrip("/"))
            continue
        name = Path(words[0]).stem
        paths = [root / pattern.format(name) for pattern in getattr(description, f"{split}_labels")]
        files.append(next((path for path in paths if path.is_file()), paths[0]))
    return files


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = Parser(None, __doc__)
    parser.add_argument(
        "--output", type=utils.program.a_path, required=True, help="new or empty folder"
    )
    parser.add_argument("--train", type=int, default=700, help="training images (%(default)s)")
    parser.add_argument("--val", type=int, default=150, help="validation images (%(default)s)")
    parser.add_argument("--size", type=int, default=128, help="longer side, up to 1.25 times this")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    parser.add_argument("--classes", type=int, default=CLASSES, help="number of classes (%(default)s)")
    parser.add_argument(
        "--labels", type=utils.program.a_path, help="VOC root whose label maps are painted"
    )
    args = parser.parse_args(argv)
    make_synthetic_voc(
        args.output, args.train, args.val, args.size, args.seed, args.classes, args.labels
    )
    print(f"{args.output}: {args.train} training and {args.val} validation images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
