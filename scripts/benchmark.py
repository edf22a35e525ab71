"""Measure where the time goes: warm-up, repeats, median and spread, memory taken.

python scripts/benchmark.py step --backbone resnet50 --crop 128
python scripts/benchmark.py all --json figures.json

A part is a function from the flags to rows; it stands in PARTS, its sizes in FLAGS.
"""

import copy
import ctypes
import gc
import itertools
import json
import logging
import os
import platform
import shutil
import statistics
import sys
import tempfile
import timeit
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils.program

import numpy as np
import torch
import torchvision
from PIL import Image

from configs.options import Config, DataSet
from data_loader.data_loaders import EvalBatches, StepData, cores, make_loader
from data_loader.data_root import DataRoot, read_image, read_label
from data_loader.dataset import LabelledImages, TrainDataset, normalize
from data_loader.memory import Memory, beside, put_in_place
from data_loader.paste import Bank
from data_loader.tasks import get_task
from data_loader.transforms import TrainTransform
from models.deeplabv3 import DeepLabV3, upsample_logits
from models.losses import bce_sum, distillation_sum, sum_over_images
from scripts.make_synthetic_voc import make_synthetic_voc
from scripts.plain import Pasted, plain_bce, plain_distillation, plain_paste, plain_soft_labels
from trainer.base import Batch, Trainer
from trainer.base_step import BaseStep
from trainer.evaluate import confusion_matrix
from trainer.incremental import IncrementalStep
from trainer.meter import Meter
from trainer.pseudo_labels import pseudo_labels
from utils.checkpoint import save_checkpoint
from utils.config import Parser
from utils.distributed import device, peak_memory
from utils.logging import log
from utils.visualize import VOID

Work = Callable[[], object]

# Measuring.


@dataclass
class Row:
    """One measurement: the value of each repeat in `unit`; memory that the warm-up took, MiB."""

    name: str
    unit: str
    values: list[float]
    peak_mib: float | None = None

    def spread(self) -> dict[str, float]:
        """Median, least and most of the values."""
        low, high = min(self.values), max(self.values)
        return {"median": statistics.median(self.values), "low": low, "high": high}


def call_times(work: Work, repeats: int, before: Work | None = None) -> list[float]:
    """Seconds of each of `repeats` calls of work().

    On CUDA from one event of the device to another, without waiting for it in between: the host runs
    ahead of the device there, as it does in training.
    """
    if device().type != "cuda":
        timer = timeit.Timer(work, before or "pass", timer=timeit.default_timer)
        return timer.repeat(repeats, number=1)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in events:
        if before:
            before()
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in events]


def warm_up(work: Work, calls: int, before: Work | None = None) -> float:
    """Call work() before it is timed; returns the memory that this took, MiB.

    The peak is taken here because the first call finds nothing allocated for it yet.
    """
    gc.collect()
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        in_use = torch.cuda.memory_allocated() / 2**20
    else:
        if Path("/proc/self/clear_refs").exists():
            ctypes.CDLL(None).malloc_trim(0)  # gives freed memory back to the system
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is in use
        in_use = peak_memory()
    call_times(work, calls, before)
    return peak_memory() - in_use


def measure(
    name: str, work: Work, args: Namespace, unit: str = "s", items: int = 1, before: Work | None = None
) -> Row:
    """Time work() per item, in s or ms, after a warm-up; before() comes ahead of each call, untimed."""
    peak = warm_up(work, args.warmup, before)
    seconds = call_times(work, args.repeats, before)
    return Row(name, unit, [t * {"s": 1, "ms": 1000}[unit] / items for t in seconds], peak)


def compare(
    bare: tuple[str, Work], whole: tuple[str, Work], args: Namespace, unit: str = "s", items: int = 1
) -> list[Row]:
    """Time two named works and their quotient, `whole` between two halves of the repeats of `bare`.

    So a drift of the machine's speed cancels, while calls of the same work follow each other without
    a break in which a loader's workers could get ahead.
    """
    half = Namespace(warmup=args.warmup, repeats=-(-args.repeats // 2))
    under = measure(*bare, half, unit, items)
    over = measure(*whole, args, unit, items)
    under.values += measure(*bare, half, unit, items).values
    title = f"{over.name.split(',')[0]} / {under.name.split(',')[0]}"
    return [under, over, ratio(title, over, under)]


def ratio(name: str, over: Row, under: Row) -> Row:
    """The quotient of two medians, and the least and most that the repeats allow."""
    o, u = over.spread(), under.spread()
    return Row(name, "x", [o["low"] / u["high"], o["median"] / u["median"], o["high"] / u["low"]])


# Reading files.


def drawn(classes: int) -> DataSet:
    """What the drawn images are: a data set of so many classes in VOC's folders."""
    names = {f"class {i}": i for i in range(1, classes + 1)}
    return DataSet(name="drawn", classes=names, highest_id=classes)


def photographs(folder: Path, train: int, val: int, classes: int = 20) -> Path:
    """A VOC root in `folder` whose images decode like photographs: 500x375, JPEG quality 95.

    Their pixels are noise of all scales, coarse ones strongest: the flat areas of drawn shapes would
    decode faster.
    """
    root, size = make_synthetic_voc(folder, train, val, 400, classes=classes), (500, 375)
    rng = np.random.default_rng(0)
    for image in sorted((root / "JPEGImages").iterdir()):
        pixels = np.full((375, 500, 3), 128.0)
        for cell in (256, 128, 64, 32, 16, 8, 4, 2, 1):
            grid = (375 // cell + 1, 500 // cell + 1)
            noise = rng.normal(size=(*grid, 1)) + 0.3 * rng.normal(size=(*grid, 3))
            levels = np.clip(128 + 5 * cell**0.4 * noise, 0, 255).astype(np.uint8)
            pixels += np.asarray(Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC)) - 128.0
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(image, quality=95)
        label = root / f"SegmentationClassAug/{image.stem}.png"
        Image.open(label).resize(size, Image.Resampling.NEAREST).save(label)
    return root


def index(args: Namespace) -> list[Row]:
    """The label index over many small label maps: first scan, and from the cache."""
    with tempfile.TemporaryDirectory() as folder:
        root = make_synthetic_voc(Path(folder) / "voc", 200, 1, args.index_size)
        names = [f"2009_{i:06d}" for i in range(args.index_images)]
        for i, name in enumerate(names):  # copies, since drawing so many would take minutes
            for kind, suffix in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png")):
                original = root / kind / f"2007_{i % 200:06d}.{suffix}"
                shutil.copy(original, root / kind / f"{name}.{suffix}")
        (root / "ImageSets/Segmentation/train_aug.txt").write_text("\n".join(names) + "\n")
        voc = DataRoot(root)

        def read():
            voc.index(voc.read_list("train"), cores())

        forget = partial(shutil.rmtree, voc.cache_dir, ignore_errors=True)
        title = f"{args.index_images} label maps of {args.index_size} px"
        first = measure(f"first scan, {title}", read, args, before=forget)
        return [first, measure(f"from the cache, {title}", read, args)]


def loader(args: Namespace) -> list[Row]:
    """One training sample on one core, and its parts: decode, read the label, crop and flip."""
    from torch.utils.benchmark import set_torch_threads  # with a word on CUDA where there is none

    with tempfile.TemporaryDirectory() as folder, set_torch_threads(1):
        root = args.data_root or photographs(Path(folder) / "voc", args.loader_images, 1)
        files = DataRoot(root).read_list("train")
        task = get_task("joint", "overlap")
        table = task.label_table(task.order)
        transform = TrainTransform(args.loader_crop)
        n = min(args.loader_images, len(files.ids))
        images = LabelledImages(files.ids, files.images, files.labels, table, transform)
        samples = TrainDataset(images, None, seed=1)
        decoded = [images.load(i) for i in range(n)]
        epochs = itertools.count()

        def whole():
            epoch = next(epochs)
            return [samples[epoch, i] for i in range(n)]

        works = {
            f"sample, crop {args.loader_crop}": whole,
            "  decode": lambda: [read_image(path) for path in files.images[:n]],
            "  label": lambda: [table[read_label(path)] for path in files.labels[:n]],
            "  transform": lambda: [transform(*pair) for pair in decoded],
        }
        return [measure(name, work, args, "ms", n) for name, work in works.items()]


def loss(args: Namespace) -> list[Row]:
    """BCE and distillation with their gradient: on sparse labels, and by the plain one-hot formulas."""
    size, n = (args.crop, args.crop), args.batch
    torch.manual_seed(0)
    random = partial(torch.rand, device=device())
    old, channels, k = args.channels - 3, args.channels, 3
    side = -(-args.crop // 16)
    logits = 8 * random(n, channels, side, side) - 4
    logits = logits.to(memory_format=torch.channels_last).requires_grad_()  # as the network gives them
    teacher = 8 * random(n, old, side, side) - 4
    labels = (random(n, *size) * channels).to(torch.uint8)
    classes = (random(n, k) * (old - 1)).long() + 1
    weights = random(n, k, *size) * (random(n, k, *size) < 0.25) / k
    scale = 1 / (labels != VOID).sum().float()

    def sparse():
        def losses(i, z):
            known = upsample_logits(teacher[i : i + 1], size)[0]
            covered = weights[i].sum(dim=0) > 0
            return {
                "bce": bce_sum(z, labels[i], classes[i], weights[i]),
                "kd": distillation_sum(z, known, labels[i], covered, region="all"),
            }

        sum_over_images(logits, size, losses, scale)[0].backward()

    def one_hot():
        full, known = upsample_logits(logits, size), upsample_logits(teacher, size)
        soft = plain_soft_labels(labels, classes, weights, channels)
        kd = plain_distillation(full, known, labels, weights.sum(dim=1) > 0, "rskd", "all")
        ((plain_bce(full, soft, labels) + kd).sum() * scale).backward()

    title = f"batch {n}, crop {args.crop}, {channels} channels"
    fast = measure(f"sparse labels, {title}", sparse, args)
    slow = measure(f"plain one-hot, {title}", one_hot, args)
    return [fast, slow, ratio("sparse labels / plain one-hot", fast, slow)]


# A step that is ready to train, and the parts of its iteration.


@contextmanager
def prepared_step(
    args: Namespace, number: int = 1, **hyperparameter: str
) -> Iterator[tuple[Trainer, dict]]:
    """Trainer of step `number` of a task, in training mode, and a batch of its loader.

    It trains on the images of --data_root, else on drawn ones of 400 to 500 px.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = Config()
        root = args.data_root
        if not root:
            voc = Path(folder) / "voc"
            root = make_synthetic_voc(voc, 8 * args.batch, 1, 400, classes=args.classes)
            config.data.dataset = drawn(args.classes)
        config.data.data_root, config.trainer.save_dir = str(root), folder
        config.arch.args.backbone, config.arch.args.backbone_pretrained = args.backbone, False
        config.data.train.batch_size, config.data.memory.mem_size = args.batch, args.mem_size
        config.data.train.args.transform_args.crop_size = args.crop
        config.task.name, config.task.step = args.task, number
        config.arch.args.freeze_all_bn = number > 0
        config.amp_dtype = args.amp_dtype
        for name, value in hyperparameter.items():
            setattr(config.hyperparameter, name, value)
        data = StepData(config)
        if number:
            previous = Path(folder) / "previous.pth"
            model = DeepLabV3(data.classes[:-1], args.backbone)
            content = {"format": "eir-1", "ac": 0.0, "state_dict": model.state_dict()}
            save_checkpoint(previous, content)
            trainer = IncrementalStep(config, data, previous=previous)
        else:
            trainer = BaseStep(config, data)
        trainer.prepare()
        keep_memory(trainer)
        trainer.train_mode()
        yield trainer, next(iter(make_loader(trainer.dataset, trainer.batches, 0, False)))


def keep_memory(trainer: Trainer) -> None:
    """Bring a memory that was just drawn to its place, as the start of a training does."""
    folder = trainer.folder / "memory"
    if beside(folder).is_dir():
        put_in_place(folder)


def iteration(trainer: Trainer, batches: Iterator[dict]) -> Work:
    """A whole training iteration, on the next of these batches."""
    meter = Meter("benchmark", 0, trainer.device, shown=False)
    return lambda: trainer.train_iteration(next(batches), meter)


def student(trainer: Trainer, images: torch.Tensor) -> None:
    """The student, forward and backward from a loss that costs next to nothing."""
    with trainer.autocast():
        logits = trainer.net(images, upsample=False)
    logits.float().square().mean().backward()


def bare_networks(trainer: Trainer, images: torch.Tensor) -> None:
    """What an iteration cannot do without: the student, and at a step t >= 1 two teacher forwards."""
    student(trainer, images)
    trainer.optimizer.zero_grad(set_to_none=True)
    for _ in range(2 if trainer.data.step else 0):
        trainer.teach(images)


def pieces(trainer: Trainer, raw: dict) -> dict[str, Work]:
    """The parts of an iteration on a batch of the loader, one by one: name -> work."""
    (batch,) = trainer.to_device(raw)
    student(trainer, batch.images)  # the optimiser finds gradients
    works = {
        "batch to the device": lambda: trainer.to_device(raw),
        "student, forward and backward": lambda: student(trainer, batch.images),
        "optimiser": trainer.optimizer.step,
    }
    with torch.no_grad(), trainer.autocast():
        logits = trainer.net(batch.images, upsample=False)
    logits.requires_grad_()
    rest = copy.copy(trainer)  # a trainer whose networks and paste cost nothing: the losses are left
    rest.config = copy.deepcopy(trainer.config)
    rest.config.hyperparameter.pseudo_labels = "off"
    rest.net = lambda images, upsample: logits
    if trainer.data.step:
        taught = trainer.teach(batch.images)
        labels = pseudo_labels(batch.labels, taught, 0.7)
        composite = trainer.compose(batch, labels)
        works["teacher, one of two forwards"] = lambda: trainer.teach(batch.images)
        works["pseudo labels"] = lambda: pseudo_labels(batch.labels, taught, 0.7)
        works["paste"] = lambda: trainer.compose(batch, labels)
        rest.teach = lambda images: taught
        rest.compose = lambda batch, labels: composite
    return {**works, "losses with gradient": lambda: rest.training_loss(batch)[0].backward()}


def plain_pasted(
    trainer: IncrementalStep, batch: Batch, labels: torch.Tensor, channels: int
) -> list[Pasted]:
    """A batch after the plain paste, which reads all stored instances from disk; on the CPU.

    labels: uint8 [N, H, W] with pseudo labels. channels: those of the dense soft labels.
    """
    task = trainer.data.task
    table = task.label_table(task.seen(trainer.data.step - 1))
    stored = Memory(trainer.folder / "memory", table)
    old = 1 + sum(trainer.data.classes[:-1])
    views = trainer.paste.views(batch.epoch).cpu()
    numbers = trainer.paste.random_numbers(batch.epoch, batch.indices)
    numbers = {name: values.cpu() for name, values in numbers.items()}
    tensors = [tensor.cpu() for tensor in (batch.images, batch.labels, labels)]
    settings, size = trainer.config.hyperparameter.paste, labels.shape[-1]
    drawn = views, numbers, batch.replayed.cpu()
    return plain_paste(settings, size, stored, old, channels, *tensors, *drawn)


def plain_iteration(trainer: IncrementalStep, raw: dict) -> None:
    """An iteration with the plain paste, and with the plain losses on dense one-hot targets."""
    (batch,) = trainer.to_device(raw)
    size = batch.labels.shape[-2:]
    labels = pseudo_labels(batch.labels, trainer.teach(batch.images), 0.7)
    done = plain_pasted(trainer, batch, labels, 1 + sum(trainer.data.classes))
    images = torch.stack([d.image for d in done]).to(trainer.device)
    soft = torch.stack([d.soft for d in done]).to(trainer.device, torch.float32)
    masks = [[mask for _, _, mask in d.pastes] or [torch.zeros(size) > 0] for d in done]
    covered = torch.stack([torch.stack(m).any(dim=0) for m in masks]).to(trainer.device)
    known = upsample_logits(trainer.teach(images).float(), size)
    with trainer.autocast():
        logits = trainer.net(images, upsample=False)
    full = upsample_logits(logits.float(), size)
    kd = plain_distillation(full, known, batch.labels, covered, "rskd")
    bce = plain_bce(full, soft, batch.labels)
    ((bce + 5 * kd).sum() / batch.valid).backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)


# The parts that train or evaluate.


def memory(args: Namespace) -> list[Row]:
    """Drawing and storing a memory, loading it, packing it on the device."""
    with prepared_step(args) as (trainer, _):
        folder, source = trainer.folder / "memory", trainer.previous.parent / "memory"

        def build():
            trainer.data.memory(folder, source)
            keep_memory(trainer)

        epochs = itertools.count()

        def views():
            return trainer.paste.views(next(epochs))

        forget = partial(shutil.rmtree, folder, ignore_errors=True)
        stored, channels = trainer.dataset.memory, 1 + sum(trainer.data.classes[:-1])
        size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
        title = f"{len(stored)} entries, {size:.1f} MiB on disk"
        return [
            measure(f"draw, store and load, {title}", build, args, "ms", before=forget),
            measure("load", build, args, "ms"),
            measure("pack", lambda: Bank(stored, channels, device()), args, "ms"),
            measure("views of an epoch", views, args, "ms"),
        ]


def paste(args: Namespace) -> list[Row]:
    """Pseudo labels and pasting of a batch, beside the plain paste, which reads from disk."""
    with prepared_step(args) as (trainer, raw):
        (batch,) = trainer.to_device(raw)
        fill = partial(pseudo_labels, batch.labels, trainer.teach(batch.images), 0.7)
        labels = fill()
        fast = partial(trainer.compose, batch, labels)
        one_new = 2 + sum(trainer.data.classes[:-1])  # channels where one class is learned
        plain = partial(plain_pasted, trainer, batch, labels, one_new)
        count, n = trainer.config.hyperparameter.paste.pastes, len(raw["id"])
        title = f"crop {args.crop}, batch {n}, per image"
        filled = measure(f"pseudo labels, {title}", fill, args, "ms", n)
        under = measure(f"paste, {count} instances, {title}", fast, args, "ms", n)
        over = measure(f"plain, {title}", plain, args, "ms", n)
        return [filled, under, over, ratio("plain / paste", over, under)]


def step(args: Namespace) -> list[Row]:
    """A base and an incremental iteration: beside its bare networks, beside the plain one, in parts."""
    rows = []
    for number in (0, 1):
        with prepared_step(args, number) as (trainer, raw):
            batches = chosen_batches(args, trainer, raw)
            rows += whole_step(args, trainer, raw, batches)
            works = {"next batch of the loader": partial(next, batches), **pieces(trainer, raw)}
            rows += [measure(f"  {name}", work, args) for name, work in works.items()]
    return rows


def chosen_batches(args: Namespace, trainer: Trainer, raw: dict) -> Iterator[dict]:
    """Batches without end: epochs of the loader, or the same one from memory."""
    if args.data == "memory":
        return itertools.repeat(raw)
    epoch = make_loader(trainer.dataset, trainer.batches, args.num_workers, True)
    return itertools.chain.from_iterable(itertools.repeat(epoch))


def whole_step(args: Namespace, trainer: Trainer, raw: dict, batches: Iterator[dict]) -> list[Row]:
    """An iteration of a step beside its bare networks and, at a step t >= 1, beside the plain one."""
    kind = "incremental" if trainer.data.step else "base"
    n, images = len(raw["id"]), trainer.to_device(raw)[0].images
    title = f"{kind}: bare networks, {args.backbone}, crop {args.crop}, batch {n}"
    bare = title, partial(bare_networks, trainer, images)
    whole = f"{kind}: iteration, data from {args.data}", iteration(trainer, batches)
    under, over, quotient = compare(bare, whole, args)
    rates = Row(f"{kind}: images per second", "/s", [n / seconds for seconds in over.values])
    rows = [under, over, quotient, rates]
    if trainer.data.step:
        slow = measure(f"{kind}: plain", partial(plain_iteration, trainer, raw), args)
        rows += [slow, ratio(f"{kind}: plain / iteration", slow, over)]
    return rows


def labels(args: Namespace) -> list[Row]:
    """An incremental iteration with pseudo labels of whole images, beside one with those of crops."""
    rows = []
    for kd_mode in ("rskd", "none"):
        with (
            prepared_step(args, kd_mode=kd_mode) as (trainer, raw),
            prepared_step(args, kd_mode=kd_mode, pseudo_labels="image") as (once, own),
        ):
            crops = f"labels of crops, --kd_mode {kd_mode}"
            images = f"labels of images, --kd_mode {kd_mode}"
            work = iteration(trainer, itertools.repeat(raw))
            faster = iteration(once, itertools.repeat(own))
            rows += compare((crops, work), (images, faster), args)
    return rows


def table(args: Namespace) -> Iterator[Row]:
    """Both iterations and the paste at three sizes of a batch: --batch, twice and four times that.

    It ends before a batch that the GPU has no memory for.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = args.data_root or make_synthetic_voc(Path(folder) / "voc", 32 * args.batch, 1, 400)
        for batch in (args.batch, 2 * args.batch, 4 * args.batch):
            sized = Namespace(**{**vars(args), "data_root": root, "batch": batch})
            try:
                for number in (0, 1):
                    with prepared_step(sized, number) as (trainer, raw):
                        batches = chosen_batches(sized, trainer, raw)
                        yield from whole_step(sized, trainer, raw, batches)
                yield from paste(sized)
            except torch.OutOfMemoryError:
                print(f"warning: no memory for a batch of {batch}", file=sys.stderr)
                break


def evaluation(args: Namespace) -> list[Row]:
    """The evaluation loop, data included, beside the bare forward passes of the same images."""
    with tempfile.TemporaryDirectory() as folder:
        config = Config()
        root = args.data_root
        if not root:
            root = photographs(Path(folder) / "voc", 1, args.eval_images, args.classes)
            config.data.dataset = drawn(args.classes)
        config.data.data_root, config.data.num_workers = str(root), args.num_workers
        config.data.test.args.transform_args.crop_size = args.eval_crop
        config.data.test.batch_size = args.eval_batch
        config.task.name = "joint"
        data = StepData(config)
        chosen = data.select("test")[: args.eval_images]
        data.select = lambda split, step=None: chosen
        where = device()
        model = DeepLabV3(data.classes, args.backbone).to(where, memory_format=torch.channels_last)
        model.eval()
        dataset, batch_size = data.evaluation("test")
        batches = make_loader(dataset, EvalBatches(len(dataset), batch_size), 0, False)
        images = [normalize(batch["image"].to(where)) for batch in batches]

        @torch.inference_mode()
        def forward():
            with torch.backends.cudnn.flags(
                enabled=True, deterministic=True, benchmark=False, allow_tf32=False
            ):
                for batch in images:
                    model(batch)

        title = f"{args.backbone}, crop {args.eval_crop}, per image"
        bare = f"bare forward, {title}", forward
        whole = f"evaluation, {title}", lambda: confusion_matrix(model, data, "test", where)
        return compare(bare, whole, args, "ms", len(dataset))


# Axis of the part scaling, a flag -> its values, and the size of a step that its panel shows.
AXES = {
    "batch": ([2, 4, 8, 16], "images", lambda trainer: trainer.config.data.train.batch_size),
    "crop": ([96, 128, 192, 256], "pixels", lambda trainer: trainer.dataset[0, 0]["label"].numel()),
    "task": (["5-5", "10-5", "15-5"], "channels", lambda trainer: 1 + sum(trainer.data.classes)),
    "mem_size": ([8, 16, 32, 64], "stored entries", lambda trainer: len(trainer.dataset.memory)),
}


def scaling(args: Namespace) -> list[Row]:
    """An incremental iteration, data from memory, against each of its sizes; draws --figure."""
    curves: dict[str, list[tuple[int, Row]]] = {axis: [] for axis in AXES}
    with tempfile.TemporaryDirectory() as folder:
        root = make_synthetic_voc(Path(folder) / "voc", 300, 1, 160)
        for axis, (values, what, size_of) in AXES.items():
            for value in values:
                flags = Namespace(**{**vars(args), "data_root": root, axis: value})
                with prepared_step(flags) as (trainer, raw):
                    size, work = size_of(trainer), iteration(trainer, itertools.repeat(raw))
                    row = measure(f"{axis} {value}: {size} {what}", work, args, "ms")
                    curves[axis].append((size, row))
    if args.figure:
        title = f"Incremental step, {args.backbone}, batch {args.batch}, crop {args.crop}"
        draw_scaling(curves, args.figure, title)
    return [row for points in curves.values() for _, row in points]


def draw_scaling(curves: dict[str, list[tuple[int, Row]]], path: str | Path, title: str) -> None:
    """A panel for each axis: the medians against the sizes, with least and most."""
    from matplotlib.figure import Figure  # slow to import, and seldom needed

    figure = Figure(figsize=(13, 3.2))
    panels = figure.subplots(1, len(curves))
    for panel, (axis, points) in zip(panels, curves.items(), strict=True):
        sizes, spreads = [size for size, _ in points], [row.spread() for _, row in points]
        medians = [spread["median"] for spread in spreads]
        errors = [[s["median"] - s["low"], s["high"] - s["median"]] for s in spreads]
        panel.errorbar(sizes, medians, np.transpose(errors), marker="o", capsize=3)
        panel.set(xlabel=AXES[axis][1], ylim=(0, None), xlim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("one iteration, ms")
    figure.suptitle(title)
    figure.savefig(path, dpi=100, bbox_inches="tight")


# The command line.

PARTS = dict(
    index=index,
    loader=loader,
    memory=memory,
    paste=paste,
    loss=loss,
    step=step,
    labels=labels,
    eval=evaluation,
    scaling=scaling,
    table=table,
)
SWEEPS = ("scaling", "table")  # the same works at several sizes: no part of "all"
# Flag -> its default, its least value and its help.
FLAGS = {
    "index_images": (12000, 1, "label maps"),
    "index_size": (80, 32, "longer side of a label map, up to 1.25 times this, pixels"),
    "loader_images": (24, 1, "images"),
    "loader_crop": (512, 32, "crop, pixels"),
    "eval_images": (96, 1, "images"),
    "eval_crop": (128, 32, "crop, pixels"),
    "eval_batch": (8, 1, "images per batch"),
    "batch": (4, 1, "images per batch of the parts memory, paste, loss, step, labels and table"),
    "crop": (128, 32, "crop of these parts, pixels"),
    "mem_size": (100, 1, "stored instances, at most"),
    "classes": (20, 2, "classes of the images drawn for the parts memory, paste, step and eval"),
    "channels": (9, 5, "channels of the part loss, three of them new"),
    "num_workers": (2, 0, "loader processes where a whole loader is measured"),
    "warmup": (1, 1, "calls before measuring"),
    "repeats": (5, 1, "calls measured"),
}


def environment() -> dict[str, str]:
    """What a figure needs beside it: processor, cores, GPU, versions, date."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), None)
    return {
        "processor": f"{model or platform.processor() or platform.machine()}, {cores()} cores",
        "load before": ", ".join(f"{x:.1f}" for x in os.getloadavg()),
        "gpu": torch.cuda.get_device_name() if device().type == "cuda" else "none",
        "versions": f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"Python {platform.python_version()}",
        "date": date.today().isoformat(),
    }


def format_row(part: str, row: Row) -> str:
    """A line of the table."""
    values = "".join(f"{value:>10.3f}" for value in row.spread().values())
    peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
    return f"{part:<8}{row.name:<56}{values} {row.unit:<4}{peak:>10}"


def parse(argv: list[str] | None) -> Namespace:
    """The flags; a value that no part can use ends the program with a line that says so."""
    parser = Parser(None, __doc__)
    parser.add_argument("part", choices=[*PARTS, "all"], help="all: every part but scaling and table")
    parser.add_argument(
        "--data_root", type=utils.program.a_path, help="a VOC 2012 folder (else images are drawn)"
    )
    parser.add_argument("--backbone", default="resnet101", help="network (%(default)s)")
    parser.add_argument("--task", default="15-5", help="task of memory, paste and step (%(default)s)")
    parser.add_argument(
        "--figure",
        type=utils.program.a_path,
        metavar="PNG",
        help="where the part scaling draws its figure",
    )
    parser.add_argument(
        "--json", type=utils.program.a_path, metavar="FILE", help="write the figures to this file"
    )
    parser.add_argument(
        "--data",
        choices=("loader", "memory"),
        default="loader",
        help="where the parts step and table have their batches from (%(default)s)",
    )
    parser.add_argument(
        "--amp_dtype",
        choices=("auto", "bf16", "fp16"),
        default="auto",
        help="mixed precision of training (%(default)s: on a GPU only)",
    )
    for name, (default, _, text) in FLAGS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (%(default)s)")
    args = parser.parse_args(argv)
    for name, (_, least, _) in FLAGS.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} is at least {least}")
    for name in ("figure", "json"):
        path = getattr(args, name)
        if path and not path.parent.is_dir():
            parser.error(f"--{name} {path}: there is no such folder")
        if path and path.is_dir():
            parser.error(f"--{name} {path} is a folder: give the name of a file")
    return args


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse(argv)
    log.setLevel(logging.ERROR)
    about = environment()
    print("\n".join(f"{key:<12} {value}" for key, value in about.items()) + "\n")
    chosen = [args.part] if args.part != "all" else [part for part in PARTS if part not in SWEEPS]
    rows = []
    print(f"{'part':<8}{'measured':<56}{'median':>10}{'least':>10}{'most':>10}     {'MiB':>10}")
    for part in chosen:
        for row in PARTS[part](args):
            rows.append((part, row))
            print(format_row(part, row), flush=True)
    if args.json:
        figures = [{"part": part, **asdict(row), **row.spread()} for part, row in rows]
        report = {**about, "flags": vars(args), "rows": figures}
        Path(args.json).write_text(json.dumps(report, indent=2, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
