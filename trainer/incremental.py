"""Steps t >= 1 of EIR: learn new classes, keep the old (METHOD 5)."""

import torch

from data_loader.dataset import TrainDataset
from data_loader.paste import Bank, Composite, PasteAugmentation
from models.deeplabv3 import upsample_logits
from models.losses import bce_sum, distillation_sum, sum_over_images
from trainer.base import Batch
from trainer.later_step import LaterStep
from trainer.pseudo_labels import (
    ImageLabels,
    WholeImages,
    ignore_doubtful,
    pseudo_labels,
    store_pseudo_labels,
)
from utils.checkpoint import content_digest
from utils.logging import log


class IncrementalStep(LaterStep):
    """L = mbce * L_bce(soft labels) + kd * L_distillation, on images with pasted instances."""

    def initialize(self, fresh: bool) -> None:
        """Teacher and student; the distillation needs a teacher that knows the background."""
        super().initialize(fresh)
        if self.auxiliary:
            log.warning(
                f"{self.previous} may hold an auxiliary classifier (DKD) in place of the background's: "
                "the teacher's background score then means nothing to the distillation"
            )

    def training_set(self) -> TrainDataset:
        """As in LaterStep; what is pasted comes from the same memory."""
        samples = super().training_set()
        self.paste, memory = None, samples.memory
        if memory and self.config.data.memory.replay == "eir":
            bank = Bank(memory, 1 + sum(self.teacher.classes), self.device)
            crop_size = self.config.data.train.args.transform_args.crop_size
            settings, seed = self.config.hyperparameter.paste, self.config.seed
            self.paste = PasteAugmentation(settings, crop_size, bank, seed)
        if self.config.hyperparameter.pseudo_labels == "image":
            samples.pseudo = self._look_at_whole_images(samples)
        return samples

    def _look_at_whole_images(self, dataset):
        """Pseudo labels of all whole images of a training set, stored in the step's folder."""
        folder, data, task = self.folder / "pseudo_labels", self.config.data, self.data.task
        known = task.seen(self.data.step - 1)
        made_from = {
            "teacher": content_digest(self.previous),
            "train": self.data.digest("train"),
            "memory": dataset.memory.digest if dataset.memory else None,
            "precision": str(self.amp_dtype),
        }
        written = store_pseudo_labels(
            folder,
            WholeImages(dataset, data.train.args.transform_args.crop_size),
            self.teach,
            known,
            self.config.hyperparameter.pseudo_thresh,
            made_from,
            self.device,
            data.num_workers,
        )
        return ImageLabels(written, task.label_table(known))

    def training_loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        settings = self.config.hyperparameter
        distils = settings.kd_mode != "none" and settings.kd > 0
        size = batch.labels.shape[-2:]

        # where the label is background, a class that the teacher is sure of becomes the label
        labels, on_image = self.pseudo_label(batch)

        # stored instances of the old classes go where there is most background
        composite = self.compose(batch, labels)
        if settings.ignore_thresh is not None:
            labels = ignore_doubtful(labels, on_image, settings.ignore_thresh, composite.weights)

        # student and teacher look at the composite; without a paste that is the image
        with self.autocast():
            logits = self.net(composite.images, upsample=False)
        on_composite = on_image
        if distils and (self.paste or on_image is None):
            on_composite = self.teach(composite.images)

        def losses(i, z):
            """The loss terms of image i from its full-size logits z [C, H, W]."""
            weights = composite.weights[i].to(z.dtype)
            bce = bce_sum(z, labels[i], composite.classes[i], weights, settings.pos_weight)
            if not distils:
                return {"bce": settings.mbce * bce, "kd": torch.zeros_like(bce)}
            kd = distillation_sum(
                z,
                upsample_logits(on_composite[i : i + 1].to(z.dtype).contiguous(), size)[0],
                batch.labels[i],
                weights.sum(dim=0) > 0,
                settings.kd_mode,
                settings.rskd_region,
            )
            return {"bce": settings.mbce * bce, "kd": settings.kd * kd}

        return sum_over_images(logits, size, losses, batch.scale)

    @torch.no_grad()
    def pseudo_label(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Labels [N, H, W] with pseudo labels in their background, and the teacher's logits on the
        images, if it looked at them for that.
        """
        if batch.pseudo is not None:
            return torch.where(batch.labels == 0, batch.pseudo, batch.labels), None
        settings = self.config.hyperparameter
        if settings.pseudo_labels == "off":
            return batch.labels, None
        on_image = self.teach(batch.images)
        return pseudo_labels(batch.labels, on_image, settings.pseudo_thresh), on_image

    @torch.no_grad()
    def compose(self, batch: Batch, labels: torch.Tensor) -> Composite:
        """The batch with instances pasted into it, or as it is."""
        if self.paste:
            return self.paste(
                batch.images, batch.labels, labels, batch.epoch, batch.indices, batch.replayed
            )
        n, h, w = labels.shape
        classes = torch.zeros(n, 0, dtype=torch.int64, device=labels.device)
        return Composite(batch.images, classes, torch.zeros(n, 0, h, w, device=labels.device))
