"""Steps t >= 1: sequences, channels, the loss by its formula, choices, failures, same weights."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from data_loader.data_loaders import StepData
from data_loader.dataset import normalize
from data_loader.memory import read_manifest
from models.deeplabv3 import DeepLabV3, predict
from scripts.plain import (
    plain_bce,
    plain_distillation,
    plain_ignore_doubtful,
    plain_paste,
    plain_pseudo_labels,
    plain_soft_labels,
)
from tests.helpers import CLASS_NAMES, error_line, small_config, snapshot, train_flags
from tests.no_waiting import no_waiting
from tests.trainer.steps import assert_same_step, raw_batch, run, silent_meter, training_mode
from trainer import output
from trainer.base_step import BaseStep
from trainer.incremental import IncrementalStep
from trainer.output import has_results
from utils.checkpoint import (
    final_checkpoint,
    json_digest,
    read_checkpoint,
    save_checkpoint,
    write_atomically,
    write_json,
)
from utils.errors import UserError
from utils.logging import log

pytestmark = pytest.mark.usefixtures("cpu")

SHUFFLED = "15-1_b"
ORDER = (12, 9, 20, 7, 15, 8, 14, 16, 5, 19, 4, 1, 13, 2, 11, 17, 3, 6, 18, 10)
OLD, NEW = ORDER[:15], 17


def settings(root, save_dir, step=1, **changes):
    base = {"task_name": SHUFFLED, "task_step": step, "mem_size": 9, "epochs": 1, "freeze_bn": True}
    return small_config(root, save_dir, **{**base, **changes})


@pytest.fixture(autouse=True)
def quiet():
    """No handler of an earlier test, whose streams are closed by now."""
    log.handlers.clear()


@pytest.fixture(scope="module")
def step_0(voc_root, tmp_path_factory, module_cpu):
    """The final checkpoint of step 0 of the shuffled task, trained for an epoch."""
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


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def one_iteration(trainer):
    """Mean loss and its terms of one iteration, as they are reported."""
    training_mode(trainer)
    meter = silent_meter(trainer)
    trainer.train_iteration(raw_batch(trainer), meter)
    return meter.means()


def test_other_conditions_of_the_step_before_are_named(
    own_root, tmp_path, step_0, warnings, monkeypatch
):
    label = next(own_root.glob("SegmentationClassAug/2008_*.png"))
    Image.fromarray(np.zeros_like(np.array(Image.open(label)))).save(label)
    config = settings(own_root, tmp_path, crop_size=32, seed=2, bs=8, lr=0.5)
    trainer = IncrementalStep(config, StepData(config), None, step_0)
    trainer.prepare()
    assert output.other_conditions(trainer.before, trainer.made_from) == [
        "--seed 1, now 2",
        "--crop_size 64, now 32",
        "updates of 4 images, now 8",
        "another val list, or other labels",
    ]
    assert not output.other_conditions({}, trainer.made_from)  # a checkpoint of another program
    trainer.before["settings"]["method"] = "dkd"
    assert "--method dkd, now eir" in output.other_conditions(trainer.before, trainer.made_from)
    trainer.before["settings"]["data_loader.args.task.step"] = 1  # as if this were step 2
    assert "--lr 0.01, now 0.5" in output.other_conditions(trainer.before, trainer.made_from)
    trainer.before["settings"]["data_loader.args.task.step"] = 0
    monkeypatch.setattr(output, "finish", lambda trainer: None)
    trainer.fit()
    assert any(
        "other conditions: --method dkd, now eir; --seed 1, now 2; " in text for text in warnings
    )


def test_three_steps_one_class_each(voc_root, step_0, tmp_path):
    for step in (1, 2):
        config = settings(voc_root, step_0.parents[3], step)
        run(config)
        folder = config.step_dir()
        text = (config.step_dir(kind="log") / "log.txt").read_text()
        assert "other conditions" not in text  # learning by --freeze_bn and a memory is by design
        assert ("as at step 0" in text) == (step == 1)
        (record,) = (config.step_dir(kind="log") / "metrics.jsonl").read_text().splitlines()
        record = json.loads(record)
        assert all(np.isfinite(record[name]) for name in ("loss", "bce", "kd"))
        assert record["bce"] > 0 and record["kd"] > 0
        assert record["loss"] == pytest.approx(record["bce"] + record["kd"])
        checkpoint = read_checkpoint(folder / "checkpoint-epoch1.pth")
        assert checkpoint["arch"]["classes"] == [15] + [1] * step
        assert checkpoint["state_dict"][f"cls.{step + 1}.weight"].shape == (1, 256, 1, 1)
        metrics = json.loads((folder / "metrics.json").read_text())
        names = [CLASS_NAMES[c] for c in (0, *ORDER[: 15 + step])]
        assert list(metrics["Mean_Intersection_over_Union"]["by_class"]) == names
        memory = read_manifest(folder / "memory")
        assert memory["classes"] == list(ORDER[: 14 + step])
        assert len(memory["entries"]) == 9

    # step 2 pastes, and has pseudo labels of, the class of step 1 too; the memory that it draws from is
    # drawn again where it is gone
    folder = settings(voc_root, step_0.parents[3], 1).step_dir()
    before = snapshot(folder / "memory")
    shutil.rmtree(folder / "memory")
    config = settings(voc_root, tmp_path / "step_2", 2, mem_size=48, pseudo_labels="image", seed=3)
    trainer = IncrementalStep(config, StepData(config), None, final_checkpoint(folder))
    trainer.prepare()
    assert snapshot(folder / "memory") == before
    assert len(trainer.paste.bank.count) == 17 and trainer.paste.bank.count[16] > 0
    assert trainer.dataset.pseudo.table[ORDER[15]] == 16
    assert trainer.dataset.seed == trainer.paste.seed == 3

    # a memory that a later step needs is drawn again, the same one, or not at all
    data = StepData(settings(voc_root, tmp_path, 2))
    for gone in (folder / "memory", next(folder.glob("memory/*_label.png"))):
        (shutil.rmtree if gone.is_dir() else Path.unlink)(gone)
        output.mend_memory(data, folder)
        assert snapshot(folder / "memory") == before
    record = json.loads((folder / "made_from.json").read_text())
    (folder / "made_from.json").write_text(json.dumps({**record, "memory": "another one"}))
    with pytest.raises(UserError, match=r"cannot be drawn again .*\(--task_step 1 --overwrite\)"):
        output.mend_memory(data, folder)
    assert snapshot(folder / "memory") == before

    # step 0 is trained anew: what was made from its former model is stale
    runs = Path(shutil.copytree(step_0.parents[3], tmp_path / "copy"))
    before = settings(voc_root, runs, 0).step_dir() / step_0.name
    content = read_checkpoint(before)
    content["state_dict"]["cls.1.bias"] += 1
    save_checkpoint(before, content)
    (settings(voc_root, runs, 2).step_dir() / "metrics.json").unlink()
    for step, request in ((1, {}), (2, {"overwrite": True})):
        words = f"step_1 was trained from another model of step 0 than {before} is now"
        with pytest.raises(UserError, match=words):
            run(settings(voc_root, runs, step), **request)


def test_a_few_images_are_learned_in_a_shuffled_order(tmp_path):
    """Each VOC class comes out at its channel, the old ones after step 1 too."""
    root = coloured_squares(tmp_path / "squares", {9: "red", 19: "green", NEW: "blue"})
    changes = {"mem_size": 6, "trainer__verbosity": 0, "allow_val_in_train": True}
    config = settings(root, tmp_path, 0, epochs=20, lr=0.03, freeze_bn=False, **changes)
    base = BaseStep(config, StepData(config))
    for module in base.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1  # statistics that follow a run as short as this one
    base.prepare()
    base.fit()
    config = settings(root, tmp_path, 1, epochs=24, lr=0.005, **changes)
    run(config)
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
        assert trainer.teacher.classes == [15] and trainer.model.classes == [15, 1]
        assert same_state(state(trainer.teacher), before)
        assert same_state({k: v for k, v in state(trainer.model).items() if k in before}, before)
        images = torch.randn(2, 3, 64, 64)
        trainer.model.eval()
        assert torch.equal(trainer.model(images)[:, :16], trainer.teacher(images))
        assert trainer.model.cls[2].weight.abs().max() > 0

    @pytest.mark.parametrize("frozen", [True, False])
    def test_what_does_not_move(self, step_1, monkeypatch, warnings, frozen):
        """The teacher; dropout is off, and batch normalisation learns unless it is frozen."""
        monkeypatch.setattr(output, "finish", lambda trainer: None)
        trainer = step_1(freeze_bn=frozen)
        warning = "batch normalisation is trained in this step: from step 1 on the method freezes it"
        assert any(warning in text for text in warnings) != frozen
        assert any("the learning rate is 0.01, as at step 0" in text for text in warnings)
        teacher, student = state(trainer.teacher), state(trainer.model)
        kinds = {"norm": torch.nn.BatchNorm2d, "dropout": torch.nn.Dropout}
        modes = {"norm": set(), "dropout": set(), "teacher": set()}
        plain = trainer.training_loss

        def spy(batch):
            for name, kind in kinds.items():
                modes[name] |= {m.training for m in trainer.model.modules() if isinstance(m, kind)}
            modes["teacher"] |= {module.training for module in trainer.teacher.modules()}
            return plain(batch)

        monkeypatch.setattr(trainer, "training_loss", spy)
        trainer.fit()
        assert modes == {"norm": {not frozen}, "dropout": {False}, "teacher": {False}}
        assert same_state(state(trainer.teacher), teacher)
        assert not any(p.requires_grad for p in trainer.teacher.parameters())
        norms = {
            f"{name}.{key}"
            for name, module in trainer.model.named_modules()
            if isinstance(module, torch.nn.BatchNorm2d)
            for key in module.state_dict()
        }
        after = state(trainer.model)
        unmoved = norms if frozen else set()
        assert {key for key in after if torch.equal(student[key], after[key])} == unmoved

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

    @pytest.mark.parametrize("task", ["15-1", "10-1"])
    def test_a_model_of_other_classes_or_another_order_is_refused(
        self, voc_root, tmp_path, step_0, task
    ):
        config = settings(voc_root, tmp_path, task_name=task)
        words = f"learned other classes than {task} has there, or in another order"
        with pytest.raises(UserError, match=words):
            IncrementalStep(config, StepData(config), None, step_0)

    def test_a_model_of_other_names_or_another_backbone_is_refused(self, voc_root, tmp_path, step_0):
        content = read_checkpoint(step_0)
        config = settings(voc_root, tmp_path)
        for key, value, words in (
            (
                "arch",
                {**content["arch"], "backbone": "resnet18"},
                "has the backbone resnet18, not tiny",
            ),
            (
                "classes",
                {"ape": 12, "bee": 9},
                f"learned classes of other names than those of {SHUFFLED}",
            ),
        ):
            if key == "classes":
                made = content["made_from"]
                classes = {"data_loader.args.dataset.classes": value}
                key, value = "made_from", {**made, "settings": {**made["settings"], **classes}}
            save_checkpoint(tmp_path / "other.pth", {**content, key: value})
            with pytest.raises(UserError, match=words):
                IncrementalStep(config, StepData(config), None, tmp_path / "other.pth")


LOSSES = [
    {},
    {"rskd_region": "all"},
    {"kd_mode": "unbiased", "pos_weight": 2.0, "mbce": 0.5, "kd": 1.5},
    {"kd_mode": "plain", "replay": "instance"},
    {"pseudo_labels": "off", "paste_on_replay": "off", "fill_in": "next"},
    {"paste_on_replay": "only"},
    {"pseudo_labels": "off", "replay": "none"},
    {"kd_mode": "none", "lambda_min": 0.5, "accumulate": 2},
    {"pseudo_thresh": 0.92, "ignore_thresh": 0.8, "replay": "image"},
    {"pseudo_thresh": 0.92, "ignore_thresh": 0.8},
    {"pseudo_thresh": 0.92, "ignore_thresh": 0.8, "rskd_region": "all"},
]


class TestLoss:
    @pytest.mark.parametrize("changes", LOSSES, ids=str)
    def test_loss_parts_and_gradients_equal_the_formula(self, step_1, float64, changes):
        trainer = step_1(**{"pseudo_thresh": 0.2, **changes})
        with torch.no_grad():
            trainer.teacher.cls[0].bias.fill_(-3.0)
            trainer.teacher.cls[1].weight.normal_(std=0.3)
        training_mode(trainer)
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
        training_mode(trainer)
        meter = silent_meter(trainer)
        before = state(trainer.model)
        with no_waiting():
            trainer.train_iteration(raw, meter)
        assert not same_state(state(trainer.model), before)


def whole_batch(trainer, raw):
    """The batch in one piece."""
    trainer.config.trainer.accumulate = 1
    return trainer.to_device(raw)


def plain_loss(trainer, batch):
    """[mbce * L_bce, kd * L_distillation] of METHOD 5, with a graph to the model's parameters."""
    hyper, size = trainer.config.hyperparameter, batch.images.shape[-2:]
    labels = batch.labels
    if hyper.pseudo_labels == "crop":
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
    {"replay": "none", "kd_mode": "none", "pseudo_labels": "off"},
    {"replay": "image"},
    {"replay": "instance"},
    {"mem_size": 0},
    {"kd": 0.0},
    {"ac": 1.0},
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
        assert (trainer.folder / "memory.unfinished").is_dir() == bool(stored)
        if stored:
            assert trainer.dataset.memory.alone == (replay != "image")
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
            ({"pseudo_labels": "off"}, 0, 1),
            ({"kd_mode": "none"}, 1, 0),
            ({"kd": 0.0}, 1, 0),
            ({"kd": 0.0, "pseudo_labels": "off"}, 0, 0),
            ({"replay": "instance"}, 1, 0),
            ({"replay": "none", "pseudo_labels": "off"}, 1, 0),
            ({"pseudo_labels": "image"}, 0, 1),
            ({"pseudo_labels": "image", "kd_mode": "none"}, 0, 0),
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


class TestSameWeights:
    """Step 1 with all of EIR comes out the same from other workers and after interruptions."""

    @pytest.fixture(scope="class")
    @staticmethod
    def uninterrupted(voc_root, tmp_path_factory, step_0, module_cpu):
        folder = tmp_path_factory.mktemp("whole")
        config = settings(voc_root, folder, epochs=3, trainer__save_period=1)
        run(config, prev_checkpoint=str(step_0))
        return config.step_dir()

    @pytest.mark.parametrize(("after", "workers"), [(0, 2), (1, 0)])
    def test_resumed_run_equals_the_uninterrupted_one(
        self, uninterrupted, voc_root, tmp_path, step_0, after, workers
    ):
        config = settings(voc_root, tmp_path, epochs=3, num_workers=workers)
        resume = str(uninterrupted / f"checkpoint-epoch{after}.pth") if after else None
        run(config, resume=resume, prev_checkpoint=str(step_0))
        assert_same_step(uninterrupted, config.step_dir(), "checkpoint-epoch3.pth")
        assert snapshot(uninterrupted / "memory") == snapshot(config.step_dir() / "memory")


class TestOverwrite:
    @pytest.fixture(scope="class")
    @staticmethod
    def finished(voc_root, tmp_path_factory, step_0, module_cpu):
        """Folder of a finished step 1, to be read only."""
        config = settings(voc_root, tmp_path_factory.mktemp("finished"), mem_size=6)
        run(config, prev_checkpoint=str(step_0))
        return config.step_dir()

    @pytest.fixture
    def own_step(self, finished, voc_root, tmp_path):
        """A copy of it that a test may change."""
        folder = settings(voc_root, tmp_path).step_dir()
        return Path(shutil.copytree(finished, folder))

    @pytest.fixture
    def overwrite(self, voc_root, tmp_path, step_0, command):
        """Overwrite that step, with more flags."""

        def call(*more, **changes):
            changes = {"mem_size": 6, "prev_checkpoint": step_0, "epochs": 1, **changes}
            flags = train_flags(voc_root, tmp_path, task_name=SHUFFLED, task_step=1, **changes)
            return command("train_voc.py", *flags, "--overwrite", *more)

        return call

    def test_a_finished_step_that_started_from_another_model_is_not_that_run(
        self, own_step, voc_root, tmp_path, step_0
    ):
        config = settings(voc_root, tmp_path, mem_size=6)
        before = snapshot(own_step)
        run(config, prev_checkpoint=str(step_0))
        other = tmp_path / "other.pth"
        save_checkpoint(other, {**read_checkpoint(step_0), "epoch": 99})
        with pytest.raises(UserError, match=f"started from another model than {other}: choose another"):
            run(config, prev_checkpoint=str(other))
        assert snapshot(own_step) == before

    def test_a_step_may_start_from_the_best_model_of_the_step_before(self, voc_root, tmp_path, step_0):
        config = settings(voc_root, tmp_path, mem_size=6)
        before = config.step_dir(0)
        before.mkdir(parents=True)
        shutil.copy(step_0, before / "checkpoint-epoch1.pth")
        save_checkpoint(before / "model_best.pth", {**read_checkpoint(step_0), "epoch": 99})
        run(config, prev_checkpoint=str(before / "model_best.pth"))
        finished = snapshot(config.step_dir())
        run(config, prev_checkpoint=str(before / "model_best.pth"))
        assert snapshot(config.step_dir()) == finished

    @pytest.mark.parametrize("replay", ["eir", "none"])
    def test_what_a_killed_run_drew_is_not_taken_for_its_own(
        self, own_step, voc_root, tmp_path, step_0, replay
    ):
        """Killed before its first checkpoint: all that is left is the memory, of other data."""
        drawn = read_manifest(own_step / "memory")["sha256"]
        for path in own_step.iterdir():
            if path.is_file():
                path.unlink()
        manifest = json.loads((own_step / "memory" / "manifest.json").read_text())
        manifest["entries"] = manifest["entries"][:1]
        del manifest["sha256"]
        write_json(own_step / "memory" / "manifest.json", {**manifest, "sha256": json_digest(manifest)})
        config = settings(voc_root, tmp_path, mem_size=6, replay=replay)
        run(config, resume="auto", prev_checkpoint=str(step_0))
        if replay == "none":
            assert not (own_step / "memory").exists()
        else:
            assert read_manifest(own_step / "memory")["sha256"] == drawn

    def test_it_draws_the_memory_anew(self, own_step, overwrite):
        again = overwrite("--freeze_bn", mem_size=4)
        assert again.returncode == 0, again.stderr
        assert len(read_manifest(own_step / "memory")["entries"]) == 4

    def test_a_refusal_leaves_the_finished_step_as_it_was(self, own_step, overwrite, tmp_path, step_0):
        before = snapshot(own_step)
        damaged = tmp_path / "damaged" / "model.pth"
        (damaged.parent / "memory").mkdir(parents=True)
        damaged.write_bytes(step_0.read_bytes())
        for flags, changes, words in (
            ([], {"mem_size": 5, "bs": 1}, "cannot train on one image"),
            (["--freeze_bn"], {"prev_checkpoint": "nowhere.pth"}, "no checkpoint at nowhere.pth"),
            (["--freeze_bn"], {"prev_checkpoint": damaged}, "cannot read the memory in"),
            ([], {"mem_size": 5, "bs": 200, "accumulate": 100}, "cannot train on one image"),
        ):
            assert words in error_line(overwrite(*flags, **changes))
            assert snapshot(own_step) == before and has_results(own_step)


class TestPseudoLabelsOfWholeImages:
    """--pseudo_labels image: stored before the first epoch, by class ids, and cut with the crops."""

    @pytest.fixture
    def trainer(self, step_1):
        def make(**changes):
            trainer = step_1(pseudo_labels="image", pseudo_thresh=0.2, **changes)
            with torch.no_grad():  # a teacher that sees something
                trainer.teacher.cls[1].weight.normal_(std=0.3)
            shutil.rmtree(trainer.dataset.pseudo.folder)
            trainer.prepare()
            return trainer

        return make

    @pytest.mark.parametrize(
        "changes",
        [{"replay": "instance"}, {"replay": "image"}, {"replay": "instance", "surroundings": 1.0}],
    )
    def test_stored_labels_are_what_the_teacher_sees_in_the_whole_image(self, trainer, changes):
        """Whole: an image of the list, or what is stored of one, even where that is in the list too."""
        trainer = trainer(**changes)
        dataset = trainer.dataset
        folder = dataset.pseudo.folder
        entries = [] if dataset.memory.alone else dataset.memory.entries
        assert dataset.memory.alone == (changes == {"replay": "instance"})
        assert not entries or {*dataset.images.ids} & {entry.id for entry in entries}
        called = [*dataset.images.ids, *(f"memory/{entry.file}" for entry in entries)]
        names = {name: i for i, name in enumerate(called)}
        assert {f"{path.relative_to(folder).with_suffix('')}" for path in folder.rglob("*.png")} == {
            *names
        }
        for name, i in names.items():
            image, label, _ = dataset.load(i)
            height, width = label.shape
            small = F.resize(image, [trainer.config.data.train.args.transform_args.crop_size])
            logits = trainer.teacher(normalize(small[None]), upsample=False)
            empty = torch.zeros(1, height, width, dtype=torch.uint8)
            channels = plain_pseudo_labels(empty, logits, 0.2)[0].numpy()
            stored = np.array(Image.open(folder / f"{name}.png"))
            assert np.array_equal(stored, np.array([0, *OLD])[channels]) and channels.any()
            assert torch.equal(dataset.pseudo(name, label.shape), torch.from_numpy(channels))

    def test_crops_take_their_part_and_instances_none(self, trainer):
        dataset = trainer(replay="instance").dataset
        for i in range(len(dataset)):
            sample = dataset[0, i]
            if sample["replayed"]:
                assert not sample["pseudo"].any()
                continue
            # the same crop of the pseudo labels, had they been the labels
            _, label, name = dataset.load(i)
            swapped = dataset.pseudo(name, label.shape)
            dataset.pseudo, kept = lambda name, size, swapped=swapped: swapped, dataset.pseudo
            assert torch.equal(dataset[0, i]["pseudo"], sample["pseudo"])
            dataset.pseudo = kept
            with torch.random.fork_rng(devices=[]):
                generator = np.random.default_rng((dataset.seed, 0, i))
                torch.default_generator.manual_seed(int(generator.integers(2**62)))
                _, part = dataset.images.transform(swapped.expand(3, -1, -1), swapped)
            assert torch.equal(part, sample["pseudo"])

    def test_they_label_the_background_alone(self, trainer):
        trainer = trainer()
        (batch,) = trainer.to_device(raw_batch(trainer))
        labels, on_image = trainer.pseudo_label(batch)
        assert on_image is None
        given = batch.labels != 0
        assert torch.equal(labels[given], batch.labels[given])
        assert torch.equal(labels[~given], batch.pseudo[~given]) and batch.pseudo[~given].any()

    def test_what_is_there_stays_unless_it_was_made_from_something_else(self, trainer, monkeypatch):
        one = trainer()
        folder = one.dataset.pseudo.folder
        before = snapshot(folder)
        gone, *_ = sorted(folder.glob("*.png"))
        gone.unlink()  # as after a kill
        written = []
        monkeypatch.setattr(
            "trainer.pseudo_labels.write_atomically",
            lambda path, write: written.append(path) or write_atomically(path, write),
        )
        one.prepare()
        assert written == [gone] and snapshot(folder) == before
        made_from = json.loads((folder / "made_from.json").read_text())
        assert made_from["train"] == one.data.digest("train")
        assert made_from["memory"] == one.dataset.memory.digest
        for key in ("teacher", "train", "memory", "precision", "threshold", "shorter_side"):
            written.clear()
            (folder / "made_from.json").write_text(json.dumps({**made_from, key: "another"}))
            one.prepare()
            assert len(written) == len(before) - 1 and snapshot(folder) == before

    def test_a_label_of_another_size_is_refused(self, trainer):
        trainer = trainer()
        path = min(trainer.dataset.pseudo.folder.glob("*.png"))
        Image.fromarray(np.zeros((3, 4), dtype=np.uint8)).save(path)
        index = trainer.dataset.images.ids.index(path.stem)
        with pytest.raises(UserError, match="has not its image's size"):
            trainer.dataset[0, index]

    def test_a_run_is_the_same_with_workers(self, voc_root, tmp_path, step_0):
        """Through the program, with its files."""
        configs = [
            settings(voc_root, tmp_path / f"{n}", pseudo_labels="image", num_workers=n) for n in (0, 1)
        ]
        for config in configs:
            run(config, prev_checkpoint=str(step_0))
        folders = [config.step_dir() for config in configs]
        assert_same_step(*folders, final_checkpoint(folders[0]).name)

    def test_an_overwrite_that_is_refused_keeps_the_old_ones(
        self, voc_root, tmp_path, step_0, command, monkeypatch
    ):
        """Refused by its settings once they are made, and by a disk that is full halfway; one that is
        ended keeps what it has made, and the next one places it."""
        wanted = {"pseudo_labels": "image", "epochs": 1, "mem_size": 4, "task_name": SHUFFLED}

        def call(*more, **changes):
            changes = {**wanted, "task_step": 1, "prev_checkpoint": step_0, **changes}
            return command("train_voc.py", *train_flags(voc_root, tmp_path, **changes), *more)

        assert call().returncode == 0
        models, (made,) = (
            tmp_path / "models",
            tmp_path.glob("models/*/step_1/pseudo_labels/made_from.json"),
        )
        before, folder = snapshot(models), made.parent
        refused = call("--overwrite", pseudo_thresh=0.1, bs=200, accumulate=100)
        assert "cannot train on one image" in error_line(refused)
        assert snapshot(models) == before
        for error, words in (
            (UserError("the disk is full"), "full"),
            (KeyboardInterrupt(), "interrupted"),
        ):
            written = []

            def write(path, fill, error=error, written=written):
                written.append(path)
                if len(written) == 3:
                    raise error
                write_atomically(path, fill)

            with monkeypatch.context() as patch:
                patch.setattr("trainer.pseudo_labels.write_atomically", write)
                assert words in error_line(call("--overwrite", pseudo_thresh=0.1))
            half = folder.with_name("pseudo_labels.unfinished")
            assert half.is_dir() == (words == "interrupted")
            assert snapshot(folder) == {
                path.name: before[str(path.relative_to(models))] for path in folder.iterdir()
            }
        kept = snapshot(half)
        assert call("--overwrite", pseudo_thresh=0.1).returncode == 0
        assert kept.items() <= snapshot(folder).items() and not half.exists()
        assert json.loads(made.read_text())["threshold"] == 0.1


def test_another_crop_of_the_test_changes_no_training(step_1):
    test = "data_loader__args__test__args__transform_args__crop_size"
    trainer = step_1(pseudo_labels="image", **{test: 48})
    assert trainer.data.evaluation("test")[0][0]["image"].shape == (3, 48, 48)
    assert raw_batch(trainer)["image"].shape[2:] == (64, 64) and trainer.paste.crop_size == 64
    made_from = json.loads((trainer.dataset.pseudo.folder / "made_from.json").read_text())
    assert made_from["shorter_side"] == 64
