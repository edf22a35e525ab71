"""Paste augmentation (METHOD 5, 1-5) for a whole batch on the device.

A pure function of the batch, the bank of instances and the random numbers that came with each
sample. Nothing here waits for the device: no transfer back, no size that depends on data, no file.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from configs.options import PasteArgs
from data_loader.dataset import normalize
from data_loader.memory import FILL, Memory, bounding_box
from data_loader.tasks import NUM_CLASSES
from utils.visualize import VOID


@dataclass
class Bank:
    """The regions of the stored instances, packed on a device.

    pixels: float32 [P, 3], all regions' pixels row by row, normalised; mask: bool [P], those of the
    class. start, height, width: int64 [M], of entry m's region in pixels.
    slots: int64 [C, L], entries of each channel's list; count: int64 [C], lengths of the lists.
    """

    pixels: torch.Tensor
    mask: torch.Tensor
    start: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor
    slots: torch.Tensor
    count: torch.Tensor

    @classmethod
    def pack(cls, memory: Memory, channels: int, device: torch.device) -> "Bank":
        """Pack, of each entry, the region of the class that it was drawn for."""
        regions = [_region(memory, i) for i in range(len(memory))]
        regions = regions or [(np.zeros((1, 1, 3), dtype=np.uint8), np.zeros((1, 1), dtype=bool))]
        colours = np.concatenate([colour.reshape(-1, 3) for colour, _ in regions])
        mask = torch.from_numpy(np.concatenate([mask.ravel() for _, mask in regions]))
        shapes = torch.tensor([mask.shape for _, mask in regions])
        sizes = shapes.prod(dim=1)
        lists = [[i for i, c in enumerate(memory.drawn_for) if c == k] for k in range(channels)]
        slots = torch.zeros(channels, max(1, *map(len, lists)), dtype=torch.int64)
        for k, entries in enumerate(lists):
            slots[k, : len(entries)] = torch.tensor(entries, dtype=torch.int64)
        count = torch.tensor([len(entries) for entries in lists])
        pixels = normalize(torch.from_numpy(colours).T[None, :, :, None])[0, :, :, 0].T.contiguous()
        fields = (pixels, mask, sizes.cumsum(0) - sizes, shapes[:, 0], shapes[:, 1], slots, count)
        return cls(*(field.to(device) for field in fields))


def _region(memory, i):
    """Box around the pixels of the entry's class: colour uint8 [h, w, 3] and mask bool [h, w].

    Pixels of the box that are not of the class have ImageNet's mean colour: zero after
    normalisation, with which bilinear resampling mixes at the region's border.
    """
    mask = memory.labels[i] == memory.drawn_for[i]
    box = bounding_box(mask)
    colour = np.where(mask[box][..., None], memory.images[i][box], np.uint8(FILL))
    return colour, mask[box]


@dataclass
class Plan:
    """What is pasted where: each field [N, K], for the k-th paste of an image.

    classes int64, channels; used bool; entry int64; cell int64, row-major; height, width int64, on
    the image; mirror bool; share float, lambda.
    """

    classes: torch.Tensor
    used: torch.Tensor
    entry: torch.Tensor
    cell: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor
    mirror: torch.Tensor
    share: torch.Tensor


@dataclass
class Composite:
    """A batch with instances pasted into it.

    images float [N, 3, H, W]. classes int64 [N, K], channels of the pastes; weights float
    [N, K, H, W], their shares of each pixel's soft label: the base label has the rest.
    """

    images: torch.Tensor
    classes: torch.Tensor
    weights: torch.Tensor


class Numbers:
    """The random numbers of a sample's pastes, as one vector float32 [length]."""

    def __init__(self, settings: PasteArgs, crop_size: int):
        self.settings = settings
        cells = (crop_size // cell_size(settings, crop_size)) ** 2
        k = settings.pastes
        self.lengths = {"classes": NUM_CLASSES + 1, "cells": cells}
        self.lengths |= {name: k for name in ("entry", "mirror", "aspect", "share")}

    def __call__(self, generator: np.random.Generator) -> torch.Tensor:
        """Uniform numbers in [0, 1), and the shares, Beta distributed."""
        numbers = generator.random(sum(self.lengths.values()), dtype=np.float32)
        beta = self.settings.beta
        numbers[-self.settings.pastes :] = generator.beta(beta, beta, self.settings.pastes)
        return torch.from_numpy(numbers)

    def split(self, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """Vectors [N, length] by name."""
        parts = numbers.split(list(self.lengths.values()), dim=1)
        return dict(zip(self.lengths, parts, strict=True))


def cell_size(settings: PasteArgs, crop_size: int) -> int:
    """Side of a cell in pixels: given for a crop of 512, scaled with the crop."""
    return max(1, settings.cell * crop_size // 512)


class PasteAugmentation:
    """Pastes stored instances into a batch: class combination, selection, position, fusion."""

    def __init__(self, settings: PasteArgs, crop_size: int, bank: Bank):
        self.settings, self.bank = settings, bank
        self.numbers = Numbers(settings, crop_size)
        self.cell = cell_size(settings, crop_size)
        self.grid = crop_size // self.cell

    def __call__(
        self,
        images: torch.Tensor,
        given: torch.Tensor,
        labels: torch.Tensor,
        numbers: torch.Tensor,
        replayed: torch.Tensor,
    ) -> Composite:
        """Composite of a batch.

        images float [N, 3, H, W], normalised; given uint8 [N, H, W], the labels, and labels, the same
        with pseudo labels; numbers [N, D] of Numbers; replayed bool [N], images of the memory.
        """
        plan = self.plan(given, labels, self.numbers.split(numbers), replayed)
        return self.fuse(images, plan)

    def plan(self, given, labels, numbers, replayed) -> Plan:
        """Decide what is pasted where."""
        classes, used, fill_in = self.combine_classes(given, labels, numbers["classes"])
        if not self.settings.on_replay:
            used = used & ~replayed[:, None]
        count = self.bank.count[classes]
        pick = (numbers["entry"] * count).long().minimum((count - 1).clamp(min=0))
        entry = self.bank.slots[classes, pick]
        mirror = numbers["mirror"] < 0.5
        stretch = (4 / 3) ** (2 * numbers["aspect"] - 1)
        if not self.settings.augment:
            mirror, stretch = torch.zeros_like(mirror), torch.ones_like(stretch)
        height, width = self.fit(entry, stretch)
        used = used & (self.bank.height[entry] > 1) & (self.bank.width[entry] > 1)
        lowest = self.settings.lambda_min
        share = lowest + (1 - lowest) * numbers["share"]
        if not self.settings.fusion:
            share = torch.ones_like(share)
        cell = self.position(labels, numbers["cells"], fill_in)
        return Plan(classes, used, entry, cell, height, width, mirror, share)

    def combine_classes(self, given, labels, keys) -> tuple[torch.Tensor, ...]:
        """Classes to paste into each image (METHOD 5, 2): channels, used, fill_in, each [N, K].

        Potential old classes come first, in random order: those in the pseudo labels, not in the
        given labels, and stored. With fewer than two of them, random stored classes follow, others
        first, then the same again, until there are K.
        """
        k, channels = self.settings.pastes, len(self.bank.count)
        stored = (self.bank.count > 0).expand(len(given), -1)
        keys = keys[:, :channels]
        if self.settings.class_combination:
            known, pseudo = shown(given, labels, channels)
            potential = stored & pseudo & ~known
        else:
            potential = torch.zeros_like(stored)
        group = torch.where(potential, 0, torch.where(stored, 1, 2))
        order = (group + keys.double()).argsort(dim=1)
        found, kinds = potential.sum(dim=1), stored.sum(dim=1)
        position = torch.arange(k, device=given.device).expand(len(given), k)
        # positions beyond the potential classes go round all stored ones, the others first
        turn = torch.where(position < found[:, None], position, position % kinds.clamp(min=1)[:, None])
        classes = order.gather(1, turn)
        fill_in = position >= found[:, None]
        wanted = torch.where(found < min(2, k), k, found.clamp(max=k))
        if self.settings.class_combination and self.settings.fill_in == "none":
            wanted = found.clamp(max=k)
        used = (position < wanted[:, None]) & (kinds > 0)[:, None]
        if not self.settings.class_combination:
            fill_in = torch.zeros_like(fill_in)
        return classes, used, fill_in

    def fit(self, entry, stretch) -> tuple[torch.Tensor, torch.Tensor]:
        """Height and width, int64 [N, K], of a stretched region scaled to fit a cell."""
        root = stretch.sqrt()
        height, width = self.bank.height[entry] / root, self.bank.width[entry] * root
        scale = self.cell / torch.maximum(height, width)
        if self.settings.max_upscale is not None:
            scale = scale.clamp(max=self.settings.max_upscale)
        return tuple(
            (side * scale).round().long().clamp(min=1, max=self.cell) for side in (height, width)
        )

    def position(self, labels, keys, fill_in) -> torch.Tensor:
        """Cell of each paste, int64 [N, K] (METHOD 5, 4).

        Cells are ranked by their background pixels (void counts as such), ties in raster order. The
        k-th potential class has the k-th cell; fill-ins have the best one, or the next ones.
        """
        k, cells = self.settings.pastes, self.grid**2
        if self.settings.position:
            empty = (labels == 0) | (labels == VOID)
            side = self.grid * self.cell
            empty = empty[:, :side, :side].unflatten(1, (self.grid, self.cell))
            empty = empty.unflatten(3, (self.grid, self.cell)).sum(dim=(2, 4)).flatten(1)
            ranked = empty.argsort(dim=1, descending=True, stable=True)
        else:
            ranked = keys.argsort(dim=1)
        rank = torch.arange(k, device=labels.device).expand(len(labels), k) % cells
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
        height, width = plan.height[:, i, None], plan.width[:, i, None]
        target = torch.arange(self.cell, device=entry.device).expand(len(entry), -1)
        inside = ((target < height) & plan.used[:, i, None])[:, :, None] & (target < width)[:, None]
        column = torch.where(plan.mirror[:, i, None], width - 1 - target, target).clamp(min=0)
        y0, y1, fy = _neighbours(target, bank.height[entry, None], height)
        x0, x1, fx = _neighbours(column, bank.width[entry, None], width)

        def at(y, x):
            row = bank.start[entry, None] + y * bank.width[entry, None]
            return row[:, :, None] + x[:, None, :]

        def pixels(y, x):
            return F.embedding(at(y, x), bank.pixels)

        along = fx[:, None, :, None].expand(-1, -1, -1, 3).contiguous()  # read in one go with colour
        upper = torch.lerp(pixels(y0, x0), pixels(y0, x1), along)
        lower = torch.lerp(pixels(y1, x0), pixels(y1, x1), along)
        colour = torch.lerp(upper, lower, fy[:, :, None, None]).permute(0, 3, 1, 2)
        nearest = at(torch.where(fy < 0.5, y0, y1), torch.where(fx < 0.5, x0, x1))
        return colour, inside & bank.mask[nearest]


def _neighbours(target, size, scaled_size):
    """Source pixels next to target pixels [N, cell] along one axis, sizes [N, 1].

    Returns both neighbours, int64, and the fraction between them, float32; the nearest pixel is the
    second where the fraction reaches one half.
    """
    centre = (target.float() + 0.5) * (size.float() / scaled_size.float())
    below = (centre - 0.5).clamp(min=0)
    first = below.long().minimum(size - 1)
    return first, (first + 1).minimum(size - 1), below - first


def shown(given: torch.Tensor, labels: torch.Tensor, channels: int) -> tuple[torch.Tensor, ...]:
    """Channels that images show: bool [N, channels] of the given labels, and of the pseudo labels.

    given uint8 [N, H, W]; labels, the same with background pixels pseudo labelled.
    """
    pseudo = (labels != given).flatten(1)
    found = torch.zeros(len(given), 512, dtype=torch.bool, device=given.device)
    found.scatter_(1, labels.flatten(1) + 256 * pseudo, True)
    return found[:, :channels], found[:, 256 : 256 + channels]
