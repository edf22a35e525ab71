"""Measure where the time goes: warm-up, repeats, median and spread, memory taken.

A part is a function from the flags to rows; it stands in PARTS at the end, its sizes in FLAGS.
"""

import argparse
import ctypes
import gc
import json
import logging
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torchvision
from PIL import Image

from data_loader.data_loaders import EvalBatches, StepData, cores, make_loader
from data_loader.dataset import EvalDataset, TrainDataset, normalize
from data_loader.memory import Memory
from data_loader.paste import Bank
from data_loader.tasks import get_task
from data_loader.transforms import TrainTransform
from data_loader.voc import VOC2012, read_image, read_label
from models.deeplabv3 import DeepLabV3, freeze_bn, upsample_logits
from models.losses import bce_sum, distillation_sum, sum_over_images
from scripts.make_synthetic_voc import make_synthetic_voc, outlines
from tests.data_loader.paste_reference import plain_paste
from tests.models import reference
from trainer.base_step import BaseStep
from trainer.evaluate import confusion_matrix
from trainer.health import Health
from trainer.incremental import IncrementalStep
from trainer.pseudo_labels import pseudo_labels
from utils.checkpoint import save_checkpoint
from utils.config import Config
from utils.distributed import device, peak_memory
from utils.errors import UserError, exit_with
from utils.logging import log
from utils.visualize import label_image


@dataclass
class Row:
    """One measurement: median, least and most of its repeats in `unit`; memory taken, MiB."""

    part: str
    name: str
    unit: str
    median: float
    low: float
    high: float
    repeats: int
    peak_mib: float | None = None


def measure(
    part: str,
    name: str,
    work: Callable[[], object],
    args: argparse.Namespace,
    unit: str = "s",
    items: int = 1,
    before: Callable[[], object] = lambda: None,
) -> Row:
    """Time work() per item, after warm-up; before() comes ahead of each call, untimed."""
    peak = _warm_up(work, args, before)
    times = []
    for _ in range(args.repeats):
        before()
        times.append(_seconds(work))
    return _row(part, name, times, unit, items, peak)


def compare(
    part: str,
    under: tuple[str, Callable[[], object]],
    over: tuple[str, Callable[[], object]],
    args: argparse.Namespace,
    unit: str = "s",
    items: int = 1,
) -> list[Row]:
    """Time two named works and their quotient, `over` between two halves of `under`.

    So a drift of the machine's speed cancels, while calls of the same work follow each other without
    a break in which a loader's workers could get ahead.
    """
    peaks = [_warm_up(work, args) for _, work in (under, over)]
    half = -(-args.repeats // 2)
    low = [_seconds(under[1]) for _ in range(half)]
    high = [_seconds(over[1]) for _ in range(args.repeats)]
    low += [_seconds(under[1]) for _ in range(half)]
    rows = [
        _row(part, name, times, unit, items, peak)
        for (name, _), times, peak in zip((under, over), (low, high), peaks, strict=True)
    ]
    names = (name.split(",")[0] for name in (over[0], under[0]))
    return [*rows, ratio(part, " / ".join(names), rows[1], rows[0])]


def _warm_up(work, args, before=lambda: None):
    """Peak memory of the warm-up, MiB: the first call finds nothing allocated for it yet."""
    taken = _reset_peak()
    for _ in range(max(1, args.warmup)):
        before()
        work()
    return peak_memory() - taken


def _row(part, name, seconds, unit, items, peak):
    factor = {"s": 1, "ms": 1000}[unit] / items
    values = [value * factor for value in seconds]
    spread = statistics.median(values), min(values), max(values)
    return Row(part, name, unit, *spread, len(values), peak)


def ratio(part: str, name: str, over: Row, under: Row) -> Row:
    """The quotient of two medians, and the least and most that the repeats allow."""
    quotients = over.median / under.median, over.low / under.high, over.high / under.low
    return Row(part, name, "x", *quotients, min(over.repeats, under.repeats))


def _seconds(work):
    """Time of one call; on CUDA between two events, so that the device's work counts."""
    if device().type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def _reset_peak():
    """Start of a memory measurement: MiB in use now."""
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    if Path("/proc/self/clear_refs").exists():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory back to the system
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


# Data of a known size.


def photograph(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise of all scales, coarse ones strongest, as in photographs: uint8 [height, width, 3]."""
    pixels = np.full((height, width, 3), 128.0)
    cell = max(height, width)
    while cell >= 1:
        coarse = rng.normal(size=(-(-height // cell) + 1, -(-width // cell) + 1, 3)) * cell**0.4 * 8
        grey = coarse.mean(axis=2, keepdims=True)
        levels = np.clip(128 + grey + 0.3 * coarse, 0, 255).astype(np.uint8)
        layer = Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)
        pixels += np.asarray(layer) - 128.0
        cell //= 2
    return np.clip(pixels, 0, 255).astype(np.uint8)


def regions(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth regions of three classes with void between: uint8 [height, width], 0..20 and 255."""
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5), dtype=np.uint8))
    levels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) // 64
    label = np.array([0, *rng.integers(1, 21, 3)], dtype=np.uint8)[levels]
    label[outlines(levels, 2)] = 255
    return label


def write_photographs(root: Path, count: int, height: int = 375, width: int = 500) -> Path:
    """A VOC root of photographs, the same images as train and val list."""
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    ids = [f"2007_{i:06d}" for i in range(count)]
    for name in ids:
        picture = Image.fromarray(photograph(rng, height, width))
        picture.save(root / f"JPEGImages/{name}.jpg", quality=95)
        label = label_image(regions(rng, height, width))
        label.save(root / f"SegmentationClassAug/{name}.png")
    for file in ("train_aug", "val"):
        (root / f"ImageSets/Segmentation/{file}.txt").write_text("\n".join(ids) + "\n")
    return root


def multiply(root: Path, count: int) -> Path:
    """Copy the training images of a VOC root until its list names `count` of them."""
    path = root / "ImageSets/Segmentation/train_aug.txt"
    originals = [Path(line.split()[0]).stem for line in path.read_text().splitlines()]
    names = [f"2009_{i:06d}" for i in range(count)]
    for name, original in zip(names, cycle(originals), strict=False):
        for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png")):
            shutil.copy(root / folder / f"{original}.{suffix}", root / folder / f"{name}.{suffix}")
    path.write_text("\n".join(names) + "\n")
    return root


@contextmanager
def data_root(args: argparse.Namespace, count: int) -> Iterator[Path]:
    """The root given with --data_root, or a temporary one of `count` photographs."""
    if args.data_root:
        yield Path(args.data_root)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield write_photographs(Path(folder) / "voc", count)


# The parts.


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
        images = EvalDataset(files.ids, files.images, files.labels, table, transform)
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


def evaluation(args: argparse.Namespace) -> list[Row]:
    """The evaluation loop, data included, beside the bare forward passes of the same images."""
    with data_root(args, args.eval_images) as root:
        data = _evaluation_data(args, root)
        where = device()
        model = DeepLabV3(data.classes, args.backbone).to(where, memory_format=torch.channels_last)
        model.eval()
        dataset, batch_size = data.evaluation("test")
        batches = EvalBatches(len(dataset), batch_size)
        images = [normalize(b["image"].to(where)) for b in make_loader(dataset, batches, 0, False)]

        @torch.inference_mode()
        def forward():
            with torch.backends.cudnn.flags(
                enabled=True, deterministic=True, benchmark=False, allow_tf32=False
            ):
                for batch in images:
                    model(batch)

        def loop():
            confusion_matrix(model, data, "test", where)

        title = f"{args.backbone}, crop {args.eval_crop}, per image"
        n = len(dataset)
        bare, whole = (f"bare forward, {title}", forward), (f"evaluation, {title}", loop)
        return compare("eval", bare, whole, args, "ms", n)


def _evaluation_data(args, root):
    config = Config()
    settings = config.data.test
    config.data.data_root, config.data.num_workers = str(root), args.num_workers
    config.task.name = "joint"
    settings.args.transform_args.crop_size, settings.batch_size = args.eval_crop, args.eval_batch
    data = StepData(config)
    chosen = data.images
    data.images = lambda *a: np.array(list(islice(chosen(*a), args.eval_images)))
    return data


def memory(args: argparse.Namespace) -> list[Row]:
    """Drawing and storing a memory, loading it, packing it on the device."""
    with prepared_step(args) as (trainer, _):
        folder, source = trainer.folder / "memory", trainer.previous.parent / "memory"

        def build():
            return trainer.data.memory(folder, source)

        def forget():
            shutil.rmtree(folder, ignore_errors=True)

        stored = trainer.dataset.memory
        size = sum(path.stat().st_size for path in stored.folder.iterdir()) / 2**20
        title = f"{len(stored)} entries, {size:.1f} MiB on disk"
        channels = 1 + sum(trainer.teacher.classes)
        return [
            measure("memory", f"draw, store and load, {title}", build, args, "ms", before=forget),
            measure("memory", "load", build, args, "ms"),
            measure("memory", "pack", lambda: Bank.pack(stored, channels, device()), args, "ms"),
        ]


def paste(args: argparse.Namespace) -> list[Row]:
    """Pasting into a batch, beside the plain way: read each instance anew, image by image."""
    with prepared_step(args) as (trainer, raw):
        (batch,) = trainer.to_device(raw)
        settings, crop = trainer.config.hyperparameter.paste, batch.images.shape[-1]
        logits = trainer.teach(batch.images)
        labels = pseudo_labels(batch.labels, logits, 0.7)
        given = batch.images, batch.labels, labels
        numbers = trainer.paste.numbers.split(batch.numbers.cpu())
        channels = 1 + sum(trainer.teacher.classes)

        def plain():
            stored = Memory(trainer.folder / "memory", trainer.data.task.label_table(0, "test"))
            on_cpu = (tensor.cpu() for tensor in (*given, batch.replayed))
            images, known, pseudo, replayed = on_cpu
            plain_paste(
                settings, crop, stored, channels, channels + 1, images, known, pseudo, numbers, replayed
            )

        n = len(batch.images)
        works = {
            "pseudo labels": lambda: pseudo_labels(batch.labels, logits, 0.7),
            f"paste, {settings.pastes} instances": lambda: trainer.paste(
                *given, batch.numbers, batch.replayed
            ),
        }
        title = f"crop {crop}, per image"
        rows = [
            measure("paste", f"{name}, {title}", work, args, "ms", n) for name, work in works.items()
        ]
        slow = measure("paste", f"plain, image by image, {title}", plain, args, "ms", n)
        return [*rows, slow, ratio("paste", "plain / paste", slow, rows[1])]


def loss(args: argparse.Namespace) -> list[Row]:
    """Both losses with their gradient, beside the plain one-hot formulas."""
    where, size, n = device(), (args.crop, args.crop), args.batch
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.rand(*shape, generator=generator).to(where)

    old, channels, k = args.channels - 3, args.channels, 3
    side = -(-args.crop // 16)
    logits = (8 * random(n, channels, side, side) - 4).requires_grad_()
    teacher = 8 * random(n, old, side, side) - 4
    base = (random(n, *size) * channels).to(torch.uint8)
    classes = (random(n, k) * (old - 1)).long() + 1
    weights = random(n, k, *size) * (random(n, k, *size) < 0.25) / k
    scale = (1 / (base != 255).sum().float()).expand(2)

    def fast():
        def parts_of(i, z):
            known = upsample_logits(teacher[i : i + 1], size)[0]
            covered = weights[i].sum(dim=0) > 0
            bce = bce_sum(z, base[i], classes[i], weights[i])
            return torch.stack([bce, distillation_sum(z, known, base[i], covered)])

        sum_over_images(logits, size, parts_of, scale)[0].backward()

    def plain():
        full, known = upsample_logits(logits, size), upsample_logits(teacher, size)
        soft = reference.soft_labels(base, classes, weights, channels)
        kd = reference.distillation(full, known, base, weights.sum(dim=1) > 0, "rskd")
        ((reference.bce(full, soft, base) + kd).sum() * scale[0]).backward()

    title = f"batch {n}, crop {args.crop}, {channels} channels"
    rows = [
        measure("loss", f"image by image, {title}", fast, args),
        measure("loss", f"plain one-hot, {title}", plain, args),
    ]
    return [*rows, ratio("loss", "image by image / plain", *rows)]


def step(args: argparse.Namespace) -> list[Row]:
    """A training iteration beside its bare networks, and where an iteration's time goes."""
    rows = []
    for number in (0, 1):
        with prepared_step(args, number) as (trainer, raw):
            rows += _iteration_rows(args, trainer, raw)
    return rows


def _iteration_rows(args, trainer, raw):
    kind = "incremental" if trainer.data.step else "base"
    health = Health(trainer.loss_parts, trainer.device, trainer.data.step)
    batches = iter(lambda: raw, None) if args.data == "memory" else _endless(trainer, args)
    pieces = trainer.to_device(raw)
    images = pieces[0].images

    def networks():
        with trainer.autocast():
            logits = trainer.net(images, upsample=False)
        logits.float().square().mean().backward()
        trainer.optimizer.zero_grad(set_to_none=True)
        for _ in range(2 if trainer.data.step else 0):
            trainer.teach(images)

    def iteration():
        trainer.train_iteration(next(batches), health)
        health.recent.clear()

    trainer.model.train()
    if trainer.config.arch.args.freeze_all_bn:
        freeze_bn(trainer.model)
    n = len(images)
    title = f"{args.backbone}, crop {images.shape[-1]}, batch {n}"
    bare = f"{kind}: bare networks, {title}", networks
    whole = f"{kind}: iteration, data from {args.data}", iteration
    rows = compare("step", bare, whole, args)
    rates = (n / seconds for seconds in (rows[1].median, rows[1].high, rows[1].low))
    rows.append(Row("step", f"{kind}: images per second", "/s", *rates, args.repeats))
    if trainer.data.step:
        slow = measure("step", f"{kind}: image by image", _plain_iteration(trainer, raw), args)
        rows += [slow, ratio("step", f"{kind}: image by image / iteration", slow, rows[1])]
    works = {
        "  next batch of the loader": lambda: next(batches),
        "  batch to the device": lambda: trainer.to_device(raw),
        **_pieces(trainer, pieces[0]),
    }
    return rows + [measure("step", name, work, args) for name, work in works.items()]


def _pieces(trainer, batch):
    """The parts of an iteration, one by one."""
    images, size = batch.images, batch.images.shape[-2:]

    def student():
        with trainer.autocast():
            trainer.net(images, upsample=False).float().square().mean().backward()

    student()
    works = {"  student, forward and backward": student, "  optimiser": trainer.optimizer.step}
    with torch.no_grad(), trainer.autocast():
        fixed = trainer.net(images, upsample=False)
    fixed.requires_grad_()

    def bce(base, composite=None):
        def parts_of(i, z):
            pastes = (composite.classes[i], composite.weights[i]) if composite else ()
            return bce_sum(z, base[i], *pastes)[None]

        scale = trainer.normalizer(batch).expand(1)
        return lambda: sum_over_images(fixed, size, parts_of, scale)[0].backward()

    if not trainer.data.step:
        return {**works, "  loss with gradient": bce(batch.labels)}
    logits = trainer.teach(images)
    labels = pseudo_labels(batch.labels, logits, 0.7)
    composite = trainer.compose(batch, labels)

    def both():
        def parts_of(i, z):
            known = upsample_logits(logits[i : i + 1].to(z.dtype), size)[0]
            weights = composite.weights[i]
            bce = bce_sum(z, labels[i], composite.classes[i], weights)
            covered = weights.sum(dim=0) > 0
            return torch.stack([bce, distillation_sum(z, known, batch.labels[i], covered)])

        scale = trainer.normalizer(batch).expand(2)
        sum_over_images(fixed, size, parts_of, scale)[0].backward()

    return {
        **works,
        "  teacher, one of two forwards": lambda: trainer.teach(images),
        "  pseudo labels": lambda: pseudo_labels(batch.labels, logits, 0.7),
        "  paste": lambda: trainer.compose(batch, labels),
        "  losses with gradient": both,
    }


def _plain_iteration(trainer, raw):
    """An iteration that reads and pastes each instance image by image, with one-hot targets."""
    settings = trainer.config.hyperparameter.paste
    channels = 1 + sum(trainer.teacher.classes)
    total = 1 + sum(trainer.model.classes)
    table = trainer.data.task.label_table(trainer.data.step - 1, "test")

    def iteration():
        (batch,) = trainer.to_device(raw)
        size = batch.images.shape[-2:]
        labels = pseudo_labels(batch.labels, trainer.teach(batch.images), 0.7)
        stored = Memory(trainer.folder / "memory", table)
        numbers = trainer.paste.numbers.split(batch.numbers.cpu())
        on_cpu = [t.cpu() for t in (batch.images, batch.labels, labels)]
        done = plain_paste(
            settings, size[0], stored, channels, total, *on_cpu, numbers, batch.replayed.cpu()
        )
        images = torch.stack([d.image for d in done]).to(trainer.device)
        soft = torch.stack([d.soft for d in done]).to(trainer.device, torch.float32)
        masks = [[mask for _, _, mask in d.pastes] or [torch.zeros(size) > 0] for d in done]
        covered = torch.stack([torch.stack(m).any(dim=0) for m in masks]).to(trainer.device)
        known = upsample_logits(trainer.teach(images).float(), size)
        with trainer.autocast():
            logits = trainer.net(images, upsample=False)
        full = upsample_logits(logits.float(), size)
        kd = reference.distillation(full, known, batch.labels, covered, "rskd")
        bce = reference.bce(full, soft, batch.labels)
        ((bce + 5 * kd).sum() / batch.valid).backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)

    return iteration


def _endless(trainer, args):
    """Batches of the real loader, epoch after epoch."""
    loader = make_loader(trainer.dataset, trainer.batches, args.num_workers, True)
    while True:
        yield from loader
        trainer.batches.epoch += 1


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
        _draw_scaling(axes, rows, args)
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


def _draw_scaling(axes, rows, args):
    """The rows against each size; area in place of the crop's side, channels in place of the task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {"batch": "batch", "crop": "crop, pixels", "task": "channels", "mem_size": "stored entries"}
    figure, panels = plt.subplots(1, 4, figsize=(13, 3.2), sharey=False)
    remaining = iter(rows)
    for axes_, (axis, values) in zip(panels, axes.items(), strict=True):
        own = list(islice(remaining, len(values)))
        sizes = [float(row.name.split()[2 if "," in row.name else 1]) for row in own]
        sizes = [size**2 for size in sizes] if axis == "crop" else sizes
        errors = [[r.median - r.low for r in own], [r.high - r.median for r in own]]
        axes_.errorbar(sizes, [r.median for r in own], errors, marker="o", capsize=3)
        axes_.set(xlabel=names[axis], ylim=(0, None), xlim=(0, None))
        axes_.grid(alpha=0.3)
    panels[0].set_ylabel("one iteration, ms")
    figure.suptitle(f"Incremental step, {args.backbone}, batch {args.batch}, crop {args.crop}")
    figure.savefig(args.figure, dpi=100, bbox_inches="tight")


@contextmanager
def prepared_step(args: argparse.Namespace, number: int = 1):
    """Trainer of step `number` of a task on drawn images of 500 px, and a batch of its loader."""
    with tempfile.TemporaryDirectory() as folder:
        root = args.data_root or make_synthetic_voc(Path(folder) / "voc", 8 * args.batch, 1, 400)
        config = Config()
        config.data.data_root, config.trainer.save_dir = str(root), folder
        config.arch.args.backbone, config.arch.args.backbone_pretrained = args.backbone, False
        config.data.train.batch_size, config.data.memory.mem_size = args.batch, args.mem_size
        config.task.name, config.task.step = args.task, number
        config.data.train.args.transform_args.crop_size = args.crop
        config.arch.args.freeze_all_bn = number > 0
        config.amp_dtype = args.amp_dtype
        data = StepData(config)
        if number:
            previous = Path(folder) / "previous.pth"
            model = DeepLabV3(data.classes[:-1], args.backbone)
            content = {"format": "eir-1", "ac": 0.0, "state_dict": model.state_dict()}
            save_checkpoint(previous, content)
            trainer = IncrementalStep(config, data, previous=previous)
        else:
            trainer = BaseStep(config, data)
        raw = next(iter(make_loader(trainer.dataset, trainer.batches, 0, False)))
        yield trainer, raw


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
    "--index_size": (80, "longer side of a label map, up to 1.25 times this, pixels"),
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


def environment() -> dict[str, str]:
    """What a figure needs beside it: processor, cores, GPU, versions, date."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), None)
    gpu = torch.cuda.get_device_name() if device().type == "cuda" else "none"
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return {
        "processor": f"{model or platform.processor() or platform.machine()}, {cores()} cores",
        "load before": load,
        "gpu": gpu,
        "versions": f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"Python {platform.python_version()}",
        "date": date.today().isoformat(),
    }


def format_rows(rows: list[Row]) -> str:
    """The table: a line per row."""
    lines = [f"{'part':<8}{'measured':<56}{'median':>10}{'least':>10}{'most':>10}     {'MiB':>10}"]
    for row in rows:
        values = "".join(f"{value:>10.3f}" for value in (row.median, row.low, row.high))
        peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        lines.append(f"{row.part:<8}{row.name:<56}{values} {row.unit:<4}{peak:>10}")
    return "\n".join(lines)


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
