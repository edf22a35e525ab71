"""The batched paste against a plain one, its properties, and that nothing in it waits for a device."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given as sampled
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from configs.options import PasteArgs
from data_loader.data_root import read_label
from data_loader.dataset import normalize
from data_loader.paste import VIEWS, Bank, PasteAugmentation, _cropped
from data_loader.transforms import TrainTransform
from models.losses import auxiliary_sum, bce_sum, distillation_sum, sum_over_images
from scripts.plain import Place, Stored, plain_paste, plain_view
from tests.no_waiting import Waits, no_waiting
from trainer.pseudo_labels import ignore_doubtful, pseudo_labels
from utils.visualize import VOID

CPU = torch.device("cpu")


def random_entry(rng, channels, height, width, kind):
    """An image [h, w, 3], its labels [h, w], and the class that it was drawn for."""
    drawn_for = int(rng.integers(1, channels))
    frame = rng.integers(0, 3, 4)
    shape = (height + frame[0] + frame[1], width + frame[2] + frame[3])
    label = np.zeros(shape, np.uint8)
    inner = label[frame[0] : frame[0] + height, frame[2] : frame[2] + width]
    if kind == "full":
        inner[:] = drawn_for
    else:
        inner[rng.random(inner.shape) < 0.6] = drawn_for
        inner[0, 0] = drawn_for
    if kind == "shared" and channels > 2:
        other = 1 + drawn_for % (channels - 1)
        inner[rng.random(inner.shape) < 0.3] = other
        inner[-1, -1] = drawn_for
    image = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    return image, label, drawn_for


def random_memory(rng, channels, shapes):
    rows = [random_entry(rng, channels, h, w, kind) for h, w, kind in shapes]
    return stored(rng, *([row[i] for row in rows] for i in range(3)))


def stored(rng, images, labels, drawn_for):
    """A memory of crops that lie somewhere on larger canvases."""
    entries = []
    for label in labels:
        top, left, below, right = (int(x) for x in rng.integers(0, 30, 4))
        canvas = (top + label.shape[0] + below, left + label.shape[1] + right)
        entries.append(Place(top, left, canvas))
    return Stored(images, labels, drawn_for, entries)


def random_labels(rng, kind, crop, channels, total):
    """Given labels and the same with pseudo labels, uint8 [crop, crop]."""
    labels = np.zeros((crop, crop), np.uint8)
    if kind == "void":
        labels[:] = VOID
    elif kind == "foreground":
        labels[:] = rng.integers(1, total)
    elif kind == "random":
        for _ in range(rng.integers(1, 8)):
            top, left = rng.integers(0, crop, 2)
            value = rng.choice([0, VOID, *range(1, total)])
            labels[top : top + rng.integers(1, crop), left : left + rng.integers(1, crop)] = value
    given = labels.copy()
    for c in range(1, channels):
        if rng.random() < 0.7:
            given[given == c] = 0
    return given, labels


class Case:
    """A batch, a memory and settings, all from a few numbers."""

    def __init__(self, settings, crop, channels, kinds, shapes, seed):
        rng = np.random.default_rng(seed)
        self.settings, self.crop, self.channels, self.total = settings, crop, channels, channels + 2
        self.memory = random_memory(rng, channels, shapes)
        pairs = [random_labels(rng, kind, crop, channels, self.total) for kind in kinds]
        self.given, self.labels = (
            torch.from_numpy(np.stack(maps)) for maps in zip(*pairs, strict=True)
        )
        self.indices = rng.integers(0, 10**6, len(kinds)).tolist()
        self.images = torch.from_numpy(rng.normal(size=(len(kinds), 3, crop, crop))).float()
        self.replayed = torch.from_numpy(rng.random(len(kinds)) < 0.4)
        self.paste = self.augmentation()

    def augmentation(self):
        bank = Bank(self.memory, self.channels, CPU)
        return PasteAugmentation(self.settings, self.crop, bank, seed=1, view_count=3)

    def batch(self, rows=slice(None)):
        """The arguments of the paste, or some rows of them."""
        indices = np.array(self.indices)[rows].tolist()
        return self.images[rows], self.given[rows], self.labels[rows], 3, indices, self.replayed[rows]

    def plan(self):
        views, numbers = self.paste.views(3), self.paste.random_numbers(3, self.indices)
        return self.paste.plan(self.given, self.labels, views, numbers, self.replayed)

    def dense(self, composite, n):
        """Soft label float64 [total, H, W] of image n, from base label, classes and weights."""
        weights = composite.weights[n].double()
        base = torch.stack([self.labels[n] == c for c in range(self.total)]).double()
        base *= 1 - weights.sum(dim=0)
        for k, c in enumerate(composite.classes[n].tolist()):
            base[c] += weights[k]
        return base

    def reference(self):
        return plain_paste(
            self.settings,
            self.crop,
            self.memory,
            self.channels,
            self.total,
            self.images,
            self.given,
            self.labels,
            self.paste.views(3),
            self.paste.random_numbers(3, self.indices),
            self.replayed,
        )


CHOICES = {
    "pastes": st.integers(1, 4),
    "cell": st.sampled_from([250, 250, 250, 512, 300, 160]),
    "beta": st.sampled_from([1.0, 0.3]),
    "lambda_min": st.sampled_from([0.0, 0.0, 0.5, 1.0]),
    "class_combination": st.sampled_from([True, True, True, False]),
    "position": st.sampled_from([True, True, True, False]),
    "fusion": st.sampled_from([True, True, False]),
    "fill_in": st.sampled_from(["best", "best", "next", "none"]),
    "max_upscale": st.sampled_from([None, None, 1.0, 0.3, 2.5]),
    "on_replay": st.sampled_from(["on", "off", "only"]),
    "augment": st.sampled_from(["crop", "crop", "stretch", "off"]),
}
SETTINGS = st.builds(PasteArgs, **CHOICES)
SIDES = st.sampled_from([1, 2, 3, 7, 20, 60, 130])
SHAPES = st.lists(
    st.tuples(SIDES, SIDES, st.sampled_from(["full", "holes", "shared"])), min_size=1, max_size=6
)
KINDS = st.lists(
    st.sampled_from(["void", "background", "foreground", "random", "random", "random"]),
    min_size=1,
    max_size=4,
)
CASES = st.builds(
    Case, SETTINGS, st.integers(32, 96), st.integers(2, 7), KINDS, SHAPES, st.integers(0, 2**32)
)


def examples(count):
    return hypothesis_settings(deadline=None, max_examples=count, derandomize=True)


class TestAgainstThePlainPaste:
    def test_no_switch_is_left_at_its_default(self):
        assert CHOICES.keys() == {field.name for field in dataclasses.fields(PasteArgs)}

    @examples(250)
    @sampled(CASES)
    def test_pixels_masks_and_soft_labels_are_the_same(self, case):
        composite = case.paste(*case.batch())
        for n, expected in enumerate(case.reference()):
            assert torch.allclose(composite.images[n], expected.image, rtol=0, atol=1e-4)
            counts = case.labels[n] != VOID
            difference = (case.dense(composite, n) - expected.soft)[:, counts]
            assert difference.numel() == 0 or difference.abs().max() < 1e-5
            plan = case.plan()
            masks = [mask for mask in placed_masks(case, plan, n) if mask.any()]
            expected_masks = [mask for _, _, mask in expected.pastes if mask.any()]
            assert len(masks) == len(expected_masks)
            assert all(map(torch.equal, masks, expected_masks))

    def test_the_cases_have_pastes_of_every_kind(self):
        """Mirrored, scaled up and down, several on one another, on void, and none."""
        seen = set()
        for seed in range(40):
            shapes = [(20, 7, "holes"), (130, 60, "shared"), (3, 3, "full"), (1, 7, "full")]
            case = Case(PasteArgs(), 32 + seed, 4, ["random", "background"], shapes, seed)
            plan = case.plan()
            for n in range(2):
                cells = plan.cell[n][plan.used[n]].tolist()
                seen |= {"stacked"} if len(set(cells)) < len(cells) else {"apart"}
                seen.add(f"{len(cells)} pastes")
                for k in range(3):
                    if plan.used[n, k]:
                        grows = plan.height[n, k] > plan.view[n, k, 2]
                        seen.add("up" if grows else "down")
                        seen.add("mirrored" if plan.mirror[n, k] else "as stored")
        assert seen >= {"stacked", "apart", "up", "down", "mirrored", "as stored"}
        assert seen >= {"2 pastes", "3 pastes"}


def placed_masks(case, plan, n):
    """Masks bool [H, W] of the pastes of image n."""
    side = case.paste.cell
    for k in range(case.settings.pastes):
        _, mask = case.paste.sample(plan, k)
        row, column = divmod(int(plan.cell[n, k]), case.paste.grid)
        whole = torch.zeros(case.labels[n].shape, dtype=torch.bool)
        whole[row * side : (row + 1) * side, column * side : (column + 1) * side] = mask[n]
        yield whole


class TestProperties:
    @examples(60)
    @sampled(CASES)
    def test_weights_are_shares_and_nothing_changes_outside_the_masks(self, case):
        before = [case.images.clone(), case.given.clone(), case.labels.clone()]
        composite = case.paste(*case.batch())
        weights = composite.weights
        assert weights.min() >= 0 and weights.sum(dim=1).max() <= 1 + 1e-6
        plan = case.plan()
        for n in range(len(case.images)):
            assert (
                (case.dense(composite, n).sum(dim=0) - 1).abs()[case.labels[n] != VOID] < 1e-5
            ).all()
            union = torch.zeros(case.labels[n].shape, dtype=torch.bool)
            for mask in placed_masks(case, plan, n):
                union |= mask
            assert torch.equal(composite.images[n][:, ~union], case.images[n][:, ~union])
            assert not weights[n][:, ~union].any()
        assert all(map(torch.equal, before, (case.images, case.given, case.labels)))
        assert composite.images.data_ptr() != case.images.data_ptr()

    @examples(40)
    @sampled(CASES, st.randoms(use_true_random=False))
    def test_an_image_is_pasted_into_the_same_way_in_any_batch(self, case, random):
        whole = case.paste(*case.batch())
        order = list(range(len(case.images)))
        random.shuffle(order)
        shuffled = case.paste(*case.batch(order))
        for place, n in enumerate(order):
            alone = case.paste(*case.batch(slice(n, n + 1)))
            for field in ("images", "classes", "weights"):
                expected = getattr(whole, field)[n]
                assert torch.equal(getattr(alone, field)[0], expected)
                assert torch.equal(getattr(shuffled, field)[place], expected)

    @examples(20)
    @sampled(CASES)
    def test_the_same_numbers_give_the_same_composite(self, case):
        first, second = case.paste(*case.batch()), case.augmentation()(*case.batch())
        for field in ("images", "classes", "weights"):
            assert torch.equal(getattr(first, field), getattr(second, field))

    def test_void_under_a_paste_does_not_count(self):
        case = Case(PasteArgs(fusion=False), 64, 4, ["void"], [(20, 20, "full")], seed=1)
        composite = case.paste(*case.batch())
        assert (composite.weights > 0).any()
        logits = torch.randn(5, 64, 64, requires_grad=True)
        loss = bce_sum(logits, case.labels[0], composite.classes[0], composite.weights[0])
        loss.backward()
        assert loss == 0 and not logits.grad.any()


SQUARE = np.full((8, 8), 1, np.uint8)
WHOLE = Place(0, 0, (8, 8))


def squares(channels, only=None):
    """A memory of one uniform 8x8 square of each class, its colour 10 times its channel."""
    classes = range(1, channels) if only is None else only
    images = [np.full((8, 8, 3), 10 * c, np.uint8) for c in classes]
    return Stored(images, [SQUARE * c for c in classes], list(classes), [WHOLE for _ in classes])


def plans(settings, memory, given, labels, channels, count=200, crop=64, replayed=False):
    """The plan of `count` images with the same labels [H, W] and different random numbers."""
    paste = PasteAugmentation(settings, crop, Bank(memory, channels, CPU), seed=5)
    maps = [tensor.expand(count, -1, -1) for tensor in (given, labels)]
    numbers = paste.random_numbers(0, list(range(count)))
    return paste.plan(*maps, paste.views(0), numbers, torch.full((count,), replayed))


def label_map(*channels, crop=64):
    """uint8 [crop, crop]: background, and a row of each of the channels."""
    labels = torch.zeros(crop, crop, dtype=torch.uint8)
    for row, c in enumerate(channels):
        labels[row] = c
    return labels


def chosen_sets(plan):
    rows = zip(plan.classes.tolist(), plan.used.tolist(), strict=True)
    return [[c for c, used in zip(*row, strict=True) if used] for row in rows]


class TestClassCombination:
    def test_exactly_two_potential_classes_get_no_company(self):
        plan = plans(PasteArgs(), squares(7), label_map(), label_map(2, 5), 7)
        assert all(sorted(chosen) == [2, 5] for chosen in chosen_sets(plan))

    def test_of_more_than_three_potential_classes_three_are_kept_at_random(self):
        plan = plans(PasteArgs(), squares(7), label_map(), label_map(1, 2, 3, 4, 6), 7)
        chosen = chosen_sets(plan)
        assert all(len(set(c)) == 3 and 5 not in c for c in chosen)
        counts = [sum(k in c for c in chosen) for k in (1, 2, 3, 4, 6)]
        assert min(counts) > 80 and max(counts) < 160
        assert all(any(c[0] == k for c in chosen) for k in (1, 2, 3, 4, 6))

    @pytest.mark.parametrize("potential", [0, 1])
    def test_fill_ins_are_distinct_and_reach_every_old_class(self, potential):
        shown = (3,) * potential
        plan = plans(PasteArgs(), squares(7), label_map(), label_map(*shown), 7)
        chosen = chosen_sets(plan)
        assert all(len(set(c)) == 3 and tuple(c[:potential]) == shown for c in chosen)
        counts = [sum(k in c for c in chosen) for k in range(1, 7)]
        if potential:
            assert counts.pop(2) == 200
        assert min(counts) > 50

    def test_fill_ins_repeat_only_when_the_stored_classes_run_out(self):
        plan = plans(PasteArgs(), squares(7, only=[2, 6]), label_map(), label_map(), 7)
        assert all(c in ([2, 6, 2], [6, 2, 6]) for c in chosen_sets(plan))
        plan = plans(PasteArgs(), squares(7, only=[6]), label_map(), label_map(), 7)
        assert all(c == [6, 6, 6] for c in chosen_sets(plan))

    def test_classes_without_entries_take_no_part(self):
        memory = squares(7, only=[1, 2, 3, 4])
        plan = plans(PasteArgs(), memory, label_map(), label_map(5, 6, 4), 7)
        assert all(len(set(c)) == 3 and c[0] == 4 and set(c) <= {1, 2, 3, 4} for c in chosen_sets(plan))

    def test_classes_that_the_given_labels_show_are_no_potential_classes(self):
        plan = plans(PasteArgs(), squares(7), label_map(2, 5, 6), label_map(2, 5, 6, 3, 4), 7)
        assert all(sorted(c) == [3, 4] for c in chosen_sets(plan))

    def test_without_fill_ins_only_potential_classes_are_pasted(self):
        settings = PasteArgs(fill_in="none")
        assert not any(chosen_sets(plans(settings, squares(7), label_map(), label_map(), 7)))
        plan = plans(settings, squares(7), label_map(), label_map(6), 7)
        assert all(c == [6] for c in chosen_sets(plan))

    def test_off_means_random_classes(self):
        settings = PasteArgs(class_combination=False)
        plan = plans(settings, squares(7), label_map(), label_map(2, 5), 7)
        chosen = chosen_sets(plan)
        assert all(len(set(c)) == 3 for c in chosen)
        assert min(sum(k in c for c in chosen) for k in range(1, 7)) > 50

    @pytest.mark.parametrize("on_replay, onto", [("on", {0, 1}), ("off", {0}), ("only", {1})])
    def test_replay_images_or_new_ones_are_left_alone_on_request(self, on_replay, onto):
        arguments = PasteArgs(on_replay=on_replay), squares(7), label_map(), label_map(2, 5), 7
        assert {r for r in (0, 1) if plans(*arguments, replayed=bool(r)).used.any()} == onto

    def test_a_class_given_in_one_place_is_no_potential_class_in_another(self):
        given, labels = label_map(2), label_map(2, 2, 3, 4)  # row 0 is given, row 1 a pseudo label
        plan = plans(PasteArgs(), squares(7), given, labels, 7)
        assert all(sorted(chosen) == [3, 4] for chosen in chosen_sets(plan))


class TestSelectionAndPosition:
    def test_every_entry_of_a_list_is_drawn_and_no_other(self):
        memory = squares(4)
        memory.images += [memory.images[1]] * 3
        memory.labels += [memory.labels[1]] * 3
        memory.drawn_for += [2] * 3
        memory.entries += [WHOLE] * 3
        plan = plans(PasteArgs(), memory, label_map(), label_map(2, 3), 4)
        entries = plan.entry[plan.classes == 2]
        assert sorted(entries.unique().tolist()) == [1, 3, 4, 5]
        counts = [int((entries == e).sum()) for e in (1, 3, 4, 5)]
        assert min(counts) > 25

    def test_cells_with_most_background_come_first_and_ties_in_raster_order(self):
        labels = label_map()
        labels[:31, :31] = 6
        labels[31:62, :31] = VOID
        labels[31:36, 31:62] = 6
        labels[62:] = 4
        labels[:, 62:] = 5
        plan = plans(PasteArgs(), squares(7), label_map(), labels, 7, count=50)
        assert all(row == [1, 2, 3] for row in plan.cell.tolist())
        plan = plans(PasteArgs(), squares(7), labels, labels, 7, count=50)
        assert all(row == [1, 1, 1] for row in plan.cell.tolist())
        plan = plans(PasteArgs(fill_in="next"), squares(7), labels, labels, 7, count=50)
        assert all(row == [1, 2, 3] for row in plan.cell.tolist())

    def test_potential_classes_take_their_own_cells_and_fill_ins_the_best(self):
        plan = plans(PasteArgs(pastes=4), squares(7), label_map(), label_map(6), 7, count=50)
        best = plan.cell[:, 0]
        assert (plan.cell == best[:, None]).all()
        plan = plans(PasteArgs(), squares(7), label_map(), label_map(1, 5, 6), 7, count=50)
        assert all(row == [2, 3, 0] for row in plan.cell.tolist())

    def test_off_means_random_cells_without_repetition(self):
        plan = plans(PasteArgs(position=False, pastes=4), squares(7), label_map(), label_map(), 7)
        assert all(sorted(row) == [0, 1, 2, 3] for row in plan.cell.tolist())
        assert all(len(column.unique()) == 4 for column in plan.cell.T)

    def test_more_pastes_than_cells_start_again_from_the_best(self):
        settings = PasteArgs(cell=512)
        plan = plans(settings, squares(7), label_map(), label_map(1, 5, 6), 7, count=20)
        assert not plan.cell.any()
        settings = PasteArgs(pastes=6, fill_in="next")
        plan = plans(settings, squares(7), label_map(), label_map(1, 5, 6), 7)
        assert all(row == [2, 3, 0, 1, 2, 3] for row in plan.cell.tolist())

    @pytest.mark.parametrize(("crop", "cell", "grid"), [(512, 250, 2), (64, 31, 2), (100, 48, 2)])
    def test_the_cell_is_scaled_with_the_crop(self, crop, cell, grid):
        paste = PasteAugmentation(PasteArgs(), crop, Bank(squares(3), 3, CPU), seed=1)
        assert (paste.cell, paste.grid) == (cell, grid)


class TestFusion:
    def compose(self, settings, memory, labels, share=None, crop=64, channels=3):
        paste = PasteAugmentation(settings, crop, Bank(memory, channels, CPU), seed=2)
        numbers = paste.random_numbers(0, [7])
        if share is not None:
            numbers["share"] = torch.tensor([share])
        maps = label_map()[None], labels[None]
        plan = paste.plan(*maps, paste.views(0), numbers, torch.tensor([False]))
        return paste.fuse(torch.full((1, 3, crop, crop), 0.25), plan)

    def test_a_plain_square_by_hand(self):
        settings = PasteArgs(fill_in="none", augment="off")
        labels = label_map(2)
        composite = self.compose(settings, squares(3), labels, share=[0.75, 0.1, 0.1])
        weights = torch.zeros(3, 64, 64)
        weights[0, 31:62, :31] = 0.75
        assert composite.classes[0, 0] == 2
        assert torch.equal(composite.weights[0], weights)
        for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
            image = torch.full((64, 64), 0.25)
            image[31:62, :31] = 0.75 * (20 / 255 - mean) / std + 0.25 * 0.25
            assert torch.allclose(composite.images[0, channel], image, atol=1e-6)

    def test_the_smaller_side_keeps_the_aspect(self):
        memory = squares(3, only=[2])
        memory.images, memory.labels = [memory.images[0][:, :4]], [memory.labels[0][:, :4]]
        settings = PasteArgs(fill_in="none", augment="off", fusion=False)
        weights = self.compose(settings, memory, label_map(2)).weights[0, 0]
        assert weights.any(dim=1).sum() == 31 and weights.any(dim=0).sum() == 16
        capped = PasteArgs(fill_in="none", augment="off", fusion=False, max_upscale=2.0)
        weights = self.compose(capped, memory, label_map(2)).weights[0, 0]
        assert weights.any(dim=1).sum() == 16 and weights.any(dim=0).sum() == 8

    def test_later_pastes_take_their_share_of_earlier_ones(self):
        settings = PasteArgs(augment="off")
        labels = label_map(1)
        weights = self.compose(settings, squares(3), labels, share=[0.5, 0.4, 0.25]).weights[0]
        at = weights[:, weights.sum(dim=0) > 0]
        expected = torch.tensor([0.5 * 0.6 * 0.75, 0.4 * 0.75, 0.25])
        assert torch.allclose(at, expected[:, None].expand_as(at))

    @pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
    def test_regions_one_pixel_wide_or_high_are_skipped(self, shape):
        place = Place(0, 0, shape)
        memory = Stored([np.zeros((*shape, 3), np.uint8)], [np.full(shape, 2, np.uint8)], [2], [place])
        composite = self.compose(PasteArgs(augment="stretch"), memory, label_map(2))
        assert not composite.weights.any() and (composite.images == 0.25).all()

    def test_lambda_has_a_lower_bound_and_is_one_without_fusion(self):
        arguments = squares(7), label_map(), label_map(), 7
        free, bounded = plans(PasteArgs(), *arguments), plans(PasteArgs(lambda_min=0.6), *arguments)
        assert free.share.min() < 0.05 and free.share.max() > 0.95
        assert torch.allclose(bounded.share, 0.6 + 0.4 * free.share)
        assert (plans(PasteArgs(fusion=False), *arguments).share == 1).all()

    def test_instances_do_not_mix_with_what_is_stored_around_them(self):
        label = np.zeros((12, 12), np.uint8)
        label[2:10, 2:10] = 2
        label[4:6, 4:6] = 0
        images = [np.full((12, 12, 3), 200, np.uint8) for _ in range(2)]
        images[1][label == 0] = (255, 0, 255)
        settings = PasteArgs(fill_in="none", augment="off", fusion=False)
        place = Place(0, 0, (12, 12))
        a, b = (
            self.compose(settings, Stored([i], [label], [2], [place]), label_map(2)) for i in images
        )
        assert a.weights.any() and torch.equal(a.images, b.images)


def blob(rows, columns, place, canvas):
    """A memory of one entry: an ellipse with a hole, of class 1, somewhere on a canvas."""
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    label = ((y**2 + x**2 <= 1) & (y**2 + (x - 0.3) ** 2 > 0.04)).astype(np.uint8)
    image = np.random.default_rng(0).integers(0, 256, (rows, columns, 3)).astype(np.uint8)
    return Stored([image], [label], [1], [Place(*place, canvas)])


def on_canvas(memory):
    """Image uint8 [3, H, W] and label uint8 [H, W] of the only entry."""
    entry, label = memory.entries[0], memory.labels[0]
    at = np.s_[entry.top : entry.top + label.shape[0], entry.left : entry.left + label.shape[1]]
    image = np.zeros((*entry.canvas, 3), np.uint8)
    image[at] = memory.images[0]
    canvas = np.zeros(entry.canvas, np.uint8)
    canvas[at] = label
    return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(canvas)


BLOBS = {
    "large": blob(50, 60, (5, 10), (60, 80)),
    "small, at the border": blob(9, 12, (0, 66), (60, 80)),
    "tall image": blob(30, 20, (40, 5), (90, 60)),
    "filling": blob(60, 60, (0, 0), (60, 60)),
}


class TestViews:
    """Views against the release's way: transform the whole image, then cut out the class."""

    @pytest.mark.parametrize("name", BLOBS)
    def test_distribution(self, name):
        """Area kept, width to height and share of empty pastes, over 2,000 draws of each kind."""
        memory, crop, count = BLOBS[name], 48, 2000
        image, label = on_canvas(memory)
        total = int((label == 1).sum())
        torch.manual_seed(1)
        bank = Bank(memory, 2, CPU)
        views = bank.draw_views("crop", crop, count)[0]
        ours = []
        for top, left, height, width, *shown in views.tolist():
            box = np.s_[int(top) : int(top + height), int(left) : int(left + width)]
            ours.append((bank.masks[0][box].sum() / total, *shown))
        theirs = []
        window = TrainTransform(crop).window
        for _ in range(count):
            box = window(*label.shape).values()
            found = plain_view(image, label, 1, box, crop)
            if found is None:
                theirs.append((0.0, 0, 0))
                continue
            _, _, height, width = box
            kept = float(found[1].sum()) * height * width / crop**2 / total
            theirs.append((kept, *found[1].shape))
        ours, theirs = np.array(ours), np.array(theirs)
        kept = [rows[:, 0] for rows in (ours, theirs)]
        empty = [rows[:, 1] == 0 for rows in (ours, theirs)]
        ratio = [np.log(rows[rows[:, 1] > 0, 2] / rows[rows[:, 1] > 0, 1]) for rows in (ours, theirs)]
        for a, b in (kept, empty, ratio):
            error = np.sqrt(a.var() / len(a) + b.var() / len(b))
            assert abs(a.mean() - b.mean()) < 4 * error + 0.005
            assert abs(a.std() - b.std()) < 0.1 * b.std() + 0.01
        if name.startswith("small"):
            assert 0.05 < empty[0].mean() < 0.6

    @pytest.mark.parametrize("name", BLOBS)
    @pytest.mark.parametrize(
        "window", [(3, 4, 24, 24), (0, 0, 48, 48), (7, 9, 12, 24), (20, 11, 37, 29), (1, 50, 43, 30)]
    )
    def test_given_windows(self, name, window):
        """Pixel by pixel where the window is enlarged by whole numbers, else up to its resampling."""
        memory, crop = BLOBS[name], 48
        (image, label), bank = on_canvas(memory), Bank(memory, 2, CPU)
        expected = plain_view(image, label, 1, window, crop)
        named = dict(zip(("top", "left", "height", "width"), window, strict=True))
        top, left, height, width, *shown = _cropped(bank.masks[0], bank.places[0], named, crop)
        if expected is None:
            assert shown == [0, 0]
            return
        colour, mask = expected
        assert list(mask.shape) == shown
        start = bank.places[0][0] + top, bank.places[0][1] + left
        box = np.s_[start[0] : start[0] + height, start[1] : start[1] + width]
        cut = label[box] == 1
        nearest = torch.nn.functional.interpolate(cut[None, None].float(), shown, mode="nearest-exact")
        if all(48 % side == 0 for side in window[2:]):
            assert torch.equal(nearest[0, 0] > 0, mask)
        else:
            union = ((nearest[0, 0] > 0) | mask).sum()
            assert ((nearest[0, 0] > 0) & mask).sum() >= 0.9 * union
        if window[2:] == (48, 48):
            assert torch.equal(image[(slice(None), *box)], colour)

    def test_stretch_and_off_show_the_whole_region(self):
        torch.manual_seed(2)
        bank = Bank(BLOBS["large"], 2, CPU)
        views = bank.draw_views("stretch", 48, 2000)[0]
        height, width = bank.masks[0].shape
        assert (views[:, :4] == torch.tensor([0, 0, height, width])).all()
        ratio = views[:, 5] / views[:, 4] / (width / height)
        assert 0.75 <= ratio.min() < 0.76 and 1.32 < ratio.max() <= 4 / 3 + 1e-6
        assert abs(ratio.log().mean()) < 0.02
        assert torch.allclose(views[:, 4] * views[:, 5], torch.tensor(float(height * width)))
        assert bank.draw_views("off", 48, 2000).tolist() == [[[0, 0, height, width, height, width]]]

    def test_seed_and_epoch_decide_and_the_global_generator_is_left_alone(self):
        def views(seed, epoch):
            bank = Bank(BLOBS["large"], 2, CPU)
            return PasteAugmentation(PasteArgs(), 48, bank, seed).views(epoch)

        torch.manual_seed(9)
        state = torch.get_rng_state()
        first = views(1, 0)
        assert first.shape == (1, VIEWS, 6)
        assert torch.equal(first, views(1, 0))
        assert not torch.equal(first, views(1, 1)) and not torch.equal(first, views(2, 0))
        assert torch.equal(state, torch.get_rng_state())

    def test_half_of_the_pastes_are_mirrored_but_for_those_as_stored(self):
        for augment, low, high in (("crop", 0.4, 0.6), ("stretch", 0.4, 0.6), ("off", 0, 0)):
            plan = plans(PasteArgs(augment=augment), squares(7), label_map(), label_map(), 7)
            assert low <= plan.mirror.float().mean() <= high

    def test_a_border_on_the_centre_of_a_pixel(self):
        """Of 32 pixels shown as 48, three rows and five columns end at 4.5 and 7.5."""
        window = {"top": 0, "left": 0, "height": 32, "width": 32}
        found = _cropped(np.ones((3, 5), dtype=bool), (0, 0, 40, 40), window, 48)
        assert found == [0, 0, 3, 5, 4, 7]


class TestRandomNumbers:
    def numbers(self, count=400, seed=1, epoch=0, **settings):
        paste = PasteAugmentation(PasteArgs(**settings), 64, Bank(squares(5), 5, CPU), seed)
        return paste.random_numbers(epoch, list(range(count)))

    def test_numbers_are_uniform_but_for_the_shares(self):
        numbers = self.numbers(beta=0.2)
        sizes = {"classes": 5, "cells": 4, "entry": 3, "view": 3, "mirror": 3, "share": 3}
        assert {name: n.shape[1] for name, n in numbers.items()} == sizes
        uniform = torch.cat([n.flatten() for name, n in numbers.items() if name != "share"])
        assert uniform.dtype == torch.float32 and uniform.min() >= 0 and uniform.max() < 1
        assert abs(uniform.mean() - 0.5) < 0.02 and abs(uniform.var() - 1 / 12) < 0.01
        share = numbers["share"]
        assert abs(share.mean() - 0.5) < 0.05 and abs(share.var() - 1 / 4 / 1.4) < 0.03

    def test_seed_epoch_and_index_alone_decide(self):
        one, again = self.numbers()["classes"], self.numbers(count=300)["classes"]
        assert torch.equal(one[:300], again)
        others = self.numbers(seed=2)["classes"], self.numbers(epoch=1)["classes"]
        assert not any(torch.equal(one, other) for other in others)
        assert len(one.unique()) > 0.99 * one.numel()


def training_path(case, device):
    """Everything between the loader's batch and the gradient, in the order of a training step."""
    g = torch.Generator().manual_seed(4)
    size = case.labels.shape[-2:]
    h, w = (side // 16 + 1 for side in size)
    n = len(case.labels)
    teacher = torch.randn(n, case.channels, h, w, generator=g).to(device)
    student = torch.randn(n, case.total, h, w, generator=g).to(device).requires_grad_()
    images = torch.randint(0, 256, case.images.shape, generator=g, dtype=torch.uint8).to(device)
    given, replayed = (t.to(device) for t in (case.given, case.replayed))
    bank = Bank(case.memory, case.channels, device)
    paste = PasteAugmentation(case.settings, case.crop, bank, seed=1, view_count=3)
    paste.views(3)  # at the start of an epoch, on the host
    factor = torch.ones((), device=device)

    def run():
        labels = pseudo_labels(given, teacher, 0.7)
        normalized = normalize(images, given, replayed)
        composite = paste(normalized, given, labels, 3, case.indices, replayed)
        labels = ignore_doubtful(labels, teacher, 0.5, composite.weights)

        def losses(i, z):
            weights = composite.weights[i]
            full = torch.nn.functional.interpolate(teacher[i : i + 1], size, mode="bilinear")[0]
            covered = weights.sum(dim=0) > 0
            modes = [("plain", "all"), ("unbiased", "all"), ("rskd", "all"), ("rskd", "new")]
            kinds = (distillation_sum(z, full, given[i], covered, *mode) for mode in modes)
            return {
                "bce": bce_sum(z, labels[i], composite.classes[i], weights, 2.0),
                "ac": auxiliary_sum(z, labels[i]),
                "kd": sum(kinds),
            }

        loss, _ = sum_over_images(student, size, losses, factor)
        loss.backward()
        return composite, student.grad

    return run


def waiting_case(**switches):
    shapes = [(20, 7, "holes"), (130, 60, "shared"), (3, 3, "full"), (1, 7, "full")]
    return Case(PasteArgs(**switches), 64, 4, ["random", "background", "void"], shapes, seed=3)


SWITCHES = [
    {},
    {"class_combination": False, "position": False, "fusion": False},
    {"fill_in": "next", "on_replay": "off", "augment": "off", "max_upscale": 2.0},
    {"fill_in": "none", "lambda_min": 0.5, "pastes": 1},
]


class TestNothingWaits:
    @pytest.mark.parametrize("switches", SWITCHES)
    def test_paste_and_losses_read_nothing_back(self, switches):
        run = training_path(waiting_case(**switches), CPU)
        with no_waiting():
            composite, gradient = run()
        assert composite.weights.any() and gradient.isfinite().all() and gradient.any()

    @pytest.mark.parametrize("switches", SWITCHES)
    def test_sizes_do_not_depend_on_data(self, switches, monkeypatch):
        """On the meta device there are no data at all."""
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        case = waiting_case(**switches)
        composite, gradient = training_path(case, torch.device("meta"))()
        assert composite.images.shape == case.images.shape
        assert gradient.shape[:2] == (3, case.total)

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_the_device_is_never_waited_for(self):
        device = torch.device("cuda")
        run = training_path(waiting_case(), device)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize(
        "offence",
        [
            lambda x, mask, path: x.sum().item(),
            lambda x, mask, path: bool(mask.any()),
            lambda x, mask, path: float(x[0]),
            lambda x, mask, path: x[mask],
            lambda x, mask, path: x.masked_select(mask),
            lambda x, mask, path: x.__setitem__(mask, torch.ones(3)),
            lambda x, mask, path: mask.nonzero(),
            lambda x, mask, path: torch.where(mask),
            lambda x, mask, path: x.unique(),
            lambda x, mask, path: torch.equal(x, x),
            lambda x, mask, path: x.to("meta"),
            lambda x, mask, path: read_label(path),
            lambda x, mask, path: path.read_bytes(),
        ],
    )
    def test_the_guard_notices(self, offence, tmp_path):
        path = tmp_path / "file.png"
        Image.new("L", (2, 2)).save(path)
        x = torch.arange(5.0)
        offence(x.clone(), x > 1.5, path)
        with no_waiting(), pytest.raises(Waits):
            offence(x, x > 1.5, path)

    def test_the_guard_lets_the_rest_pass(self):
        x = torch.arange(5.0)
        with no_waiting():
            y = torch.where(x > 1.5, x, 0)[torch.tensor([4, 0])]
            y = y.to(torch.float64).gather(0, torch.tensor([0]))
        assert y.item() == 4
