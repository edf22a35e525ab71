"""Measure where the time goes: warm-up, repeats, median and spread, memory taken.

A part is a function from the flags to rows; it stands in PARTS, its sizes in FLAGS.
"""

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmarks.evaluation import evaluation
from scripts.benchmarks.iteration import step
from scripts.benchmarks.losses import loss
from scripts.benchmarks.output import environment, format_rows
from scripts.benchmarks.reading import index, loader
from scripts.benchmarks.replay import memory, paste
from scripts.benchmarks.scaling import scaling
from utils.errors import UserError, exit_with
from utils.logging import log

PARTS = {
    "index": index,
    "loader": loader,
    "memory": memory,
    "paste": paste,
    "loss": loss,
    "step": step,
    "eval": evaluation,
    "scaling": scaling,
}
FLAGS = {
    "--index_images": (12000, "label maps"),
    "--index_size": (80, "longer side of a label map, up to 1.25 times this, pixels, at least 32"),
    "--loader_images": (24, "images"),
    "--loader_crop": (512, "crop, pixels"),
    "--eval_images": (96, "images"),
    "--eval_crop": (128, "crop, pixels"),
    "--eval_batch": (8, "images per batch"),
    "--batch": (4, "images per batch of the parts memory, paste, loss and step"),
    "--crop": (128, "crop of these parts, pixels"),
    "--mem_size": (100, "stored instances, at most"),
    "--channels": (9, "channels of the part loss, three of them new"),
    "--num_workers": (2, "loader processes where a whole loader is measured"),
    "--warmup": (1, "calls before measuring"),
    "--repeats": (5, "calls measured"),
}


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "all"], help="all: every part but scaling")
    parser.add_argument("--data_root", help="a VOC 2012 folder (else images are drawn)")
    parser.add_argument("--backbone", default="resnet101", help="network (%(default)s)")
    parser.add_argument("--task", default="15-5", help="task of the part step (%(default)s)")
    parser.add_argument("--figure", metavar="PNG", help="where the part scaling draws its figure")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    parser.add_argument(
        "--data",
        choices=("loader", "memory"),
        default="loader",
        help="where the part step has its batches from (%(default)s)",
    )
    parser.add_argument(
        "--amp_dtype",
        choices=("auto", "bf16", "fp16"),
        default="auto",
        help="mixed precision of training (%(default)s: on a GPU only)",
    )
    for flag, (default, text) in FLAGS.items():
        parser.add_argument(flag, type=int, default=default, help=f"{text} (%(default)s)")
    args = parser.parse_args(argv)
    if args.index_size < 32:
        parser.error("--index_size is at least 32")
    log.setLevel(logging.ERROR)
    about = environment()
    print("\n".join(f"{key:<12} {value}" for key, value in about.items()) + "\n")
    try:
        chosen = [args.part] if args.part != "all" else [p for p in PARTS if p != "scaling"]
        rows = [row for part in chosen for row in PARTS[part](args)]
    except UserError as error:
        exit_with(error)
    print(format_rows(rows))
    if args.json:
        report = {**about, "flags": vars(args), "rows": [asdict(row) for row in rows]}
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
