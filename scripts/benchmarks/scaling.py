"""Cost of an incremental iteration against its sizes."""

import argparse
import tempfile
from pathlib import Path

from models.deeplabv3 import freeze_bn
from scripts.benchmarks.figure import draw_scaling
from scripts.benchmarks.prepared import prepared_step
from scripts.benchmarks.timing import Row, measure
from scripts.make_synthetic_voc import make_synthetic_voc
from trainer.health import Health


def scaling(args: argparse.Namespace) -> list[Row]:
    """Time of an incremental iteration, data from memory, against each of its sizes; a figure."""
    axes = {
        "batch": [2, 4, 8, 16],
        "crop": [96, 128, 192, 256],
        "task": ["5-5", "10-5", "15-5"],
        "mem_size": [8, 16, 32, 64],
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = make_synthetic_voc(Path(folder) / "voc", 300, 1, 160)
        for axis, values in axes.items():
            for value in values:
                own = argparse.Namespace(**{**vars(args), "data_root": root, axis: value})
                rows.append(_iteration_time(own, axis, value))
    if args.figure:
        draw_scaling(axes, rows, args)
    return rows


def _iteration_time(args, axis, value):
    with prepared_step(args) as (trainer, raw):
        trainer.model.train()
        freeze_bn(trainer.model)
        health = Health(trainer.loss_parts, trainer.device, 1)
        title = f"{axis} {value}"
        if axis == "task":
            title += f", {1 + sum(trainer.model.classes)} channels"
        if axis == "mem_size":
            title += f", {len(trainer.dataset.memory)} entries"
        return measure("scaling", title, lambda: trainer.train_iteration(raw, health), args, "ms")
