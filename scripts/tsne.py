"""The features of pixels in two dimensions (t-SNE), coloured by class: of one step, or of two.

python scripts/tsne.py -r RUN/step_0/checkpoint-epoch60.pth RUN/step_5/checkpoint-epoch60.pth \\
    --data_root data/VOC2012 --output tsne.png

Shown are the 256 features that the classifiers read, at stride 16, of the test images of the later
step: as many pixels of each class, the same ones for both models. A dot is a pixel whose class the
model predicts, a cross one that it takes for another class: where dots of old classes become crosses,
and their groups dissolve, they are forgotten.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils.program

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from tqdm import tqdm

from configs.options import Config
from data_loader.data_loaders import StepData
from data_loader.dataset import normalize
from models.deeplabv3 import predict
from trainer.trained import Trained, add_flags, read_steps, titles
from utils.checkpoint import write_atomically
from utils.config import Parser
from utils.distributed import device, launch
from utils.errors import UserError
from utils.visualize import VOID, voc_palette

FROM_AN_IMAGE = 10  # pixels of one class, at most, so that a group is not a single object


@dataclass
class Pixels:
    """The chosen pixels: classes int [pixels], as channels; images int [pixels], which image each is
    from; for each model its features float32 [pixels, 256] and the channels that it predicts."""

    classes: np.ndarray
    images: np.ndarray
    features: list[np.ndarray]
    predicted: list[np.ndarray]


def draw(_, args: argparse.Namespace) -> None:
    """Write the picture and print, for each step, how well classes are recognised and set apart."""
    if args.output.suffix.lower() != ".png":
        raise UserError(f"--output is {args.output}; give the name of a .png file")
    if len(args.resume) > 2:
        raise UserError(f"{len(args.resume)} checkpoints: give one, or those of two steps")
    if args.pixels < 1 or not 0 <= args.seed < 2**32:
        raise UserError("--pixels starts at 1, and --seed goes from 0 to 4294967295")
    models = read_steps(args.resume, args)
    first, last = models[0], models[-1]
    config = last.config
    config.task.step = last.step
    if args.data_root:
        config.data.data_root = str(args.data_root)
    pixels = choose_pixels(models, StepData(config), args.pixels, args.seed)
    folds = min(5, len(set(pixels.images)))
    steps = "step 0's classes" if first.step == 0 else f"the classes of steps 0 to {first.step}"
    old = (pixels.classes > 0) & (pixels.classes < len(first.ids))
    if folds < 2 or not old.any():
        raise UserError("there are too few test images with classes of these steps")
    captions = []
    for name, features, predicted in zip(
        titles(models), pixels.features, pixels.predicted, strict=True
    ):
        right = (predicted == pixels.classes)[old].mean()
        near = cross_val_score(
            KNeighborsClassifier(1),
            features,
            pixels.classes,
            groups=pixels.images,
            cv=GroupKFold(folds),
        )
        captions.append(f"{name}: {right:.0%} of the pixels of {steps} recognised")
        print(f"{captions[-1]}; by the nearest pixel of another image, {near.mean():.0%} of all")
    places = embed(pixels.features, args.seed)
    write_atomically(args.output, lambda file: plot(file, pixels, places, captions, last))
    print(f"{len(old)} pixels of {len(set(pixels.images))} images: {args.output}")


@torch.inference_mode()
def choose_pixels(models: list[Trained], data: StepData, wanted: int, seed: int) -> Pixels:
    """Pixels of the test images, drawn by the seed: as many as wanted of each class, if there are."""
    dataset, _ = data.evaluation("test")
    generator = np.random.default_rng(seed)
    missing = np.full(len(models[-1].ids), wanted)
    rows = []
    for i in tqdm(generator.permutation(len(dataset)), desc="features", unit="image", disable=None):
        if not missing.any():
            break
        sample = dataset[int(i)]
        label = at_stride_16(sample["label"])
        chosen = []
        for c in np.unique(label[label != VOID]):
            cells = generator.permutation(np.flatnonzero(label == c))
            chosen += cells[: min(FROM_AN_IMAGE, missing[c])].tolist()
            missing[c] -= min(FROM_AN_IMAGE, missing[c], len(cells))
        if not chosen:
            continue
        image = normalize(sample["image"][None].to(device()))
        found = []
        for model in models:
            logits, features = model.model(image, upsample=False, with_features=True)
            found.append(features.flatten(2)[0].T[chosen].cpu().numpy())
            found.append(predict(logits).flatten()[chosen].cpu().numpy())
        rows.append((label[chosen], np.full(len(chosen), i), *found))
    if not rows:
        raise UserError("no test image shows a class of the step")
    classes, images, *found = (np.concatenate(column) for column in zip(*rows, strict=True))
    return Pixels(classes, images, found[::2], found[1::2])


def at_stride_16(label: torch.Tensor) -> np.ndarray:
    """The labels uint8 [h * w] under the features of an image, of its label uint8 [H, W]."""
    size = [-(-side // 16) for side in label.shape]
    return F.interpolate(label[None, None].float(), size, mode="nearest-exact").byte().flatten().numpy()


def embed(features: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Places float [pixels, 2] by t-SNE, for each model.

    The second model's start where the first one's ended, so that the groups of both can be compared.
    """
    perplexity = min(30, (len(features[0]) - 1) / 3)
    places, start = [], "pca"
    for of_model in features:
        found = TSNE(perplexity=perplexity, init=start, random_state=seed).fit_transform(of_model)
        places.append(found)
        start = (1e-4 * found / found.std()).astype(np.float32)  # as small as that of pca
    return places


def plot(file, pixels: Pixels, places: list[np.ndarray], captions: list[str], model: Trained) -> None:
    """Write the PNG: a panel for each model, and a legend of the classes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = -(-len(model.ids) // 24)
    size = (6 * len(places) + 2 * columns, 6.6)
    figure, (panels,) = plt.subplots(1, len(places), figsize=size, squeeze=False, layout="constrained")
    colours = voc_palette()[model.ids] / 255
    colours[0] = 0.8  # grey: the black of the background would hide the classes
    for axes, at, predicted, title in zip(panels, places, pixels.predicted, captions, strict=True):
        for c in np.unique(pixels.classes):
            for marker, chosen in (("o", predicted == c), ("x", predicted != c)):
                shown = (pixels.classes == c) & chosen
                axes.scatter(*at[shown].T, s=14, marker=marker, color=colours[c], linewidths=1)
        axes.set_title(title, fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
    for c in np.unique(pixels.classes):
        step = next((t for t in range(model.step + 1) if c in model.task.channels(t)), 0)
        label = f"{model.names[c]} (step {step})" if c else "background"
        panels[0].scatter([], [], color=colours[c], label=label)
    panels[0].scatter([], [], color="grey", marker="x", label="taken for another")
    figure.legend(loc="outside right upper", ncols=columns)
    figure.savefig(file, format="png", dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(None, __doc__)
    add_flags(parser, nargs="+")
    parser.add_argument(
        "--data_root",
        type=utils.program.a_path,
        help="folder of the data set (that of the configuration)",
    )
    parser.add_argument("--output", type=utils.program.a_path, required=True, help="PNG to write")
    parser.add_argument("--pixels", type=int, default=100, help="pixels of each class (100)")
    parser.add_argument(
        "--seed", type=int, default=0, help="which pixels, and how they are laid out (0)"
    )
    launch(draw, Config(), parser.parse_args(argv))


if __name__ == "__main__":
    main()
