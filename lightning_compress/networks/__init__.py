"""Networks of the papers that no library ships, and one function that builds any network by name."""

from __future__ import annotations

from lightning_compress.core.weights import load_weights
from lightning_compress.networks.binary_resnet import (
    BinaryResNet,
    binary_resnet18,
    binary_resnet18_cifar,
    binary_resnet20,
    binary_resnet34,
)
from lightning_compress.networks.channel_shortcut import ChannelShortcut
from lightning_compress.networks.densenet_cifar import CIFARDenseNet, densenet40
from lightning_compress.networks.digits_kernel import DigitsKernel
from lightning_compress.networks.edsr import EDSR, edsr_baseline, edsr_large
from lightning_compress.networks.find import build
from lightning_compress.networks.googlenet_cifar import CIFARGoogLeNet, googlenet_cifar
from lightning_compress.networks.lenet import LeNet5, lenet5
from lightning_compress.networks.mobilenet_v2_cifar import CIFARMobileNetV2, mobilenet_v2_cifar
from lightning_compress.networks.rdn import RDN, rdn_a, rdn_b
from lightning_compress.networks.resnet_cifar import (
    CIFARResNet,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
)
from lightning_compress.networks.vgg_cifar import CIFARVGG, vgg16_cifar, vgg19_cifar
from lightning_compress.networks.vgg_small import VGGSmall, vgg_small

__all__ = [
    "CIFARVGG",
    "EDSR",
    "RDN",
    "BinaryResNet",
    "CIFARDenseNet",
    "CIFARGoogLeNet",
    "CIFARMobileNetV2",
    "CIFARResNet",
    "ChannelShortcut",
    "DigitsKernel",
    "LeNet5",
    "VGGSmall",
    "binary_resnet18",
    "binary_resnet18_cifar",
    "binary_resnet20",
    "binary_resnet34",
    "build",
    "densenet40",
    "edsr_baseline",
    "edsr_large",
    "googlenet_cifar",
    "lenet5",
    "load_weights",
    "mobilenet_v2_cifar",
    "rdn_a",
    "rdn_b",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "vgg16_cifar",
    "vgg19_cifar",
    "vgg_small",
]
