"""Networks of torchvision and timm, as small as their options allow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.entry import DIFFERENCES, Batch, Entry, images


def resnet() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    network = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
    return narrowed(network)


def narrowed(network: nn.Module) -> nn.Module:
    """The stem and the first block alone."""
    network.layer2 = network.layer3 = network.layer4 = nn.Identity()
    network.fc = nn.Linear(64, 3)
    return network


def segmentation() -> nn.Module:
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": self.body(x)}

    return FCN(Backbone(), FCNHead(8, 3))


def pixels() -> list[Batch]:
    return [(torch.randn(n, 1, 8, 8), torch.randint(3, (n, 8, 8))) for n in (2, 1)]


def by_pixel(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs["out"], targets)


def mobilenet() -> nn.Module:
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    block = InvertedResidualConfig(16, 3, 16, 16, True, "HS", 2, 1, 1.0)
    return MobileNetV3([block], 16, num_classes=3)


def timm_network(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=3, **options)


def efficientnet() -> nn.Module:
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    blocks = decode_arch_def([["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r1_k3_s2_e2_c8_se0.25"]])
    return EfficientNet(blocks, num_classes=3, num_features=8, stem_size=8, act_layer=nn.SiLU)


def mobilenet_of_timm() -> nn.Module:
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.mobilenetv3 import MobileNetV3

    blocks = decode_arch_def([["ds_r1_k3_s1_e1_c8_se0.25_nre"], ["ir_r1_k3_s2_e2_c8_se0.25"]])
    return MobileNetV3(blocks, num_classes=3, num_features=8, stem_size=8, act_layer=nn.Hardswish)


VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2}
SWIN = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2)}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8)}
#: Hard sigmoids have no second derivative in torch.
HARD: dict[str, Any] = {"differences": True, "tolerance": DIFFERENCES}


def small(*sizes: int, width: int = 16) -> Callable[[], list[Batch]]:
    return images(*sizes, channels=3, width=width)


TORCHVISION, TIMM = "torchvision", "timm"

ENTRIES = [
    Entry(TORCHVISION, "ResNet", resnet, small(3, 2), slow=True),
    Entry(TORCHVISION, "FCN", segmentation, pixels, by_pixel, slow=True),
    Entry(TORCHVISION, "MobileNetV3", mobilenet, small(3, 2), slow=True, **HARD),
    Entry(TIMM, "ViT", partial(timm_network, "vit_tiny_patch16_224", **VIT), small(3, 2), packages=("timm",)),
    Entry(TIMM, "Swin", partial(timm_network, "swin_tiny_patch4_window7_224", **SWIN), small(3, 2), packages=("timm",)),
    Entry(
        TIMM, "ConvNeXt", partial(timm_network, "convnext_atto", **CONVNEXT), small(3, 2, width=32), packages=("timm",)
    ),
    Entry(TIMM, "EfficientNet", efficientnet, small(3, 2), packages=("timm",)),
    Entry(TIMM, "MobileNetV3 of timm", mobilenet_of_timm, small(3, 2), packages=("timm",), **HARD),
]
