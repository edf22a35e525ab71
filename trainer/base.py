"""The loop: epochs, mixed precision, accumulation, checkpoints, logging, evaluation.

A kind of step is a subclass that says how it starts (`initialize`), what is optimised
(`parameter_groups`) and what is minimised (`training_loss`).
"""

import contextlib
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data_loader.data_loaders import StepData, TrainBatches, make_loader
from data_loader.dataset import TrainDataset, normalize
from data_loader.tasks import VOID
from models.deeplabv3 import DeepLabV3, freeze_bn
from trainer.evaluate import evaluate
from trainer.health import Health
from trainer.monitor import monitor_name, parse_monitor
from trainer.progress import Progress
from utils.checkpoint import (
    load_weights,
    numbered_checkpoints,
    read_checkpoint,
    save_checkpoint,
    write_json,
)
from utils.config import GROUPS, Config
from utils.distributed import all_sum, barrier, broadcast, device, peak_memory, rank, world_size
from utils.errors import UserError
from utils.logging import EpochRecords, log
from utils.metrics import format_table


@dataclass
class Batch:
    """A (micro-)batch on the device.

    images float [N, 3, H, W], normalised; labels uint8 [N, H, W], channels and 255; numbers float
    [N, D] for pastes, or None; replayed bool [N]; valid: the non-void pixels of the whole batch,
    over all micro-batches and processes, which sums are divided by.
    """

    images: torch.Tensor
    labels: torch.Tensor
    numbers: torch.Tensor | None
    replayed: torch.Tensor
    valid: torch.Tensor


class Trainer:
    """Trains one step of a task and evaluates it."""

    loss_parts: tuple[str, ...] = ()

    def __init__(
        self,
        config: Config,
        data: StepData,
        resume: Path | None = None,
        previous: Path | None = None,
        overwrite: bool = False,
    ):
        """resume: checkpoint of this step to go on from; previous: final one of the step before.

        overwrite: draw the step's memory anew where there is one.
        """
        self.config, self.data, self.previous, self.overwrite = config, data, previous, overwrite
        self.device = device()
        self.folder = config.step_dir()
        self.epoch, self.best, self.stale = 0, None, 0
        seed_everything(config.seed, 0)
        torch.backends.cudnn.benchmark = True

        self.model = DeepLabV3(data.classes, config.arch.args.backbone)
        checkpoint = read_checkpoint(resume) if resume else None
        if checkpoint:
            load_weights(self.model, checkpoint["state_dict"], resume)
        self.initialize(fresh=checkpoint is None)
        self.model.to(self.device, memory_format=torch.channels_last)
        self.dataset = self.training_set()
        self.batches = TrainBatches(
            len(self.dataset),
            config.data.train.batch_size,
            config.seed,
            rank(),
            world_size(),
        )
        self._prepare_bn()
        self.net = self._parallel()
        self.optimizer = self._make_optimizer()
        self.scheduler = torch.optim.lr_scheduler.PolynomialLR(
            self.optimizer,
            config.trainer.epochs * len(self.batches),
            config.lr_scheduler.args.power,
        )
        self.amp_dtype = self._amp_dtype()
        self.scaler = torch.amp.GradScaler(enabled=self.amp_dtype == torch.float16)
        if checkpoint:
            self._restore(checkpoint, resume)

    # What a kind of step provides.

    def initialize(self, fresh: bool) -> None:
        """Give the model its starting weights; fresh is false where a checkpoint gave them."""
        raise NotImplementedError

    def training_set(self) -> TrainDataset:
        raise NotImplementedError

    def parameter_groups(self) -> list[dict]:
        raise NotImplementedError

    def training_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a micro-batch, and its parts [P] in the order of loss_parts, without gradient."""
        raise NotImplementedError

    # The loop.

    def fit(self) -> None:
        """Train the remaining epochs, then evaluate on the test images and write metrics.json."""
        settings = self.config.trainer
        loader = make_loader(
            self.dataset, self.batches, self.config.data.num_workers, self.config.data.pin_memory
        )
        records = EpochRecords(self.config.step_dir(kind="log"), settings.tensorboard and not rank())
        if rank() == 0:
            records.keep_until(self.epoch)
        log.info(
            f"{len(self.dataset.images)} training images, {len(self.dataset)} samples with replay, "
            f"{len(self.batches)} iterations an epoch, {settings.epochs} epochs"
        )
        while self.epoch < settings.epochs and not self._stopped_early():
            started = time.perf_counter()
            parts = self.train_epoch(loader)
            self.epoch += 1
            seconds = time.perf_counter() - started
            record = {"epoch": self.epoch, **parts, "seconds": seconds, "peak_mib": peak_memory()}
            broadcast(self.model.buffers())  # plain BN has statistics of its own in each process
            improved = self._validate(record)
            if rank() == 0:
                records.write(record)
            self._save(improved)
            log.info(_epoch_line(record, settings.epochs))
        self._finish()

    def train_epoch(self, loader) -> dict[str, float]:
        """One pass over the training set; returns the mean loss and its parts."""
        seed_everything(self.config.seed, self.epoch + 1, rank())
        self.batches.epoch = self.epoch
        self.model.train()
        if self.config.arch.args.freeze_all_bn:
            freeze_bn(self.model)
        health = Health(self.loss_parts, self.device, self.data.step)
        settings, iterations = self.config.trainer, len(self.batches)
        title = f"epoch {self.epoch + 1}/{settings.epochs}"
        with Progress(title, iterations, settings.verbosity == 2) as progress:
            for iteration, raw in enumerate(loader, start=1):
                self.train_iteration(raw, health)
                progress.advance(len(raw["id"]))
                if iteration % settings.log_interval == 0 or iteration == iterations:
                    loss = health.check(self.epoch)["loss"]
                    progress.show(iteration, loss, self.scheduler.get_last_lr()[0])
        return health.epoch_means()

    def train_iteration(self, raw: dict, health: Health) -> None:
        """One optimiser step on a batch of the loader, in micro-batches."""
        micro_batches = self.to_device(raw)
        parts = torch.zeros(len(self.loss_parts), device=self.device)
        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if last or self.net is self.model else self.net.no_sync():
                loss, micro_parts = self.training_loss(batch)
                self.scaler.scale(loss * world_size()).backward()  # DDP averages, the loss is a sum
            parts += micro_parts / batch.valid
        failed = health.record(parts, raw["id"])
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = failed  # where it is 1, the fused optimiser skips its step
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()

    def to_device(self, raw: dict) -> list[Batch]:
        """A loader's batch as micro-batches on the device, without waiting for it."""
        move = {key: raw[key].to(self.device, non_blocking=True) for key in raw if key != "id"}
        valid = all_sum((move["label"] != VOID).sum()).clamp(min=1)
        dtype = next(self.model.parameters()).dtype
        images = normalize(move["image"], move["label"], move["alone"]).to(dtype)
        pieces = self._micro_batches()
        columns = (images, move["label"], move.get("numbers"), move["replayed"])
        split = [c.tensor_split(pieces) if c is not None else [None] * pieces for c in columns]
        return [Batch(*piece, valid) for piece in zip(*split, strict=True)]

    def _micro_batches(self):
        """How many a batch is split into: as many in each process, since their collectives meet."""
        return min(self.config.trainer.accumulate, *self.batches.sizes())

    def autocast(self):
        """Mixed precision for the networks, where the configuration and the device have it."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype != torch.float32)

    def normalizer(self, batch: Batch) -> torch.Tensor:
        """1 / non-void pixels of the batch, in the precision of the losses."""
        dtype = torch.float64 if batch.images.dtype == torch.float64 else torch.float32
        return 1 / batch.valid.to(dtype)

    # Construction.

    def _prepare_bn(self):
        """Synchronise batch normalisation over CUDA processes; refuse batches it cannot train on."""
        args = self.config.arch.args
        if args.freeze_all_bn:
            freeze_bn(self.model)
            return
        synchronised = args.norm_act == "bn_sync" and world_size() > 1 and self.device.type == "cuda"
        if synchronised:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        sizes = [n // self._micro_batches() for n in self.batches.sizes()]
        if (sum(sizes) if synchronised else min(sizes)) < 2:
            raise UserError(
                "batch normalisation cannot train on one image at a time: use a larger --bs, a "
                "smaller --accumulate, more training images, or --freeze_bn"
            )

    def _parallel(self):
        if world_size() == 1:
            return self.model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.model, device_ids=ids, gradient_as_bucket_view=True)

    def _make_optimizer(self):
        args = self.config.optimizer.args
        optimizer = torch.optim.SGD(
            self.parameter_groups(),
            lr=args.lr,
            momentum=args.momentum,
            nesterov=args.nesterov and args.momentum > 0,
            weight_decay=args.weight_decay,
            fused=True,
        )
        if args.momentum > 0:  # a fused first step that is gated would leave its buffers unset
            for group in optimizer.param_groups:
                for p in group["params"]:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return optimizer

    def _amp_dtype(self):
        asked = self.config.amp_dtype if self.config.use_amp else None
        if self.device.type != "cuda":
            return torch.bfloat16 if asked == "bf16" else torch.float32
        if asked == "auto":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            asked = "bf16" if native else "fp16"
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(asked, torch.float32)

    # Checkpoints, validation, the end.

    def _restore(self, checkpoint, path):
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.scheduler.load_state_dict(checkpoint["lr_scheduler"])
            if self.scaler.is_enabled() and checkpoint["scaler"]:
                self.scaler.load_state_dict(checkpoint["scaler"])
            self.epoch = checkpoint["epoch"]
            if self.epoch > self.config.trainer.epochs:
                raise ValueError(f"it is at epoch {self.epoch} already")
            if not self.config.trainer.reset_best_mnt:
                self.best, self.stale = checkpoint["best"], checkpoint["stale"]
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{path} cannot be resumed from: its training state does not fit ({error}); "
                "--overwrite trains the step anew"
            ) from None
        log.info(f"resumed after epoch {self.epoch} from {path}")

    def checkpoint(self) -> dict:
        """All that is needed to go on bit for bit; the randomness follows from seed and epoch."""
        return {
            "format": "eir-1",
            "arch": {"backbone": self.config.arch.args.backbone, "classes": self.model.classes},
            "order": list(self.data.task.seen(self.data.step)),
            "state_dict": self.model.state_dict(),
            "epoch": self.epoch,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best,
            "stale": self.stale,
            "ac": self.config.hyperparameter.ac,
        }

    def _save(self, improved):
        settings = self.config.trainer
        if not all(bool(value.isfinite().all()) for value in self.model.state_dict().values()):
            raise UserError(
                f"weights are not finite after epoch {self.epoch}: nothing was saved; the last good "
                "checkpoint stands (a smaller --lr may help)"
            )
        if rank() == 0:
            content = self.checkpoint()
            if improved:
                save_checkpoint(self.folder / "model_best.pth", content)
            save_checkpoint(self.folder / "last.pth", content)
            if settings.save_period > 0 and self.epoch % settings.save_period == 0:
                save_checkpoint(self._numbered(), content)
        barrier()

    def _validate(self, record):
        """Validate if it is due; true if the monitored value is the best so far."""
        settings = self.config.trainer
        if settings.validation_period < 1 or self.epoch % settings.validation_period:
            return False
        metrics = evaluate(self.model, self.data, "val", self.device)
        for metric in self.config.metrics:
            for group in GROUPS:
                record[monitor_name(metric, group)] = metrics[metric][group]
        if settings.monitor == "off":
            return False
        mode, name = parse_monitor(settings.monitor)
        value = record.get(name)
        better = value is not None and (
            self.best is None or (value > self.best if mode == "max" else value < self.best)
        )
        self.best, self.stale = (value, 0) if better else (self.best, self.stale + 1)
        return better

    def _stopped_early(self):
        return 0 < self.config.trainer.early_stop <= self.stale

    def _numbered(self):
        return self.folder / f"checkpoint-epoch{self.epoch}.pth"

    def _finish(self):
        """Keep the final checkpoint, evaluate, and write what marks the step as finished."""
        if rank() == 0:
            save_checkpoint(self._numbered(), self.checkpoint())
            for later in numbered_checkpoints(self.folder, self.epoch + 1):
                later.unlink()  # of a longer run that was gone back from
        metrics = evaluate(self.model, self.data, "test", self.device)
        if rank() == 0:
            write_json(self.folder / "metrics.json", metrics)
        log.info("\n" + format_table(metrics, *self.data.groups("test")))
        log.info(f"\ncheckpoint  {self._numbered()}")
        log.info(f"metrics     {self.folder / 'metrics.json'}")
        log.info(f"log         {self.config.step_dir(kind='log')}")


def seed_everything(seed: int, epoch: int, process: int = 0) -> None:
    """Seed every library for an epoch, so that a resumed run needs no generator states."""
    value = int(np.random.SeedSequence((seed, epoch, process)).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def check_order(checkpoint: dict, data: StepData, path: Path) -> None:
    """Raise UserError if a checkpoint learned other classes, or in another order."""
    order = checkpoint.get("order")
    if order is not None and order != list(data.task.order[: len(order)]):
        raise UserError(
            f"{path} learned other classes than {data.task.name} has there, or in another order"
        )


def _epoch_line(record, epochs):
    values = (f"{k} {v:.4f}" for k, v in record.items() if isinstance(v, float))
    return f"epoch {record['epoch']}/{epochs}: " + ", ".join(values)
