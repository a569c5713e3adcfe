"""DenseNet-40 for small images: every layer reads the outputs of all earlier ones of its block.

Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks", CVPR 2017,
arXiv:1608.06993; the plain variant, without bottlenecks and without compression at the transitions.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """Batch norm, ReLU, 3x3 convolution; ``growth`` new channels are appended to the input.

    Args:
        in_channels: channels of the input.
        growth: channels that are added.
    """

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.conv(self.relu(self.bn(x)))), 1)


class CIFARDenseNet(nn.Module):
    """Stem, three blocks of :class:`DenseLayer`, a transition (1x1 convolution, 2x2 average) between blocks.

    Args:
        depth: 3n + 4 layers, n per block; 40 in the paper.
        growth: channels that each layer adds.
        num_classes: outputs of the last layer.
        in_channels: channels of the images.

    Raises:
        ValueError: if ``depth`` is not 3n + 4.
    """

    def __init__(self, depth: int = 40, growth: int = 12, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 7 or (depth - 4) % 3:
            raise ValueError(f"depth must be 3n + 4 with n >= 1 (7, 10, 13, ..., 40, 100), got {depth}.")
        layers = (depth - 4) // 3
        width = 2 * growth
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.dense1, width = _dense_block(width, growth, layers)
        self.trans1 = _transition(width)
        self.dense2, width = _dense_block(width, growth, layers)
        self.trans2 = _transition(width)
        self.dense3, width = _dense_block(width, growth, layers)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``, 32x32 in the paper."""
        x = self.trans1(self.dense1(self.conv1(x)))
        x = self.dense3(self.trans2(self.dense2(x)))
        return self.linear(self.pool(self.relu(self.bn(x))).flatten(1))


def _dense_block(in_channels: int, growth: int, layers: int) -> tuple[nn.Sequential, int]:
    block = nn.Sequential(*(DenseLayer(in_channels + i * growth, growth) for i in range(layers)))
    return block, in_channels + layers * growth


def _transition(channels: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            bn=nn.BatchNorm2d(channels),
            relu=nn.ReLU(),
            conv=nn.Conv2d(channels, channels, 1, bias=False),
            pool=nn.AvgPool2d(2),
        )
    )


def densenet40(num_classes: int = 10, in_channels: int = 3, growth: int = 12) -> CIFARDenseNet:
    """40 layers: 1,059,298 parameters, 282.9 million MACs (32x32). Arguments: see :class:`CIFARDenseNet`."""
    return CIFARDenseNet(40, growth, num_classes, in_channels)
