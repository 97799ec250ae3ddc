"""The paper's networks, by default for 32x32 images.

The factories for images take ``input_shape`` (C, H, W) and ``num_classes`` and return a module with the attribute
``input_shape``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from pnanalysis.torch_internals import BatchNormBase

CIFAR_SHAPE = (3, 32, 32)
TANH_WIDTH = 256
ALEXNET_WIDTH = RESNET_WIDTH = 64


class ImageNetwork(nn.Sequential):
    """Named layers in sequence, with the input shape they were built for."""

    def __init__(self, input_shape: Sequence[int], **layers: nn.Module) -> None:
        super().__init__()
        self.input_shape = tuple(input_shape)
        for name, layer in layers.items():
            self.add_module(name, layer)


def lenet5(input_shape: Sequence[int] = CIFAR_SHAPE, num_classes: int = 10) -> nn.Module:
    """LeNet-5 with ReLU and max-pooling (LeCun et al. 1998): 62,006 parameters on CIFAR-10, PyTorch's default init."""
    features = [nn.Conv2d(input_shape[0], 6, 5), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2)]
    flat = _flat_size(nn.Sequential(*features), input_shape)
    return ImageNetwork(
        input_shape,
        conv1=features[0],
        relu1=nn.ReLU(),
        pool1=features[1],
        conv2=features[2],
        relu2=nn.ReLU(),
        pool2=features[3],
        flatten=nn.Flatten(),
        fc1=nn.Linear(flat, 120),
        relu3=nn.ReLU(),
        fc2=nn.Linear(120, 84),
        relu4=nn.ReLU(),
        fc3=nn.Linear(84, num_classes),
    )


def alexnet(input_shape: Sequence[int] = CIFAR_SHAPE, num_classes: int = 10, width: int = ALEXNET_WIDTH) -> nn.Module:
    """AlexNet from torchvision, adapted to small images.

    The first convolution, 11x11 with stride 4, becomes 3x3 with stride 1. The adaptive pooling to 6x6, which would only
    repeat the 3x3 map that remains of 32x32, is removed, and the first fully connected layer fits that map. Its
    ``width`` channels are 64 in the paper; another number scales those of all hidden layers in proportion.
    """
    from torchvision import models  # slow to import

    network = models.alexnet(num_classes=num_classes)
    network.features[0] = nn.Conv2d(input_shape[0], ALEXNET_WIDTH, kernel_size=3, padding=1)
    network.avgpool = nn.Identity()
    if width != ALEXNET_WIDTH:
        _scale_alexnet(network, width)
    units = network.classifier[4].in_features
    network.classifier[1] = nn.Linear(_flat_size(network.features, input_shape), units)
    network.input_shape = tuple(input_shape)
    return network


def _scale_alexnet(network: Any, width: int) -> None:
    """Give the hidden layers another number of channels, in place."""
    before = network.features[0].in_channels
    for i, layer in enumerate(network.features):
        if isinstance(layer, nn.Conv2d):
            channels = max(layer.out_channels * width // ALEXNET_WIDTH, 1)
            shape: Any = (layer.kernel_size, layer.stride, layer.padding)
            network.features[i] = nn.Conv2d(before, channels, *shape)
            before = channels
    units = max(network.classifier[4].in_features * width // ALEXNET_WIDTH, 1)
    network.classifier[4] = nn.Linear(units, units)
    network.classifier[6] = nn.Linear(units, network.classifier[6].out_features)


def resnet18(input_shape: Sequence[int] = CIFAR_SHAPE, num_classes: int = 10, width: int = RESNET_WIDTH) -> nn.Module:
    """ResNet-18 from torchvision, adapted to small images (He et al. 2016, section 4.2).

    The first convolution, 7x7 with stride 2 and max-pooling, becomes 3x3 with stride 1 and no pooling. Its ``width``
    channels are doubled three times; 64 are those of the paper.
    """
    from torchvision import models

    network = models.resnet18(num_classes=num_classes) if width == RESNET_WIDTH else _scaled(width, num_classes)
    network.conv1 = nn.Conv2d(input_shape[0], width, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    network.input_shape = tuple(input_shape)
    return network


def _scaled(width: int, num_classes: int) -> nn.Module:
    """ResNet-18 with another number of channels, which torchvision has no option for."""
    from torchvision.models.resnet import BasicBlock, ResNet

    class Scaled(ResNet):
        def _make_layer(self, block: type, planes: int, *rest: Any, **options: Any) -> nn.Sequential:
            if planes == RESNET_WIDTH:
                self.inplanes = width
            return super()._make_layer(block, planes * width // RESNET_WIDTH, *rest, **options)

    network = Scaled(BasicBlock, [2, 2, 2, 2], num_classes)
    network.bn1 = nn.BatchNorm2d(width)
    network.fc = nn.Linear(8 * width, num_classes)
    return network


def tanh7(input_shape: Sequence[int] = CIFAR_SHAPE, num_classes: int = 10, width: int = TANH_WIDTH) -> nn.Module:
    """Seven fully connected layers: six tanh layers of ``width`` units and a linear output.

    Xavier (Glorot) uniform weights with gain 1 and zero biases, as in Glorot and Bengio (2010).
    """
    sizes = [prod(input_shape), *[width] * 6]
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for i, (before, after) in enumerate(pairwise(sizes), start=1):
        layers[f"fc{i}"] = nn.Linear(before, after)
        layers[f"tanh{i}"] = nn.Tanh()
    layers["fc7"] = nn.Linear(width, num_classes)
    network = ImageNetwork(input_shape, **layers)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return network


def relu32(width: int = 32) -> nn.Module:
    """The 1 -> 32 -> 32 -> 1 ReLU regression network, He normal weights and zero biases (He et al. 2015)."""
    layers = {
        "fc1": nn.Linear(1, width),
        "relu1": nn.ReLU(),
        "fc2": nn.Linear(width, width),
        "relu2": nn.ReLU(),
        "fc3": nn.Linear(width, 1),
    }
    network = ImageNetwork((1,), **layers)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return network


class Point(nn.Module):
    """A point (x, y) of a two-parameter surface, float64; its coordinates are the parameter ``w``."""

    input_shape = None

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.w


def point() -> nn.Module:
    """The point that moves on the two-well surface."""
    return Point()


def initialise_normal(model: nn.Module, std: float) -> None:
    """Draw all weights and biases from N(0, std^2), in place, except those of batch-norm layers."""
    for module in model.modules():
        if isinstance(module, BatchNormBase):
            continue
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=std)


def _flat_size(features: nn.Module, input_shape: Sequence[int]) -> int:
    """Length of the flattened output of convolutional features."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        output: Tensor = features.eval()(torch.zeros(1, *input_shape))
    features.train()
    return output.numel()
