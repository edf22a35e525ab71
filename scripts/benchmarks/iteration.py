"""A training iteration, whole and in its parts."""

import argparse

import torch

from data_loader.data_loaders import make_loader
from data_loader.memory import Memory
from models.deeplabv3 import freeze_bn, upsample_logits
from models.losses import bce_sum, sum_over_images
from scripts.benchmarks.prepared import prepared_step
from scripts.benchmarks.timing import Row, compare, measure, ratio
from scripts.plain import plain_bce, plain_distillation, plain_paste
from trainer.health import Health
from trainer.pseudo_labels import pseudo_labels


def step(args: argparse.Namespace) -> list[Row]:
    """A training iteration beside its bare networks, and where an iteration's time goes."""
    rows = []
    for number in (0, 1):
        with prepared_step(args, number) as (trainer, raw):
            rows += _step_rows(args, trainer, raw)
    return rows


def _step_rows(args, trainer, raw):
    batches = iter(lambda: raw, None) if args.data == "memory" else _endless(trainer, args)
    batch = trainer.to_device(raw)[0]
    trainer.model.train()
    if trainer.config.arch.args.freeze_all_bn:
        freeze_bn(trainer.model)
    rows = _iteration_rows(args, trainer, raw, batch.images, batches)
    works = {
        "  next batch of the loader": lambda: next(batches),
        "  batch to the device": lambda: trainer.to_device(raw),
        **_pieces(trainer, batch),
    }
    return rows + [measure("step", name, work, args) for name, work in works.items()]


def _iteration_rows(args, trainer, raw, images, batches):
    """The whole iteration, beside the bare networks and beside the plain way."""
    kind = "incremental" if trainer.data.step else "base"
    health = Health(trainer.loss_parts, trainer.device, trainer.data.step)

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

    n = len(images)
    title = f"{args.backbone}, crop {images.shape[-1]}, batch {n}"
    bare = f"{kind}: bare networks, {title}", networks
    whole = f"{kind}: iteration, data from {args.data}", iteration
    rows = compare("step", bare, whole, args)
    rates = (n / seconds for seconds in (rows[1].median, rows[1].high, rows[1].low))
    rows.append(Row("step", f"{kind}: images per second", "/s", *rates, args.repeats))
    if trainer.data.step:
        slow = measure("step", f"{kind}: plain", _plain_iteration(trainer, raw), args)
        rows += [slow, ratio("step", f"{kind}: plain / iteration", slow, rows[1])]
    return rows


def _pieces(trainer, batch):
    """The parts of an iteration, one by one: name -> work."""

    def student():
        with trainer.autocast():
            trainer.net(batch.images, upsample=False).float().square().mean().backward()

    student()
    works = {"  student, forward and backward": student, "  optimiser": trainer.optimizer.step}
    with torch.no_grad(), trainer.autocast():
        fixed = trainer.net(batch.images, upsample=False)
    fixed.requires_grad_()
    own = _incremental_pieces if trainer.data.step else _base_pieces
    return {**works, **own(trainer, batch, fixed)}


def _base_pieces(trainer, batch, fixed):
    """What follows the student at step 0, from its logits."""
    scale = trainer.normalizer(batch).expand(1)

    def loss():
        def parts_of(i, z):
            return bce_sum(z, batch.labels[i])[None]

        sum_over_images(fixed, batch.images.shape[-2:], parts_of, scale)[0].backward()

    return {"  loss with gradient": loss}


def _incremental_pieces(trainer, batch, fixed):
    """What else a step t >= 1 does, its losses from the student's logits."""
    logits = trainer.teach(batch.images)
    labels = pseudo_labels(batch.labels, logits, 0.7)
    composite = trainer.compose(batch, labels)

    def losses():
        trainer.losses(fixed, logits, batch, labels, composite)[0].backward()

    return {
        "  teacher, one of two forwards": lambda: trainer.teach(batch.images),
        "  pseudo labels": lambda: pseudo_labels(batch.labels, logits, 0.7),
        "  paste": lambda: trainer.compose(batch, labels),
        "  losses with gradient": losses,
    }


def _plain_iteration(trainer, raw):
    """An iteration that reads each instance anew to paste it, with one-hot targets."""
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
        kd = plain_distillation(full, known, batch.labels, covered, "rskd")
        bce = plain_bce(full, soft, batch.labels)
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
