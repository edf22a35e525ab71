"""What the pixels of the test images are called by the model of a finished step, and how much of each.

python docs/results/surroundings/areas.py _saved_variants/models/overlap_2-1_grey/step_2
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import utils.program  # noqa: F401

import torch
from offsets import opened

from trainer.evaluate import confusion_matrix

if __name__ == "__main__":
    model, data = opened(Path(sys.argv[1]))
    counts = confusion_matrix(model, data, "test", torch.device("cpu"))
    print("rows: truth, in percent of its pixels; last row: area called so over area that is so")
    print(f"{'':12}" + "".join(f"{name[:10]:>12}" for name in data.class_names))
    for name, row in zip(data.class_names, counts, strict=True):
        print(f"{name[:11]:12}" + "".join(f"{100 * count / row.sum():12.1f}" for count in row))
    areas = counts.sum(axis=0) / counts.sum(axis=1)
    print(f"{'area':12}" + "".join(f"{area:12.2f}" for area in areas))
