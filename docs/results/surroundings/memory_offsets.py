"""What offsets.py looks for, chosen without a test image: on what is stored, and on the new classes.

python docs/results/surroundings/memory_offsets.py RUN/step_5

The offsets are those of the greatest mean IoU on the entries of the step's memory and on the pixels of
its training images that have a label. Prints the IoU there and on the test images, without and with
them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from offsets import best_offsets, iou, read

from configs.options import load_config
from data_loader.data_loaders import StepData
from data_loader.dataset import TrainDataset, normalize
from data_loader.transforms import EvalTransform
from models.deeplabv3 import upsample_logits
from trainer.output import read_model
from utils.checkpoint import final_checkpoint
from utils.visualize import VOID


@torch.inference_mode()
def trained_on(folder):
    """Logits [C, P] and labels [P] of one pixel of nine of the entries, and of the labelled ones."""
    config = load_config(folder / "config.json")[0]
    data = StepData(config)
    model, _ = read_model(final_checkpoint(folder), data, config.arch.args.backbone, data.step)
    model.eval()
    memory = data.memory(folder / "memory", None)
    samples = TrainDataset(data.training(), memory, config.seed)
    view = EvalTransform(config.data.train.args.transform_args.crop_size)
    logits, labels = [], []
    new = len(samples.images)
    for i in [*range(0, new, 3), *range(new, len(samples))]:
        image, label, _ = samples.load(i)
        image, label = view(image, label)
        alone = torch.tensor([i >= new and memory.alone])
        z = model(normalize(image[None], label[None], alone), upsample=False)
        z = upsample_logits(z, label.shape)[0, :, 1::3, 1::3].flatten(1)
        label = label[1::3, 1::3].flatten()
        counted = (label != VOID) & ((label > 0) | (i >= new))
        logits.append(z[:, counted])
        labels.append(label[counted])
    return torch.cat(logits, dim=1), torch.cat(labels)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    logits, labels, names = read(folder)
    seen = trained_on(folder)
    chosen = best_offsets(*seen, names)
    print(f"{'':12}{'mean':>8}" + "".join(f"{name[:10]:>12}" for name in names))
    for title, given, at in (
        ("seen", torch.zeros_like(chosen), seen),
        ("offset", chosen, seen),
        ("test", torch.zeros_like(chosen), (logits, labels)),
        ("offset", chosen, (logits, labels)),
    ):
        found = iou(*at, given, names)
        values = "".join(f"{value:12.1f}" for value in found["by_class"].values())
        print(f"{title:12}{found['overall']:8.1f}{values}")
    print(f"{'offsets':12}{'':20}" + "".join(f"{offset:12.2f}" for offset in chosen))
