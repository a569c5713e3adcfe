"""ResNet-50 for small images: the bottleneck network of ImageNet behind a 3x3 stem, without the early max-pool.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385; the variant for CIFAR
that papers on distillation take as a teacher. Names of layers are those of the small ResNets of `resnet_cifar`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Bottleneck(nn.Module):
    """1x1 to a quarter of the width, 3x3, 1x1 back, each with batch norm, and a shortcut around them.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the 3x3 convolution and of the shortcut, a 1x1 convolution with batch norm where shapes change.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        width = out_channels // 4
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu3(out + self.shortcut(x))


class CIFARBottleneckResNet(nn.Module):
    """A 3x3 stem of 64 channels, four stages of :class:`Bottleneck` of 256 to 2048 channels, one linear layer.

    Args:
        blocks: in each of the four stages; ResNet-50's are the default.
        num_classes: outputs of the last layer.
        in_channels: channels of the images.

    Raises:
        ValueError: if ``blocks`` are not four numbers of at least 1.
    """

    def __init__(self, blocks: Sequence[int] = (3, 4, 6, 3), num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if len(blocks) != 4 or min(blocks) < 1:
            raise ValueError(f"blocks must be four numbers of at least 1, got {tuple(blocks)}.")
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = _stage(64, 256, blocks[0], 1)
        self.layer2 = _stage(256, 512, blocks[1], 2)
        self.layer3 = _stage(512, 1024, blocks[2], 2)
        self.layer4 = _stage(1024, 2048, blocks[3], 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(2048, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``, 32x32 in the papers."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(self.pool(x).flatten(1))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (Bottleneck(out_channels, out_channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(in_channels, out_channels, stride), *rest)


def resnet50_cifar(num_classes: int = 10, in_channels: int = 3) -> CIFARBottleneckResNet:
    """50 layers: 23,520,842 parameters, 1297.8 million MACs (32x32)."""
    return CIFARBottleneckResNet(num_classes=num_classes, in_channels=in_channels)
