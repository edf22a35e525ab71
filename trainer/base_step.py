"""Step 0: learn the first classes (METHOD 3)."""

import torch

from data_loader.dataset import TrainDataset
from models.deeplabv3 import imagenet_weights
from models.losses import auxiliary_sum, bce_sum, sum_over_images
from trainer.base import Batch, Trainer
from utils.distributed import first_process_first


class BaseStep(Trainer):
    """L = mbce * L_bce + ac * L_ac."""

    loss_parts = ("bce", "ac")

    def initialize(self, fresh: bool) -> None:
        """ImageNet weights for the backbone, if the configuration asks for them."""
        args = self.config.arch.args
        if not fresh or not args.backbone_pretrained or args.backbone_weights == "none":
            return
        weights = first_process_first(lambda: imagenet_weights(args.backbone, args.backbone_weights))
        self.model.backbone.load_state_dict(weights)

    def training_set(self) -> TrainDataset:
        return TrainDataset(self.data.training(), None, self.config.seed)

    def parameter_groups(self) -> list[dict]:
        """Backbone at the learning rate, ASPP and classifiers at ten times that."""
        lr = self.config.optimizer.args.lr
        return [
            {"params": trainable(self.model.backbone), "lr": lr},
            {"params": trainable(self.model.aspp), "lr": 10 * lr},
            {"params": trainable(self.model.cls), "lr": 10 * lr},
        ]

    def training_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        settings = self.config.hyperparameter
        with self.autocast():
            logits = self.net(batch.images, upsample=False)

        def parts_of(i, z):
            label = batch.labels[i]
            bce = bce_sum(z, label, pos_weight=settings.pos_weight)
            return torch.stack([settings.mbce * bce, settings.ac * auxiliary_sum(z, label)])

        size = batch.images.shape[-2:]
        return sum_over_images(logits, size, parts_of, self.normalizer(batch).expand(2))


def trainable(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters that are learned: frozen batch normalisation has none."""
    return [p for p in module.parameters() if p.requires_grad]
