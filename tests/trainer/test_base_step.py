"""Step 0 and the loop: the loss, the optimiser, resuming, accumulation, losses that are not finite."""

import json

import pytest
import torch

from configs.options import Config
from data_loader.data_loaders import StepData
from models.deeplabv3 import DeepLabV3
from scripts.plain import plain_auxiliary, plain_bce
from tests.helpers import small_config, snapshot
from tests.trainer.steps import assert_same, assert_same_step, raw_batch, run, silent_meter
from trainer import base, base_step, output, setup
from trainer.base_step import BaseStep
from trainer.meter import Meter
from trainer.setup import precision
from trainer.validation import Validation
from utils.checkpoint import final_checkpoint, read_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.metrics import GROUPS, METRICS

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture
def step_0(voc_root, tmp_path):
    """Makes the trainer of step 0 with the changes that it is given."""

    def make(**changes):
        config = small_config(voc_root, tmp_path, **changes)
        trainer = BaseStep(config, StepData(config))
        trainer.prepare()
        return trainer

    return make


def metrics_of(**values):
    return {metric: {**dict.fromkeys(GROUPS, 0.0), **values} for metric in METRICS}


def one_hot(labels):
    return torch.stack([labels == c for c in range(6)], dim=1).to(torch.get_default_dtype())


class TestLossAndOptimiser:
    @pytest.mark.parametrize("settings", [{}, {"pos_weight": 2.0, "mbce": 0.5, "ac": 0.3}])
    def test_loss_terms_and_gradients_equal_the_formula(self, step_0, float64, settings):
        trainer = step_0(freeze_bn=True, **settings)
        trainer.model.eval()
        (batch,) = trainer.to_device(raw_batch(trainer))
        loss, terms = trainer.training_loss(batch)
        loss.backward()
        found = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.model.zero_grad()

        weights = trainer.config.hyperparameter
        logits, labels = trainer.model(batch.images), batch.labels
        valid = (labels != 255).sum()
        assert 0 < valid < labels.numel()
        bce = plain_bce(logits, one_hot(labels), labels, weights.pos_weight).sum() / valid
        ac = plain_auxiliary(logits, labels).sum() / valid
        expected = {"bce": weights.mbce * bce, "ac": weights.ac * ac}
        total = sum(expected.values())
        total.backward()
        assert abs(loss - total) < 1e-9
        assert {name: (value / valid).item() for name, value in terms.items()} == pytest.approx(
            {name: value.item() for name, value in expected.items()}, abs=1e-9
        )
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                assert (found[name] - parameter.grad).abs().max() < 1e-9, name

    @pytest.mark.parametrize("warmup", [0, 2])
    def test_first_iterations_equal_plain_sgd_with_the_poly_schedule(self, step_0, warmup):
        """Backbone at the learning rate, all else at ten times that; weight decay on everything.

        Warm-up of 2 iterations: a third and two thirds of what the schedule has, then all of it.
        """
        trainer = step_0(freeze_bn=True, epochs=3, warmup=warmup)
        total = 3 * len(trainer.batches)
        model = DeepLabV3([5], "tiny")
        model.load_state_dict(trainer.model.state_dict())
        model.eval()
        momentum = {}
        meter = silent_meter(trainer)
        trainer.model.eval()
        for i in range(3):
            raw = raw_batch(trainer, i)
            (batch,) = trainer.to_device(raw)
            trainer.train_iteration(raw, meter)

            model.zero_grad()
            cost = plain_bce(model(batch.images), one_hot(batch.labels), batch.labels)
            (cost.sum() / (batch.labels != 255).sum()).backward()
            decay = (1 - i / total) ** 0.9 * ([1 / 3, 2 / 3, 1][i] if warmup else 1)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.BatchNorm2d):
                        continue  # frozen
                    lr = decay * (0.01 if name.startswith("backbone.") else 0.1)
                    gradient = p.grad + 1e-4 * p
                    velocity = momentum[name] = 0.9 * momentum.get(name, 0) + gradient
                    p -= lr * (gradient + 0.9 * velocity)
        for name, p in trainer.model.named_parameters():
            assert torch.allclose(p, model.get_parameter(name), rtol=1e-4, atol=1e-5), name

    def test_momenta_are_there_before_the_first_step(self, step_0):
        optimizer = step_0().optimizer
        momenta = [
            optimizer.state[p]["momentum_buffer"] for g in optimizer.param_groups for p in g["params"]
        ]
        assert len(momenta) > 20 and not any(momentum.any() for momentum in momenta)

    def test_the_seed_decides_the_order_and_the_dropout_of_each_epoch_and_image(
        self, step_0, monkeypatch
    ):
        monkeypatch.setattr(output, "finish", lambda trainer: None)
        orders, masks = [], []
        for seed in (1, 2):
            keys = []
            monkeypatch.setattr(
                base, "seed_dropout", lambda model, seeds, keys=keys: keys.extend(seeds)
            )
            trainer = step_0(seed=seed, epochs=2)
            assert trainer.dataset.seed == seed
            orders.append(list(trainer.batches))
            trainer.fit()
            assert len({*keys}) == len(keys) == 2 * len(trainer.batches) * trainer.batches.total
            masks.append({*keys})
        assert orders[0] != orders[1] and not masks[0] & masks[1]

    def test_no_more_micro_batches_than_images(self, step_0, warnings):
        trainer = step_0(freeze_bn=True, bs=2, accumulate=4)
        assert "2 micro-batches instead of 4" in warnings[-1]
        assert [len(batch.images) for batch in trainer.to_device(raw_batch(trainer))] == [1, 1]

    def test_unsynchronised_batch_normalisation_sees_the_images_of_one_process(self, monkeypatch):
        monkeypatch.setattr(setup, "world_size", lambda: 2)
        assert setup.bn_images(Config(), [4, 3]) == 3
        with pytest.raises(UserError, match="cannot train on one image"):
            setup.check_batch_size(Config(), [2, 1])

    def test_a_warmup_as_long_as_the_training_is_a_warning(self, step_0, warnings):
        iterations = len(step_0(epochs=1).batches)
        step_0(epochs=1, warmup=iterations - 1)
        assert not [text for text in warnings if "warmup" in text]
        step_0(epochs=1, warmup=iterations)
        assert f"--warmup {iterations} is not shorter" in warnings[-1]

    def test_micro_batches_give_the_gradient_of_the_whole_batch(self, step_0, float64, monkeypatch):
        monkeypatch.setattr(output, "finish", lambda trainer: None)
        states = []
        for pieces in (1, 2, 3):
            trainer = step_0(freeze_bn=True, accumulate=pieces, epochs=1)
            trainer.fit()
            states.append(trainer.model.state_dict())
        for key, value in states[0].items():
            for other in states[1:]:
                assert torch.allclose(value, other[key], rtol=1e-9, atol=1e-9), key

    @pytest.mark.parametrize("pieces", [1, 2])
    def test_trained_batch_normalisation_sees_micro_batches(self, step_0, monkeypatch, pieces):
        monkeypatch.setattr(output, "finish", lambda trainer: None)
        trainer = step_0(accumulate=pieces, epochs=1)
        trainer.fit()
        seen = [b for n, b in trainer.model.named_buffers() if n.endswith("num_batches_tracked")]
        assert seen and {int(count) for count in seen} == {pieces * len(trainer.batches)}


class TestInitialisation:
    def test_imagenet_weights_enter_a_fresh_step_and_no_resumed_one(
        self, voc_root, tmp_path, monkeypatch
    ):
        calls = []
        marked = DeepLabV3([5], "tiny").backbone.state_dict()

        def weights(backbone, file):
            calls.append((backbone, file))
            return marked

        monkeypatch.setattr(base_step, "imagenet_weights", weights)
        config = small_config(voc_root, tmp_path, backbone_weights="some.pth", epochs=1)
        trainer = BaseStep(config, StepData(config))
        assert_same(dict(trainer.model.backbone.state_dict()), dict(marked))
        assert calls == [("tiny", "some.pth")]
        trainer.prepare()
        trainer.fit()
        BaseStep(config, StepData(config), trainer.folder / "last.pth")
        config.arch.args.backbone_weights = None
        config.arch.args.backbone_pretrained = False
        BaseStep(config, StepData(config))
        assert len(calls) == 1

    def test_weights_of_other_normalised_images_are_named(
        self, voc_root, tmp_path, monkeypatch, warnings
    ):
        own = DeepLabV3([5], "tiny").backbone.state_dict()
        monkeypatch.setattr(base_step, "imagenet_weights", lambda *_: own)
        config = small_config(voc_root, tmp_path, backbone_weights="some.pth")
        data = StepData(config)
        BaseStep(config, data)
        assert warnings == []
        other = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        monkeypatch.setattr(torch.nn.Sequential, "normalised", other, raising=False)
        BaseStep(config, data)
        assert "timm's weights of tiny were trained on images with mean (0.5, 0.5, 0.5)" in warnings[0]

    def test_the_seed_decides_the_starting_weights(self, step_0):
        first, again, other = (step_0(seed=seed).model.state_dict() for seed in (1, 1, 2))
        assert_same(first, again)
        assert not torch.equal(first["cls.1.weight"], other["cls.1.weight"])


class TestSameWeights:
    """The same run, with dropout, comes out of other workers and after interruptions."""

    @pytest.fixture(scope="class")
    @staticmethod
    def reference(voc_root, tmp_path_factory, module_cpu):
        """A step's folder with checkpoints after epochs 1 to 4 of an uninterrupted run, 0 workers.

        The learning rate still rises after the first epoch.
        """
        folder = tmp_path_factory.mktemp("reference")
        config = small_config(voc_root, folder, epochs=4, warmup=20, trainer__save_period=1)
        run(config)
        return config.step_dir()

    @pytest.mark.parametrize(("after", "workers"), [(1, 2), (3, 0)])
    def test_resumed_run_equals_the_uninterrupted_one(
        self, reference, voc_root, tmp_path, after, workers
    ):
        config = small_config(voc_root, tmp_path, epochs=4, warmup=20, num_workers=workers)
        run(config, resume=str(reference / f"checkpoint-epoch{after}.pth"))
        assert_same_step(reference, config.step_dir(), "checkpoint-epoch4.pth")
        records = (config.step_dir(kind="log") / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(r)["epoch"] for r in records] == list(range(after + 1, 5))

    def test_workers_and_validation_change_nothing(self, reference, voc_root, tmp_path):
        changes = {"num_workers": 2, "trainer__validation_period": 1}
        config = small_config(voc_root, tmp_path, epochs=4, warmup=20, **changes)
        run(config)
        assert_same_step(reference, config.step_dir(), "checkpoint-epoch4.pth")

    def test_every_epoch_is_recorded_with_its_losses(self, reference):
        log = reference.parents[2] / "log" / reference.parent.name / reference.name
        records = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
        assert [r["epoch"] for r in records] == [1, 2, 3, 4]
        assert all(r["loss"] == pytest.approx(r["bce"] + r["ac"]) for r in records)
        assert records[-1]["loss"] < records[0]["loss"]
        assert not any(key.startswith("val_") for r in records for key in r)


class TestCheckpoints:
    def test_a_finished_step_with_other_micro_batches_is_named(self, voc_root, tmp_path, capsys):
        """And not refused: a batch may be shared by other GPUs at the next step."""
        config = small_config(voc_root, tmp_path, epochs=1)
        run(config)
        run(config)
        assert "it was trained" not in capsys.readouterr().out
        config.trainer.accumulate = 2
        run(config)
        assert "trained with batch normalisation over 4 images, which" in capsys.readouterr().out
        config.trainer.accumulate, config.data.train.batch_size = 1, 2
        assert output.trained_otherwise(config, 1) != []
        assert output.trained_otherwise(config, 2) == []  # shared by GPUs that synchronise it

    def test_save_period_keeps_more(self, voc_root, tmp_path):
        config = small_config(voc_root, tmp_path, epochs=3, trainer__save_period=2)
        run(config)
        kept = {path.name: read_checkpoint(path) for path in config.step_dir().glob("checkpoint*")}
        assert sorted(kept) == ["checkpoint-epoch2.pth", "checkpoint-epoch3.pth"]
        final = kept["checkpoint-epoch3.pth"]
        assert final["epoch"] == 3 and final["order"] == [1, 2, 3, 4, 5]
        assert {"state_dict", "optimizer", "lr_scheduler", "scaler"} <= final.keys()

    def test_an_epoch_that_is_trained_again_has_one_record(self, voc_root, tmp_path):
        config = small_config(voc_root, tmp_path, epochs=3, trainer__save_period=1)
        run(config)
        (config.step_dir() / "metrics.json").unlink()
        run(config, resume=str(config.step_dir() / "checkpoint-epoch1.pth"))
        records = (config.step_dir(kind="log") / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(record)["epoch"] for record in records] == [1, 2, 3]

    def test_the_final_checkpoint_is_the_model_that_was_evaluated(self, voc_root, tmp_path):
        """Whatever numbered checkpoints a run that was gone back from has left."""
        config = small_config(voc_root, tmp_path)
        run(config)
        folder = config.step_dir()
        state = read_checkpoint(folder / "checkpoint-epoch2.pth")["state_dict"]
        (folder / "metrics.json").unlink()
        for epoch in (2, 7):
            (folder / f"checkpoint-epoch{epoch}.pth").write_bytes(b"stale")
        run(config, resume="auto")
        assert final_checkpoint(folder) == folder / "checkpoint-epoch2.pth"
        assert_same(read_checkpoint(folder / "checkpoint-epoch2.pth")["state_dict"], state)

    def test_best_model_and_early_stop_follow_the_monitored_value(
        self, voc_root, tmp_path, monkeypatch
    ):
        """Across an interruption after the third epoch."""
        values = [10.0, 30.0, 20.0, 20.0, 99.0]
        real = base.evaluate

        def scripted(model, data, split, device):
            metrics = real(model, data, split, device)
            if split == "val":
                metrics["Mean_Intersection_over_Union"]["new"] = values.pop(0)
                if len(values) == 1:
                    raise KeyboardInterrupt
            return metrics

        monkeypatch.setattr(base, "evaluate", scripted)
        monitored = {
            "trainer__validation_period": 1,
            "trainer__monitor": "max val_Mean_Intersection_over_Union_new",
            "trainer__early_stop": 2,
        }
        config = small_config(voc_root, tmp_path, epochs=9, **monitored)
        folder = config.step_dir()
        with pytest.raises(KeyboardInterrupt):
            run(config)
        assert read_checkpoint(folder / "last.pth")["epoch"] == 3
        values[:] = [20.0, 99.0, 99.0]
        run(config, resume="auto")
        assert read_checkpoint(folder / "model_best.pth")["epoch"] == 2
        assert final_checkpoint(folder) == folder / "checkpoint-epoch4.pth"
        assert (folder / "metrics.json").is_file()

    def test_monitors_of_the_least_and_of_what_step_0_does_not_have(self, voc_root, tmp_path):
        watched = {"trainer__validation_period": 1, "trainer__early_stop": 2}
        least = "min val_Mean_Intersection_over_Union"
        validation = Validation(small_config(voc_root, tmp_path, trainer__monitor=least, **watched))
        found = [validation.record(metrics_of(overall=value))[1] for value in (3.0, 2.0, 2.5, 1.0)]
        assert found == [True, True, False, True] and validation.best == 1.0
        new = "max val_Mean_Intersection_over_Union_new"
        validation = Validation(small_config(voc_root, tmp_path, trainer__monitor=new, **watched))
        found = [validation.record(metrics_of(new=value))[1] for value in (0.0, 2.0, 2.0, 2.0)]
        assert found == [True, True, False, False] and validation.stops()
        validation = Validation(small_config(voc_root, tmp_path, trainer__monitor=new, **watched))
        assert not any(validation.record(metrics_of(new=None))[1] for _ in range(5))
        assert not validation.stops()

    def test_every_third_epoch_is_validated(self, voc_root, tmp_path):
        validation = Validation(small_config(voc_root, tmp_path, trainer__validation_period=3))
        assert [epoch for epoch in range(1, 10) if validation.is_due(epoch)] == [3, 6, 9]

    @pytest.mark.parametrize(("reset", "best"), [(False, 42.0), (True, None)])
    def test_the_best_value_is_forgotten_on_resuming_if_that_is_asked_for(
        self, voc_root, tmp_path, reset, best
    ):
        config = small_config(voc_root, tmp_path, epochs=1)
        run(config)
        last = config.step_dir() / "last.pth"
        save_checkpoint(last, {**read_checkpoint(last), "best": 42.0})
        config.trainer.reset_best_mnt = reset
        trainer = BaseStep(config, StepData(config), resume=last)
        trainer.prepare()
        assert trainer.validation.best == best

    def test_a_training_state_that_does_not_fit_is_refused(self, voc_root, tmp_path):
        config = small_config(voc_root, tmp_path / "saved", epochs=1)
        run(config)
        last = config.step_dir() / "last.pth"
        other = small_config(voc_root, tmp_path / "other", epochs=1)

        def refusal(change):
            content = read_checkpoint(last)
            change(content)
            save_checkpoint(tmp_path / "changed.pth", content)
            with pytest.raises(UserError) as refused:
                run(other, resume=str(tmp_path / "changed.pth"))
            assert not list(other.step_dir().glob("*.pth"))
            return str(refused.value).partition("cannot be resumed from: ")[2]

        def momentum(content):
            content["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(2)

        def buffers(content):
            return [state["momentum_buffer"] for state in content["optimizer"]["state"].values()]

        cases = {
            "it is at epoch 2 already": lambda c: c.update(epoch=2),
            "its epoch is 'x'": lambda c: c.update(epoch="x"),
            "its schedule has 5 iterations, this run's ": lambda c: c["lr_scheduler"].update(
                total_iters=5
            ),
            "a momentum has another shape": momentum,
            "a momentum is not finite": lambda c: buffers(c)[3].fill_(float("nan")),
            "its schedule is at iteration 3": lambda c: c["lr_scheduler"].update(last_epoch=3),
            "its learning rate is 9.0": lambda c: c["optimizer"]["param_groups"][0].update(lr=9.0),
            "its best validation is 'x', 0 validations": lambda c: c.update(best="x"),
            "'optimizer'": lambda c: c.pop("optimizer"),
            "an update took 8 images over all processes": lambda c: c["made_from"].update(batch=8),
            "statistics over 2 images, now over 4": lambda c: c["made_from"].update(bn_batch=2),
            "the model of the step before has changed": lambda c: c["made_from"].update(previous="x"),
            "its memory has changed": lambda c: c["made_from"].update(memory="x"),
            "the training list or its labels": lambda c: c["made_from"].update(train="x"),
        }
        for words, change in cases.items():
            assert words in refusal(change), words


NO_VALIDATION = {"trainer__monitor": "max Pixel_Accuracy"}
NOT_VALIDATED = {"trainer__monitor": "max Pixel_Accuracy_Class", "metrics": ["Pixel_Accuracy"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bs": 1}, r"cannot train on one image.*--freeze_bn"),
        ({"bs": 4, "accumulate": 4}, r"cannot train on one image.*--freeze_bn"),
        ({"bs": 3, "accumulate": 2}, r"cannot train on one image.*--freeze_bn"),
        ({"trainer__early_stop": 2}, r"trainer\.early_stop needs trainer\.monitor"),
        (NO_VALIDATION, r"trainer\.monitor needs validations"),
        ({"trainer__monitor": "best"}, "allowed: off, or max or min and one of Pixel_Accuracy, "),
        ({"trainer__monitor": "max val_accuracy"}, r"trainer\.monitor is 'max val_accuracy'; allowed"),
        ({"trainer__validation_period": 1, **NOT_VALIDATED}, "one of Pixel_Accuracy, with _old"),
    ],
    ids=str,
)
def test_settings_that_could_never_work_are_refused_and_nothing_is_written(
    voc_root, tmp_path, changes, message
):
    with pytest.raises(UserError, match=message):
        run(small_config(voc_root, tmp_path, **changes))
    assert not list((tmp_path / "models").rglob("*"))


def test_frozen_batch_normalisation_takes_one_image(voc_root, tmp_path):
    config = small_config(voc_root, tmp_path, bs=1, freeze_bn=True, epochs=1)
    run(config)
    assert (config.step_dir() / "metrics.json").is_file()


class TestNotFinite:
    @pytest.mark.parametrize(("bad", "accumulate"), [(float("nan"), 1), (float("inf"), 2)])
    def test_a_loss_ends_the_run_and_touches_no_weight(self, step_0, monkeypatch, bad, accumulate):
        trainer = step_0(epochs=3, accumulate=accumulate)
        weights, good, calls = {}, {}, []
        plain, iterations = trainer.training_loss, len(trainer.batches)
        assert iterations > 3

        def loss(batch):
            calls.append(1)
            value, terms = plain(batch)
            if len(calls) == (iterations + 2) * accumulate + 1:
                good.update(snapshot(trainer.folder))
                weights.update({n: p.clone() for n, p in trainer.model.named_parameters()})
                return value * bad, {**terms, "ac": terms["ac"] * bad}
            return value, terms

        monkeypatch.setattr(trainer, "training_loss", loss)
        trainer.batches.epoch = 1
        images = [trainer.dataset[key]["id"] for key in list(trainer.batches)[2]]
        trainer.batches.epoch = 0
        with pytest.raises(UserError) as ended:
            trainer.fit()
        message = str(ended.value)
        assert (
            "not finite in step 0, epoch 2/3, iteration 3 (bce " in message and ", ac nan)" in message
        )
        assert all(image in message for image in images)
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter, weights[name]), name
        assert snapshot(trainer.folder) == good
        assert read_checkpoint(trainer.folder / "last.pth")["epoch"] == 1

    def test_weights_are_not_saved(self, step_0, monkeypatch):
        trainer = step_0(epochs=2)
        plain = trainer.train_epoch

        def epoch(loader):
            losses = plain(loader)
            if trainer.epoch == 1:
                with torch.no_grad():
                    trainer.model.cls[1].bias[0] = float("inf")
            return losses

        monkeypatch.setattr(trainer, "train_epoch", epoch)
        with pytest.raises(UserError, match="weights are not finite after epoch 2"):
            trainer.fit()
        assert read_checkpoint(trainer.folder / "last.pth")["epoch"] == 1
        assert not (trainer.folder / "checkpoint-epoch2.pth").exists()


class TestMixedPrecision:
    def gradient(self, trainer):
        torch.manual_seed(0)
        (batch,) = trainer.to_device(raw_batch(trainer))
        loss, _ = trainer.training_loss(batch)
        loss.backward()
        weight = trainer.model.cls[1].weight
        assert weight.dtype == weight.grad.dtype == torch.float32
        return loss.item(), weight.grad.flatten()

    def test_bf16_runs_on_the_cpu_where_it_is_asked_for(self, step_0):
        loss, gradient = self.gradient(step_0(freeze_bn=True))
        rounded_loss, rounded_gradient = self.gradient(step_0(freeze_bn=True, amp_dtype="bf16"))
        assert rounded_loss != loss
        assert rounded_loss == pytest.approx(loss, rel=0.02)
        assert torch.cosine_similarity(gradient, rounded_gradient, dim=0) > 0.98

    @pytest.mark.parametrize(
        ("changes", "device", "native", "dtype"),
        [
            ({}, "cuda", True, torch.bfloat16),
            ({}, "cuda", False, torch.float16),  # emulation does not count
            ({"amp_dtype": "fp16"}, "cuda", True, torch.float16),
            ({"use_amp": False}, "cuda", True, torch.float32),
            ({"amp_dtype": "bf16"}, "cpu", False, torch.bfloat16),
            ({}, "cpu", False, torch.float32),
            ({"amp_dtype": "fp16"}, "cpu", False, torch.float32),
            ({"amp_dtype": "bf16", "use_amp": False}, "cpu", False, torch.float32),
        ],
    )
    def test_the_type_by_settings_and_device(self, monkeypatch, changes, device, native, dtype):
        supported = lambda including_emulation=True: native or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert precision(Config(**changes), torch.device(device)) == dtype


def test_the_losses_of_an_epoch_are_means_over_its_iterations():
    meter = Meter("", 3, torch.device("cpu"), shown=False)
    for bce in (1.0, 2.0, 6.0):
        meter.record({"bce": torch.tensor(bce), "ac": torch.tensor(1.0)}, ["a", "b"])
    assert meter.read() == {"bce": 3.0, "ac": 1.0}
    assert meter.means() == {"loss": 4.0, "bce": 3.0, "ac": 1.0}
