"""Reading files: the label index, and training samples."""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch

from data_loader.data_loaders import cores
from data_loader.dataset import LabelledImages, TrainDataset
from data_loader.tasks import get_task
from data_loader.transforms import TrainTransform
from data_loader.voc import VOC2012, read_image, read_label
from scripts.benchmarks.data import data_root, multiply
from scripts.benchmarks.timing import Row, measure
from scripts.make_synthetic_voc import make_synthetic_voc


def index(args: argparse.Namespace) -> list[Row]:
    """The label index over many small label maps: first scan, and from the cache."""
    with tempfile.TemporaryDirectory() as folder:
        root = make_synthetic_voc(Path(folder) / "voc", 200, 1, args.index_size)
        voc = VOC2012(multiply(root, args.index_images))

        def read():
            voc.index(voc.read_list("train"), cores())

        def forget():
            shutil.rmtree(voc.cache_dir, ignore_errors=True)

        title = f"{args.index_images} label maps of {args.index_size} px"
        first = measure("index", f"first scan, {title}", read, args, before=forget)
        return [first, measure("index", f"from the cache, {title}", read, args)]


def loader(args: argparse.Namespace) -> list[Row]:
    """One training sample on one core, and its parts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with data_root(args, args.loader_images) as root:
        files = VOC2012(root).read_list("train")
        table = get_task("joint", "overlap").label_table(0, "train")
        transform = TrainTransform(args.loader_crop)
        n = min(args.loader_images, len(files.ids))
        images = LabelledImages(files.ids, files.images, files.labels, table, transform)
        samples = TrainDataset(images, None, seed=1)
        decoded = [images.load(i) for i in range(n)]
        epochs = iter(range(10**9))

        def whole():
            epoch = next(epochs)
            return [samples[epoch, i] for i in range(n)]

        works = {
            f"sample, crop {args.loader_crop}": whole,
            "  decode": lambda: [read_image(path) for path in files.images[:n]],
            "  label": lambda: [table[read_label(path)] for path in files.labels[:n]],
            "  transform": lambda: [transform(*pair) for pair in decoded],
        }
        rows = [measure("loader", name, work, args, "ms", n) for name, work in works.items()]
    torch.set_num_threads(threads)
    return rows
