"""Step 0 and the loop: the loss, the optimiser, resuming, accumulation, losses that are not finite."""

import json

import pytest
import torch

from configs.options import Config, TrainCall
from data_loader.data_loaders import StepData
from models.deeplabv3 import DeepLabV3
from tests.helpers import small_config, snapshot
from trainer import base, base_step, output
from trainer.base_step import BaseStep
from trainer.meter import Meter
from trainer.run import train
from trainer.setup import precision
from trainer.validation import Validation
from utils.checkpoint import final_checkpoint, read_checkpoint
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def run(config, **request) -> None:
    train(config, TrainCall(**request))


def assert_same(a, b, where="checkpoint"):
    """Equality to the last bit, of tensors and of all else."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}.{i}")
    else:
        assert a == b, where


def prepared(config):
    trainer = BaseStep(config, StepData(config))
    trainer.prepare()
    return trainer


def raw_batch(trainer, number=0):
    keys = list(trainer.batches)[number]
    return torch.utils.data.default_collate([trainer.dataset[key] for key in keys])


class TestLoss:
    @pytest.mark.parametrize("settings", [{}, {"pos_weight": 2.0, "mbce": 0.5, "ac": 0.3}])
    def test_loss_parts_and_gradients_equal_the_formula(self, voc_root, tmp_path, float64, settings):
        config = small_config(voc_root, tmp_path, freeze_bn=True, **settings)
        trainer = prepared(config)
        trainer.model.eval()
        (batch,) = trainer.to_device(raw_batch(trainer))
        loss, terms = trainer.training_loss(batch)
        loss.backward()
        found = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.model.zero_grad()

        weights = config.hyperparameter
        logits = trainer.model(batch.images)
        known = batch.labels != 255
        assert 0 < known.sum() < known.numel()
        target = torch.stack([batch.labels == c for c in range(6)], dim=1).double()
        factor = torch.full((6, 1, 1), weights.pos_weight)
        factor[0] = 1.0
        p = logits.sigmoid()
        bce = -(factor * target * p.log() + (1 - target) * (1 - p).log()).sum(dim=1)[known].mean()
        ac = -(1 - p[:, 0]).log()[known].mean()
        expected = weights.mbce * bce + weights.ac * ac
        expected.backward()

        assert abs(loss - expected) < 1e-9
        assert {name: (sums / batch.valid).item() for name, sums in terms.items()} == pytest.approx(
            {"bce": weights.mbce * bce.item(), "ac": weights.ac * ac.item()}, abs=1e-9
        )
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                assert (found[name] - parameter.grad).abs().max() < 1e-9, name

    def test_a_batch_of_void_alone_has_a_loss_of_zero(self, voc_root, tmp_path):
        trainer = prepared(small_config(voc_root, tmp_path))
        raw = raw_batch(trainer)
        raw["label"].fill_(255)
        (batch,) = trainer.to_device(raw)
        loss, _ = trainer.training_loss(batch)
        assert loss.item() == 0


class TestOptimiser:
    def test_learning_rates_and_weight_decay(self, voc_root, tmp_path):
        config = small_config(voc_root, tmp_path, lr=0.001)
        trainer = BaseStep(config, StepData(config))
        groups = trainer.optimizer.param_groups
        owner = {id(p): g for g in groups for p in g["params"]}
        for name, parameter in trainer.model.named_parameters():
            group = owner[id(parameter)]
            assert group["lr"] == pytest.approx(0.001 if name.startswith("backbone.") else 0.01)
            assert group["weight_decay"] == 1e-4
            assert group["momentum"] == 0.9 and group["nesterov"]

    def test_frozen_batch_normalisation_is_not_optimised_and_does_not_move(self, voc_root, tmp_path):
        config = small_config(voc_root, tmp_path, freeze_bn=True, epochs=1)
        trainer = BaseStep(config, StepData(config))
        norms = [m for m in trainer.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        frozen = {id(p) for m in norms for p in m.parameters()}
        optimised = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
        everything = {id(p) for p in trainer.model.parameters()}
        assert norms and not frozen & optimised and frozen | optimised == everything
        before = [t.clone() for m in norms for t in m.state_dict().values()]
        trainer.fit()
        assert all(map(torch.equal, before, [t for m in norms for t in m.state_dict().values()]))

    def test_first_iterations_equal_plain_sgd_with_the_poly_schedule(self, voc_root, tmp_path):
        trainer = prepared(small_config(voc_root, tmp_path, freeze_bn=True, epochs=3))
        total = 3 * len(trainer.batches)
        model = DeepLabV3([5], "tiny")
        model.load_state_dict(trainer.model.state_dict())
        model.eval()
        momentum = {}
        meter = Meter("", total, trainer.device, shown=False)
        trainer.model.eval()
        for i in range(3):
            raw = raw_batch(trainer, i)
            (batch,) = trainer.to_device(raw)
            trainer.train_iteration(raw, meter)

            logits = model(batch.images)
            known = (batch.labels != 255)[:, None]
            target = torch.stack([batch.labels == c for c in range(6)], dim=1).float()
            cost = torch.nn.functional.binary_cross_entropy_with_logits(
                logits, target, reduction="none"
            )
            model.zero_grad()
            ((cost * known).sum() / known.sum()).backward()
            decay = (1 - i / total) ** 0.9
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.BatchNorm2d):
                        continue
                    lr = decay * (0.01 if name.startswith("backbone.") else 0.1)
                    gradient = p.grad + 1e-4 * p
                    velocity = momentum[name] = 0.9 * momentum.get(name, 0) + gradient
                    p -= lr * (gradient + 0.9 * velocity)
        for name, p in trainer.model.named_parameters():
            assert torch.allclose(p, model.get_parameter(name), rtol=1e-4, atol=1e-5), name


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
        trainer.fit()
        BaseStep(config, StepData(config), trainer.folder / "last.pth")
        config.arch.args.backbone_weights = None
        config.arch.args.backbone_pretrained = False
        BaseStep(config, StepData(config))
        assert len(calls) == 1

    def test_the_seed_decides_the_starting_weights(self, voc_root, tmp_path):
        def start(seed):
            config = small_config(voc_root, tmp_path, seed=seed)
            return BaseStep(config, StepData(config)).model.state_dict()

        assert_same(start(1), start(1))
        assert not torch.equal(start(1)["cls.1.weight"], start(2)["cls.1.weight"])


class TestSameWeights:
    """The same run comes out of other workers, interruptions and micro-batches."""

    @pytest.fixture(scope="class")
    @staticmethod
    def reference(voc_root, tmp_path_factory):
        """Checkpoints after epochs 1 to 4 of an uninterrupted run, 0 workers, with dropout."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(torch.cuda, "device_count", lambda: 0)
            folder = tmp_path_factory.mktemp("reference")
            config = small_config(voc_root, folder, epochs=4, trainer__save_period=1)
            run(config)
        return config.step_dir()

    def compare(self, reference, config):
        final = "checkpoint-epoch4.pth"
        assert_same(read_checkpoint(reference / final), read_checkpoint(config.step_dir() / final))
        ours, theirs = (f / "metrics.json" for f in (config.step_dir(), reference))
        assert ours.read_text() == theirs.read_text()

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("after", [1, 3])
    def test_resumed_run_equals_the_uninterrupted_one(
        self, reference, voc_root, tmp_path, workers, after
    ):
        config = small_config(voc_root, tmp_path, epochs=4, num_workers=workers)
        run(config, resume=str(reference / f"checkpoint-epoch{after}.pth"))
        self.compare(reference, config)
        records = (config.step_dir(kind="log") / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(r)["epoch"] for r in records] == list(range(after + 1, 5))

    def test_workers_and_validation_change_nothing(self, reference, voc_root, tmp_path):
        config = small_config(voc_root, tmp_path, epochs=4, num_workers=2, trainer__validation_period=1)
        run(config)
        self.compare(reference, config)

    def test_every_epoch_is_recorded_with_its_losses(self, reference):
        log = reference.parents[2] / "log" / reference.parent.name / reference.name
        records = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
        assert [r["epoch"] for r in records] == [1, 2, 3, 4]
        assert all(r["loss"] == pytest.approx(r["bce"] + r["ac"]) for r in records)
        assert records[-1]["loss"] < records[0]["loss"]
        assert not any(key.startswith("val_") for r in records for key in r)

    def test_micro_batches_give_the_gradient_of_the_whole_batch(
        self, voc_root, tmp_path, float64, monkeypatch
    ):
        states = []
        for pieces in (1, 2, 3):
            config = small_config(
                voc_root, tmp_path / str(pieces), freeze_bn=True, accumulate=pieces, epochs=1
            )
            trainer = BaseStep(config, StepData(config))
            monkeypatch.setattr(output, "finish", lambda trainer: None)
            trainer.fit()
            states.append(trainer.model.state_dict())
        for key, value in states[0].items():
            for other in states[1:]:
                assert torch.allclose(value, other[key], rtol=1e-9, atol=1e-9), key


class TestCheckpoints:
    def test_a_finished_step_keeps_the_final_checkpoint_and_the_last(self, voc_root, tmp_path):
        config = small_config(voc_root, tmp_path)
        run(config)
        names = sorted(path.name for path in config.step_dir().iterdir())
        assert names == ["checkpoint-epoch2.pth", "config.json", "last.pth", "metrics.json"]
        final = read_checkpoint(config.step_dir() / "checkpoint-epoch2.pth")
        assert final["epoch"] == 2
        assert {"state_dict", "optimizer", "lr_scheduler", "scaler"} <= final.keys()

    def test_save_period_keeps_more(self, voc_root, tmp_path):
        config = small_config(voc_root, tmp_path, epochs=5, trainer__save_period=2)
        run(config)
        kept = sorted(path.name for path in config.step_dir().glob("checkpoint*"))
        assert kept == [f"checkpoint-epoch{e}.pth" for e in (2, 4, 5)]

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
        values = iter([10.0, 30.0, 20.0, 20.0, 99.0])
        real = base.evaluate

        def scripted(model, data, split, device):
            metrics = real(model, data, split, device)
            if split == "val":
                metrics["Mean_Intersection_over_Union"]["new"] = next(values)
            return metrics

        monkeypatch.setattr(base, "evaluate", scripted)
        config = small_config(
            voc_root,
            tmp_path,
            epochs=9,
            trainer__validation_period=1,
            trainer__monitor="max val_Mean_Intersection_over_Union_new",
            trainer__early_stop=2,
        )
        run(config)
        folder = config.step_dir()
        assert read_checkpoint(folder / "model_best.pth")["epoch"] == 2
        assert final_checkpoint(folder) == folder / "checkpoint-epoch4.pth"
        assert (folder / "metrics.json").is_file()

    def test_a_monitor_that_does_not_exist_is_refused_before_anything_is_written(
        self, voc_root, tmp_path
    ):
        config = small_config(voc_root, tmp_path, trainer__monitor="max val_accuracy")
        with pytest.raises(UserError, match=r"trainer\.monitor is 'max val_accuracy'; allowed"):
            run(config)
        assert not list(tmp_path.rglob("*.json"))


class TestBatchOfOne:
    @pytest.mark.parametrize(
        "changes", [{"bs": 1}, {"bs": 4, "accumulate": 4}, {"bs": 3, "accumulate": 2}]
    )
    def test_batch_normalisation_refuses_one_image(self, voc_root, tmp_path, changes):
        config = small_config(voc_root, tmp_path, **changes)
        with pytest.raises(UserError, match=r"cannot train on one image.*--freeze_bn"):
            BaseStep(config, StepData(config))

    def test_frozen_batch_normalisation_takes_one_image(self, voc_root, tmp_path):
        config = small_config(voc_root, tmp_path, bs=1, freeze_bn=True, epochs=1)
        trainer = BaseStep(config, StepData(config))
        trainer.fit()
        assert trainer.epoch == 1


class TestLossThatIsNotFinite:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_it_ends_the_run_and_touches_no_weight(
        self, voc_root, tmp_path, monkeypatch, bad, accumulate
    ):
        config = small_config(voc_root, tmp_path, epochs=3, accumulate=accumulate, bs=4)
        trainer = prepared(config)
        weights, good = {}, {}
        calls = []
        plain = trainer.training_loss
        iterations = len(trainer.batches)
        assert iterations > 3

        def loss(batch):
            calls.append(1)
            value, terms = plain(batch)
            if len(calls) == (iterations + 2) * accumulate + 1:
                good.update(snapshot(config.step_dir()))
                weights.update({n: p.clone() for n, p in trainer.model.named_parameters()})
                return value * bad, {**terms, "ac": terms["ac"] * bad}
            return value, terms

        monkeypatch.setattr(trainer, "training_loss", loss)
        trainer.batches.epoch = 1
        images = [trainer.dataset[key]["id"] for key in list(trainer.batches)[2]]
        with pytest.raises(UserError) as ended:
            trainer.fit()
        message = str(ended.value)
        assert "step 0, epoch 2/3, iteration 3 (bce " in message and ", ac nan)" in message
        assert all(image in message for image in images)
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter, weights[name]), name
        after = snapshot(config.step_dir())
        assert after == good
        assert read_checkpoint(config.step_dir() / "last.pth")["epoch"] == 1

    def test_weights_that_are_not_finite_are_not_saved(self, voc_root, tmp_path, monkeypatch):
        config = small_config(voc_root, tmp_path, epochs=2)
        trainer = BaseStep(config, StepData(config))
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
        assert read_checkpoint(config.step_dir() / "last.pth")["epoch"] == 1
        assert not (config.step_dir() / "checkpoint-epoch2.pth").exists()


class TestMixedPrecision:
    def gradient(self, config):
        trainer = prepared(config)
        torch.manual_seed(0)
        (batch,) = trainer.to_device(raw_batch(trainer))
        loss, _ = trainer.training_loss(batch)
        loss.backward()
        weight = trainer.model.cls[1].weight
        assert weight.dtype == weight.grad.dtype == torch.float32
        return trainer.amp_dtype, float(loss.detach()), weight.grad.flatten()

    def test_bf16_runs_on_the_cpu_where_it_is_asked_for(self, voc_root, tmp_path):
        exact = small_config(voc_root, tmp_path, freeze_bn=True)
        rounded = small_config(voc_root, tmp_path, freeze_bn=True, amp_dtype="bf16")
        kind, loss, gradient = self.gradient(exact)
        rounded_kind, rounded_loss, rounded_gradient = self.gradient(rounded)
        assert (kind, rounded_kind) == (torch.float32, torch.bfloat16)
        assert rounded_loss != loss
        assert rounded_loss == pytest.approx(loss, rel=0.02)
        assert torch.cosine_similarity(gradient, rounded_gradient, dim=0) > 0.98

    @pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
    def test_auto_takes_bf16_on_a_gpu_that_need_not_emulate_it(self, monkeypatch, native, dtype):
        supported = lambda including_emulation=True: native or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert precision(Config(), torch.device("cuda")) == dtype

    @pytest.mark.parametrize("changes", [{}, {"amp_dtype": "fp16"}, {"use_amp": False}])
    def test_else_the_cpu_computes_in_float32(self, voc_root, tmp_path, changes):
        config = small_config(voc_root, tmp_path, **changes)
        assert BaseStep(config, StepData(config)).amp_dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer__early_stop": 2}, "early_stop needs trainer.monitor"),
        ({"trainer__monitor": "max Pixel_Accuracy"}, "needs validations"),
        ({"trainer__monitor": "best"}, "allowed: off, or max or min"),
        (
            {
                "trainer__monitor": "max Pixel_Accuracy_Class",
                "trainer__validation_period": 1,
                "metrics": ["Pixel_Accuracy"],
            },
            "allowed: off, or max or min",
        ),
    ],
)
def test_a_monitor_that_could_never_work_is_refused(voc_root, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        Validation(small_config(voc_root, tmp_path, **changes))
