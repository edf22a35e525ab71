"""Evaluation: one confusion matrix, each image counted once, in float32."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from data_loader.data_loaders import EvalBatches, StepData, make_loader
from data_loader.dataset import normalize
from models.deeplabv3 import predict, upsample_logits
from utils.distributed import all_sum, rank, world_size
from utils.errors import UserError
from utils.logging import progress
from utils.metrics import ConfusionMatrix, compute_metrics


@torch.inference_mode()
def predictions(
    model: nn.Module,
    images: torch.Tensor,
    score: float = 0.5,
    size: tuple[int, int] | None = None,
) -> Iterator[torch.Tensor]:
    """The channels int64 [1, H, W] predicted in each image of a batch uint8 [N, 3, h, w], in turn.

    size: H and W, by default those of the images.

    The model is in evaluation mode, and on the device of the images. Arithmetic is float32 without
    TF32. Logits of full size are made of one image at a time, for the memory of many classes. UserError
    for logits that are not finite, which would count as background.
    """
    images = normalize(images)
    with torch.backends.cudnn.flags(
        enabled=True, deterministic=True, benchmark=False, allow_tf32=False
    ):
        logits = model(images, upsample=False)
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite: its weights are damaged, train it anew")
    for i in range(len(images)):
        yield predict(upsample_logits(logits[i : i + 1], size or images.shape[-2:]), score)


@torch.inference_mode()
def confusion_matrix(
    model: nn.Module, data: StepData, split: str, device: torch.device, score: float = 0.5
) -> np.ndarray:
    """Confusion matrix int64 [C, C] of a split over all processes, predicted above a score.

    Batches are fixed by the images' index in the split, so that the numbers do not depend on how the
    evaluation was started.
    """
    dataset, batch_size = data.evaluation(split)
    batches = EvalBatches(len(dataset), batch_size, rank(), world_size())
    loader = make_loader(dataset, batches, data.config.num_workers, data.config.pin_memory)
    matrix = ConfusionMatrix(1 + sum(model.classes), device)
    was_training = model.training
    model.eval()
    for batch in progress(loader, f"evaluation ({split})", "batch"):
        images = batch["image"].to(device, non_blocking=True)
        labels = batch["label"].to(device, non_blocking=True)
        for label, found in zip(labels, predictions(model, images, score), strict=True):
            matrix.update(label[None], found)
    model.train(was_training)
    return all_sum(matrix.counts).cpu().numpy()


def evaluate(
    model: nn.Module,
    data: StepData,
    split: str,
    device: torch.device,
    score: float = 0.5,
    untrained: Sequence[str] | None = None,
) -> dict:
    """Metrics of a split (utils.metrics.compute_metrics), equal in every process.

    Beside the IoU, `without_images` lists the classes with an IoU of 0 that no training image, or no
    pixel of the split, shows: no error of the model. The means count them.
    untrained: names of the former; None for what the training list of the data has.
    """
    counts = confusion_matrix(model, data, split, device, score)
    metrics = compute_metrics(counts, data.class_names, *data.groups)
    iou = metrics["Mean_Intersection_over_Union"]
    untrained = data.never_shown() if untrained is None else untrained
    lacking = [
        name
        for (name, value), pixels in zip(iou["by_class"].items(), counts.sum(axis=1), strict=True)
        if value == 0 and (pixels == 0 or name in untrained)
    ]
    if lacking:
        iou["without_images"] = lacking
    return metrics
