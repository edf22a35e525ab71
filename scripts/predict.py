"""What a trained model says about photographs of any size, or what the models of several steps say.

python scripts/predict.py -r step_2/checkpoint-epoch60.pth --input photographs --output predicted
    writes NAME_labels.png, the class ids of the data set's label maps with VOC's colours, and
    NAME_overlay.png, the photograph with its classes in colour and a legend. The model sees a
    photograph at the scale of its test: the shorter side as long as the crop, or, where it is tested
    on whole images, as it is. What is written has the photograph's own size.
python scripts/predict.py --compare -r RUN/step_*/checkpoint-epoch60.pth --input cat.jpg --output seen
    writes NAME_compare.png: photograph, label where there is one, and the prediction of each step.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils.program

import numpy as np
import torch
from PIL import Image, ImageOps

from configs.options import Config
from data_loader.data_root import DataRoot, check_photograph, read_checked_label, reading
from data_loader.transforms import EvalTransform
from trainer.evaluate import predictions
from trainer.trained import Trained, add_flags, read_steps, titles
from utils.checkpoint import write_atomically
from utils.config import Parser
from utils.distributed import device, launch
from utils.errors import UserError
from utils.visualize import VOID, label_image, overlay, side_by_side, with_legend

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def predict_all(_, args: argparse.Namespace) -> None:
    """Write the pictures of all photographs; those that cannot be read are a warning and, in the end,
    an error."""
    if not 0 <= args.score <= 1:
        raise UserError(f"--score is {args.score}; it must be between 0 and 1")
    if len(args.resume) > 1 and not args.compare:
        raise UserError("several checkpoints are for --compare: give one with -r, or add --compare")
    if args.labels and not (args.compare and args.labels.is_dir()):
        raise UserError(f"--labels {args.labels}: give a folder that is there, and --compare with it")
    photographs = find_photographs(args.input, args.output)
    models = read_steps(args.resume, args)
    failed = 0
    for path in photographs:
        try:
            (compare if args.compare else show)(path, models, args)
        except UserError as error:
            if len(photographs) == 1:
                raise
            print(f"warning: {error}", file=sys.stderr)
            failed += 1
    if failed:
        raise UserError(f"{failed} of {len(photographs)} photographs have no prediction, see above")


def find_photographs(where: Path, output: Path) -> list[Path]:
    """The photograph that was named, or all in a folder; UserError where there is none, where two have
    one name, and where the output is a file or would stand among them."""
    with reading("the input", where):
        folder = where if where.is_dir() else where.parent
        found = [where]
        if where.is_dir():
            found = sorted(path for path in where.iterdir() if path.suffix.lower() in ENDINGS)
    if not found:
        raise UserError(f"no image in {where}: give one, or a folder with any of {' '.join(ENDINGS)}")
    if output.is_file():
        raise UserError(f"{output} is a file: give --output a folder")
    if output.resolve() == folder.resolve():
        raise UserError(f"the photographs lie in {output}: give --output another folder")
    names = [path.stem for path in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"{where} has several photographs {twice}: their predictions need two names")
    return found


def show(path: Path, models: list[Trained], args: argparse.Namespace) -> None:
    """Write label map and overlay of a photograph, and print which classes were found."""
    photograph, (model,) = read_photograph(path, labelled=False), models
    label = predict_label(model, photograph, args.score)
    names, shares = names_in(label, model), np.bincount(label.ravel(), minlength=256) / label.size
    write(args.output / f"{path.stem}_labels.png", label_image(label))
    found = {c: name for c, name in names.items() if c} or {0: "background only"}
    picture = with_legend(overlay(photograph, label), found, max(14, photograph.shape[1] // 40))
    write(args.output / f"{path.stem}_overlay.png", picture)
    print(f"{path.name}:", ", ".join(f"{name} {shares[c]:.1%}" for c, name in found.items()))


def compare(path: Path, models: list[Trained], args: argparse.Namespace) -> None:
    """Write the sheet of a photograph: itself, its label, and what each step predicts."""
    photograph, last = read_photograph(path, labelled=True), models[-1]
    truth = find_label(path, photograph, last, args.labels)
    labels = [] if truth is None else [("label", truth)]
    for model, title in zip(models, titles(models), strict=True):
        labels.append((caption(model, title), predict_label(model, photograph, args.score)))
    pictures = [("photograph", Image.fromarray(photograph))]
    pictures += [(title, label_image(label)) for title, label in labels]
    names = names_in(np.stack([label for _, label in labels]), last)
    file = args.output / f"{path.stem}_compare.png"
    write(file, with_legend(side_by_side(pictures), names, 16))
    print(f"{path.name}: {file}")


def caption(model: Trained, title: str) -> str:
    """The title of a model and the classes that it learned last, as far as there is room above it."""
    new = model.task.named(model.task.steps[model.step])
    plus = "+ " if model.step else ""
    for text in (f"{title}: {plus}{', '.join(new)}", f"{title}: {plus}{len(new)} classes"):
        if len(text) < 33:
            return text
    return title if len(title) < 33 else f"...{title[-30:]}"


def read_photograph(path: Path, labelled: bool) -> np.ndarray:
    """uint8 [H, W, 3], turned as viewers show it; UserError as check_photograph has it."""
    with reading("the image", path), Image.open(path) as image:
        check_photograph(image, path, labelled)
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def predict_label(model: Trained, photograph: np.ndarray, score: float) -> np.ndarray:
    """The label map uint8 [H, W] that a model predicts, of ids as in its data set."""
    images, test = torch.from_numpy(photograph).permute(2, 0, 1)[None], model.config.data.test.args
    if test.transform:
        images = EvalTransform(test.transform_args.crop_size).scaled(images)
    (channels,) = predictions(model.model, images.to(device()), score, photograph.shape[:2])
    return np.array(model.ids, dtype=np.uint8)[channels[0].cpu().numpy()]


def find_label(path: Path, photograph: np.ndarray, model: Trained, folder: Path | None):
    """The label uint8 [H, W] of a photograph: in the folder that was named, or where the data set of
    the model has it if the photograph is one of its images; None where there is none.

    Classes that are not the data set's are background. UserError for a label that cannot be read or has
    another size.
    """
    data, places = model.config.data, [folder / f"{path.stem}.png"] if folder else []
    try:
        root = DataRoot(data.data_root, description=data.dataset).root
    except UserError:  # no data set here, and none is needed
        root = None
    if root and not folder:
        for images, labels in (
            (data.dataset.val_images, data.dataset.val_labels),
            (data.dataset.train_images, data.dataset.train_labels),
        ):
            if (root / images.format(path.stem)).resolve() == path.resolve():
                places += [root / label.format(path.stem) for label in labels]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        return None
    label = read_checked_label(file, data.dataset)
    if label.shape != photograph.shape[:2]:
        (height, width), size = label.shape, f"{photograph.shape[1]}x{photograph.shape[0]}"
        raise UserError(f"{path} is {size} but its label {file} is {width}x{height}")
    known = np.zeros(256, dtype=np.uint8)
    for c in (*model.task.order, VOID):
        known[c] = c
    return known[label]


def names_in(label: np.ndarray, model: Trained) -> dict[int, str]:
    """Names of the ids in a label map, for its legend."""
    names = {0: "background", **dict(model.task.names), VOID: "void"}
    found = set(np.unique(label).tolist())
    return {c: name for c, name in names.items() if c in found}


def write(path: Path, picture: Image.Image) -> None:
    write_atomically(path, lambda file: picture.save(file, "PNG"))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(None, __doc__)
    add_flags(parser, nargs="+")
    parser.add_argument(
        "--input", type=utils.program.a_path, required=True, help="a photograph, or a folder of them"
    )
    parser.add_argument(
        "--output", type=utils.program.a_path, required=True, help="folder for the pictures"
    )
    parser.add_argument("--score", type=float, default=0.5, help="score that a class needs (0.5)")
    parser.add_argument("--compare", action="store_true", help="a sheet of several steps' predictions")
    parser.add_argument(
        "--labels",
        type=utils.program.a_path,
        help="folder of labels NAME.png to compare with (the data set's own)",
    )
    args = parser.parse_args(argv)
    launch(predict_all, Config(), args)


if __name__ == "__main__":
    main()
