"""What one number a class, added to its logit, could give: chosen on the test images, so a bound.

python docs/results/surroundings/offsets.py _saved_variants/models/overlap_2-1_grey/step_2

Looks at one pixel of nine. Each offset moves by 1, then by 1/2 and 1/4, as long as the mean IoU grows.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import utils.program  # noqa: F401

import torch

from configs.options import load_config
from data_loader.data_loaders import EvalBatches, StepData, make_loader
from data_loader.dataset import normalize
from models.deeplabv3 import predict, upsample_logits
from trainer.output import read_model
from utils.checkpoint import final_checkpoint
from utils.metrics import ConfusionMatrix, compute_metrics
from utils.visualize import VOID


def opened(folder):
    """The final model of a step, to evaluate, and the step's data."""
    config = load_config(folder / "config.json")[0]
    data = StepData(config)
    model, _ = read_model(final_checkpoint(folder), data, config.arch.args.backbone, data.step)
    return model.eval(), data


@torch.inference_mode()
def read(model, data):
    """Logits [C, P] and labels [P] of the test images' pixels that are not void."""
    dataset, batch_size = data.evaluation("test")
    logits, labels = [], []
    for batch in make_loader(dataset, EvalBatches(len(dataset), batch_size, 0, 1), 0, pin=False):
        images = batch["image"]
        z = upsample_logits(model(normalize(images), upsample=False), images.shape[-2:])
        label = batch["label"][:, 1::3, 1::3]
        counted = label != VOID
        logits.append(z[:, :, 1::3, 1::3].movedim(1, 0)[:, counted])
        labels.append(label[counted])
    return torch.cat(logits, dim=1), torch.cat(labels)


def iou(logits, labels, offsets, names):
    """IoU in percent, as a metric has it, of the prediction with offsets [C - 1] on the logits."""
    shifted = logits + torch.cat([torch.zeros(1), offsets])[:, None]
    matrix = ConfusionMatrix(len(logits), logits.device)
    matrix.update(labels, predict(shifted[None]))
    return compute_metrics(matrix.counts.numpy(), names, [], [])["Mean_Intersection_over_Union"]


def best_offsets(logits, labels, names):
    """Offsets [C - 1] of the greatest mean IoU that moves of one of them at a time lead to."""
    offsets = torch.zeros(len(logits) - 1)
    best = iou(logits, labels, offsets, names)["overall"]
    for size in (1.0, 0.5, 0.25):
        moved = True
        while moved:
            moved = False
            for move in size * torch.cat([torch.eye(len(offsets)), -torch.eye(len(offsets))]):
                value = iou(logits, labels, offsets + move, names)["overall"]
                if value > best:
                    best, offsets, moved = value, offsets + move, True
    return offsets


def show(pixels, offsets, names):
    """Print the IoU without and with the offsets; pixels: what to call them -> logits and labels."""
    print(f"{'':12}{'mean':>8}" + "".join(f"{name[:10]:>12}" for name in names))
    for which, of in pixels.items():
        for title, given in ((which, torch.zeros_like(offsets)), ("offset", offsets)):
            found = iou(*of, given, names)
            values = "".join(f"{value:12.1f}" for value in found["by_class"].values())
            print(f"{title:12}{found['overall']:8.1f}{values}")
    print(f"{'offsets':12}{'':20}" + "".join(f"{offset:12.2f}" for offset in offsets))


if __name__ == "__main__":
    model, data = opened(Path(sys.argv[1]))
    pixels = read(model, data)
    show({"as it is": pixels}, best_offsets(*pixels, data.class_names), data.class_names)
