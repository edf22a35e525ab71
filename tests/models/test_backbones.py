"""Feature networks: their ImageNet weights, and those of timm."""

import copy
import sys
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from data_loader.data_loaders import StepData
from data_loader.dataset import MEAN, STD
from models import DeepLabV3, backbones, deeplabv3
from models.backbones import imagenet_weights, make_backbone, synchronise_bn
from models.deeplabv3 import freeze_bn
from tests.helpers import small_config
from trainer import output
from trainer.base_step import BaseStep
from trainer.evaluate import evaluate
from utils.errors import UserError

LITE = "timm/tf_efficientnet_lite0"


class TestImagenetWeights:
    @pytest.fixture(scope="class")
    @staticmethod
    def file(tmp_path_factory):
        torch.manual_seed(4)
        path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
        torch.save(resnet50().state_dict(), path)
        return path

    @pytest.mark.parametrize("counted", [True, False])
    def test_from_a_file(self, file, tmp_path, counted):
        """Of today, or one from before batches were counted."""
        stored = torch.load(file)
        named = {k: v for k, v in stored.items() if counted or "num_batches" not in k}
        torch.save(named, tmp_path / "file.pth")
        model = DeepLabV3([5], "resnet50")
        model.backbone.load_state_dict(imagenet_weights("resnet50", tmp_path / "file.pth"))
        for key, value in model.backbone.state_dict().items():
            assert torch.equal(value, stored[key]), key

    def test_pretrained_model_starts_from_them(self, monkeypatch):
        torch.manual_seed(3)
        wanted = DeepLabV3([5], "tiny").backbone.state_dict()
        monkeypatch.setattr(deeplabv3, "imagenet_weights", lambda name: wanted)
        model = DeepLabV3([5], "tiny", pretrained=True)
        assert all(torch.equal(v, wanted[k]) for k, v in model.backbone.state_dict().items())

    def test_weights_of_another_network_are_refused(self, file):
        with pytest.raises(UserError, match="holds no weights of resnet101: layer"):
            imagenet_weights("resnet101", file)

    def test_a_training_checkpoint_of_several_gpus_is_taken(self, file, tmp_path):
        state = torch.load(file)
        named = {f"module._orig_mod.{key}": value for key, value in state.items()}
        torch.save({"state_dict": named, "epoch": 3}, tmp_path / "c.pth")
        weights = imagenet_weights("resnet50", tmp_path / "c.pth")
        assert weights.keys() == state.keys() - {"fc.weight", "fc.bias"}
        torch.save({**state, "epoch": 3}, tmp_path / "c.pth")
        with pytest.raises(UserError, match="has no state_dict"):
            imagenet_weights("resnet50", tmp_path / "c.pth")

    def test_missing_and_torn_files_are_refused(self, file, tmp_path):
        with pytest.raises(UserError, match="no backbone weights at"):
            imagenet_weights("resnet50", tmp_path / "nowhere.pth")
        (tmp_path / "torn.pth").write_bytes(file.read_bytes()[:1000])
        with pytest.raises(UserError, match="is damaged"):
            imagenet_weights("resnet50", tmp_path / "torn.pth")

    @pytest.mark.parametrize("error", [URLError("no route to host"), RuntimeError("invalid hash")])
    def test_a_failed_download_says_how_to_do_without(self, monkeypatch, error):
        def fail(*_, **__):
            raise error

        kind = type(backbones.RESNETS["resnet101"][1])
        monkeypatch.setattr(kind, "get_state_dict", fail)
        with pytest.raises(UserError) as refused:
            imagenet_weights("resnet101")
        message = str(refused.value)
        assert "--backbone_weights FILE" in message and "--backbone_weights none" in message
        assert "https://download.pytorch.org/models/resnet101" in message
        assert "\n" not in message

    def test_the_tiny_backbone_has_none(self):
        with pytest.raises(UserError, match="no ImageNet weights for the backbone tiny"):
            imagenet_weights("tiny")


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


def test_the_weights_of_resnets_are_those_that_the_method_names():
    assert {
        name: weights.url.rpartition("/")[2] for name, (_, weights) in backbones.RESNETS.items()
    } == {
        "resnet101": "resnet101-63fe2227.pth",
        "resnet50": "resnet50-0676ba61.pth",
    }


class TestTimm:
    @pytest.mark.parametrize(
        ("name", "channels"), [(LITE, 320), ("timm/resnet18", 512), ("timm/convnext_atto", 320)]
    )
    def test_features_at_stride_16(self, timm, name, channels):
        net, found = make_backbone(name)
        assert found == channels
        assert net.normalised == (((0.5,) * 3, (0.5,) * 3) if name == LITE else (MEAN, STD))
        assert net(torch.rand(2, 3, 64, 96)).shape == (2, channels, 4, 6)

    def test_the_features_are_those_of_the_dilated_network(self, timm):
        torch.manual_seed(0)
        net = make_backbone("timm/resnet18")[0].eval()
        whole = timm.create_model("resnet18", output_stride=16).eval()
        whole.load_state_dict(net.model.state_dict(), strict=False)
        images = torch.rand(1, 3, 64, 64)
        assert torch.equal(net(images), whole.forward_features(images))

    @pytest.mark.parametrize(
        "name", ["timm/nonsense", "timm/vit_tiny_patch16_224", "timm/vgg11", "timm/"]
    )
    def test_what_timm_cannot_make_is_refused_in_one_line(self, timm, name):
        with pytest.raises(
            UserError, match=f"timm makes no {name} with features at stride 16"
        ) as refused:
            make_backbone(name)
        assert "\n" not in str(refused.value)

    def test_without_the_package_the_line_names_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(UserError, match="needs the package timm: pip install timm"):
            make_backbone(LITE)

    def test_weights_of_a_file_reach_every_parameter(self, timm, tmp_path):
        torch.manual_seed(1)
        stored = timm.create_model("tf_efficientnet_lite0").state_dict()
        torch.save(stored, tmp_path / "lite0.pth")
        model = DeepLabV3([5], LITE)
        model.backbone.load_state_dict(imagenet_weights(LITE, tmp_path / "lite0.pth"))
        for key, value in model.backbone.state_dict().items():
            assert torch.equal(value, stored[key.removeprefix("model.")]), key

    def test_weights_of_another_network_are_refused(self, timm, tmp_path):
        torch.save(timm.create_model("tf_efficientnet_lite1").state_dict(), tmp_path / "lite1.pth")
        with pytest.raises(UserError, match=r"lite1\.pth holds no weights of timm"):
            imagenet_weights(LITE, tmp_path / "lite1.pth")

    def test_a_failed_download_says_how_to_do_without(self, timm, monkeypatch):
        made = timm.create_model

        def create(name, pretrained=False, **settings):
            if pretrained:
                raise RuntimeError("no route\nto the hub")
            return made(name, **settings)

        monkeypatch.setattr(timm, "create_model", create)
        with pytest.raises(UserError, match=r"no route to the hub.*--backbone_weights FILE"):
            imagenet_weights(LITE)

    def test_every_parameter_has_a_gradient_and_frozen_ones_have_none(self, timm):
        model = DeepLabV3([2], LITE)
        model.train()
        model(torch.rand(2, 3, 64, 64)).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        model.zero_grad()
        freeze_bn(model)
        before = copy.deepcopy(dict(model.named_buffers()))
        model(torch.rand(2, 3, 64, 64)).square().sum().backward()
        frozen = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert len(frozen) > 40
        assert all(m.weight.grad is None and m.bias.grad is None for m in frozen)
        assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())

    def test_synchronised_batch_normalisation_keeps_the_activations(self, timm):
        torch.manual_seed(2)
        model = DeepLabV3([2], LITE).eval()
        images = torch.rand(1, 3, 64, 64)
        wanted = model(images)
        synchronised = synchronise_bn(copy.deepcopy(model)).eval()
        assert any(isinstance(m, nn.SyncBatchNorm) for m in synchronised.modules())
        assert torch.equal(synchronised(images), wanted)

    def test_a_stored_step_evaluates_to_the_numbers_of_its_training(self, timm, voc_root, tmp_path):
        config = small_config(voc_root, tmp_path, backbone=LITE, epochs=1)
        trainer = BaseStep(config, StepData(config))
        trainer.prepare()
        trainer.fit()
        model, _ = output.read_model(trainer.folder / "checkpoint-epoch1.pth", trainer.data, LITE, 0)
        again = evaluate(model, trainer.data, "test", trainer.device)
        assert again == output.read_json_object(trainer.folder / "metrics.json")
