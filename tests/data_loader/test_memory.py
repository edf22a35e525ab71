"""The instance memory: the draw, what is stored, and what becomes of it in training."""

import hashlib
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given as sampled
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from data_loader import memory as memory_module
from data_loader.data_loaders import StepData
from data_loader.dataset import TrainDataset, normalize
from data_loader.memory import balanced_draw, beside, put_in_place, read_manifest
from data_loader.tasks import get_task
from tests.helpers import CLASS_NAMES, small_config, snapshot
from utils.errors import UserError

VOID = 255
ALL = 1000
FIELDS = {"id", "drawn_for", "classes", "top", "left", "height", "width", "canvas", "file", "sha256"}


@pytest.fixture
def messages():
    """Messages of the log, by level name."""
    found = []

    class Keep(logging.Handler):
        def emit(self, record):
            found.append((record.levelname, record.getMessage()))

    log, handler = memory_module.log, Keep()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield found
    log.removeHandler(handler)
    log.setLevel(level)


def step_data(root, step=1, mem_size=20, **changes):
    return StepData(small_config(root, root, task_step=step, mem_size=mem_size, **changes))


def kept_memory(data, folder, previous):
    """The memory of a step, in its folder, as a run leaves it."""
    memory = data.memory(folder, previous)
    if beside(folder).is_dir():
        put_in_place(folder)
    return memory


def decoded(root, name):
    """Image uint8 [H, W, 3] and VOC label uint8 [H, W] of a training image, as stored."""
    image = np.array(Image.open(root / "JPEGImages" / f"{name}.jpg"))
    return image, np.array(Image.open(root / "SegmentationClassAug" / f"{name}.png"))


def stored(folder, row):
    return tuple(np.array(Image.open(folder / f"{row.file}_{part}.png")) for part in ("image", "label"))


def train_ids(root):
    lines = (root / "ImageSets" / "Segmentation" / "train_aug.txt").read_text().split()
    return [line.rpartition("/")[2][:-4] for line in lines[::2]]


def region_count(mask):
    """Number of 4-connected regions of a bool [H, W], by flood fill."""
    todo = set(zip(*map(list, np.nonzero(mask)), strict=True))
    regions = 0
    while todo:
        regions += 1
        front = [todo.pop()]
        while front:
            y, x = front.pop()
            for neighbour in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if neighbour in todo:
                    todo.remove(neighbour)
                    front.append(neighbour)
    return regions


def expected_candidates(root, setting, step, kind="instance", task_name="5-3"):
    """{(id, visible classes)} of the images of a step, from the label files alone."""
    task = get_task(task_name, setting)
    seen, new = task.seen(step), task.steps[step]
    found = set()
    for name in train_ids(root):
        label = decoded(root, name)[1]
        classes = set(np.unique(label).tolist()) - {0, VOID}
        if not classes & set(new) or (setting != "overlap" and classes - set(seen)):
            continue
        visible = sorted(classes & set(seen if setting == "sequential" else new), key=int)
        if kind == "image" or all(region_count(label == c) == 1 for c in visible):
            found.add((name, tuple(visible)))
    return found


class TestDraw:
    CANDIDATES = st.lists(st.sets(st.integers(1, 7)).map(lambda s: tuple(sorted(s))), max_size=25)

    @hypothesis_settings(deadline=None, max_examples=300, derandomize=True)
    @sampled(CANDIDATES, st.permutations(range(1, 7)), st.integers(0, 30), st.integers(0, 99))
    def test_it_is_balanced_within_the_budget_and_ends(self, shown, classes, budget, seed):
        classes = tuple(classes)
        lists = balanced_draw(shown, classes, budget, np.random.default_rng(seed))
        taken = [i for picks in lists.values() for i in picks]
        useful = [i for i, s in enumerate(shown) if set(s) & set(classes)]
        assert list(lists) == list(classes)
        assert len(taken) == len(set(taken)) == min(budget, len(useful))
        assert all(c in shown[i] for c, picks in lists.items() for i in picks)
        for c, picks in lists.items():
            exhausted = all(i in taken for i, s in enumerate(shown) if c in s)
            assert exhausted or all(len(others) <= len(picks) + 1 for others in lists.values())
        again = balanced_draw(shown, classes, budget, np.random.default_rng(seed))
        assert again == lists

    def test_classes_and_candidates_are_random(self):
        shown = [(1,), (1, 2), (2,), (3,), (3,)]
        firsts, picks = set(), set()
        for seed in range(60):
            lists = balanced_draw(shown, (1, 2, 3), 1, np.random.default_rng(seed))
            firsts |= {c for c, taken in lists.items() if taken}
            picks |= {taken[0] for taken in lists.values() if taken}
        assert firsts == {1, 2, 3} and picks == {0, 1, 2, 3, 4}


class TestCandidates:
    @pytest.mark.parametrize("setting", ["overlap", "disjoint", "sequential"])
    @pytest.mark.parametrize("step", [1, 2])
    def test_they_are_the_images_of_the_step_before_in_one_piece(
        self, voc_root, tmp_path, setting, step
    ):
        data = step_data(voc_root, step, ALL, task_setting=setting, task_name="15-1_b")
        kept_memory(data, tmp_path / "memory", None)
        rows = read_manifest(tmp_path / "memory")["entries"]
        found = {(row.id, tuple(sorted(row.classes))) for row in rows}
        arguments = voc_root, setting, step - 1
        expected = expected_candidates(*arguments, task_name="15-1_b")
        assert len(rows) == len(found) and found == expected
        if step == 1:
            assert expected < expected_candidates(*arguments, "image", "15-1_b")

    def test_stored_entries_are_candidates_again(self, voc_root, tmp_path):
        kept_memory(step_data(voc_root, 1, ALL), tmp_path / "one", None)
        kept_memory(step_data(voc_root, 2, ALL), tmp_path / "two", tmp_path / "one")
        first, second = (read_manifest(tmp_path / name)["entries"] for name in ("one", "two"))
        new = expected_candidates(voc_root, "overlap", 1)
        assert sorted((r.id, tuple(r.classes)) for r in second) == sorted(
            [*new, *((r.id, tuple(r.classes)) for r in first)]
        )

    def test_whole_images_need_not_be_in_one_piece(self, voc_root, tmp_path):
        data = step_data(voc_root, 1, ALL, replay="image")
        memory = kept_memory(data, tmp_path / "memory", None)
        rows = read_manifest(tmp_path / "memory")["entries"]
        expected = expected_candidates(voc_root, "overlap", 0, "image")
        assert {(row.id, tuple(row.classes)) for row in rows} == expected
        assert expected > expected_candidates(voc_root, "overlap", 0)
        voids = 0
        for i, row in enumerate(rows):
            image, label = decoded(voc_root, row.id)
            seen_then = np.where(np.isin(label, [*range(1, 6), VOID]), label, 0)
            pictures = stored(tmp_path / "memory", row)
            assert np.array_equal(pictures[0], image) and np.array_equal(pictures[1], seen_then)
            shown, channels = memory.replay(i)
            assert np.array_equal(shown.permute(1, 2, 0), image)
            assert np.array_equal(channels, seen_then)
            voids += (seen_then == VOID).sum()
        assert voids and not memory.alone

    def test_instances_with_surroundings_are_the_same_ones_with_a_margin(self, voc_root, tmp_path):
        alone = kept_memory(step_data(voc_root, 1), tmp_path / "alone", None)
        data = step_data(voc_root, 1, surroundings=0.25)
        memory = kept_memory(data, tmp_path / "memory", None)
        assert alone.alone and not memory.alone
        larger = 0
        for i, (row, small) in enumerate(zip(memory.entries, alone.entries, strict=True)):
            assert (row.id, row.drawn_for, row.canvas) == (small.id, small.drawn_for, small.canvas)
            image, label = decoded(voc_root, row.id)
            seen_then = np.where(np.isin(label, [*range(1, 6), VOID]), label, 0)
            height, width = (int(0.25 * size) for size in (small.height, small.width))
            rows = slice(max(small.top - height, 0), small.top + small.height + height)
            columns = slice(max(small.left - width, 0), small.left + small.width + width)
            pictures = stored(tmp_path / "memory", row)
            assert np.array_equal(pictures[0], image[rows, columns])
            assert np.array_equal(pictures[1], seen_then[rows, columns])
            assert (row.top, row.left) == (rows.start, columns.start)
            shown, channels = memory.replay(i)
            expected = np.empty_like(image)
            expected[:] = memory_module.FILL
            expected[rows, columns] = image[rows, columns]
            assert np.array_equal(shown.permute(1, 2, 0), expected)
            known = channels.numpy() % VOID
            assert np.array_equal(known, alone.replay(i)[1])  # what is pasted is the same
            larger += row.height > small.height
        assert larger
        sample = TrainDataset(data.training(), memory, 1)[0, len(data.training())]
        assert sample["replayed"] and not sample["alone"]
        with pytest.raises(UserError, match=r"surroundings of 0\.25, this step needs 0\.0"):
            kept_memory(step_data(voc_root, 2), tmp_path / "two", tmp_path / "memory")

    def test_kinds_do_not_mix(self, voc_root, tmp_path):
        kept_memory(step_data(voc_root, 1), tmp_path / "one", None)
        data = step_data(voc_root, 2, replay="image")
        with pytest.raises(UserError, match=r"one is of kind instance.*image.*same --replay"):
            kept_memory(data, tmp_path / "two", tmp_path / "one")
        assert not (tmp_path / "two").exists()


class TestStore:
    @pytest.mark.parametrize("task", ["5-3", "15-1_b"])
    def test_entries_hold_the_instances_and_nothing_around_them(self, voc_root, tmp_path, task):
        kept_memory(step_data(voc_root, 1, ALL, task_name=task), tmp_path / "memory", None)
        around = 0
        for row in read_manifest(tmp_path / "memory")["entries"]:
            image, label = decoded(voc_root, row.id)
            pixels, classes = stored(tmp_path / "memory", row)
            mask = np.isin(label, row.classes)
            box = np.s_[row.top : row.top + row.height, row.left : row.left + row.width]
            assert row.canvas == list(label.shape) and mask.sum() == mask[box].sum()
            assert all(mask[box][edge].any() for edge in (0, -1, np.s_[:, 0], np.s_[:, -1]))
            assert np.array_equal(classes, np.where(mask[box], label[box], 0))
            assert np.array_equal(pixels, np.where(mask[box][..., None], image[box], 0))
            assert set(np.unique(classes)) - {0} == set(row.classes)
            around += (label[box] == VOID).sum()
        assert around

    def test_the_manifest_is_complete(self, voc_root, tmp_path):
        folder = tmp_path / "memory"
        kept_memory(step_data(voc_root, 1, 12, task_name="15-1_b", seed=7), folder, None)
        manifest = json.loads((folder / "manifest.json").read_text())
        order = get_task("15-1_b", "overlap").steps[0]
        assert all(row.keys() == FIELDS for row in manifest["entries"])
        rows = read_manifest(folder)["entries"]
        assert manifest["kind"] == "instance" and manifest["classes"] == list(order)
        assert manifest["budget"] == 12 == len(rows) and manifest["seed"] == 7
        assert list(manifest["lists"]) == [CLASS_NAMES[c] for c in order]
        listed = {k: CLASS_NAMES.index(name) for name, ks in manifest["lists"].items() for k in ks}
        assert listed == {k: row.drawn_for for k, row in enumerate(rows)}
        files = set()
        for row in rows:
            assert row.drawn_for in row.classes and set(row.classes) <= set(order)
            for part, digest in zip(("image", "label"), row.sha256, strict=True):
                path = folder / f"{row.file}_{part}.png"
                assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
                files.add(path.name)
        assert {path.name for path in folder.iterdir()} == files | {"manifest.json"}
        assert len(files) == 24

    def test_the_budget_holds_at_every_step_and_the_seed_decides(self, voc_root, tmp_path):
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            kept_memory(step_data(voc_root, 1, 9, seed=seed), tmp_path / name, None)
        a, b, c = (snapshot(tmp_path / name) for name in "abc")
        assert a == b != c
        previous = None
        for step in (1, 2, 3):
            folder = tmp_path / str(step)
            memory = kept_memory(step_data(voc_root, step, 9), folder, previous)
            counts = [memory.drawn_for.count(c) for c in range(1, 3 * step + 3)]
            assert len(memory) == sum(counts) == 9
            assert max(counts) - min(counts) <= 1 and len(counts) == 3 * step + 2
            previous = folder

    def test_each_step_draws_by_its_seed_and_its_number_of_old_classes(self, voc_root, tmp_path):
        previous, entries = None, []
        for step in (1, 2):
            kept_memory(step_data(voc_root, step, 9, seed=5), tmp_path / str(step), previous)
            found = expected_candidates(voc_root, "overlap", step - 1)
            images = sorted(found, key=lambda image: train_ids(voc_root).index(image[0]))
            candidates = [*images, *entries]
            classes = get_task("5-3", "overlap").seen(step - 1)
            generator = np.random.default_rng((5, len(classes)))
            lists = balanced_draw([shown for _, shown in candidates], classes, 9, generator)
            previous = tmp_path / str(step)
            stored = read_manifest(previous)["entries"]
            entries = [(e.id, tuple(e.classes)) for e in stored]
            drawn = [candidates[i] for picks in lists.values() for i in picks]
            assert drawn == entries
            assert [e.drawn_for for e in stored] == [c for c, picks in lists.items() for _ in picks]

    @pytest.mark.parametrize("harm", ["pixel", "label", "missing"])
    def test_a_damaged_store_says_so(self, voc_root, tmp_path, harm):
        """Where it is to be replayed, and where entries are to be carried on from it."""
        folder = tmp_path / "memory"
        data = step_data(voc_root, 1, 6)
        kept_memory(data, folder, None)
        path = next(folder.glob("*_label.png" if harm == "label" else "*_image.png"))
        if harm == "missing":
            path.unlink()
        else:
            image = Image.open(path)
            image.putpixel((0, 0), 3 if harm == "label" else (1, 2, 3))
            image.save(path)
        with pytest.raises(UserError) as refused:
            kept_memory(data, folder, None)
        assert str(path) in str(refused.value)
        assert "train that step anew with --overwrite" in str(refused.value)
        with pytest.raises(UserError, match="is missing or was changed"):
            kept_memory(step_data(voc_root, 2, ALL), tmp_path / "next", folder)
        assert not (tmp_path / "next").exists()
        shutil.rmtree(folder)
        assert len(kept_memory(data, folder, None)) == 6

    def test_it_is_not_drawn_again_when_it_is_there(self, voc_root, tmp_path):
        folder = tmp_path / "memory"
        data = step_data(voc_root, 1, 6)
        kept_memory(data, folder, None)
        before = snapshot(folder)
        times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        assert len(kept_memory(data, folder, None)) == 6
        assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
        with pytest.raises(UserError, match=r"drawn with another budget.*--overwrite"):
            kept_memory(step_data(voc_root, 1, 4), folder, None)
        assert snapshot(folder) == before

    def test_an_interrupted_build_leaves_no_half_memory(self, voc_root, tmp_path, monkeypatch):
        data = step_data(voc_root, 1, 6)
        kept_memory(data, tmp_path / "whole", None)
        folder, calls, store = tmp_path / "memory", [], memory_module._store

        def interrupted(*arguments):
            calls.append(1)
            if len(calls) > 3:
                raise KeyboardInterrupt
            return store(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(memory_module, "_store", interrupted)
            with pytest.raises(KeyboardInterrupt):
                kept_memory(data, folder, None)
        assert not folder.exists()
        leftover = tmp_path / "memory.unfinished"
        leftover.mkdir(exist_ok=True)
        (leftover / "999_junk_image.png").write_bytes(b"junk")
        kept_memory(data, folder, None)
        assert snapshot(folder) == snapshot(tmp_path / "whole")
        assert not leftover.exists()


class TestWithoutTheOldData:
    def test_carried_entries_survive_the_deletion_of_the_original_data(self, own_root, tmp_path):
        first = step_data(own_root, 1, 10)
        kept_memory(first, tmp_path / "one", None)
        whole = step_data(own_root, 2, 12)
        kept_memory(whole, tmp_path / "undisturbed", tmp_path / "one")

        kept = {name for name, _ in expected_candidates(own_root, "overlap", 1, "image")}
        kept |= {name for name, _ in expected_candidates(own_root, "overlap", 2, "image")}
        ids = train_ids(own_root)
        assert len(kept) < len(ids)
        for name in set(ids) - kept:
            (own_root / "JPEGImages" / f"{name}.jpg").unlink()
            (own_root / "SegmentationClassAug" / f"{name}.png").unlink()
        lines = [f"/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png\n" for i in ids if i in kept]
        (own_root / "ImageSets" / "Segmentation" / "train_aug.txt").write_text("".join(lines))

        data = step_data(own_root, 2, 12)
        memory = kept_memory(data, tmp_path / "two", tmp_path / "one")
        assert snapshot(tmp_path / "two") == snapshot(tmp_path / "undisturbed")
        gone = [i for i, entry in enumerate(memory.entries) if entry.id not in kept]
        assert gone
        shutil.rmtree(tmp_path / "one")
        alone = kept_memory(data, tmp_path / "two", None)
        for i in gone:
            assert all(map(torch.equal, alone.replay(i), memory.replay(i)))
            assert 0 < memory.replay(i)[1].max() <= 5


class TestWarnings:
    def test_running_out_says_how_many_there_are(self, voc_root, tmp_path, messages):
        kept_memory(step_data(voc_root, 1, ALL), tmp_path / "memory", None)
        lists = read_manifest(tmp_path / "memory")["lists"]
        counts = ", ".join(f"{name} {len(entries)}" for name, entries in lists.items())
        total = sum(map(len, lists.values()))
        (warning,) = [text for level, text in messages if level == "WARNING"]
        assert f"only {total} of {ALL} entries" in warning and counts in warning

    def test_a_class_without_any_candidate_is_named(self, own_root, tmp_path, messages):
        for name in train_ids(own_root):
            label = decoded(own_root, name)[1]
            if (label == 4).any():
                label[0, :3] = [4, 0, 4]
                Image.fromarray(label).save(own_root / "SegmentationClassAug" / f"{name}.png")
        memory = kept_memory(step_data(own_root, 1, 8), tmp_path / "memory", None)
        assert 4 not in memory.drawn_for and len(memory) == 8
        (warning,) = [text for level, text in messages if level == "WARNING"]
        assert "no entry at all for boat:" in warning

    def test_no_candidate_at_all_trains_without_replay(self, own_root, tmp_path, messages):
        for name in train_ids(own_root):
            label = decoded(own_root, name)[1]
            present = [c for c in range(1, 6) if (label == c).any()]
            label[0, : 2 * len(present)] = [value for c in present for value in (c, 0)]
            label[2, : 2 * len(present)] = [value for c in present for value in (c, 0)]
            label[1] = 0
            Image.fromarray(label).save(own_root / "SegmentationClassAug" / f"{name}.png")
        assert kept_memory(step_data(own_root, 1, 8), tmp_path / "memory", None) is None
        assert any("the memory is empty" in text for _, text in messages)

    def test_a_missing_memory_before_is_a_warning(self, voc_root, tmp_path, messages):
        memory = kept_memory(step_data(voc_root, 2, 6), tmp_path / "two", tmp_path / "one")
        assert set(memory.drawn_for) == {6, 7, 8}
        assert any("no memory in" in text for level, text in messages if level == "WARNING")

    @pytest.mark.parametrize("changes", [{"mem_size": 0}, {"replay": "none"}])
    def test_no_memory_leaves_no_trace(self, voc_root, tmp_path, changes, messages):
        assert kept_memory(step_data(voc_root, 1, **changes), tmp_path / "memory", None) is None
        assert not list(tmp_path.iterdir()) and not messages


class TestReplay:
    @pytest.fixture
    def data(self, voc_root):
        return step_data(voc_root, 1, 12, task_name="15-1_b")

    def test_around_an_instance_is_the_mean_colour_inside_its_box_too(self, data, tmp_path):
        """Resampling mixes the pixels at its border with what lies there."""
        memory = kept_memory(data, tmp_path / "memory", None)
        inside = 0
        for i in range(len(memory)):
            image, label = memory.replay(i)
            assert (image[:, label == 0] == torch.tensor([[124], [116], [104]])).all()
            inside += int((memory.labels[i] == 0).sum())
        assert inside

    def test_an_entry_alone_is_zero_outside_after_normalisation(self, data, tmp_path):
        memory = kept_memory(data, tmp_path / "memory", None)
        order = data.task.steps[0]
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        for i, row in enumerate(read_manifest(tmp_path / "memory")["entries"]):
            image, label = memory.replay(i)
            pixels, classes = stored(tmp_path / "memory", row)
            whole = np.zeros(row.canvas, np.uint8)
            expected = np.zeros((*row.canvas, 3))
            box = np.s_[row.top : row.top + row.height, row.left : row.left + row.width]
            for channel, c in enumerate(order, start=1):
                whole[box][classes == c] = channel
            expected[box] = (pixels / 255 - mean) / std * (classes > 0)[..., None]
            assert np.array_equal(label, whole)
            found = normalize(image[None], label[None], torch.tensor([True]))[0].permute(1, 2, 0)
            assert not found[label == 0].any()
            assert np.allclose(found, expected, atol=1e-5)

    def test_samples_of_the_training_set_are_alone_too(self, data, voc_root, tmp_path):
        memory = kept_memory(data, tmp_path / "memory", None)
        samples = TrainDataset(data.training(), memory, seed=1)
        first = len(samples.images)
        assert len(samples) == first + 12
        channels = set()
        for i in range(12):
            sample = samples[(0, first + i)]
            assert sample["replayed"] and sample["alone"] and sample["id"] == memory.entries[i].id
            shown = set(sample["label"].unique().tolist()) - {0}
            allowed = {data.task.order.index(c) + 1 for c in memory.entries[i].classes}
            assert shown <= allowed
            channels |= shown
            batch = [sample[key][None] for key in ("image", "label")]
            pixels = normalize(*batch, torch.tensor([True]))[0]
            assert not pixels[:, sample["label"] == 0].any()
            if shown:
                assert pixels[:, sample["label"] > 0].any()
        assert len(channels) > 6
        sample = samples[(0, 0)]
        assert not sample["replayed"] and not sample["alone"]
        whole = step_data(voc_root, 1, 5, replay="image")
        samples = TrainDataset(whole.training(), kept_memory(whole, tmp_path / "whole", None), seed=1)
        sample = samples[(0, len(samples) - 1)]
        assert sample["replayed"] and not sample["alone"]


class TestManifest:
    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"entries": [{"id": "x"}]}', "[" * 100_000])
    def test_a_damaged_one_is_an_error_that_says_the_way_out(self, tmp_path, text):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"cannot read the memory.*anew with --overwrite"):
            read_manifest(tmp_path)

    def test_a_changed_one_is_refused_and_one_without_a_digest_is_a_warning(
        self, voc_root, tmp_path, messages
    ):
        path = tmp_path / "memory" / "manifest.json"
        kept_memory(step_data(voc_root, 1, 4), path.parent, None)
        manifest = json.loads(path.read_text())
        outside = [{**manifest["entries"][0], "file": "../x"}]
        for change, words in (
            ({"budget": 5}, "its digest differs"),
            ({"sha256": None, "entries": outside}, r"an entry names the file '\.\./x'"),
        ):
            path.write_text(json.dumps({**manifest, **change}))
            with pytest.raises(UserError, match=f"cannot read the memory in .*{words}"):
                read_manifest(path.parent)
        messages.clear()
        path.write_text(json.dumps({**manifest, "sha256": None}))
        assert len(read_manifest(path.parent)["entries"]) == 4
        assert any("has no digest" in text for level, text in messages if level == "WARNING")
