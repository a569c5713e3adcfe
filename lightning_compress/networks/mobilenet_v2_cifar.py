"""MobileNetV2 for small images: three of the strides are 1, so that the last maps are 8x8.

Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018,
arXiv:1801.04381; the variant for CIFAR of Zhang et al., "Carrying out CNN Channel Pruning in a White Box", IEEE TNNLS
2023, arXiv:2104.11883. Its two parts use ReLU and ReLU6, and two strides, for one network; this is ReLU6 and stride 1.
"""

from __future__ import annotations

from torch import Tensor, nn

# Expansion, output channels, blocks, stride of the first block; table 2 of the paper, with other strides.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 1),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expand with a 1x1 convolution, filter each channel, project with another 1x1; a shortcut where stride is 1.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output. Where they differ, the shortcut is a 1x1 convolution with batch norm.
        expansion: channels inside, as a multiple of ``in_channels``.
        stride: of the convolution in the middle.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        width = expansion * in_channels
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU6()
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU6()
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module | None = None
        if stride == 1:
            self.shortcut = nn.Identity()
            if in_channels != out_channels:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
                )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out if self.shortcut is None else out + self.shortcut(x)


class CIFARMobileNetV2(nn.Module):
    """A 3x3 stem of stride 1, 17 blocks of :class:`InvertedResidual`, a 1x1 convolution, one linear layer.

    Args:
        num_classes: outputs of the last layer.
        in_channels: channels of the images.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        width = 32
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU6()
        blocks = []
        for expansion, out_channels, number, stride in STAGES:
            for index in range(number):
                blocks.append(InvertedResidual(width, out_channels, expansion, 1 if index else stride))
                width = out_channels
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(width, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.relu2 = nn.ReLU6()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``, 32x32 in the paper."""
        x = self.layers(self.relu1(self.bn1(self.conv1(x))))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.linear(self.pool(x).flatten(1))


def mobilenet_v2_cifar(num_classes: int = 10, in_channels: int = 3) -> CIFARMobileNetV2:
    """17 inverted residuals: 2,297,754 parameters, 304.1 million MACs (32x32)."""
    return CIFARMobileNetV2(num_classes, in_channels)
