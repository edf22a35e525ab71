"""Replay of instances: the memory, and pasting from it."""

import argparse
import shutil

from data_loader.memory import Memory
from data_loader.paste import Bank
from scripts.benchmarks.prepared import prepared_step
from scripts.benchmarks.timing import Row, measure, ratio
from scripts.plain import plain_paste
from trainer.pseudo_labels import pseudo_labels
from utils.distributed import device


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
    """Pasting into a batch, beside the plain way, which reads each instance anew."""
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
        slow = measure("paste", f"plain, {title}", plain, args, "ms", n)
        return [*rows, slow, ratio("paste", "plain / paste", slow, rows[1])]
