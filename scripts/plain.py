"""The method once more, by its formulas: an image, an instance, a pixel at a time, one-hot targets.

Slow, and easy to check against METHOD.md. The tests compare the fast code with it, the benchmark
measures beside it.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from utils.visualize import VOID

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MEAN_COLOUR = (124, 116, 104)


def plain_soft_labels(base, classes, weights, channels):
    """Dense soft labels [N, C, H, W] of base labels [N, H, W], pasted classes and their weights."""
    planes = [(base == c).to(weights.dtype) for c in range(channels)]
    soft = torch.stack(planes, dim=1) * (1 - weights.sum(dim=1, keepdim=True))
    for n in range(len(base)):
        for k, c in enumerate(classes[n].tolist()):
            soft[n, c] = soft[n, c] + weights[n, k]
    return soft


def plain_bce(logits, soft, base, pos_weight=1.0):
    """L_bce per image [N], summed over channels and non-void pixels; all [N, C, H, W] at full size."""
    factor = torch.full((logits.shape[1], 1, 1), pos_weight, dtype=logits.dtype, device=logits.device)
    factor[0] = 1
    cost = F.binary_cross_entropy_with_logits(logits, soft, reduction="none", pos_weight=factor)
    return (cost.sum(dim=1) * (base != VOID)).sum(dim=(1, 2))


def plain_auxiliary(logits, base):
    """L_ac per image [N]: binary cross entropy of channel 0 with zeros over non-void pixels."""
    zeros = torch.zeros_like(logits[:, 0])
    cost = F.binary_cross_entropy_with_logits(logits[:, 0], zeros, reduction="none")
    return (cost * (base != VOID)).sum(dim=(1, 2))


def plain_distillation(logits, teacher, given, covered, mode, region="new"):
    """Distillation per image [N], by probabilities; logits [N, C, H, W], teacher [N, S, H, W]."""
    old = teacher.shape[1]
    p_student, p_teacher = logits.softmax(dim=1), teacher.softmax(dim=1)
    background = p_student[:, 0]
    new = p_student[:, old:].sum(dim=1)
    is_new = torch.zeros_like(given, dtype=torch.bool)
    for c in range(old, logits.shape[1]):
        is_new |= given == c
    if mode == "unbiased":
        background = background + new
    elif mode == "rskd" and region == "new":
        background = torch.where(is_new, new, background)
    elif mode == "rskd":
        alone, both_true = is_new & ~covered, is_new & covered
        background = background * ~is_new + new * alone + (background + new) * both_true
    q = torch.cat([background[:, None], p_student[:, 1:old]], dim=1)
    cost = -(p_teacher * q.log()).sum(dim=1) / old
    counted = is_new if (mode, region) == ("rskd", "new") else given != VOID
    return torch.where(counted, cost, 0).sum(dim=(1, 2))


def plain_dkd(student, teacher, images, labels, weights):
    """The terms of DKD's loss on a batch, by name; step 0 where teacher is None.

    student and teacher are networks, weights the hyperparameters. The targets are one-hot, the parts of
    a logit sums over its features, and every mean is one over all pixels of the batch.
    """
    features = student.features(images)
    # the auxiliary classifier learns, but does not shape the features
    read = [features.detach(), *[features] * (len(student.cls) - 1)]
    logits = [classifier(f) for classifier, f in zip(student.cls, read, strict=True)]
    logits = _at_full_size(logits, images)
    old = sum(teacher.classes) if teacher else 0
    new = range(1 + old, logits.shape[1])
    positive = torch.tensor(weights.pos_weight, dtype=logits.dtype)
    bce = F.binary_cross_entropy_with_logits
    found = {
        "bce": weights.mbce
        * sum(bce(logits[:, c], (labels == c).to(logits.dtype), pos_weight=positive) for c in new),
        "ac": weights.ac * bce(logits[:, 0], torch.zeros_like(logits[:, 0])),
    }
    if teacher is None:
        return found
    seen = teacher.features(images)
    target = _at_full_size([c(seen) for c in teacher.cls], images).sigmoid().detach()
    parts = {"kd": weights.kd * sum(bce(logits[:, c], target[:, c]) for c in range(1, 1 + old))}
    for name, sign, weight in (("dkd_pos", 1, weights.dkd_pos), ("dkd_neg", -1, weights.dkd_neg)):
        parts[name] = 0
        for new_rows, old_rows in zip(_rows(student)[:old], _rows(teacher), strict=True):
            z = sum(w * features[:, k] for k, w in enumerate(new_rows) if sign * w > 0)
            y = sum(w * seen[:, k] for k, w in enumerate(old_rows) if sign * w > 0)
            parts[name] = parts[name] + weight * bce(z, y.sigmoid().detach())
    return {**found, **parts}


def _at_full_size(logits, images):
    size = images.shape[-2:]
    return F.interpolate(torch.cat(logits, dim=1), size, mode="bilinear", align_corners=False)


def _rows(model):
    """The weights of each class of a network, 256 numbers each."""
    return [row.flatten() for classifier in model.cls[1:] for row in classifier.weight]


@dataclass
class Place:
    """Where a stored crop was: its upper left corner on a canvas (height, width)."""

    top: int
    left: int
    canvas: tuple[int, int]


@dataclass
class Stored:
    """Instances as a loaded memory holds them: crops [h, w, 3], labels [h, w], class of the list."""

    images: list[np.ndarray]
    labels: list[np.ndarray]
    drawn_for: list[int]
    entries: list[Place]

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class Pasted:
    """One image after its pastes: image [3, H, W], soft label float64 [C, H, W] of its base and its
    pastes, and of each paste that took place (channel, lambda, mask bool [H, W])."""

    image: torch.Tensor
    soft: torch.Tensor
    pastes: list[tuple[int, float, torch.Tensor]]


def plain_pseudo_labels(labels, teacher, threshold):
    """Labels with the teacher's confident classes: full-size float64 scores of the whole batch."""
    filled = labels.clone()
    for n, y, x, pixel in _scores(labels, teacher):
        best = pixel.index(max(pixel))
        if labels[n, y, x] == 0 and best > 0 and pixel[best] >= threshold:
            filled[n, y, x] = best
    return filled


def plain_ignore_doubtful(labels, teacher, threshold, weights):
    """Labels in which background without an instance that may show an old class is void."""
    kept = labels.clone()
    for n, y, x, pixel in _scores(labels, teacher):
        free = labels[n, y, x] == 0 and not weights[n, :, y, x].any()
        if free and any(score >= threshold for score in pixel[1:]):
            kept[n, y, x] = VOID
    return kept


def _scores(labels, teacher):
    """Each pixel's image, row, column and scores."""
    size = labels.shape[-2:]
    scores = F.interpolate(teacher.double(), size, mode="bilinear", align_corners=False).sigmoid()
    for n in range(len(labels)):
        for y in range(size[0]):
            for x in range(size[1]):
                yield n, y, x, scores[n, :, y, x].tolist()


def plain_paste(
    settings, crop, memory, channels, total, images, given, labels, views, numbers, replayed
):
    """A Pasted for each image of a batch.

    channels: background and old classes; total: those and the new ones; views and numbers: what
    PasteAugmentation.views and random_numbers return.
    """
    return [
        _paste_into(
            settings,
            crop,
            memory,
            channels,
            total,
            images[n],
            given[n],
            labels[n],
            views.numpy(),
            {name: values[n].numpy() for name, values in numbers.items()},
            bool(replayed[n]),
        )
        for n in range(len(images))
    ]


def _paste_into(
    settings, crop, memory, channels, total, image, given, labels, views, numbers, replayed
):
    image = image.clone()
    soft = torch.stack([labels == c for c in range(total)]).double()
    result = Pasted(image, soft, [])
    if settings.on_replay == ("off" if replayed else "only"):
        return result

    chosen = choose_classes(settings, memory, channels, given, labels, numbers["classes"])
    cell = max(1, int(settings.cell * crop / 512))
    ranked = rank_cells(settings, crop // cell, cell, labels, numbers["cells"])
    for k, (c, added) in enumerate(chosen):
        entries = [i for i, drawn_for in enumerate(memory.drawn_for) if drawn_for == c]
        entry = entries[_picked(numbers["entry"][k], len(entries))]
        view = views[entry, _picked(numbers["view"][k], views.shape[1])]
        top, left, height, width = view[:4].astype(int)
        shown = view[4:]
        if min(np.round(shown)) <= 1:
            continue
        colour, mask = region_of(memory, entry)
        box = np.s_[top : top + height, left : left + width]
        height, width = fitted(settings, cell, shown)
        mirrored = settings.augment != "off" and numbers["mirror"][k] < 0.5
        colour, mask = resampled(colour[(slice(None), *box)], mask[box], height, width, mirrored)
        share = settings.lambda_min + (1 - settings.lambda_min) * float(numbers["share"][k])
        if not settings.fusion:
            share = 1.0
        best = settings.position and added and settings.fill_in == "best"
        row, column = ranked[0 if best else k % len(ranked)]
        place = np.s_[row : row + height, column : column + width]

        whole = torch.zeros(labels.shape, dtype=torch.bool)
        whole[place] = mask
        canvas = torch.zeros_like(image)
        canvas[(slice(None), *place)] = colour.to(image.dtype)
        one_hot = torch.zeros(len(result.soft), 1, 1, dtype=torch.float64)
        one_hot[c] = 1
        result.image[:, whole] = (share * canvas + (1 - share) * result.image)[:, whole]
        result.soft[:, whole] = (share * one_hot + (1 - share) * result.soft)[:, whole]
        result.pastes.append((c, share, whole))
    return result


def _picked(number, count):
    """Index below count from a uniform number, in float32 arithmetic."""
    return min(int(np.float32(number) * np.float32(count)), count - 1)


def choose_classes(settings, memory, channels, given, labels, keys):
    """[(channel, whether it is a random fill-in)] of the pastes of one image."""
    pastes = settings.pastes
    by_key = sorted(range(1, channels), key=lambda c: keys[c])
    stored = [c for c in by_key if c in memory.drawn_for]
    if not stored:
        return []
    if not settings.class_combination:
        return [(stored[k % len(stored)], False) for k in range(pastes)]
    in_labels, in_given = set(labels.unique().tolist()), set(given.unique().tolist())
    potential = [c for c in stored if c in in_labels and c not in in_given]
    if len(potential) >= min(2, pastes) or settings.fill_in == "none":
        return [(c, False) for c in potential[:pastes]]
    round_of_all = potential + [c for c in stored if c not in potential]
    chosen = [(c, False) for c in potential]
    while len(chosen) < pastes:
        chosen.append((round_of_all[len(chosen) % len(round_of_all)], True))
    return chosen


def rank_cells(settings, grid, cell, labels, keys):
    """Upper left corners (row, column) of the cells, in the order in which they are filled."""
    corners = [(cell * row, cell * column) for row in range(grid) for column in range(grid)]
    if not settings.position:
        return [corners[i] for i in np.argsort(keys)]
    background = []
    for row, column in corners:
        part = labels[row : row + cell, column : column + cell]
        background.append(int((part == 0).sum()) + int((part == VOID).sum()))
    order = sorted(range(len(corners)), key=lambda i: (-background[i], i))
    return [corners[i] for i in order]


def region_of(memory, i):
    """Colour float32 [3, h, w] in 0..255, the mean colour beside the class; mask bool [h, w]."""
    mask = memory.labels[i] == memory.drawn_for[i]
    rows, columns = np.nonzero(mask)
    box = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    colour, mask = memory.images[i][box].astype(np.float32), mask[box]
    colour[~mask] = MEAN_COLOUR
    return torch.from_numpy(colour).permute(2, 0, 1), torch.from_numpy(mask)


def fitted(settings, cell, shown):
    """Height and width of a region of that size that is scaled to fit a cell, in float32 arithmetic."""
    scale = np.float32(cell) / max(shown)
    if settings.max_upscale is not None:
        scale = min(scale, np.float32(settings.max_upscale))
    return tuple(min(max(int(np.round(side * scale)), 1), cell) for side in shown)


def resampled(colour, mask, height, width, mirrored):
    """Normalised colour [3, height, width] and mask [height, width]."""
    size = (height, width)
    colour = F.interpolate(colour[None], size, mode="bilinear", align_corners=False)[0]
    mask = F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0] > 0
    if mirrored:
        colour, mask = colour.flip(2), mask.flip(1)
    mean, std = (torch.tensor(t).view(3, 1, 1) * 255 for t in (IMAGENET_MEAN, IMAGENET_STD))
    return (colour - mean) / std, mask


def plain_view(image, label, c, window, crop):
    """What the training transform leaves of class c of an image, cut out afterwards as in the release.

    image uint8 [3, H, W], label uint8 [H, W], window (top, left, height, width). Returns colour uint8
    [3, h, w] and mask bool [h, w], the box around the class in the crop; None where it is gone.
    """
    size = [crop, crop]
    nearest = InterpolationMode.NEAREST_EXACT
    image = resized_crop(image, *window, size, InterpolationMode.BILINEAR, antialias=True)
    mask = resized_crop(label[None], *window, size, nearest)[0] == c
    if not mask.any():
        return None
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return image[(slice(None), *box)], mask[box]
