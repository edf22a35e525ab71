"""Step 0: learn the first classes (METHOD 3)."""

import torch

from data_loader.dataset import MEAN, STD
from models.backbones import imagenet_weights
from models.losses import auxiliary_sum, bce_sum, sum_over_images
from trainer.base import Batch, Trainer
from trainer.setup import trainable
from utils.distributed import first_process_first
from utils.logging import log


class BaseStep(Trainer):
    """L = mbce * L_bce + ac * L_ac."""

    def initialize(self, fresh: bool) -> None:
        """ImageNet weights for the backbone, from the file that was given or from torchvision's server.

        Without a file `backbone_pretrained` decides; "none" in its place starts from scratch.
        """
        args = self.config.arch.args
        file = args.backbone_weights
        if not fresh or file == "none" or not (file or args.backbone_pretrained):
            return
        weights = first_process_first(lambda: imagenet_weights(args.backbone, file))
        self.model.backbone.load_state_dict(weights)
        normalised = getattr(self.model.backbone, "normalised", (MEAN, STD))
        if normalised != (MEAN, STD):
            log.warning(
                f"timm's weights of {args.backbone} were trained on images with mean {normalised[0]} "
                f"and std {normalised[1]}; here all images are normalised with ImageNet's, {MEAN} and "
                f"{STD}"
            )

    def parameter_groups(self) -> list[dict]:
        """Backbone at the learning rate, ASPP and classifiers at ten times that."""
        lr = self.config.optimizer.args.lr
        return [
            {"params": trainable(self.model.backbone), "lr": lr},
            {"params": trainable(self.model.aspp), "lr": 10 * lr},
            {"params": trainable(self.model.cls), "lr": 10 * lr},
        ]

    def training_loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with self.autocast():
            logits = self.net(batch.images, upsample=False)

        def terms(i, z):
            return self.terms(z, batch.labels[i])

        return sum_over_images(logits, batch.images.shape[-2:], terms, batch.scale)

    def terms(self, z: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss terms of an image from its full-size logits z [C, H, W] and its label [H, W]."""
        settings = self.config.hyperparameter
        return {
            "bce": settings.mbce * bce_sum(z, label, pos_weight=settings.pos_weight),
            "ac": settings.ac * auxiliary_sum(z, label),
        }
