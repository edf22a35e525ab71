"""Feature networks at output stride 16, and their ImageNet weights.

torchvision's ResNets, any network of the optional package timm that can keep stride 16, and a small
one for tests.
"""

from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torchvision.models import ResNet50_Weights, ResNet101_Weights, resnet50, resnet101

from utils.checkpoint import check_weight, read_checkpoint
from utils.errors import UserError

RESNETS = {
    "resnet101": (resnet101, ResNet101_Weights.IMAGENET1K_V1),
    "resnet50": (resnet50, ResNet50_Weights.IMAGENET1K_V1),
}
TIMM = "timm/"  # such as timm/tf_efficientnet_lite0


class TimmBackbone(nn.Module):
    """The last stage of a timm network, dilated so that it stays at stride 16.

    channels: of its features. normalised: (mean, std) of the images that its weights were trained on.
    """

    def __init__(self, name: str):
        super().__init__()
        timm = _import_timm(name)
        try:
            self.model = timm.create_model(name.removeprefix(TIMM), output_stride=16, num_classes=0)
            self.model.prune_intermediate_layers(1, prune_norm=True, prune_head=True)
            last = self.model.feature_info[-1]
            if last["reduction"] != 16:
                raise ValueError(f"its features are at stride {last['reduction']}")
        except Exception as error:  # whatever a network of timm raises for what it does not have
            reason = str(error) or type(error).__name__
            raise UserError(
                f"timm makes no {name} with features at stride 16 ({reason}): choose a convolutional "
                "network with the argument output_stride, such as timm/tf_efficientnet_lite0"
            ) from None
        self.channels = last["num_chs"]
        pretrained = self.model.pretrained_cfg
        self.normalised = tuple(pretrained["mean"]), tuple(pretrained["std"])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.forward_intermediates(images, indices=1, intermediates_only=True)[-1]


def synchronise_bn(model: nn.Module) -> nn.Module:
    """The model with SyncBatchNorm in place of batch normalisation.

    timm's layers hold an activation too, which torch's own conversion would drop.
    """
    if any(isinstance(module, TimmBackbone) for module in model.modules()):
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(model)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def _import_timm(name):
    try:
        import timm
    except ImportError:
        raise UserError(f"the backbone {name} needs the package timm: pip install timm") from None
    return timm


def make_backbone(name: str) -> tuple[nn.Module, int]:
    """The feature network of that name, not pretrained, and its number of channels.

    Raises UserError for a name that is not known, or that timm cannot make at stride 16.
    """
    if name == "tiny":
        return _tiny(), 128
    if name.startswith(TIMM):
        net = TimmBackbone(name)
        return net, net.channels
    if name not in RESNETS:
        raise UserError(f"unknown backbone {name!r}: choose {', '.join(RESNETS)}, timm/NAME or tiny")
    # Without ImageNet weights, residual branches that start at zero keep the network stable until
    # its batch normalisation has seen enough data.
    net = RESNETS[name][0](replace_stride_with_dilation=[False, False, True], zero_init_residual=True)
    layers = OrderedDict(net.named_children())
    del layers["avgpool"], layers["fc"]
    return nn.Sequential(layers), 2048


def _tiny():
    """A small stride-16 network for tests and demonstrations on the CPU."""
    widths = (3, 24, 48, 96, 128)
    layers = [
        nn.Sequential(
            nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(b),
            nn.ReLU(),
            nn.Conv2d(b, b, 3, padding=1, bias=False),
            nn.BatchNorm2d(b),
            nn.ReLU(),
        )
        for a, b in pairwise(widths)
    ]
    return nn.Sequential(*layers)


def imagenet_weights(backbone: str, file: str | Path | None = None) -> dict[str, torch.Tensor]:
    """ImageNet weights of a backbone, without its classifier: from a file, or from the server of its
    library.

    A file holds the state_dict of the whole network, as torchvision or timm names it, alone or in a
    checkpoint.
    Raises UserError where there are none, the download fails, or the file does not fit.
    """
    if backbone == "tiny":
        raise UserError(
            f"there are no ImageNet weights for the backbone {backbone}: --backbone_weights none"
        )
    whole, classifier = _whole_network(backbone)
    state = read_checkpoint(file, "backbone weights")["state_dict"] if file else _download(backbone)
    state = {key: value for key, value in state.items() if key not in classifier}
    shapes = {key: shape for key, shape in whole.items() if key not in classifier}
    found = {key: getattr(value, "shape", ()) for key, value in state.items()}
    wrong = [key for key in {**shapes, **found} if shapes.get(key) != found.get(key)]
    # files written before BatchNorm counted its batches lack that key
    wrong = [key for key in wrong if not key.endswith("num_batches_tracked")]
    if wrong:
        raise UserError(f"{file} holds no weights of {backbone}: {wrong[0]} is missing or differs")
    for key, value in state.items():
        check_weight(key, value, file)
        if not value.is_floating_point() and not key.endswith("num_batches_tracked"):
            raise UserError(f"{file} holds {key} as {value.dtype}, which no weight of {backbone} is")
    counts = {key: torch.tensor(0) for key in shapes if key.endswith("num_batches_tracked")}
    state = {**counts, **state}
    if not backbone.startswith(TIMM):
        return state
    # what stands between the last stage and the classifier is no part of the backbone
    return {key: state[key.removeprefix("model.")] for key in TimmBackbone(backbone).state_dict()}


def _whole_network(backbone):
    """Shapes by key of the network with its classifier, and the keys of that classifier."""
    if backbone.startswith(TIMM):
        net = _import_timm(backbone).create_model(backbone.removeprefix(TIMM))
        named = net.pretrained_cfg["classifier"]
        heads = [named] if isinstance(named, str) else named
    else:
        with torch.device("meta"):
            net, heads = RESNETS[backbone][0](), ["fc"]
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    return shapes, {key for key in shapes if key.rpartition(".")[0] in heads}


def _download(backbone):
    """The state_dict of the whole network, trained on ImageNet."""
    try:
        if backbone.startswith(TIMM):
            source = "them from the Hugging Face hub"
            name = backbone.removeprefix(TIMM)
            return _import_timm(backbone).create_model(name, pretrained=True).state_dict()
        weights = RESNETS[backbone][1]
        source = weights.url
        return weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # of the network, of the hub, of a file that was cut
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"cannot download the ImageNet weights of {backbone} ({reason}): fetch {source} "
            "elsewhere and give it with --backbone_weights FILE, or --backbone_weights none"
        ) from None
