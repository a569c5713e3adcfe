"""Networks of the papers that no library ships, and one function that builds any network by name."""

from __future__ import annotations

from lightning_compress.networks.channel_shortcut import ChannelShortcut
from lightning_compress.networks.densenet_cifar import CIFARDenseNet, densenet40
from lightning_compress.networks.find import build, load_weights
from lightning_compress.networks.googlenet_cifar import CIFARGoogLeNet, googlenet_cifar
from lightning_compress.networks.lenet import LeNet5, lenet5
from lightning_compress.networks.mobilenet_v2_cifar import CIFARMobileNetV2, mobilenet_v2_cifar
from lightning_compress.networks.resnet_cifar import (
    CIFARResNet,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
)
from lightning_compress.networks.vgg_cifar import CIFARVGG, vgg16_cifar, vgg19_cifar

__all__ = [
    "CIFARVGG",
    "CIFARDenseNet",
    "CIFARGoogLeNet",
    "CIFARMobileNetV2",
    "CIFARResNet",
    "ChannelShortcut",
    "LeNet5",
    "build",
    "densenet40",
    "googlenet_cifar",
    "lenet5",
    "load_weights",
    "mobilenet_v2_cifar",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "vgg16_cifar",
    "vgg19_cifar",
]
