"""Wide ResNets for small images: few layers, many channels, activations in front of the convolutions.

Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016, arXiv:1605.07146.
"""

from __future__ import annotations

from torch import Tensor, nn


class WideBlock(nn.Module):
    """Batch norm, ReLU and 3x3 convolution, twice, and a shortcut around them.

    Args:
        in_channels: channels of the input.
        out_channels: channels of both convolutions.
        stride: of one of the convolutions and of the shortcut, a 1x1 convolution where width or stride change.
        biased: see :class:`CIFARWideResNet`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, biased: bool = False) -> None:
        super().__init__()
        first, second = (1, stride) if biased else (stride, 1)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=first, padding=1, bias=biased)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, stride=second, padding=1, bias=biased)
        self.shortcut: nn.Module = nn.Identity()
        projects = stride != 1 or in_channels != out_channels
        if projects:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=biased)
        self.activated_shortcut = projects and not biased

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        out = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return out + self.shortcut(activated if self.activated_shortcut else x)


class CIFARWideResNet(nn.Module):
    """WRN-``depth``-``width``: a 3x3 stem, three stages of (depth - 4) / 6 :class:`WideBlock`, one linear layer.

    Stages end with sums, ``layer1`` to ``layer3``, that no activation has seen; the last one's is ``relu``.

    Args:
        depth: 6n + 4, e.g. 16, 28, 40.
        width: channels of the stages, as a multiple of 16, 32 and 64.
        num_classes: outputs of the last layer.
        in_channels: channels of the images.
        variant: ``"original"`` has no biases, its stride at a block's first 3x3 convolution, and shortcuts that read
            the activated input. ``"biased"`` has biases everywhere, its stride at the second, which computes more, and
            shortcuts that read the input itself; FFSD counts this one (arXiv:2103.14473).

    Raises:
        ValueError: if ``depth``, ``width`` or ``variant`` are none of the above.
    """

    def __init__(
        self,
        depth: int = 16,
        width: int = 2,
        num_classes: int = 10,
        in_channels: int = 3,
        variant: str = "original",
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 with n >= 1 (10, 16, 22, 28, 40, ...), got {depth}.")
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}.")
        if variant not in ("original", "biased"):
            raise ValueError(f"variant must be 'original' or 'biased', got {variant!r}.")
        biased, blocks = variant == "biased", (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=biased)
        self.layer1 = _stage(16, 16 * width, blocks, 1, biased)
        self.layer2 = _stage(16 * width, 32 * width, blocks, 2, biased)
        self.layer3 = _stage(32 * width, 64 * width, blocks, 2, biased)
        self.bn = nn.BatchNorm2d(64 * width, momentum=0.9 if biased else 0.1)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``, 32x32 in the paper."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.linear(self.pool(self.relu(self.bn(x))).flatten(1))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int, biased: bool) -> nn.Sequential:
    rest = (WideBlock(out_channels, out_channels, 1, biased) for _ in range(blocks - 1))
    return nn.Sequential(WideBlock(in_channels, out_channels, stride, biased), *rest)


def wide_resnet16_2(num_classes: int = 10, in_channels: int = 3, variant: str = "original") -> CIFARWideResNet:
    """WRN-16-2: 691,674 parameters, 101.1 million MACs (32x32). Arguments: see :class:`CIFARWideResNet`."""
    return CIFARWideResNet(16, 2, num_classes, in_channels, variant)


def wide_resnet40_1(num_classes: int = 10, in_channels: int = 3, variant: str = "original") -> CIFARWideResNet:
    """WRN-40-1: 563,930 parameters, 83.3 million MACs (32x32). Arguments: see :class:`CIFARWideResNet`."""
    return CIFARWideResNet(40, 1, num_classes, in_channels, variant)


def wide_resnet40_2(num_classes: int = 10, in_channels: int = 3, variant: str = "original") -> CIFARWideResNet:
    """WRN-40-2: 2,243,546 parameters, 327.6 million MACs (32x32). Arguments: see :class:`CIFARWideResNet`."""
    return CIFARWideResNet(40, 2, num_classes, in_channels, variant)
