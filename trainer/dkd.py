"""DKD, Decomposed Knowledge Distillation (METHOD 7): its step 0 and its steps t >= 1.

All means are over all pixels, void among them: it counts as none of the classes.
"""

import torch
import torch.nn.functional as F
from torch import nn

from data_loader.data_loaders import EvalBatches, make_loader
from data_loader.dataset import TrainDataset, normalize
from models.deeplabv3 import upsample_logits
from models.losses import new_class_sum, soft_target_sum, sum_over_images
from trainer.base import Batch, Trainer
from trainer.base_step import BaseStep
from trainer.later_step import LaterStep

SEEN = 0.9  # score from which the teacher sees a class in the background of a candidate of the memory


class AllPixels(Trainer):
    """Losses are means over all pixels, void among them."""

    def counted(self, labels: torch.Tensor) -> torch.Tensor:
        """All pixels."""
        return torch.ones_like(labels, dtype=torch.bool)


class DKDBaseStep(AllPixels, BaseStep):
    """L = mbce * L_bce + ac * L_ac; the auxiliary classifier learns to answer no everywhere."""

    def terms(self, z: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
        settings = self.config.hyperparameter
        return {
            "bce": settings.mbce * new_class_sum(z[1:], label, 1, settings.pos_weight),
            "ac": settings.ac * F.softplus(z[0]).sum(),  # binary cross entropy with zeros
        }


class DKDStep(AllPixels, LaterStep):
    """L = mbce * L_bce + kd * L_kd + dkd_pos * L_pos + dkd_neg * L_neg + ac * L_ac."""

    def training_set(self) -> TrainDataset:
        """The images of this step and those of the memory, with labels of this step's classes alone.

        A stored image has such labels where it is among the images of this step too.
        """
        samples = super().training_set(self.seen_classes if self.data.step > 1 else None)
        images, memory = samples.images, samples.memory
        for k, entry in enumerate(memory.entries if memory else ()):
            label = torch.zeros(entry.canvas, dtype=torch.uint8)
            if entry.id in images.ids:
                _, label = images.load(images.ids.index(entry.id))
            memory.labels[k] = label.numpy()
        return samples

    def seen_classes(self) -> list[set[int]]:
        """Classes that the teacher sees in the background of each training image of step t-1."""
        settings, order, seen = self.config.data, self.data.task.order, []
        images = self.data.previous_training()
        batches = EvalBatches(len(images), settings.test.batch_size)
        for batch in make_loader(images, batches, settings.num_workers, settings.pin_memory):
            logits = self.teach(normalize(batch["image"].to(self.device)))
            for i, label in enumerate(batch["label"].to(self.device)):
                scores = upsample_logits(logits[i : i + 1, 1:].float(), label.shape)[0].sigmoid()
                best, channel = scores.max(dim=0)
                found = channel[(label == 0) & (best >= SEEN)].unique().tolist()
                seen.append({order[c] for c in found})
        return seen

    def training_loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        settings, size = self.config.hyperparameter, batch.labels.shape[-2:]
        new = 1 + sum(self.teacher.classes)  # the first channel of the new classes

        with self.autocast():
            logits, features = self.net(batch.images, upsample=False, with_features=True)
            with torch.no_grad():
                taught, seen = self.teacher(batch.images, upsample=False, with_features=True)

        def losses(i, z):
            """The loss terms of image i from its full-size logits z [C, H, W]."""
            target = upsample_logits(taught[i : i + 1].to(z.dtype).contiguous(), size)[0]
            bce = new_class_sum(z[new:], batch.labels[i], new, settings.pos_weight)
            return {
                "bce": settings.mbce * bce,
                "ac": settings.ac * F.softplus(z[0]).sum(),
                "kd": settings.kd * soft_target_sum(z[1:new], target[1:]),
            }

        scale = batch.scale
        loss, terms = sum_over_images(logits, size, losses, scale)

        # the old classes' logits in two parts, at stride 16: a position counts for its share of pixels
        with torch.autocast(self.device.type, enabled=False):
            positive, negative = decompose(features.to(scale.dtype), self.model.cls[1:-1])
            taught_positive, taught_negative = decompose(seen.to(scale.dtype), self.teacher.cls[1:])
            share = batch.labels[0].numel() / features[0, 0].numel()
            parts = {
                "dkd_pos": settings.dkd_pos * share * soft_target_sum(positive, taught_positive),
                "dkd_neg": settings.dkd_neg * share * soft_target_sum(negative, taught_negative),
            }
        terms |= {name: value.detach() for name, value in parts.items()}
        return loss + scale * sum(parts.values()), terms


def decompose(features: torch.Tensor, classifiers: nn.ModuleList) -> tuple[torch.Tensor, torch.Tensor]:
    """Features times the positive and times the negative weights of the classifiers, without bias.

    features [N, 256, h, w]. Returns two tensors [N, classes, h, w]; their sum, with the bias added, is
    the logits.
    """
    weights = torch.cat([classifier.weight for classifier in classifiers]).to(features.dtype)
    return F.conv2d(features, weights.clamp(min=0)), F.conv2d(features, weights.clamp(max=0))
