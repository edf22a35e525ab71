"""Steps t >= 1: learn new classes, keep the old (METHOD 5)."""

import torch

from data_loader.dataset import TrainDataset
from data_loader.paste import Bank, Composite, PasteAugmentation
from models.deeplabv3 import DeepLabV3, upsample_logits
from models.losses import bce_sum, distillation_sum, sum_over_images
from trainer.base import Batch, Trainer, check_order
from trainer.base_step import trainable
from trainer.pseudo_labels import ignore_doubtful, pseudo_labels
from utils.checkpoint import load_weights, read_checkpoint
from utils.logging import log


class IncrementalStep(Trainer):
    """L = mbce * L_bce(soft labels) + kd * L_distillation, on images with pasted instances."""

    loss_parts = ("bce", "kd")

    def initialize(self, fresh: bool) -> None:
        """The teacher is the model of step t-1; the student starts from it, with a new classifier."""
        checkpoint = read_checkpoint(self.previous)
        check_order(checkpoint, self.data, self.previous)
        self.teacher = DeepLabV3(self.data.classes[:-1], self.config.arch.args.backbone)
        load_weights(self.teacher, checkpoint["state_dict"], self.previous)
        self.teacher.eval().requires_grad_(False)
        self.teacher.to(self.device, memory_format=torch.channels_last)
        if fresh:
            self.model.load_state_dict(self.teacher.state_dict(), strict=False)
            if self.config.hyperparameter.ac > 0:
                self._start_from_auxiliary()
        if checkpoint.get("format") != "eir-1" or checkpoint["ac"] > 0:
            log.warning(
                f"{self.previous} may hold an auxiliary classifier (DKD) in place of the background's: "
                "the teacher's background score then means nothing to the distillation"
            )

    def _start_from_auxiliary(self):
        """New classifier from cls.0, as DKD does."""
        new, auxiliary = self.model.cls[-1], self.model.cls[0]
        with torch.no_grad():
            new.weight.copy_(auxiliary.weight.expand_as(new.weight))
            new.bias.copy_(auxiliary.bias.expand_as(new.bias))

    def training_set(self) -> TrainDataset:
        """Images of this step, then the entries of the memory; sets the paste up."""
        folders = self.folder / "memory", self.previous.parent / "memory"
        memory = self.data.memory(*folders, redraw=self.overwrite)
        self.paste = None
        if memory and self.config.data.memory.replay == "eir":
            bank = Bank.pack(memory, 1 + sum(self.teacher.classes), self.device)
            crop_size = self.config.data.train.args.transform_args.crop_size
            self.paste = PasteAugmentation(self.config.hyperparameter.paste, crop_size, bank)
        draw = self.paste.numbers if self.paste else None
        return TrainDataset(self.data.training(), memory, self.config.seed, draw)

    def parameter_groups(self) -> list[dict]:
        """As at step 0, but with weight decay on the new classifier only."""
        lr, model = self.config.optimizer.args.lr, self.model
        return [
            {"params": trainable(model.backbone), "lr": lr, "weight_decay": 0},
            {"params": trainable(model.aspp), "lr": 10 * lr, "weight_decay": 0},
            {"params": trainable(model.cls[:-1]), "lr": 10 * lr, "weight_decay": 0},
            {"params": trainable(model.cls[-1]), "lr": 10 * lr},
        ]

    def training_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        settings = self.config.hyperparameter
        labels, teacher_logits = batch.labels, None
        if settings.pseudo_labels:
            teacher_logits = self.teach(batch.images)
            labels = pseudo_labels(batch.labels, teacher_logits, settings.pseudo_thresh)
        composite = self.compose(batch, labels)
        if settings.ignore_thresh is not None:
            weights = composite.weights
            labels = ignore_doubtful(labels, teacher_logits, settings.ignore_thresh, weights)
        if self._distils() and (self.paste or teacher_logits is None):
            teacher_logits = self.teach(composite.images)
        with self.autocast():
            logits = self.net(composite.images, upsample=False)
        return self.losses(logits, teacher_logits, batch, labels, composite)

    def _distils(self):
        return self.config.hyperparameter.kd_mode != "none" and self.config.hyperparameter.kd > 0

    def losses(
        self,
        logits: torch.Tensor,
        teacher_logits: torch.Tensor | None,
        batch: Batch,
        labels: torch.Tensor,
        composite: Composite,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and its parts from the logits of a composite at stride 16.

        logits float [N, C, h, w] of the student; teacher_logits [N, S, h, w], None without
        distillation; labels uint8 [N, H, W] with pseudo labels.
        """
        settings, size = self.config.hyperparameter, labels.shape[-2:]

        def parts_of(i, z):
            weights = composite.weights[i].to(z.dtype)
            bce = bce_sum(z, labels[i], composite.classes[i], weights, settings.pos_weight)
            if not self._distils():
                return torch.stack([settings.mbce * bce, torch.zeros_like(bce)])
            kd = distillation_sum(
                z,
                upsample_logits(teacher_logits[i : i + 1].to(z.dtype), size)[0],
                batch.labels[i],
                weights.sum(dim=0) > 0,
                settings.kd_mode,
                settings.rskd_region,
            )
            return torch.stack([settings.mbce * bce, settings.kd * kd])

        return sum_over_images(logits, size, parts_of, self.normalizer(batch).expand(2))

    @torch.no_grad()
    def teach(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of the teacher at stride 16."""
        with self.autocast():
            return self.teacher(images, upsample=False)

    @torch.no_grad()
    def compose(self, batch: Batch, labels: torch.Tensor) -> Composite:
        """The batch with instances pasted into it, or as it is."""
        if self.paste:
            return self.paste(batch.images, batch.labels, labels, batch.numbers, batch.replayed)
        n, h, w = labels.shape
        classes = torch.zeros(n, 0, dtype=torch.int64, device=labels.device)
        return Composite(batch.images, classes, torch.zeros(n, 0, h, w, device=labels.device))
