"""GoogLeNet for small images: nine inception blocks behind one 3x3 convolution.

Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, arXiv:1409.4842; the variant of the pruning
papers: batch norm everywhere, two 3x3 convolutions for the 5x5 branch, no early pooling, no auxiliary heads.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class Inception(nn.Module):
    """Four branches side by side, concatenated in the order 1x1, 3x3, 5x5, pool.

    Args:
        in_channels: channels of the input.
        n1x1: channels of the 1x1 branch.
        reduce3x3: channels of the 1x1 convolution in front of the 3x3.
        n3x3: channels of the 3x3 branch.
        reduce5x5: channels of the 1x1 convolution in front of the two 3x3 that stand for a 5x5.
        n5x5: channels of both of these.
        pool: channels of the 1x1 convolution behind the 3x3 max-pool.
    """

    def __init__(
        self, in_channels: int, n1x1: int, reduce3x3: int, n3x3: int, reduce5x5: int, n5x5: int, pool: int
    ) -> None:
        super().__init__()
        self.branch1x1 = _named(out=_conv(in_channels, n1x1, 1))
        self.branch3x3 = _named(reduce=_conv(in_channels, reduce3x3, 1), out=_conv(reduce3x3, n3x3, 3))
        self.branch5x5 = _named(
            reduce=_conv(in_channels, reduce5x5, 1), mid=_conv(reduce5x5, n5x5, 3), out=_conv(n5x5, n5x5, 3)
        )
        self.branch_pool = _named(pool=nn.MaxPool2d(3, stride=1, padding=1), out=_conv(in_channels, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.branch1x1(x), self.branch3x3(x), self.branch5x5(x), self.branch_pool(x)), 1)


class CIFARGoogLeNet(nn.Module):
    """Stem of 192 channels, inceptions ``a3 b3 | a4 b4 c4 d4 e4 | a5 b5`` with max-pools between; linear.

    Args:
        num_classes: outputs of the last layer.
        in_channels: channels of the images.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = _conv(in_channels, 192, 3)
        self.a3 = Inception(192, 64, 96, 128, 16, 32, 32)
        self.b3 = Inception(256, 128, 128, 192, 32, 96, 64)
        self.pool1 = nn.MaxPool2d(3, stride=2, padding=1)
        self.a4 = Inception(480, 192, 96, 208, 16, 48, 64)
        self.b4 = Inception(512, 160, 112, 224, 24, 64, 64)
        self.c4 = Inception(512, 128, 128, 256, 24, 64, 64)
        self.d4 = Inception(512, 112, 144, 288, 32, 64, 64)
        self.e4 = Inception(528, 256, 160, 320, 32, 128, 128)
        self.pool2 = nn.MaxPool2d(3, stride=2, padding=1)
        self.a5 = Inception(832, 256, 160, 320, 32, 128, 128)
        self.b5 = Inception(832, 384, 192, 384, 48, 128, 128)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``, 32x32 in the papers."""
        x = self.pool1(self.b3(self.a3(self.stem(x))))
        x = self.pool2(self.e4(self.d4(self.c4(self.b4(self.a4(x))))))
        return self.linear(self.pool(self.b5(self.a5(x))).flatten(1))


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    return _named(
        conv=nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2),
        bn=nn.BatchNorm2d(out_channels),
        relu=nn.ReLU(),
    )


def googlenet_cifar(num_classes: int = 10, in_channels: int = 3) -> CIFARGoogLeNet:
    """6,166,250 parameters, 1521.8 million MACs (32x32). Arguments: see :class:`CIFARGoogLeNet`."""
    return CIFARGoogLeNet(num_classes, in_channels)
