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
from lightning_compress.networks.cheap import Shift, convert_to_cheap
from lightning_compress.networks.cheap_resnet import CheapResNet, cheap_resnet20, cheap_resnet56
from lightning_compress.networks.densenet_cifar import CIFARDenseNet, densenet40
from lightning_compress.networks.digits_kernel import DigitsKernel
from lightning_compress.networks.edge_drawing import EdgeDrawing
from lightning_compress.networks.edsr import EDSR, edsr_baseline, edsr_large
from lightning_compress.networks.find import build
from lightning_compress.networks.googlenet_cifar import CIFARGoogLeNet, googlenet_cifar
from lightning_compress.networks.lenet import LeNet5, lenet5
from lightning_compress.networks.mobilenet_v2_cifar import CIFARMobileNetV2, mobilenet_v2_cifar, mobilenet_v2_half
from lightning_compress.networks.patch_discriminator import PatchDiscriminator, PixelDiscriminator
from lightning_compress.networks.rdn import RDN, rdn_a, rdn_b
from lightning_compress.networks.reid_resnet import ReIDResNet, ReIDSmall, reid_resnet50, reid_small
from lightning_compress.networks.resnet50_cifar import CIFARBottleneckResNet, resnet50_cifar
from lightning_compress.networks.resnet_cifar import (
    CIFARResNet,
    resnet8x4,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet56,
    resnet110,
)
from lightning_compress.networks.resnet_generator import ResNetGenerator
from lightning_compress.networks.shufflenet_cifar import CIFARShuffleNet, shufflenet_v1, shufflenet_v2
from lightning_compress.networks.unet_generator import UNetGenerator
from lightning_compress.networks.vgg_cifar import CIFARVGG, vgg8_cifar, vgg13_cifar, vgg16_cifar, vgg19_cifar
from lightning_compress.networks.vgg_features import VGGFeatures
from lightning_compress.networks.vgg_small import VGGSmall, vgg_small
from lightning_compress.networks.wide_resnet import (
    CIFARWideResNet,
    wide_resnet16_2,
    wide_resnet40_1,
    wide_resnet40_2,
)

__all__ = [
    "CIFARVGG",
    "EDSR",
    "RDN",
    "BinaryResNet",
    "CIFARBottleneckResNet",
    "CIFARDenseNet",
    "CIFARGoogLeNet",
    "CIFARMobileNetV2",
    "CIFARResNet",
    "CIFARShuffleNet",
    "CIFARWideResNet",
    "ChannelShortcut",
    "CheapResNet",
    "DigitsKernel",
    "EdgeDrawing",
    "LeNet5",
    "PatchDiscriminator",
    "PixelDiscriminator",
    "ReIDResNet",
    "ReIDSmall",
    "ResNetGenerator",
    "Shift",
    "UNetGenerator",
    "VGGFeatures",
    "VGGSmall",
    "binary_resnet18",
    "binary_resnet18_cifar",
    "binary_resnet20",
    "binary_resnet34",
    "build",
    "cheap_resnet20",
    "cheap_resnet56",
    "convert_to_cheap",
    "densenet40",
    "edsr_baseline",
    "edsr_large",
    "googlenet_cifar",
    "lenet5",
    "load_weights",
    "mobilenet_v2_cifar",
    "mobilenet_v2_half",
    "rdn_a",
    "rdn_b",
    "reid_resnet50",
    "reid_small",
    "resnet8x4",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet44",
    "resnet50_cifar",
    "resnet56",
    "resnet110",
    "shufflenet_v1",
    "shufflenet_v2",
    "vgg8_cifar",
    "vgg13_cifar",
    "vgg16_cifar",
    "vgg19_cifar",
    "vgg_small",
    "wide_resnet16_2",
    "wide_resnet40_1",
    "wide_resnet40_2",
]
