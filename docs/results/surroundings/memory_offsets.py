"""What offsets.py looks for, chosen without a test image: on what is stored, and on the new classes.

python docs/results/surroundings/memory_offsets.py RUN/step_5

The offsets are those of the greatest mean IoU on the entries of the step's memory and on the pixels of
every third of its training images that have a label. Prints the IoU there and on the test images,
without and with them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import utils.program  # noqa: F401

import torch
from offsets import best_offsets, opened, read, show

from data_loader.dataset import TrainDataset, normalize
from data_loader.transforms import EvalTransform
from models.deeplabv3 import upsample_logits
from utils.visualize import VOID


@torch.inference_mode()
def trained_on(model, data, memory):
    """Logits [C, P] and labels [P] of one pixel of nine of the entries, and of the labelled ones."""
    # the seed, 0, has no part in how they are shown here
    samples = TrainDataset(data.training(), memory, 0)
    view = EvalTransform(data.config.train.args.transform_args.crop_size)
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
    model, data = opened(folder)
    seen = trained_on(model, data, data.memory(folder / "memory", None))
    offsets = best_offsets(*seen, data.class_names)
    show({"seen": seen, "test": read(model, data)}, offsets, data.class_names)
