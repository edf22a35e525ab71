"""The network: the family's keys, its parts, prediction, ImageNet weights."""

import hashlib

import pytest
import torch
from torch.nn.functional import interpolate
from torchvision.models import resnet50

from models import DeepLabV3
from models.deeplabv3 import SampleDropout, freeze_bn, predict, seed_dropout, stop_dropout
from utils.errors import UserError

KEYS_SHA256 = "7a20d9bb0a1b1cdf202bcff93a9ae2e533fa8bc447b21d8c422c5759078f5e74"


def on_meta(classes, backbone):
    with torch.device("meta"):
        return DeepLabV3(classes, backbone)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return DeepLabV3([5, 3], "tiny")


class TestKeys:
    def test_keys_and_shapes_are_the_familys(self):
        state = on_meta([5, 3], "resnet101").state_dict()
        rows = sorted(f"{key} {tuple(value.shape)}" for key, value in state.items())
        assert hashlib.sha256("\n".join(rows).encode()).hexdigest() == KEYS_SHA256

    def test_unknown_backbone(self):
        with pytest.raises(UserError, match="resnet101, resnet50, timm"):
            DeepLabV3([5], "resnet18")


class TestForward:
    @pytest.mark.parametrize(("backbone", "channels"), [("tiny", 128), ("resnet50", 2048)])
    def test_logits_are_those_of_the_parts_put_together_by_hand(self, backbone, channels):
        torch.manual_seed(1)
        model = DeepLabV3([5, 3], backbone).eval()
        images = torch.randn(2, 3, 65, 80)
        with torch.no_grad():
            coarse, full = model(images, upsample=False), model(images)
            features = model.backbone(images)
            assert features.shape == (2, channels, 5, 5)
            assert coarse.shape == (2, 9, 5, 5)
            assert full.shape == (2, 9, 65, 80)
            branches = torch.cat([branch(features) for branch in model.aspp.convs], dim=1)
            head = model.aspp.last_conv(model.aspp.project(branches))
            by_hand = torch.cat([classifier(head) for classifier in model.cls], dim=1)
            wide = interpolate(by_hand, (65, 80), mode="bilinear", align_corners=False)
        assert torch.equal(coarse, by_hand)
        assert torch.equal(full, wide)

    def test_features_of_the_resnet_are_torchvisions(self):
        torch.manual_seed(1)
        model = DeepLabV3([5], "resnet50").eval()
        for name in ("layer1.0.bn3", "layer4.2.bn3"):  # zero_init_residual
            assert not model.backbone.get_submodule(name).weight.any()
        net = resnet50(replace_stride_with_dilation=[False, False, True]).eval()
        net.load_state_dict({**net.state_dict(), **model.backbone.state_dict()})
        images = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
            x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
            assert torch.equal(model.backbone(images), x)

    def test_rates_dropout_and_momentum(self):
        model = on_meta([5], "resnet101")
        rates = [m.dilation[0] for m in model.aspp.modules() if isinstance(m, torch.nn.Conv2d)]
        assert [r for r in rates if r > 1] == [6, 12, 18]
        assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == [0.1]
        norms = [m for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert norms and {m.momentum for m in norms} == {0.01}
        head = [m for m in model.aspp.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert {m.momentum for m in head} == {0.1}
        assert model.backbone.layer4[0].conv2.stride == (1, 1)
        assert model.backbone.layer4[1].conv2.dilation == (2, 2)

    def test_the_head_starts_kaiming_normal(self, tiny):
        for conv in [m for m in tiny.aspp.modules() if isinstance(m, torch.nn.Conv2d)]:
            fan_in = conv.weight[0].numel()
            assert conv.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)

    def test_the_background_classifier_does_not_shape_the_features(self, tiny):
        tiny.eval()
        images = torch.randn(2, 3, 64, 64)
        tiny(images)[:, 0].sum().backward()
        assert tiny.cls[0].weight.grad.abs().sum() > 0
        others = [p for n, p in tiny.named_parameters() if not n.startswith("cls.0")]
        assert all(p.grad is None or p.grad.abs().max() == 0 for p in others)
        tiny(images)[:, 1:].sum().backward()
        shaped = [*tiny.backbone.parameters(), *tiny.aspp.parameters()]
        assert all(p.grad is not None for p in shaped)


@pytest.mark.parametrize("score", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_prediction_is_the_best_foreground_class_above_the_score(score):
    g = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(2, 5, 9, 8, generator=g)
    logits[0, :, 0, 0] = torch.tensor([9.0, -1.0, -0.1, -3.0, -2.0])
    logits[0, :, 0, 1] = torch.tensor([9.0, 0.1, 0.2, -3.0, -2.0])
    logits[0, :, 0, 2] = torch.tensor([-9.0, 0.0, 0.0, -1.0, -1.0])
    found = predict(logits, score)
    scores = logits.sigmoid()
    for n, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(9), torch.arange(8)).tolist():
        foreground = scores[n, 1:, y, x].tolist()
        best = max(foreground)
        assert found[n, y, x] == (foreground.index(best) + 1 if best > score else 0)
    if score == 0.5:
        assert found[0, 0, :3].tolist() == [0, 2, 0] and torch.equal(found, predict(logits))


def test_the_dropout_of_an_image_follows_from_its_seed_alone():
    model = torch.nn.Sequential(SampleDropout(0.1))
    images = torch.rand(3, 8, 20, 20).add(1).to(memory_format=torch.channels_last)
    seed_dropout(model, [5, 6, 5])
    whole = model(images)
    assert torch.equal(whole, model(images))
    kept = whole != 0
    assert torch.allclose(whole[kept], images[kept] / 0.9) and 0.88 < kept.float().mean() < 0.92
    assert torch.equal(kept[0], kept[2]) and not torch.equal(kept[0], kept[1])
    seed_dropout(model, [6])
    assert torch.equal(model(images[1:2]), whole[1:2])
    assert torch.equal(model.eval()(images), images)


def test_freezing_stops_statistics_gradients_and_dropout(tiny):
    tiny.train()
    freeze_bn(tiny)
    images = torch.randn(2, 3, 64, 64)
    assert not torch.equal(tiny(images), tiny(images))
    stop_dropout(tiny)
    before = {k: v.clone() for k, v in tiny.state_dict().items() if "running" in k or "num_b" in k}
    assert torch.equal(tiny(images), tiny(images))
    after = tiny.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    frozen = [m for m in tiny.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(p.requires_grad for m in frozen for p in m.parameters())
    assert all(p.requires_grad for p in tiny.cls.parameters())


def test_classifiers_start_kaiming_normal():
    torch.manual_seed(0)
    for classifier in DeepLabV3([200, 300], "tiny").cls[1:]:
        assert classifier.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
