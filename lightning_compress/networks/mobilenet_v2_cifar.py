"""MobileNetV2 for small images, in two variants.

`mobilenet_v2_cifar` has three strides less, so that the last maps are 8x8, and shortcuts wherever the stride is 1.
`mobilenet_v2_half` has half the width and ends at 2x2; it is the small student of the papers on distillation.

Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018,
arXiv:1801.04381; the variant for CIFAR of Zhang et al., "Carrying out CNN Channel Pruning in a White Box", IEEE TNNLS
2023, arXiv:2104.11883. Its two parts use ReLU and ReLU6, and two strides, for one network; this is ReLU6 and stride 1.
The half one is that of Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

# Expansion, output channels, blocks; table 2 of the paper.
STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))


class InvertedResidual(nn.Module):
    """Expand with a 1x1 convolution, filter each channel, project with another 1x1; a shortcut where stride is 1.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        expansion: channels inside, as a multiple of ``in_channels``.
        stride: of the convolution in the middle.
        projection: whether there is a shortcut, a 1x1 convolution with batch norm, also where channels differ.
        activation: class of the two activations.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expansion: int,
        stride: int,
        projection: bool = True,
        activation: type[nn.Module] = nn.ReLU6,
    ) -> None:
        super().__init__()
        width = expansion * in_channels
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = activation()
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = activation()
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module | None = None
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif stride == 1 and projection:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out if self.shortcut is None else out + self.shortcut(x)


class CIFARMobileNetV2(nn.Module):
    """A 3x3 stem, 17 blocks of :class:`InvertedResidual`, a 1x1 convolution to 1280 channels, one linear layer.

    Args:
        num_classes: outputs of the last layer.
        in_channels: channels of the images.
        width: channels of stem and stages as a share of the paper's.
        strides: of the stem and of the first block of each of the seven stages.
        projection: see :class:`InvertedResidual`.
        relu6: whether activations stop at 6.

    Raises:
        ValueError: if ``width`` leaves a stage without channels, or ``strides`` are not eight.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        strides: Sequence[int] = (1, 1, 1, 1, 2, 1, 2, 1),
        projection: bool = True,
        relu6: bool = True,
    ) -> None:
        super().__init__()
        if int(16 * width) < 1:
            raise ValueError(f"width must be at least 1/16, got {width}.")
        if len(strides) != 8:
            raise ValueError(f"strides must name eight strides (stem and seven stages), got {tuple(strides)}.")
        activation = nn.ReLU6 if relu6 else nn.ReLU
        channels = int(32 * width)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=strides[0], padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = activation()
        blocks = []
        for (expansion, full, number), stride in zip(STAGES, strides[1:], strict=True):
            for index in range(number):
                out_channels = int(full * width)
                step = 1 if index else stride
                blocks.append(InvertedResidual(channels, out_channels, expansion, step, projection, activation))
                channels = out_channels
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(channels, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.relu2 = activation()
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


def mobilenet_v2_half(num_classes: int = 10, in_channels: int = 3) -> CIFARMobileNetV2:
    """Half the width, plain ReLU: 697,546 parameters, 6.4 million MACs (32x32).

    The last blocks with maps of 16, 8, 4 and 2 pixels are ``layers.2``, ``layers.5``, ``layers.12``, ``layers.16``.
    """
    return CIFARMobileNetV2(num_classes, in_channels, 0.5, (2, 1, 1, 2, 2, 1, 2, 1), projection=False, relu6=False)
