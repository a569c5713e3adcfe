"""ResNets for small images: 6n+2 layers, three stages, about 0.27 to 1.7 million parameters.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385, section 4.2.
State-dict keys are those of the widely shared CIFAR-10 checkpoints (``conv1``, ``bn1``, ``layer1.0.conv1``,
..., ``linear``), so that these load without renaming.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_compress.networks.channel_shortcut import ChannelShortcut

# Stem and stages of the wide networks that the comparisons of distillation methods use.
X4 = (32, 64, 128, 256)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut around them.

    Args:
        in_channels: channels of the input.
        out_channels: channels of both convolutions.
        stride: stride of the first convolution and of the shortcut.
        shortcut: module that brings the input to the shape of the output.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))


class CIFARResNet(nn.Module):
    """ResNet of ``depth`` = 6n+2 layers: a 3x3 stem, three stages of n :class:`BasicBlock`, one linear layer.

    The first block of every stage holds a :class:`ChannelShortcut`, also where it changes nothing (stage 1),
    so that stem and stages can be pruned to different widths; the other shortcuts are identities.

    Args:
        depth: 6n + 2, e.g. 20, 32, 44, 56, 110.
        num_classes: outputs of the last layer.
        in_channels: channels of the images.
        widths: channels of the stem and of the three stages; the paper's are the default.
        shortcut: ``"pad"`` subsamples and pads with zero channels (option A, no parameters), ``"projection"``
            puts a 1x1 convolution with batch norm where stride or width change (option B).

    Raises:
        ValueError: if ``depth``, ``widths`` or ``shortcut`` are none of the above.
    """

    def __init__(
        self,
        depth: int = 20,
        num_classes: int = 10,
        in_channels: int = 3,
        widths: Sequence[int] = (16, 16, 32, 64),
        shortcut: str = "pad",
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 with n >= 1 (8, 14, 20, 32, 44, 56, 110, ...), got {depth}.")
        if len(widths) != 4:
            raise ValueError(f"widths must name four widths (stem and three stages), got {tuple(widths)}.")
        if shortcut not in ("pad", "projection"):
            raise ValueError(f"shortcut must be 'pad' or 'projection', got {shortcut!r}.")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = _stage(widths[0], widths[1], blocks, 1, shortcut)
        self.layer2 = _stage(widths[1], widths[2], blocks, 2, shortcut)
        self.layer3 = _stage(widths[2], widths[3], blocks, 2, shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``, 32x32 in the paper."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(x).flatten(1))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
    if shortcut == "pad":
        first: nn.Module = ChannelShortcut(in_channels, out_channels, stride)
    elif stride == 1 and in_channels == out_channels:
        first = nn.Identity()
    else:
        first = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
        )
    rest = (BasicBlock(out_channels, out_channels, 1, nn.Identity()) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(in_channels, out_channels, stride, first), *rest)


def resnet20(num_classes: int = 10, in_channels: int = 3, **kwargs) -> CIFARResNet:
    """20 layers: 269,722 parameters, 40.6 million MACs (32x32). ``kwargs``: see :class:`CIFARResNet`."""
    return CIFARResNet(20, num_classes, in_channels, **kwargs)


def resnet32(num_classes: int = 10, in_channels: int = 3, **kwargs) -> CIFARResNet:
    """32 layers: 464,154 parameters, 68.9 million MACs (32x32). ``kwargs``: see :class:`CIFARResNet`."""
    return CIFARResNet(32, num_classes, in_channels, **kwargs)


def resnet44(num_classes: int = 10, in_channels: int = 3, **kwargs) -> CIFARResNet:
    """44 layers: 658,586 parameters, 97.2 million MACs (32x32). ``kwargs``: see :class:`CIFARResNet`."""
    return CIFARResNet(44, num_classes, in_channels, **kwargs)


def resnet56(num_classes: int = 10, in_channels: int = 3, **kwargs) -> CIFARResNet:
    """56 layers: 853,018 parameters, 125.5 million MACs (32x32). ``kwargs``: see :class:`CIFARResNet`."""
    return CIFARResNet(56, num_classes, in_channels, **kwargs)


def resnet110(num_classes: int = 10, in_channels: int = 3, **kwargs) -> CIFARResNet:
    """110 layers: 1,727,962 parameters, 252.9 million MACs (32x32). ``kwargs``: see :class:`CIFARResNet`."""
    return CIFARResNet(110, num_classes, in_channels, **kwargs)


def resnet8x4(num_classes: int = 10, in_channels: int = 3) -> CIFARResNet:
    """8 layers, four times as wide, projections: 1,210,410 parameters, 177.0 million MACs (32x32)."""
    return CIFARResNet(8, num_classes, in_channels, widths=X4, shortcut="projection")


def resnet32x4(num_classes: int = 10, in_channels: int = 3) -> CIFARResNet:
    """32 layers, four times as wide, projections: 7,410,730 parameters, 1083.0 million MACs (32x32)."""
    return CIFARResNet(32, num_classes, in_channels, widths=X4, shortcut="projection")
