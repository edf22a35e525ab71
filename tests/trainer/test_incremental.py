"""Steps t >= 1: sequences, channels, the loss by its formula, choices, failures, same weights."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from configs.options import TrainCall
from data_loader.data_loaders import StepData
from data_loader.memory import read_manifest
from data_loader.tasks import CLASS_NAMES, get_task
from models.deeplabv3 import DeepLabV3, predict
from scripts.plain import (
    plain_bce,
    plain_distillation,
    plain_ignore_doubtful,
    plain_paste,
    plain_pseudo_labels,
    plain_soft_labels,
)
from tests.helpers import error_line, small_config, snapshot, train_flags
from tests.no_waiting import no_waiting
from trainer import incremental, output
from trainer.base_step import BaseStep
from trainer.incremental import IncrementalStep
from trainer.meter import Meter
from trainer.run import train
from utils.checkpoint import final_checkpoint, read_checkpoint
from utils.errors import UserError
from utils.logging import log

pytestmark = pytest.mark.usefixtures("cpu")

SHUFFLED = "15-1_b"
ORDER = (12, 9, 20, 7, 15, 8, 14, 16, 5, 19, 4, 1, 13, 2, 11, 17, 3, 6, 18, 10)
OLD, NEW = ORDER[:15], 17


def settings(root, save_dir, step=1, **changes):
    base = {"task_name": SHUFFLED, "task_step": step, "mem_size": 9, "epochs": 1, "freeze_bn": True}
    return small_config(root, save_dir, **{**base, **changes})


def run(config, **request) -> None:
    train(config, TrainCall(**request))


@pytest.fixture(autouse=True)
def quiet():
    """No handler of an earlier test, whose streams are closed by now."""
    log.handlers.clear()


@pytest.fixture(scope="module")
def step_0(voc_root, tmp_path_factory):
    """The final checkpoint of step 0 of the shuffled task, trained for an epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        config = settings(voc_root, tmp_path_factory.mktemp("step_0"), 0, freeze_bn=False)
        run(config)
    return final_checkpoint(config.step_dir())


@pytest.fixture
def step_1(voc_root, tmp_path, step_0):
    """Makes the trainer of step 1 with the changes that it is given."""

    def make(**changes):
        config = settings(voc_root, tmp_path / "step_1", **changes)
        trainer = IncrementalStep(config, StepData(config), None, step_0)
        trainer.prepare()
        return trainer

    return make


@pytest.fixture
def warnings():
    found = []

    class Keep(logging.Handler):
        def emit(self, record):
            if record.levelno >= logging.WARNING:
                found.append(record.getMessage())

    handler = Keep()
    log.addHandler(handler)
    yield found
    log.removeHandler(handler)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def raw_batch(trainer, number=0):
    keys = list(trainer.batches)[number]
    return torch.utils.data.default_collate([trainer.dataset[key] for key in keys])


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def one_iteration(trainer, number=0):
    """Mean loss and parts of one iteration, as they are reported."""
    trainer.model.train()
    incremental_mode(trainer)
    meter = Meter("", 1, trainer.device, shown=False)
    trainer.train_iteration(raw_batch(trainer, number), meter)
    return meter.means()


def incremental_mode(trainer):
    for module in trainer.model.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.Dropout)):
            module.eval()


class TestSequence:
    @pytest.mark.parametrize("task", ["15-1", SHUFFLED])
    def test_three_steps_one_class_each(self, voc_root, tmp_path, step_0, task):
        if task == SHUFFLED:
            save_dir = step_0.parents[3]
        else:
            save_dir = tmp_path
            run(settings(voc_root, save_dir, 0, task_name=task, freeze_bn=False))
        order = get_task(task, "overlap").order
        for step in (1, 2):
            config = settings(voc_root, save_dir, step, task_name=task)
            run(config)
            folder = config.step_dir()
            (record,) = (config.step_dir(kind="log") / "metrics.jsonl").read_text().splitlines()
            record = json.loads(record)
            assert all(np.isfinite(record[name]) for name in ("loss", "bce", "kd"))
            assert record["bce"] > 0 and record["kd"] > 0
            assert record["loss"] == pytest.approx(record["bce"] + record["kd"])
            checkpoint = read_checkpoint(folder / "checkpoint-epoch1.pth")
            assert checkpoint["arch"]["classes"] == [15] + [1] * step
            assert checkpoint["state_dict"][f"cls.{step + 1}.weight"].shape == (1, 256, 1, 1)
            metrics = json.loads((folder / "metrics.json").read_text())
            names = [CLASS_NAMES[c] for c in (0, *order[: 15 + step])]
            assert list(metrics["Mean_Intersection_over_Union"]["by_class"]) == names
            memory = read_manifest(folder / "memory")
            assert memory["classes"] == list(order[: 14 + step])
            assert len(memory["entries"]) == 9


class TestChannels:
    """Channel k is the k-th class in learning order, in whatever part of the step it appears."""

    def test_labels_memory_and_networks_agree(self, step_1):
        trainer = step_1()
        data, dataset = trainer.data, trainer.dataset
        assert data.task.order == ORDER
        assert trainer.teacher.classes == [15] and trainer.model.classes == [15, 1]
        for i, path in enumerate(dataset.images.labels):
            voc = np.array(Image.open(path))
            expected = np.where(voc == 255, 255, np.where(voc == NEW, 16, 0))
            label = dataset.images.load(i)[1]
            assert (label == 16).any() and np.array_equal(label, expected)

        rows = read_manifest(trainer.folder / "memory")["entries"]
        assert rows and len(rows) == len(dataset) - len(dataset.images)
        count = torch.zeros(16, dtype=torch.int64)
        for i, row in enumerate(rows):
            voc = np.array(Image.open(trainer.folder / "memory" / f"{row.file}_label.png"))
            channels = np.zeros_like(voc)
            for k, c in enumerate(OLD, start=1):
                channels[voc == c] = k
            shown = dataset.memory.replay(i)[1].numpy()
            assert np.array_equal(shown[shown > 0], channels[channels > 0])
            count[OLD.index(row.drawn_for) + 1] += 1
        assert torch.equal(trainer.paste.bank.count, count)

    def test_pseudo_labels_and_pastes_use_the_same_channels(self, step_1, monkeypatch):
        trainer = step_1(pseudo_thresh=0.1)
        (batch,) = trainer.to_device(raw_batch(trainer))
        score = torch.full((len(batch.images), 16, 4, 4), -5.0)
        score[:, 7] = 5.0
        monkeypatch.setattr(trainer, "teach", lambda images: score)
        seen = {}
        compose = trainer.compose

        def spy(batch, labels):
            seen["labels"], seen["composite"] = labels, compose(batch, labels)
            return seen["composite"]

        monkeypatch.setattr(trainer, "compose", spy)
        trainer.training_loss(batch)
        filled = batch.labels == 0
        assert filled.any() and (seen["labels"][filled] == 7).all()
        assert torch.equal(seen["labels"][~filled], batch.labels[~filled])
        assert seen["composite"].classes.max() <= 15
        drawn = set(trainer.dataset.memory.drawn_for)
        used = seen["composite"].weights.flatten(2).any(dim=2)
        assert used.any() and set(seen["composite"].classes[used].tolist()) <= drawn

    def test_a_few_images_are_learned_in_a_shuffled_order(self, tmp_path):
        """Each VOC class comes out at its channel, the old ones after step 1 too."""
        root = coloured_squares(tmp_path / "squares", {9: "red", 19: "green", NEW: "blue"})
        changes = {"mem_size": 6, "trainer__verbosity": 0}
        config = settings(root, tmp_path, 0, epochs=20, lr=0.03, freeze_bn=False, **changes)
        base = BaseStep(config, StepData(config))
        for module in base.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.1  # statistics that follow a run as short as this one
        base.fit()
        config = settings(root, tmp_path, 1, epochs=14, lr=0.005, **changes)
        IncrementalStep(config, StepData(config), None, final_checkpoint(base.folder)).fit()
        for step in (0, 1):
            folder = settings(root, tmp_path, step).step_dir()
            model = DeepLabV3([15, 1][: step + 1], "tiny")
            checkpoint = read_checkpoint(final_checkpoint(folder))
            model.load_state_dict(checkpoint["state_dict"])
            right, total = recall(model.eval(), root)
            for c in (9, 19, NEW)[: step + 2]:
                assert right[c] > 0.7 * total[c] > 0, (step, c)


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 230)}


def coloured_squares(root, colours):
    """A VOC folder of 12 images; each class a square of its colour, two classes an image."""
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    classes, lines = list(colours), []
    for i in range(12):
        image = rng.integers(100, 150, (64, 64, 3)).astype(np.uint8)
        label = np.zeros((64, 64), np.uint8)
        for place, c in enumerate((classes[i % 3], classes[(i + 1 + i // 6) % 3])):
            top, left = rng.integers(0, 30), 34 * place + rng.integers(0, 4)
            box = np.s_[top : top + 28, left : left + 26]
            image[box], label[box] = COLOURS[colours[c]], c
        Image.fromarray(image).save(root / "JPEGImages" / f"2007_{i:06d}.jpg", quality=95)
        Image.fromarray(label).save(root / "SegmentationClassAug" / f"2007_{i:06d}.png")
        lines.append(f"/JPEGImages/2007_{i:06d}.jpg /SegmentationClassAug/2007_{i:06d}.png\n")
    for name in ("train_aug", "val"):
        (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("".join(lines))
    return root


def recall(model, root):
    """Pixels of each VOC class, and those predicted at its channel."""
    right, total = np.zeros(21, int), np.zeros(21, int)
    for path in sorted((root / "JPEGImages").iterdir()):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].double() / 255
        mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        mean, std = (torch.tensor(t).view(1, 3, 1, 1) for t in (mean, std))
        with torch.no_grad():
            channel = predict(model(((pixels - mean) / std).float()))[0].numpy()
        voc = np.array([0, *ORDER])[channel]
        label = np.array(Image.open(root / "SegmentationClassAug" / f"{path.stem}.png"))
        for c in range(21):
            right[c] += ((voc == c) & (label == c)).sum()
            total[c] += (label == c).sum()
    return right, total


class TestStart:
    def test_the_student_starts_from_the_teacher(self, step_1, step_0):
        trainer = step_1()
        before = read_checkpoint(step_0)["state_dict"]
        assert same_state(state(trainer.teacher), before)
        assert same_state({k: v for k, v in state(trainer.model).items() if k in before}, before)
        images = torch.randn(2, 3, 64, 64)
        trainer.model.eval()
        assert torch.equal(trainer.model(images)[:, :16], trainer.teacher(images))
        assert trainer.model.cls[2].weight.abs().max() > 0

    def test_the_teacher_and_the_frozen_statistics_do_not_move(self, step_1, monkeypatch):
        trainer = step_1()
        monkeypatch.setattr(output, "finish", lambda trainer: None)
        teacher, student = state(trainer.teacher), state(trainer.model)
        modes = []
        plain = trainer.training_loss

        def spy(batch):
            modes.extend(
                module.training
                for module in trainer.model.modules()
                if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.Dropout))
            )
            modes.extend(module.training for module in trainer.teacher.modules())
            return plain(batch)

        monkeypatch.setattr(trainer, "training_loss", spy)
        trainer.fit()
        assert modes and not any(modes)
        assert same_state(state(trainer.teacher), teacher)
        assert not any(p.requires_grad for p in trainer.teacher.parameters())
        norms = {
            f"{name}.{key}"
            for name, module in trainer.model.named_modules()
            if isinstance(module, torch.nn.BatchNorm2d)
            for key in module.state_dict()
        }
        after = state(trainer.model)
        assert all(torch.equal(student[key], after[key]) == (key in norms) for key in after)

    def test_batch_normalisation_learns_unless_it_is_frozen(self, step_1):
        trainer = step_1(freeze_bn=False)
        before = state(trainer.model)
        meter = Meter("", 1, trainer.device, shown=False)
        trainer.model.train()
        trainer.train_iteration(raw_batch(trainer), meter)
        after = state(trainer.model)
        changed = {key for key in after if not torch.equal(before[key], after[key])}
        assert {"aspp.last_conv.1.running_mean", "aspp.last_conv.1.weight"} <= changed

    def test_parameter_groups(self, step_1):
        trainer = step_1(lr=0.001)
        owner = {}
        for group in trainer.optimizer.param_groups:
            for p in group["params"]:
                assert id(p) not in owner
                owner[id(p)] = group
        frozen = {
            id(p)
            for module in trainer.model.modules()
            if isinstance(module, torch.nn.BatchNorm2d)
            for p in module.parameters()
        }
        for name, p in trainer.model.named_parameters():
            if id(p) in frozen:
                assert id(p) not in owner
                continue
            group = owner.pop(id(p))
            rate = 0.001 if name.startswith("backbone.") else 0.01
            assert group["lr"] == pytest.approx(rate), name
            assert group["weight_decay"] == (1e-4 if name.startswith("cls.2.") else 0), name
            assert group["momentum"] == 0.9 and group["nesterov"]
        assert not owner

    def test_ac_starts_the_new_classifier_from_the_auxiliary_one(self, step_1):
        trainer = step_1(ac=1.0)
        new, auxiliary = trainer.model.cls[2], trainer.model.cls[0]
        assert torch.equal(new.weight, auxiliary.weight) and torch.equal(new.bias, auxiliary.bias)
        plain = step_1()
        assert not torch.equal(plain.model.cls[2].weight, plain.model.cls[0].weight)

    def test_with_prev_checkpoint_no_finished_step_is_needed(self, voc_root, tmp_path, step_0, command):
        flags = train_flags(
            voc_root, tmp_path, task_name=SHUFFLED, task_step=1, epochs=1, prev_checkpoint=step_0
        )
        ended = command("train_voc.py", *flags, "--freeze_bn", "--mem_size", 9)
        assert ended.returncode == 0, ended.stderr
        final = final_checkpoint(settings(voc_root, tmp_path).step_dir())
        assert read_checkpoint(final)["arch"]["classes"] == [15, 1]

    @pytest.mark.parametrize("unfinished", [False, True])
    def test_without_a_finished_step_before_it_says_what_to_do(
        self, voc_root, tmp_path, command, unfinished, step_0
    ):
        folder = settings(voc_root, tmp_path, 0).step_dir()
        if unfinished:
            folder.mkdir(parents=True)
            (folder / "checkpoint-epoch1.pth").write_bytes(step_0.read_bytes())
        flags = train_flags(voc_root, tmp_path, task_name=SHUFFLED, task_step=1)
        line = error_line(command("train_voc.py", *flags))
        assert f"step 0 is not finished in {folder}" in line
        assert "--task_step 0" in line and "--prev_checkpoint" in line

    @pytest.mark.parametrize("kind", ["eir", "dkd", "ac"])
    def test_a_foreign_background_classifier_is_a_warning(
        self, voc_root, tmp_path, step_0, warnings, kind
    ):
        content = read_checkpoint(step_0)
        if kind == "dkd":
            content = {"state_dict": content["state_dict"], "epoch": 60}
        if kind == "ac":
            content["ac"] = 1.0
        torch.save(content, tmp_path / "previous.pth")
        config = settings(voc_root, tmp_path)
        IncrementalStep(config, StepData(config), None, tmp_path / "previous.pth")
        named = [text for text in warnings if "auxiliary classifier (DKD)" in text]
        assert len(named) == (kind != "eir")
        assert all(str(tmp_path / "previous.pth") in text for text in named)

    def test_a_model_of_another_class_order_is_refused(self, voc_root, tmp_path, step_0):
        config = settings(voc_root, tmp_path, task_name="15-1")
        with pytest.raises(UserError, match="or in another order"):
            IncrementalStep(config, StepData(config), None, step_0)

    def test_a_model_of_other_classes_is_refused(self, voc_root, tmp_path, step_0):
        config = settings(voc_root, tmp_path, task_name="10-1")
        with pytest.raises(UserError, match=r"learned other classes than 10-1 has there"):
            IncrementalStep(config, StepData(config), None, step_0)


LOSSES = [
    {},
    {"rskd_region": "new"},
    {"kd_mode": "unbiased", "pos_weight": 2.0, "mbce": 0.5, "kd": 1.5},
    {"kd_mode": "plain", "replay": "instance"},
    {"pseudo_labels": False, "paste_on_replay": False, "fill_in": "next"},
    {"pseudo_labels": False, "replay": "none"},
    {"kd_mode": "none", "lambda_min": 0.5, "accumulate": 2},
    {"pseudo_thresh": 0.92, "ignore_thresh": 0.8, "replay": "image"},
    {"pseudo_thresh": 0.92, "ignore_thresh": 0.8},
]


class TestLoss:
    @pytest.mark.parametrize("changes", LOSSES, ids=str)
    def test_loss_parts_and_gradients_equal_the_formula(self, step_1, float64, changes):
        trainer = step_1(**{"pseudo_thresh": 0.2, **changes})
        with torch.no_grad():
            trainer.teacher.cls[0].bias.fill_(-3.0)
            trainer.teacher.cls[1].weight.normal_(std=0.3)
        trainer.model.train()
        incremental_mode(trainer)
        batches = trainer.to_device(raw_batch(trainer))
        found = SimpleNamespace(loss=0.0, terms={"bce": 0.0, "kd": 0.0}, grad=None)
        for batch in batches:
            loss, terms = trainer.training_loss(batch)
            loss.backward()
            found.loss += loss.item()
            found.terms = {k: found.terms[k] + (v / batch.valid).item() for k, v in terms.items()}
        named = [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad]
        found.grad = {n: p.grad.clone() for n, p in named}
        trainer.model.zero_grad()

        (whole,) = whole_batch(trainer, raw_batch(trainer))
        expected = plain_loss(trainer, whole)
        (expected[0] + expected[1]).backward()
        values = [e.item() for e in expected]
        assert list(found.terms.values()) == pytest.approx(values, rel=1e-9, abs=1e-12)
        assert found.loss == pytest.approx(sum(e.item() for e in expected), rel=1e-9)
        for name, parameter in named:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            difference = (found.grad[name] - gradient).abs().max()
            assert difference <= 1e-9 * max(1, gradient.abs().max()), name

    def test_doubtful_background_counts_in_the_distillation_only(self, step_1, monkeypatch):
        trainer = step_1(replay="none")
        settings = trainer.config.hyperparameter
        incremental_mode(trainer)
        (batch,) = trainer.to_device(raw_batch(trainer))
        scores = torch.full((len(batch.images), 16, 4, 4), -5.0)
        scores[:, 3, :2] = 0.4  # a score of 0.6 in the upper half, 0.95 in a corner of the lower
        scores[:, 7, 2:, 2:] = 3.0
        monkeypatch.setattr(trainer, "teach", lambda images: scores)

        def loss_and_gradient(batch, ignore_thresh):
            settings.ignore_thresh = ignore_thresh
            trainer.model.zero_grad()
            loss, terms = trainer.training_loss(batch)
            loss.backward()
            assert loss.item() == pytest.approx(sum(terms.values()).item() / batch.valid.item())
            return terms["bce"].item(), terms["kd"].item(), trainer.model.cls[1].weight.grad.clone()

        full_size = best_old_scores(scores, batch.labels.shape[-2:])
        doubtful = (batch.labels == 0) & (full_size >= 0.5) & (full_size < 0.7)
        assert 0.1 < doubtful.float().mean() < 0.6
        bce, kd, _ = loss_and_gradient(batch, None)
        bce_without, kd_without, _ = loss_and_gradient(batch, 0.5)
        assert kd_without == kd and 0 < bce_without < bce
        # the same as void pixels, with the normaliser as it was
        void = replace(batch, labels=torch.where(doubtful, 255, batch.labels))
        bce_void, kd_void, _ = loss_and_gradient(void, None)
        assert bce_without == bce_void and kd_void < kd
        settings.kd = 0.0
        _, _, gradient = loss_and_gradient(batch, 0.5)
        _, _, gradient_void = loss_and_gradient(void, None)
        assert gradient.any() and torch.equal(gradient, gradient_void)

    def test_a_batch_of_void_alone_has_a_loss_of_zero(self, step_1):
        trainer = step_1()
        raw = raw_batch(trainer)
        raw["label"].fill_(255)
        (batch,) = trainer.to_device(raw)
        loss, terms = trainer.training_loss(batch)
        assert loss.item() == 0 and not any(terms.values())

    def test_a_whole_iteration_waits_for_nothing(self, step_1, monkeypatch):
        """From the batch on the device to the optimiser's step."""
        trainer = step_1()
        raw = raw_batch(trainer)
        batches = trainer.to_device(raw)
        monkeypatch.setattr(trainer, "to_device", lambda raw: batches)
        trainer.paste.views(0)  # at the start of an epoch, on the host
        trainer.model.train()
        incremental_mode(trainer)
        meter = Meter("", 1, trainer.device, shown=False)
        before = state(trainer.model)
        with no_waiting():
            trainer.train_iteration(raw, meter)
        assert not same_state(state(trainer.model), before)


def best_old_scores(teacher, size):
    """Best score of a foreground class at full size, [N, H, W]."""
    logits = torch.nn.functional.interpolate(teacher, size, mode="bilinear", align_corners=False)
    return logits[:, 1:].amax(dim=1).sigmoid()


def whole_batch(trainer, raw):
    """The batch in one piece."""
    trainer.config.trainer.accumulate = 1
    return trainer.to_device(raw)


def plain_loss(trainer, batch):
    """[mbce * L_bce, kd * L_distillation] of METHOD 5, with a graph to the model's parameters."""
    hyper, size = trainer.config.hyperparameter, batch.images.shape[-2:]
    labels = batch.labels
    if hyper.pseudo_labels:
        first = trainer.teacher(batch.images, upsample=False)
        labels = plain_pseudo_labels(labels, first, hyper.pseudo_thresh)
        assert (labels != batch.labels).any()
    images, classes = batch.images, torch.zeros(len(labels), 0, dtype=torch.int64)
    weights = torch.zeros(len(labels), 0, *size)
    soft = plain_soft_labels(labels, classes, weights, 17)
    if trainer.paste:
        paste, sample = trainer.paste, (batch.epoch, batch.indices)
        composite = paste(images, batch.labels, labels, *sample, batch.replayed)
        pasted = plain_paste(
            hyper.paste,
            size[0],
            trainer.dataset.memory,
            16,
            17,
            images,
            batch.labels,
            labels,
            paste.views(batch.epoch),
            paste.random_numbers(*sample),
            batch.replayed,
        )
        assert any(p.pastes for p in pasted)
        weights = composite.weights
        soft = plain_soft_labels(labels, composite.classes, weights, 17)
        for n, p in enumerate(pasted):
            assert (composite.images[n] - p.image).abs().max() < 1e-4
            assert ((soft[n] - p.soft) * (labels[n] != 255)).abs().max() < 1e-6
        images = composite.images

    if hyper.ignore_thresh is not None:
        before = labels
        labels = plain_ignore_doubtful(labels, first, hyper.ignore_thresh, weights)
        assert (labels != before).any()
    logits = trainer.model(images)
    valid = (batch.labels != 255).sum()
    assert 0 < valid < batch.labels.numel()
    bce = plain_bce(logits, soft, labels, hyper.pos_weight).sum() / valid
    if hyper.kd_mode == "none":
        return hyper.mbce * bce, torch.zeros(())
    covered = weights.sum(dim=1) > 0
    teacher = trainer.teacher(images).detach()
    arguments = logits, teacher, batch.labels, covered, hyper.kd_mode, hyper.rskd_region
    return hyper.mbce * bce, hyper.kd * plain_distillation(*arguments).sum() / valid


CHOICES = [
    {"replay": "none"},
    {"replay": "image"},
    {"replay": "instance"},
    {"replay": "eir"},
    {"mem_size": 0},
    {"kd_mode": "none"},
    {"kd_mode": "plain"},
    {"kd_mode": "unbiased"},
    {"kd_mode": "rskd"},
    {"rskd_region": "new"},
    {"kd": 0.0},
    {"pseudo_labels": False},
    {"ac": 1.0},
    {"ignore_thresh": 0.5},
    {"replay": "none", "kd_mode": "none", "pseudo_labels": False},
    {"class_combination": False, "position": False, "fusion": False},
    {"pastes": 1, "fill_in": "none", "max_upscale": 1.0, "paste_augment": "off"},
    {"accumulate": 3},
    {"bs": 1},
    {"task_setting": "disjoint"},
    {"task_setting": "sequential"},
]


class TestChoices:
    @pytest.mark.parametrize("changes", CHOICES, ids=str)
    def test_an_iteration_gives_a_finite_loss(self, step_1, changes):
        trainer = step_1(**changes)
        replay, size = changes.get("replay", "eir"), changes.get("mem_size", 9)
        stored = 9 if replay != "none" and size else 0
        assert len(trainer.dataset) == len(trainer.data.training()) + stored
        assert (trainer.paste is not None) == (replay == "eir" and bool(size))
        assert (trainer.folder / "memory").is_dir() == bool(stored)
        if stored:
            assert trainer.dataset.memory.instances == (replay != "image")
        before = state(trainer.model)
        values = one_iteration(trainer)
        assert np.isfinite(list(values.values())).all() and values["bce"] > 0
        distils = changes.get("kd_mode") != "none" and changes.get("kd") != 0
        assert (values["kd"] > 0) == distils
        assert not same_state(state(trainer.model), before)

    @pytest.mark.parametrize(
        ("changes", "on_input", "on_composite"),
        [
            ({}, 1, 1),
            ({"pseudo_labels": False}, 0, 1),
            ({"kd_mode": "none"}, 1, 0),
            ({"kd": 0.0}, 1, 0),
            ({"kd": 0.0, "pseudo_labels": False}, 0, 0),
            ({"replay": "instance"}, 1, 0),
            ({"replay": "none", "pseudo_labels": False}, 1, 0),
        ],
        ids=str,
    )
    def test_the_teacher_runs_when_it_is_needed(
        self, step_1, monkeypatch, changes, on_input, on_composite
    ):
        trainer = step_1(**changes)
        (batch,) = trainer.to_device(raw_batch(trainer))
        seen = []
        teach = trainer.teach
        monkeypatch.setattr(trainer, "teach", lambda images: seen.append(images) or teach(images))
        trainer.training_loss(batch)
        same = [images is batch.images for images in seen]
        assert (sum(same), len(same) - sum(same)) == (on_input, on_composite)

    def test_pseudo_labels_off_leaves_the_labels(self, step_1, monkeypatch):
        trainer = step_1(pseudo_labels=False)
        monkeypatch.setattr(incremental, "pseudo_labels", lambda *_: pytest.fail("used"))
        assert one_iteration(trainer)["bce"] > 0

    def test_replay_samples_are_marked_and_others_are_not(self, step_1):
        trainer = step_1(bs=1000)
        raw = raw_batch(trainer)
        assert raw["replayed"].sum() == 9 and torch.equal(raw["replayed"], raw["alone"])
        (batch,) = trainer.to_device(raw)
        alone = batch.replayed[:, None, None] & ((batch.labels == 0) | (batch.labels == 255))
        assert not batch.images.permute(0, 2, 3, 1)[alone].any()
        assert (batch.images[~batch.replayed] != 0).float().mean() > 0.99
        old = batch.labels[batch.replayed].unique().tolist()
        assert max(old) <= 15 and batch.labels[~batch.replayed].unique().tolist() == [0, 16, 255]


class TestLossThatIsNotFinite:
    def test_it_ends_the_run_and_touches_no_weight(self, step_1, monkeypatch):
        trainer = step_1()
        compose, calls, kept = trainer.compose, [], {}

        def broken(batch, labels):
            calls.append(1)
            composite = compose(batch, labels)
            if len(calls) == 2:
                kept.update(state(trainer.model))
                composite.images[0, 0, 5, 5] = float("nan")
            return composite

        monkeypatch.setattr(trainer, "compose", broken)
        assert len(trainer.batches) > 2
        ids = [trainer.dataset[key]["id"] for key in list(trainer.batches)[1]]
        before = snapshot(trainer.folder)
        with pytest.raises(UserError) as ended:
            trainer.fit()
        message = str(ended.value)
        assert "step 1, epoch 1/1, iteration 2 (bce nan, kd nan)" in message
        assert ", ".join(ids) in message
        assert len(calls) > 2
        assert same_state(state(trainer.model), kept)
        assert all(p.isfinite().all() for p in trainer.model.parameters())
        assert snapshot(trainer.folder) == before and not list(trainer.folder.glob("*.pth"))


class TestSameWeights:
    """Step 1 with all of EIR comes out the same from other workers and after interruptions."""

    @pytest.fixture(scope="class")
    @staticmethod
    def uninterrupted(voc_root, tmp_path_factory, step_0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(torch.cuda, "device_count", lambda: 0)
            config = settings(
                voc_root, tmp_path_factory.mktemp("whole"), epochs=3, trainer__save_period=1
            )
            run(config, prev_checkpoint=str(step_0))
        return config.step_dir()

    def compare(self, uninterrupted, config):
        name = "checkpoint-epoch3.pth"
        a, b = (read_checkpoint(folder / name) for folder in (uninterrupted, config.step_dir()))
        assert same_state(a["state_dict"], b["state_dict"])
        momenta = (c["optimizer"]["state"] for c in (a, b))
        for one, other in zip(*(m.values() for m in momenta), strict=True):
            assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])
        texts = [(f / "metrics.json").read_text() for f in (uninterrupted, config.step_dir())]
        assert texts[0] == texts[1]
        assert snapshot(uninterrupted / "memory") == snapshot(config.step_dir() / "memory")

    def test_with_two_workers(self, uninterrupted, voc_root, tmp_path, step_0):
        config = settings(voc_root, tmp_path, epochs=3, num_workers=2)
        run(config, prev_checkpoint=str(step_0))
        self.compare(uninterrupted, config)

    @pytest.mark.parametrize("after", [1, 2])
    def test_after_an_interruption(self, uninterrupted, voc_root, tmp_path, step_0, after):
        config = settings(voc_root, tmp_path, epochs=3)
        checkpoint = uninterrupted / f"checkpoint-epoch{after}.pth"
        run(config, resume=str(checkpoint), prev_checkpoint=str(step_0))
        self.compare(uninterrupted, config)

    def test_the_seed_matters(self, uninterrupted, voc_root, tmp_path, step_0):
        config = settings(voc_root, tmp_path, epochs=3, seed=2)
        run(config, prev_checkpoint=str(step_0))
        a, b = (
            read_checkpoint(folder / "checkpoint-epoch3.pth")["state_dict"]
            for folder in (uninterrupted, config.step_dir())
        )
        assert not same_state(a, b)


def test_overwriting_draws_the_memory_anew_and_a_refusal_loses_nothing(
    voc_root, tmp_path, step_0, command
):
    flags = train_flags(voc_root, tmp_path, task_name="15-1_b", task_step=1, epochs=1, mem_size=6)
    flags += ["--freeze_bn", "--prev_checkpoint", str(step_0)]
    assert command("train_voc.py", *flags).returncode == 0
    folder = tmp_path / "models" / "overlap_15-1_b_EIR" / "step_1"
    before = snapshot(folder)
    error_line(command("train_voc.py", *flags[:-1], tmp_path / "none.pth", "--overwrite"))
    error_line(command("train_voc.py", *flags, "--mem_size", "4", "--resume", "auto"))
    assert snapshot(folder) == before
    again = command("train_voc.py", *flags, "--mem_size", "4", "--overwrite")
    assert again.returncode == 0
    assert len(read_manifest(folder / "memory")["entries"]) == 4
