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

AXES = {
    "batch": [2, 4, 8, 16],
    "crop": [96, 128, 192, 256],
    "task": ["5-5", "10-5", "15-5"],
    "mem_size": [8, 16, 32, 64],
}


def scaling(args: argparse.Namespace) -> list[Row]:
    """Time of an incremental iteration, data from memory, against each of its sizes; a figure."""
    curves = measure_sizes(args)
    if args.figure:
        title = f"Incremental step, {args.backbone}, batch {args.batch}, crop {args.crop}"
        draw_scaling(curves, args.figure, title)
    return [row for points in curves.values() for _, row in points]


def measure_sizes(args: argparse.Namespace) -> dict[str, list[tuple[int, Row]]]:
    """Axis -> a size and its row for each value of that flag; the other flags as given."""
    with tempfile.TemporaryDirectory() as folder:
        root = make_synthetic_voc(Path(folder) / "voc", 300, 1, 160)
        flags = {**vars(args), "data_root": root}
        return {
            axis: [_sized_row(argparse.Namespace(**{**flags, axis: value}), axis) for value in values]
            for axis, values in AXES.items()
        }


def _sized_row(args, axis):
    """Images, pixels of a crop, channels or stored entries, by axis, and the time of an iteration."""
    with prepared_step(args) as (trainer, raw):
        trainer.model.train()
        freeze_bn(trainer.model)
        health = Health(trainer.loss_parts, trainer.device, 1)
        channels, entries = 1 + sum(trainer.model.classes), len(trainer.dataset.memory)
        sizes = {"batch": args.batch, "crop": args.crop**2, "task": channels, "mem_size": entries}
        notes = {"task": f", {channels} channels", "mem_size": f", {entries} entries"}
        title = f"{axis} {getattr(args, axis)}{notes.get(axis, '')}"
        row = measure("scaling", title, lambda: trainer.train_iteration(raw, health), args, "ms")
        return sizes[axis], row
