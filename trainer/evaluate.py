"""Evaluation: one confusion matrix, each image counted once, in float32."""

import numpy as np
import torch
from torch import nn

from data_loader.data_loaders import EvalBatches, StepData, make_loader
from data_loader.dataset import normalize
from models.deeplabv3 import predict, upsample_logits
from utils.distributed import all_sum, rank, world_size
from utils.logging import progress
from utils.metrics import ConfusionMatrix, compute_metrics


@torch.inference_mode()
def confusion_matrix(
    model: nn.Module, data: StepData, split: str, device: torch.device, score: float = 0.5
) -> np.ndarray:
    """Confusion matrix int64 [C, C] of a split over all processes, predicted above a score.

    Batches are fixed by the images' index in the split and arithmetic is float32 without TF32, so
    that the numbers do not depend on how the evaluation was started.
    """
    dataset, batch_size = data.evaluation(split)
    batches = EvalBatches(len(dataset), batch_size, rank(), world_size())
    loader = make_loader(dataset, batches, data.config.num_workers, data.config.pin_memory)
    matrix = ConfusionMatrix(1 + sum(model.classes), device)
    was_training = model.training
    model.eval()
    with torch.backends.cudnn.flags(
        enabled=True, deterministic=True, benchmark=False, allow_tf32=False
    ):
        for batch in progress(loader, f"evaluation ({split})", "batch"):
            images = normalize(batch["image"].to(device, non_blocking=True))
            label = batch["label"].to(device, non_blocking=True)
            logits = model(images, upsample=False)
            for i in range(len(label)):  # one at a time, for the memory of many classes
                full = upsample_logits(logits[i : i + 1], images.shape[-2:])
                matrix.update(label[i : i + 1], predict(full, score))
    model.train(was_training)
    return all_sum(matrix.counts).cpu().numpy()


def evaluate(
    model: nn.Module, data: StepData, split: str, device: torch.device, score: float = 0.5
) -> dict:
    """Metrics of a split (utils.metrics.compute_metrics), equal in every process.

    Where an IoU of 0 is no error of the model, since no training image shows the class or no pixel of
    the split, the IoU has the names of those classes as `without_images`; the means count them.
    """
    counts = confusion_matrix(model, data, split, device, score)
    metrics = compute_metrics(counts, data.class_names, *data.groups)
    iou = metrics["Mean_Intersection_over_Union"]
    untrained = data.never_shown()
    lacking = [
        name
        for (name, value), pixels in zip(iou["by_class"].items(), counts.sum(axis=1), strict=True)
        if value == 0 and (pixels == 0 or name in untrained)
    ]
    if lacking:
        iou["without_images"] = lacking
    return metrics
