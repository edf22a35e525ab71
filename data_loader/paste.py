"""Paste augmentation (METHOD 5, 2-5) for a whole batch on the device.

A pure function of the batch, the bank of instances, and (seed, epoch, index) of each sample. Nothing
here waits for the device: no transfer back, no size that depends on data, no file.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from configs.options import PasteArgs
from data_loader.dataset import normalize
from data_loader.memory import FILL, Memory, bounding_box
from data_loader.transforms import TrainTransform
from utils.visualize import VOID

VIEWS = 64  # drawn of each entry at the start of an epoch; a paste picks one of them


class Bank:
    """The stored instances, packed on a device: of each entry, the class that it was drawn for.

    A *region* is the box around the pixels of that class, as stored. M is the number of entries, C that
    of the channels (background and old classes).

    pixels: float32 [P, 3], the pixels of all regions, row by row, normalised. Those that are not of the
        class have ImageNet's mean colour, zero after normalisation, with which bilinear resampling
        mixes at the class's border.
    of_class: bool [P], the pixels of the class.
    start, stride: int64 [M], where an entry's region starts in `pixels`, and its width.
    entries, count: int64 [C, L] and [C], each channel's list of entries, and the list's length.
    masks, places: of each region the pixels of the class, as an array bool [h, w], and (top, left) on
        its canvas with the canvas's (height, width).
    """

    def __init__(self, memory: Memory, channels: int, device: torch.device):
        self.masks, self.places, colours = [], [], []
        for i, entry in enumerate(memory.entries):
            of_class = memory.labels[i] == memory.drawn_for[i]
            rows, columns = box = bounding_box(of_class)
            mask = of_class[box]
            colour = np.where(mask[..., None], memory.images[i][box], np.uint8(FILL))
            colours.append(colour.reshape(-1, 3))
            self.masks.append(mask)
            self.places.append((entry.top + rows.start, entry.left + columns.start, *entry.canvas))
        sizes = torch.tensor([mask.size for mask in self.masks])
        lists = [[i for i, c in enumerate(memory.drawn_for) if c == k] for k in range(channels)]
        longest = max(map(len, lists))
        entries = torch.tensor([one + [0] * (longest - len(one)) for one in lists])
        colours = torch.from_numpy(np.concatenate(colours))
        pixels = normalize(colours.T[None, :, :, None])[0, :, :, 0].T.contiguous()
        of_class = torch.from_numpy(np.concatenate([mask.ravel() for mask in self.masks]))
        self.pixels, self.of_class = pixels.to(device), of_class.to(device)
        self.start = (sizes.cumsum(0) - sizes).to(device)
        self.stride = torch.tensor([mask.shape[1] for mask in self.masks]).to(device)
        self.entries = entries.to(device)
        self.count = torch.tensor([len(one) for one in lists]).to(device)

    def draw_views(self, augment: str, crop_size: int, count: int) -> torch.Tensor:
        """Views of each entry, float32 [M, V, 6], drawn from torch's generator (METHOD 5, 3).

        A view is (top, left, height, width) of a box in the region, and the (height, width) that it has
        before it is scaled to a cell; zeros where nothing of the class is left. augment:
        crop: the box around what a window of RandomResizedCrop leaves of the class, at the size that
            the window, resized to the square crop, gives it; V = count.
        stretch: the whole region, its aspect ratio changed by a log-uniform factor in [3/4, 4/3].
        off: the region as it is, V = 1.
        """
        if augment == "crop":
            window = TrainTransform(crop_size).window
            views = [
                [_cropped(mask, place, window(*place[2:]), crop_size) for _ in range(count)]
                for mask, place in zip(self.masks, self.places, strict=True)
            ]
            return torch.tensor(views, dtype=torch.float32)
        sizes = torch.tensor([mask.shape for mask in self.masks], dtype=torch.float32)[:, None]
        stretch = torch.ones(len(sizes), 1, 1)
        if augment == "stretch":
            stretch = (4 / 3) ** (2 * torch.rand(len(sizes), count, 1) - 1)
        root = stretch.sqrt()
        shown = torch.cat([sizes[..., :1] / root, sizes[..., 1:] * root], dim=2)
        boxes = torch.cat([torch.zeros_like(sizes), sizes], dim=2).expand(-1, shown.shape[1], -1)
        return torch.cat([boxes, shown], dim=2)


def _cropped(mask, place, window, crop_size):
    """The view of a region (mask bool [h, w], place as in Bank) through a window on its canvas.

    above, before: by how much the window starts below and right of the region's corner; negative where
    it starts above or left of it.
    """
    height, width, side = window["height"], window["width"], crop_size
    above, before = window["top"] - place[0], window["left"] - place[1]
    rows = slice(max(above, 0), max(above + height, 0))
    columns = slice(max(before, 0), max(before + width, 0))
    left_over = mask[rows, columns]
    if not left_over.any():
        return [0] * 6
    box = bounding_box(left_over)
    top, bottom = rows.start + box[0].start, rows.start + box[0].stop
    left, right = columns.start + box[1].start, columns.start + box[1].stop
    shown = (
        _pixels_before(bottom - above, side / height) - _pixels_before(top - above, side / height),
        _pixels_before(right - before, side / width) - _pixels_before(left - before, side / width),
    )
    return [top, left, bottom - top, right - left, *shown] if min(shown) > 0 else [0] * 6


def _pixels_before(edge, scale):
    """How many pixel centres of the resized window lie before an edge, in pixels of the window."""
    return int(np.ceil(edge * scale - 0.5))


@dataclass
class Plan:
    """What is pasted where: each field [N, K], for the k-th paste of an image; view [N, K, 6].

    classes int64, channels; used bool; entry int64; view float32, see Bank.draw_views; cell int64,
    row-major; height, width int64, on the image; mirror bool; share float, lambda.
    """

    classes: torch.Tensor
    used: torch.Tensor
    entry: torch.Tensor
    view: torch.Tensor
    cell: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor
    mirror: torch.Tensor
    share: torch.Tensor


@dataclass
class Composite:
    """A batch with instances pasted into it.

    images float [N, 3, H, W]. classes int64 [N, K], channels of the pastes; weights float
    [N, K, H, W], their shares of each pixel's soft label: the pixel's own label has the rest.
    """

    images: torch.Tensor
    classes: torch.Tensor
    weights: torch.Tensor


class PasteAugmentation:
    """Pastes stored instances into a batch: class combination, selection, position, fusion."""

    def __init__(
        self, settings: PasteArgs, crop_size: int, bank: Bank, seed: int, view_count: int = VIEWS
    ):
        """view_count: how many views of each entry are drawn for an epoch."""
        self.settings, self.crop_size, self.bank, self.seed = settings, crop_size, bank, seed
        self.view_count = view_count
        # a cell has its size at a crop of 512, and is scaled with the crop
        self.cell = max(1, settings.cell * crop_size // 512)
        self.grid = crop_size // self.cell
        self.epoch, self.drawn = None, None

    def __call__(
        self,
        images: torch.Tensor,
        given: torch.Tensor,
        labels: torch.Tensor,
        epoch: int,
        indices: list[int],
        replayed: torch.Tensor,
    ) -> Composite:
        """Composite of a batch.

        images float [N, 3, H, W], normalised; given uint8 [N, H, W], the labels of the data set, and
        labels, the same with pseudo labels; epoch and indices, N of them, name the samples; replayed
        bool [N], images of the memory.
        """
        views = self.views(epoch)
        numbers = self.random_numbers(epoch, indices)
        return self.fuse(images, self.plan(given, labels, views, numbers, replayed))

    def views(self, epoch: int) -> torch.Tensor:
        """The views that the pastes of an epoch pick from, on the device: the same in all processes."""
        if epoch != self.epoch:
            seed = np.random.SeedSequence((self.seed, epoch, 2)).generate_state(1)[0]
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(seed))
                drawn = self.bank.draw_views(self.settings.augment, self.crop_size, self.view_count)
            self.epoch, self.drawn = epoch, self.to_device(drawn)
        return self.drawn

    def random_numbers(self, epoch: int, indices: list[int]) -> dict[str, torch.Tensor]:
        """The random numbers of the samples' pastes, on the device, float32 [N, ...] by name.

        classes [N, C] and cells [N, cells] are sorted by; entry, view and mirror [N, K] pick; all
        these are uniform in [0, 1). share [N, K] is Beta distributed.
        """
        k, beta = self.settings.pastes, self.settings.beta
        lengths = {"classes": len(self.bank.count), "cells": self.grid**2}
        lengths |= {"entry": k, "view": k, "mirror": k, "share": k}
        numbers = np.empty((len(indices), sum(lengths.values())), dtype=np.float32)
        for row, index in zip(numbers, indices, strict=True):
            generator = np.random.default_rng((self.seed, epoch, index, 1))  # 1: not the transform's
            generator.random(dtype=np.float32, out=row)
            row[-k:] = generator.beta(beta, beta, k)  # the last k are the shares
        parts = self.to_device(torch.from_numpy(numbers)).split([*lengths.values()], dim=1)
        return dict(zip(lengths, parts, strict=True))

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor on the bank's device; copied from pinned memory, so that nothing waits."""
        device = self.bank.pixels.device
        pinned = tensor.pin_memory() if device.type == "cuda" else tensor
        return pinned.to(device, non_blocking=True)

    def plan(self, given, labels, views, numbers, replayed) -> Plan:
        """Decide what is pasted where."""
        settings, bank = self.settings, self.bank
        classes, used, fill_in = self.combine_classes(given, labels, numbers["classes"])
        if settings.on_replay != "on":
            used = used & (replayed if settings.on_replay == "only" else ~replayed)[:, None]

        # a random entry of each class's list, and one of the entry's views
        entry = bank.entries[classes, _pick(numbers["entry"], bank.count[classes])]
        view = views[entry, _pick(numbers["view"], torch.full_like(entry, views.shape[1]))]
        mirror = numbers["mirror"] < 0.5
        if settings.augment == "off":
            mirror = torch.zeros_like(mirror)

        # scaled to fit a cell; what is one pixel wide or high, or gone, is not pasted
        shown = view[..., 4:]
        used = used & (shown.round().amin(dim=2) > 1)
        longer = shown.amax(dim=2).clamp(min=1)
        scale = torch.full_like(longer, self.cell) / longer  # number / tensor rounds twice in PyTorch
        if settings.max_upscale is not None:
            scale = scale.clamp(max=settings.max_upscale)
        size = (shown * scale[..., None]).round().long().clamp(min=1, max=self.cell)

        cell = self.position(labels, numbers["cells"], fill_in)
        share = settings.lambda_min + (1 - settings.lambda_min) * numbers["share"]
        if not settings.fusion:
            share = torch.ones_like(share)
        return Plan(classes, used, entry, view, cell, size[..., 0], size[..., 1], mirror, share)

    def combine_classes(self, given, labels, keys) -> tuple[torch.Tensor, ...]:
        """Classes to paste into each image (METHOD 5, 2): channels, used, fill_in, each [N, K].

        keys: a random number for each image and channel, float [N, C].
        """
        k, combine = self.settings.pastes, self.settings.class_combination
        stored = (self.bank.count > 0).expand_as(keys)

        # Potential old classes are in the pseudo labels and not in the given labels, and stored.
        in_given, in_pseudo = shown(given, labels, len(self.bank.count))
        potential = stored & in_pseudo & ~in_given & combine

        # The potential classes come first, then the others that are stored, both in random order.
        group = torch.where(potential, 0, torch.where(stored, 1, 2))
        order = (group + keys.double()).argsort(dim=1)

        # With two potential classes or more, these alone are pasted, K at most; with fewer, random
        # classes fill in until there are K.
        found = potential.sum(dim=1, keepdim=True)
        wanted = found.clamp(max=k)
        if self.settings.fill_in != "none" or not combine:
            wanted = torch.where(found < min(2, k), k, wanted)

        # The n-th paste is of the n-th class in that order. Where fewer classes are stored than are
        # wanted, the order starts again.
        nth, kinds = torch.arange(k, device=keys.device), stored.sum(dim=1, keepdim=True)
        return order.gather(1, nth % kinds), nth < wanted, (nth >= found) & combine

    def position(self, labels, keys, fill_in) -> torch.Tensor:
        """Cell of each paste, int64 [N, K], row-major (METHOD 5, 4).

        keys: a random number for each image and cell, float [N, cells].
        """
        side = self.grid * self.cell
        if self.settings.position:
            # cells ranked by their background pixels, void among them, ties in raster order
            empty = ((labels == 0) | (labels == VOID))[:, None, :side, :side]
            background = self.cells(empty).sum(dim=(3, 4, 5)).flatten(1)
            ranked = background.argsort(dim=1, descending=True, stable=True)
        else:
            ranked = keys.argsort(dim=1)
        # the k-th class goes to the k-th cell, fill-ins all to the best one or to the next ones
        rank = torch.arange(self.settings.pastes, device=labels.device) % self.grid**2
        rank = rank.expand_as(fill_in)
        if self.settings.position and self.settings.fill_in == "best":
            rank = torch.where(fill_in, 0, rank)
        return ranked.gather(1, rank)

    def fuse(self, images: torch.Tensor, plan: Plan) -> Composite:
        """Mix the instances into the images, one after another (METHOD 5, 5)."""
        n, _, h, w = images.shape
        k = self.settings.pastes
        images = images.clone(memory_format=torch.contiguous_format)
        weights = torch.zeros(n, k, h, w, dtype=images.dtype, device=images.device)
        image_cells, weight_cells = self.cells(images), self.cells(weights)
        rows, columns = plan.cell // self.grid, plan.cell % self.grid
        batch = torch.arange(n, device=images.device)
        alphas = []
        for i in range(k):
            colour, mask = self.sample(plan, i)
            alphas.append((plan.share[:, i, None, None] * mask).to(images.dtype))
            at = batch, rows[:, i], columns[:, i]
            image_cells[at] = torch.lerp(image_cells[at], colour.to(images.dtype), alphas[i][:, None])
        # seen from the last paste down: what it leaves free is shared by those below it
        free_cells = self.cells(torch.ones(n, 1, h, w, dtype=images.dtype, device=images.device))
        for i in reversed(range(k)):
            at = batch, rows[:, i], columns[:, i]
            free = free_cells[at][:, 0]
            weight_cells[(*at, i)] = free * alphas[i]
            free_cells[(*at, 0)] = free * (1 - alphas[i])
        return Composite(images, plan.classes, weights)

    def cells(self, maps: torch.Tensor) -> torch.Tensor:
        """View [N, grid, grid, C, cell, cell] of the cells of maps [N, C, H, W]."""
        side = self.grid * self.cell
        view = maps[:, :, :side, :side].unflatten(2, (self.grid, self.cell))
        return view.unflatten(4, (self.grid, self.cell)).permute(0, 2, 4, 1, 3, 5)

    def sample(self, plan: Plan, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The i-th instance of each image, resampled into a cell's upper left corner.

        Returns colour float32 [N, 3, cell, cell], bilinear and normalised, and mask bool
        [N, cell, cell], nearest; pixel centres as in torch.nn.functional.interpolate.
        """
        entry, bank = plan.entry[:, i], self.bank
        top, left, box_height, box_width = plan.view[:, i, :4].long().unsqueeze(-1).unbind(1)
        height, width = plan.height[:, i, None], plan.width[:, i, None]
        target = torch.arange(self.cell, device=entry.device).expand(len(entry), -1)
        inside = ((target < height) & plan.used[:, i, None])[:, :, None] & (target < width)[:, None]
        column = torch.where(plan.mirror[:, i, None], width - 1 - target, target).clamp(min=0)
        y0, y1, fy = _neighbours(target, box_height, height)
        x0, x1, fx = _neighbours(column, box_width, width)

        # indices into bank.pixels: of the rows' beginnings, and of the columns in a row
        start, stride = bank.start[entry, None], bank.stride[entry, None]
        row0, row1 = ((start + (top + y) * stride)[:, :, None].int() for y in (y0, y1))
        column0, column1 = ((left + x)[:, None, :].int() for x in (x0, x1))

        def pixels(row, column):
            return F.embedding(row + column, bank.pixels)  # bank.pixels[row + column], but faster

        along = fx[:, None, :, None].expand(-1, -1, -1, 3).contiguous()  # read in one go with colour
        upper = torch.lerp(pixels(row0, column0), pixels(row0, column1), along)
        lower = torch.lerp(pixels(row1, column0), pixels(row1, column1), along)
        colour = torch.lerp(upper, lower, fy[:, :, None, None]).permute(0, 3, 1, 2)
        nearest_row = torch.where(fy[:, :, None] < 0.5, row0, row1)
        nearest = nearest_row + torch.where(fx[:, None, :] < 0.5, column0, column1)
        return colour, inside & bank.of_class[nearest.long()]


def _pick(number, count):
    """Index below count, int64, from uniform numbers in [0, 1)."""
    return (number * count).long().minimum(count - 1)


def _neighbours(target, size, scaled_size):
    """Source pixels next to target pixels [N, cell] along one axis, sizes [N, 1].

    Returns both neighbours, int64, and the fraction between them, float32; the nearest pixel is the
    second where the fraction reaches one half.
    """
    centre = (target.float() + 0.5) * (size.float() / scaled_size.float())
    below = (centre - 0.5).clamp(min=0)
    last = (size - 1).clamp(min=0)
    first = below.long().minimum(last)
    return first, (first + 1).minimum(last), below - first


def shown(given: torch.Tensor, labels: torch.Tensor, channels: int) -> tuple[torch.Tensor, ...]:
    """Channels that images show: bool [N, channels] of the given labels, and of the pseudo labels.

    given uint8 [N, H, W]; labels, the same with background pixels pseudo labelled.
    """
    pseudo = (labels != given).flatten(1)
    found = torch.zeros(len(given), 512, dtype=torch.bool, device=given.device)
    found.scatter_(1, labels.flatten(1) + 256 * pseudo, True)
    return found[:, :channels], found[:, 256 : 256 + channels]
