"""The bare network of a checkpoint with the names of its classes, for other programs.

python scripts/export.py -r step_2/checkpoint-epoch60.pth --output network.safetensors
    .safetensors   the weights; the metadata name the backbone and the classes (package safetensors)
    .pth           the same as a dictionary, which eval_voc.py -r and predict.py -r read too
    .onnx          the network for images of any number and size (package onnx)
The network takes float32 images [N, 3, H, W], RGB in [0, 1] less `mean`, divided by `std`, and gives
logits [N, classes, H, W], the background's first. It knows objects at the scale that it was trained on,
images whose shorter side is `crop_size`. What is written is read again, and its output on
random images compared with PyTorch's; of ONNX by onnxruntime, or else by onnx's own evaluator.
"""

import argparse
import importlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils.program

import numpy as np
import torch

from configs.options import Config
from data_loader.dataset import MEAN, STD
from models.deeplabv3 import DeepLabV3
from trainer.trained import Trained, add_flags, read_trained
from utils.checkpoint import load_weights, read_checkpoint, save_checkpoint, write_atomically
from utils.config import Parser
from utils.distributed import launch
from utils.errors import UserError

Function = Callable[[torch.Tensor], torch.Tensor]
SIZES = ((96, 128), (65, 80))  # of the random images: not that of the ONNX export alone


def export(_, args: argparse.Namespace) -> None:
    """Write the file of the network in a checkpoint, once it has the output of that network."""
    output = args.output
    if output.suffix not in WRITERS:
        raise UserError(f"--output is {output}; give the name of a {', '.join(WRITERS)} file")
    if output.resolve() == args.resume.resolve():
        raise UserError(f"{output} is the checkpoint itself: give --output another name")
    if (output.parent / "config.json").exists():
        raise UserError(f"{output.parent} belongs to a step of a run: give --output another folder")
    network = read_trained(args.resume, args)
    network.model.cpu()
    write, read = WRITERS[output.suffix]
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / output.name
        write(network, temporary)
        how, function = read(network, temporary)
        difference = largest_difference(network.model, function)
        content = temporary.read_bytes()
    if not difference < 1e-3:
        raise UserError(f"{output} is not written: its logits, by {how}, differ by {difference:.1e}")
    write_atomically(output, lambda file: file.write(content))
    print(
        f"{output}: {len(network.names)} classes with the background, {len(content) / 2**20:.1f} MiB; "
        f"its logits, by {how}, differ from the checkpoint's by {difference:.1e} at most"
    )


@torch.no_grad()
def largest_difference(model: DeepLabV3, function: Function) -> float:
    """Greatest difference of logits on random images, in units of the greatest logit."""
    worst = 0.0
    for size in SIZES:
        images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        expected = model(images)
        difference = ((function(images) - expected).abs().max() / expected.abs().max()).item()
        if not difference <= worst:  # NaN too, and from then on
            worst = difference
    return worst


def description(network: Trained) -> dict:
    """What is said beside the weights: arch and order as in the checkpoints of this project, the names
    and ids of the classes by channel, how images are normalised, and their scale."""
    return {
        "arch": {"backbone": network.config.arch.args.backbone, "classes": network.model.classes},
        "order": network.ids[1:],
        "classes": dict(zip(network.names, network.ids, strict=True)),
        "mean": list(MEAN),
        "std": list(STD),
        "crop_size": network.config.data.train.args.transform_args.crop_size,
    }


def metadata(network: Trained) -> dict[str, str]:
    """The description as texts, each of them JSON."""
    return {key: json.dumps(value) for key, value in description(network).items()}


def package(name: str, needed_for: str):
    """An optional package; UserError where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        first = name.partition(".")[0]
        raise UserError(f"{needed_for} needs the package {first}: pip install {first}") from None


def write_pth(network: Trained, path: Path) -> None:
    weights = {"state_dict": network.model.state_dict()}
    save_checkpoint(path, {**description(network), **network.origin, **weights})


def read_pth(network: Trained, path: Path) -> tuple[str, Function]:
    return "PyTorch", with_weights(network, read_checkpoint(path)["state_dict"], path)


def write_safetensors(network: Trained, path: Path) -> None:
    weights = {key: value.contiguous() for key, value in network.model.state_dict().items()}
    save = package("safetensors.torch", ".safetensors").save_file
    save(weights, path, metadata(network))


def read_safetensors(network: Trained, path: Path) -> tuple[str, Function]:
    return "PyTorch", with_weights(network, package("safetensors.torch", "").load_file(path), path)


def with_weights(network: Trained, weights: dict[str, torch.Tensor], path: Path) -> DeepLabV3:
    """Another network of the same kind with these weights."""
    model = DeepLabV3(network.model.classes, network.config.arch.args.backbone).eval()
    load_weights(model, weights, path)
    return model


def write_onnx(network: Trained, path: Path) -> None:
    onnx = package("onnx", ".onnx")
    free = {0: "images", 2: "height", 3: "width"}
    # PyTorch's newer exporter (dynamo) does not get done with timm's padding where the size is free
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not the newer one
        torch.onnx.export(
            network.model,
            (torch.zeros(2, 3, 96, 128),),
            path,
            dynamo=False,
            dynamic_axes={"images": free, "logits": free},
            input_names=["images"],
            output_names=["logits"],
        )
    model = onnx.load(path)
    for key, value in metadata(network).items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)


def read_onnx(network: Trained, path: Path) -> tuple[str, Function]:
    try:
        session = importlib.import_module("onnxruntime").InferenceSession(str(path))
        how = "onnxruntime"
    except ImportError:
        session = package("onnx.reference", ".onnx").ReferenceEvaluator(str(path))
        how = "onnx's reference evaluator"

    def function(images):
        return torch.from_numpy(np.array(session.run(None, {"images": images.numpy()})[0]))

    return how, function


WRITERS = {
    ".safetensors": (write_safetensors, read_safetensors),
    ".pth": (write_pth, read_pth),
    ".onnx": (write_onnx, read_onnx),
}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(None, __doc__)
    add_flags(parser)
    parser.add_argument(
        "--output",
        type=utils.program.a_path,
        required=True,
        help="FILE.safetensors, FILE.pth or FILE.onnx",
    )
    launch(export, Config(), parser.parse_args(argv))


if __name__ == "__main__":
    main()
