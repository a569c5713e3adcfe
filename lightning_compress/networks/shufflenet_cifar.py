"""ShuffleNets for small images: cheap 1x1 convolutions, and a shuffle of channels that mixes what they keep apart.

V1: Zhang, Zhou, Lin, Sun, "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices", CVPR
2018, arXiv:1707.01083, with three groups. V2: Ma, Zhang, Zheng, Sun, "ShuffleNet V2: Practical Guidelines for Efficient
CNN Architecture Design", ECCV 2018, arXiv:1807.11164. Both behind a 1x1 stem of stride 1 and without the early
max-pool, as papers on distillation take them for students on CIFAR.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

STEM, GROUPS = 24, 3
# Width and units of each stage.
STAGES_V1 = ((240, 4), (480, 8), (960, 4))
STAGES_V2 = ((116, 4), (232, 8), (464, 4))


class GroupedUnit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1, with a shortcut that is added, or at stride 2 appended.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; at stride 2 the averaged input is ``in_channels`` of them.
        stride: 1 or 2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        groups = 1 if in_channels == STEM else GROUPS  # so few channels stay together
        own = out_channels - in_channels if stride == 2 else out_channels
        inside = own // 4
        self.conv1 = nn.Conv2d(in_channels, inside, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inside)
        self.relu1 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(groups)
        self.conv2 = nn.Conv2d(inside, inside, 3, stride=stride, padding=1, groups=inside, bias=False)
        self.bn2 = nn.BatchNorm2d(inside)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inside, own, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(own)
        self.shortcut = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else nn.Identity()
        self.appends = stride == 2
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.shuffle(self.relu1(self.bn1(self.conv1(x))))
        out = self.relu2(self.bn2(self.conv2(out)))
        out, beside = self.bn3(self.conv3(out)), self.shortcut(x)
        return self.relu3(torch.cat((out, beside), 1) if self.appends else out + beside)


class SplitUnit(nn.Module):
    """Half of the channels stay as they are (at stride 2: all go two ways), the others are filtered; then a shuffle.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; equal at stride 1.
        stride: 1 or 2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.splits = stride == 1
        self.beside: nn.Module = nn.Identity()
        if not self.splits:
            self.beside = _filtered(in_channels, half, stride)
        self.reduce = _pointwise(half if self.splits else in_channels, half)
        self.branch = _filtered(half, half, stride)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, 1) if self.splits else (x, x)
        return self.shuffle(torch.cat((self.beside(one), self.branch(self.reduce(other))), 1))


class CIFARShuffleNet(nn.Module):
    """A 1x1 stem of 24 channels, three stages that halve the map, one linear layer.

    Args:
        version: 1 has :class:`GroupedUnit` of 240, 480, 960 channels, 2 has :class:`SplitUnit` of 116, 232, 464 and a
            1x1 convolution to 1024 behind them (its width 1.0).
        num_classes: outputs of the last layer.
        in_channels: channels of the images.

    Raises:
        ValueError: if ``version`` is neither 1 nor 2.
    """

    def __init__(self, version: int = 1, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if version not in (1, 2):
            raise ValueError(f"version must be 1 or 2, got {version}.")
        self.conv1 = nn.Conv2d(in_channels, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.relu = nn.ReLU()
        unit: type[nn.Module] = GroupedUnit if version == 1 else SplitUnit
        width, stages = STEM, []
        for out_channels, number in STAGES_V1 if version == 1 else STAGES_V2:
            rest = (unit(out_channels, out_channels, 1) for _ in range(number - 1))
            stages.append(nn.Sequential(unit(width, out_channels, 2), *rest))
            width = out_channels
        self.layer1, self.layer2, self.layer3 = stages
        self.last: nn.Module = nn.Identity()
        if version == 2:
            self.last, width = _pointwise(width, 1024), 1024
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``, 32x32 in the papers."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.last(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(self.pool(x).flatten(1))


def _pointwise(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), relu=nn.ReLU()))


def _filtered(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Depthwise 3x3 with batch norm, then 1x1 with batch norm and ReLU."""
    depthwise = nn.Conv2d(in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False)
    parts = OrderedDict(depthwise=depthwise, norm=nn.BatchNorm2d(in_channels))
    return nn.Sequential(OrderedDict(**parts, **dict(_pointwise(in_channels, out_channels).named_children())))


def shufflenet_v1(num_classes: int = 10, in_channels: int = 3) -> CIFARShuffleNet:
    """ShuffleNet 1x of three groups: 862,768 parameters, 38.6 million MACs (32x32)."""
    return CIFARShuffleNet(1, num_classes, in_channels)


def shufflenet_v2(num_classes: int = 10, in_channels: int = 3) -> CIFARShuffleNet:
    """ShuffleNet V2 1x: 1,263,278 parameters, 44.4 million MACs (32x32)."""
    return CIFARShuffleNet(2, num_classes, in_channels)
