"""Segmentation metrics from one confusion matrix, and their table."""

import numpy as np
import torch

METRICS = ("Pixel_Accuracy", "Pixel_Accuracy_Class", "Mean_Intersection_over_Union")
GROUPS = ("overall", "old", "new", "harmonic")  # what each of them is the mean over


class ConfusionMatrix:
    """Pixels int64 [C, C], rows the true channel, columns the predicted, on a device."""

    def __init__(self, channels: int, device: torch.device):
        self.channels = channels
        self.counts = torch.zeros(channels, channels, dtype=torch.int64, device=device)

    def update(self, target: torch.Tensor, prediction: torch.Tensor) -> None:
        """Add pixels: integer tensors of one shape, channels; targets beyond C-1 (void) are left."""
        c = self.channels
        target, prediction = target.flatten().long(), prediction.flatten().long()
        pairs = torch.where(target < c, target * c + prediction, c * c)
        # bincount counts as well, but waits for the device to learn the greatest pair
        counts = torch.zeros(c * c + 1, dtype=torch.int64, device=pairs.device)
        counts.scatter_add_(0, pairs, torch.ones_like(pairs))
        self.counts += counts[: c * c].view(c, c)


def compute_metrics(
    counts: np.ndarray, names: list[str], old: list[int], new: list[int]
) -> dict[str, dict]:
    """Metrics in percent from a confusion matrix int64 [C, C].

    names: of the C channels. old, new: channels whose means are reported beside the mean of all.
    Each metric has overall, old, new, harmonic (None where undefined) and, but for the pixel
    accuracy, by_class. A class without a pixel counts as 0.
    """
    counts = counts.astype(np.float64)
    hits, truth, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    recall = _ratio(hits, truth)
    iou = _ratio(hits, truth + predicted - hits)

    def pixel_accuracy(channels):
        return float(_ratio(hits[channels].sum(), truth[channels].sum()))

    groups = {"overall": [*range(len(names))], "old": old, "new": new}
    means = {
        "Pixel_Accuracy": pixel_accuracy,
        "Pixel_Accuracy_Class": lambda channels: float(recall[channels].mean()),
        "Mean_Intersection_over_Union": lambda channels: float(iou[channels].mean()),
    }
    result = {}
    for metric in METRICS:
        values = {g: 100 * means[metric](ch) if ch else None for g, ch in groups.items()}
        values["harmonic"] = harmonic_mean(values["old"], values["new"])
        result[metric] = values
    for metric, per_class in zip(METRICS[1:], (recall, iou), strict=True):
        result[metric]["by_class"] = {n: 100 * float(v) for n, v in zip(names, per_class, strict=True)}
    return result


def _ratio(part, whole):
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def harmonic_mean(a: float | None, b: float | None) -> float | None:
    """Of two means, such as old and new; None where one of them is undefined."""
    if a is None or b is None:
        return None
    return 2 * a * b / (a + b) if a + b else 0.0


# Below a table in which classes are marked: those that an IoU calls `without_images`.
FOOTNOTE = "* no image to learn it from, or none to test it on: a 0 that is no error of the model"


def format_table(metrics: dict[str, dict], old: list[int], new: list[int]) -> str:
    """A table for people: class, group, IoU and accuracy, then the means."""
    iou, recall = (metrics[m] for m in (METRICS[2], METRICS[1]))
    marked = iou.get("without_images", ())
    lines = [f"{'class':<14}{'group':>6}{'IoU':>9}{'accuracy':>10}"]
    for channel, (name, value) in enumerate(iou["by_class"].items()):
        group = "old" if channel in old else "new" if channel in new else "-"
        mark = "*" if name in marked else ""
        lines.append(f"{name:<14}{group:>6}{value:>9.2f}{mark:<1}{recall['by_class'][name]:>9.2f}")
    lines += [FOOTNOTE] if marked else []
    titles = {"overall": "all", "old": "old", "new": "new", "harmonic": "harmonic"}
    lines += ["", f"{'':<30}" + "".join(f"{title:>10}" for title in titles.values())]
    for metric, values in metrics.items():
        cells = ("-" if values[g] is None else f"{values[g]:.2f}" for g in titles)
        lines.append(f"{metric:<30}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)
