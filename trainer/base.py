"""The loop: epochs and iterations, the same for every kind of step.

A kind of step is a subclass that says how it starts (`initialize`), what is optimised
(`parameter_groups`) and what is minimised (`training_loss`); `STEPS` in trainer/run.py names them.
"""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from numpy.random import SeedSequence

from configs.options import Config
from data_loader.data_loaders import StepData, TrainBatches, make_loader
from data_loader.dataset import TrainDataset, normalize
from models.deeplabv3 import DeepLabV3, freeze_bn, seed_dropout, stop_dropout
from trainer import output
from trainer.evaluate import evaluate
from trainer.meter import Meter
from trainer.setup import (
    PolySchedule,
    check_batch_size,
    make_optimizer,
    micro_batches,
    parallel,
    precision,
    prepare_bn,
    seed_everything,
)
from trainer.validation import Validation
from utils.checkpoint import write_json
from utils.distributed import all_sum, broadcast, device, peak_memory, rank, world_size
from utils.logging import EpochRecords, log
from utils.visualize import VOID


@dataclass
class Batch:
    """A (micro-)batch on the device.

    images float [N, 3, H, W], normalised; labels uint8 [N, H, W], channels and 255; replayed bool [N],
    the images of the memory; pseudo uint8 [N, H, W], channels, pseudo labels of whole images, or None;
    epoch (from 0) and indices [N], on the host, name the samples; valid: the pixels of the whole batch
    that count (Trainer.counted), over all its micro-batches and processes: losses are divided by it.
    """

    images: torch.Tensor
    labels: torch.Tensor
    replayed: torch.Tensor
    pseudo: torch.Tensor | None
    epoch: int
    indices: list[int]
    valid: torch.Tensor

    @property
    def scale(self) -> torch.Tensor:
        """1 / valid, in the precision of the losses: float32, or float64 as the images are."""
        return 1 / self.valid.to(torch.promote_types(self.images.dtype, torch.float32))


class Trainer:
    """Trains one step of a task and evaluates it.

    Making one reads and checks, and writes nothing. `prepare` makes the training set and draws the
    memory, if it is not there yet, into a folder beside its own, so that a refusal leaves the old one.
    `fit` trains, and writes what trainer/output.py lists; what was asked for is refused no more.
    """

    def __init__(
        self,
        config: Config,
        data: StepData,
        resume: Path | None = None,
        previous: Path | None = None,
    ):
        """resume: checkpoint of this step to go on from, None where what its folder holds is replaced;
        previous: final one of the step before.
        """
        self.config, self.data, self.previous = config, data, previous
        self.folder = config.step_dir()
        self.device = device()
        self.epoch = 0
        self.validation = Validation(config)
        self.before = {}  # what the previous model was made from, as far as it says so
        seed_everything(config.seed, 0)
        torch.backends.cudnn.benchmark = True

        backbone = config.arch.args.backbone
        self.resume, self.resumed = resume, None
        if resume:
            self.model, self.resumed = output.read_model(resume, data, backbone, data.step)
        else:
            self.model = DeepLabV3(data.classes, backbone)
        self.initialize(fresh=self.resumed is None)
        self.model.to(self.device, memory_format=torch.channels_last)
        check_batch_size(config, [config.data.train.batch_size] * world_size())
        self.model = prepare_bn(self.model, config)
        self.net = parallel(self.model, self.device)
        self.optimizer = make_optimizer(config, self.parameter_groups())
        self.amp_dtype = precision(config, self.device)
        self.scaler = torch.amp.GradScaler(enabled=self.amp_dtype == torch.float16)

    # What a kind of step provides.

    def initialize(self, fresh: bool) -> None:
        """Give the model its starting weights; fresh is false where a checkpoint gave them."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict]:
        """Parameter groups of the optimiser, as torch.optim takes them."""
        raise NotImplementedError

    def training_set(self) -> TrainDataset:
        """What is trained on; a step with a memory draws and stores it here."""
        return TrainDataset(self.data.training(), None, self.config.seed)

    def counted(self, labels: torch.Tensor) -> torch.Tensor:
        """The pixels, bool, that the loss is a mean over: all that are not void in labels [N, H, W]."""
        return labels != VOID

    def training_loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of a micro-batch, divided by batch.valid, and its terms by name.

        The terms are weighted, but not divided, and have no gradient.
        """
        raise NotImplementedError

    # The loop.

    def prepare(self) -> None:
        """Make the training set (and draw its memory), its batches, and the schedule, which follows
        from them; go to where a resumed checkpoint was.
        """
        config = self.config
        self.dataset = self.training_set()
        self.batches = TrainBatches(
            len(self.dataset), config.data.train.batch_size, config.seed, rank(), world_size()
        )
        check_batch_size(config, self.batches.sizes())
        pieces = micro_batches(config, self.batches.sizes())
        if pieces < config.trainer.accumulate:
            log.warning(
                f"{pieces} micro-batches instead of {config.trainer.accumulate} (--accumulate): a "
                f"process has {pieces} images"
            )
        iterations = config.trainer.epochs * len(self.batches)
        poly = config.lr_scheduler.args
        if poly.warmup >= iterations:
            log.warning(
                f"the learning rate never reaches its value: --warmup {poly.warmup} is not shorter "
                f"than the {iterations} iterations of the training"
            )
        self.scheduler = PolySchedule(self.optimizer, iterations, poly.power, poly.warmup)
        self.made_from = output.made_from(self)
        if self.resumed:
            output.restore(self, self.resumed, self.resume)
            self.resumed = None

    def fit(self) -> None:
        """Train the remaining epochs, evaluate on the test images, and write metrics.json.

        To be called once the trainer is prepared.
        """
        settings = self.config.trainer
        if rank() == 0:
            write_json(self.folder / "made_from.json", self.made_from)
        changed = output.other_conditions(self.before, self.made_from)
        if changed:
            log.warning(f"the step before was trained under other conditions: {'; '.join(changed)}")
        loader = make_loader(
            self.dataset, self.batches, self.config.data.num_workers, self.config.data.pin_memory
        )
        records = EpochRecords(self.config.step_dir(kind="log"), settings.tensorboard and not rank())
        if rank() == 0:
            records.keep_until(self.epoch)
        log.info(
            f"{len(self.dataset.images)} training images, {len(self.dataset)} samples with replay, "
            f"{len(self.batches)} iterations an epoch, {settings.epochs} epochs; "
            f"a batch of {self.batches.total} in all"
        )
        while self.epoch < settings.epochs and not self.validation.stops():
            started = time.perf_counter()
            losses = self.train_epoch(loader)
            self.epoch += 1
            seconds = time.perf_counter() - started
            speed = len(self.batches) * self.batches.total / seconds
            record = {"epoch": self.epoch, **losses, "seconds": seconds, "images_per_second": speed}
            record["peak_mib"] = peak_memory()
            broadcast(self.model.buffers())  # plain BN has statistics of its own in each process
            improved = False
            if self.validation.is_due(self.epoch):
                metrics = evaluate(self.model, self.data, "val", self.device)
                values, improved = self.validation.record(metrics)
                record.update(values)
            if rank() == 0:
                records.write(record)
            output.save(self, improved)
            values = (f"{name} {value:.4f}" for name, value in record.items() if type(value) is float)
            log.info(f"epoch {self.epoch}/{settings.epochs}: {', '.join(values)}")
        output.finish(self)

    def train_epoch(self, loader) -> dict[str, float]:
        """One pass over the training set; returns the mean loss and its terms by name."""
        settings = self.config.trainer
        seed_everything(self.config.seed, self.epoch + 1, rank())
        self.batches.epoch = self.epoch
        self.train_mode()
        title = f"step {self.data.step}, epoch {self.epoch + 1}/{settings.epochs}"
        shown = settings.verbosity == 2
        with Meter(title, len(self.batches), self.device, settings.log_interval, shown) as meter:
            for raw in loader:
                self.train_iteration(raw, meter)
                meter.show(self.scheduler.get_last_lr()[0])
        return meter.means()

    def train_mode(self) -> None:
        """The model in training mode, but for frozen batch normalisation, and dropout at steps >= 1."""
        self.model.train()
        if self.config.arch.args.freeze_all_bn:
            freeze_bn(self.model)
        if self.data.step:
            stop_dropout(self.model)

    def train_iteration(self, raw: dict, meter: Meter) -> None:
        """One optimiser step on a batch of the loader, in micro-batches.

        Nothing here waits for the device, but for synchronised batch normalisation (PyTorch's own code,
        which leaves out processes without images) where that is trained.
        """
        batches = self.to_device(raw)
        terms = {}
        for batch in batches:
            # several processes exchange their gradients once, with those of the last micro-batch
            waits = self.net is not self.model and batch is not batches[-1]
            # the masks of dropout follow from seed, epoch and image; no other draw has a 3 there
            keys = ((self.config.seed, batch.epoch, i, 3) for i in batch.indices)
            seed_dropout(self.model, [int(SeedSequence(key).generate_state(1)[0]) for key in keys])
            with self.net.no_sync() if waits else contextlib.nullcontext():
                loss, sums = self.training_loss(batch)
                # the loss is this process's share of a sum, but DDP takes the mean over processes
                self.scaler.scale(loss * world_size()).backward()
            for name, value in sums.items():
                terms[name] = terms.get(name, 0) + value / batch.valid
        failed = meter.record(terms, raw["id"])
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = failed  # where it is 1, the fused optimiser skips its step
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()

    def to_device(self, raw: dict) -> list[Batch]:
        """A loader's batch as micro-batches on the device, without waiting for it."""
        names = ("image", "label", "replayed", "alone", "pseudo")
        moved = {key: raw[key].to(self.device, non_blocking=True) for key in names if key in raw}
        image, label, replayed, alone, pseudo = map(moved.get, names)
        valid = all_sum(self.counted(label).sum()).clamp(min=1)
        image = normalize(image, label, alone).to(next(self.model.parameters()).dtype)
        # every process makes as many micro-batches, since each of them is a meeting of all processes
        pieces = micro_batches(self.config, self.batches.sizes())
        parts = (t.tensor_split(pieces) for t in (image, label, replayed, raw["index"]))
        pseudo = pseudo.tensor_split(pieces) if pseudo is not None else [None] * pieces
        epoch = int(raw["epoch"][0])
        return [
            Batch(image, label, replayed, pseudo, epoch, index.tolist(), valid)
            for image, label, replayed, index, pseudo in zip(*parts, pseudo, strict=True)
        ]

    def autocast(self) -> torch.autocast:
        """Mixed precision for the networks, where the configuration and the device have it."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype != torch.float32)
