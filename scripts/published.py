"""Published results on VOC 2012, to stand beside one's own."""

from data_loader.tasks import Task

VAL_IMAGES = 1449
SOURCE = (
    'published: by the DKD project, "Decomposed Knowledge Distillation for Class-Incremental Semantic '
    'Segmentation", NeurIPS 2022, overlap setting; hIoU and mean IoU of all classes'
)
OVERLAP = {  # hIoU and mean IoU of all classes, in percent
    "DKD": {
        "19-1": (56.95, 76.13),
        "15-5": (67.17, 73.95),
        "15-1": (57.46, 70.50),
        "10-1": (57.21, 60.43),
        "5-3": (61.32, 58.98),
    },
    "DKD-M": {
        "19-1": (68.14, 77.04),
        "15-5": (68.96, 74.84),
        "15-1": (64.09, 72.95),
        "10-1": (64.89, 66.20),
        "5-3": (65.02, 63.32),
    },
}


def published(task: Task, val_images: int | None) -> dict[str, tuple[float, float]]:
    """hIoU and mean IoU of all classes after the last step, by method.

    Empty for other tasks and settings, or another number of validation images than VOC 2012 has.
    """
    if task.setting != "overlap" or val_images != VAL_IMAGES:
        return {}
    return {method: tasks[task.name] for method, tasks in OVERLAP.items() if task.name in tasks}
