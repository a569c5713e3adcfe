"""ResNets of cheap blocks for small images: 0.10 (shift) to 0.31 million parameters for 56 layers.

Xie et al., "Training convolutional neural networks with cheap convolutions and online distillation", 2019,
arXiv:1909.13063. The skeleton is that of `CIFARResNet`; the blocks are others: a ReLU before the sum and none behind
it, the stride in the last 1x1 convolution, and projections where the shape changes.

    x -> spatial -> 1x1 (P, Q) -> BN -> ReLU -> spatial -> 1x1 (Q, Q), stride -> BN -> ReLU -> + shortcut(x)
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_compress.networks.cheap import Kind, initialise, spatial


class CheapBlock(nn.Module):
    """Two cheap convolutions, and a shortcut around them.

    Args:
        in_channels: P.
        out_channels: Q.
        stride: of the last 1x1 convolution and the shortcut.
        kind: ``"shift"``, ``"dw"`` or ``"group"``, see `convert_to_cheap`.
        groups: of ``"group"``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, kind: Kind, groups: int) -> None:
        super().__init__()
        self.spatial1 = spatial(kind, in_channels, groups=groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.spatial2 = spatial(kind, out_channels, groups=groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 1, stride=stride, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            convolution = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(self.spatial1(x))))
        out = self.relu2(self.bn2(self.conv2(self.spatial2(out))))
        return out + self.shortcut(x)


class CheapResNet(nn.Module):
    """ResNet of ``depth`` = 6n+2 layers from :class:`CheapBlock`, behind a dense 3x3 stem.

    Args:
        depth: 6n + 2, e.g. 20, 56, 110.
        num_classes: outputs of the last layer.
        in_channels: channels of the images.
        kind: ``"shift"``, ``"dw"`` or ``"group"``, see `convert_to_cheap`.
        groups: of ``"group"``; must divide 16.

    Raises:
        ValueError: if ``depth``, ``kind`` or ``groups`` are none of the above.
    """

    def __init__(
        self, depth: int = 56, num_classes: int = 10, in_channels: int = 3, kind: Kind = "shift", groups: int = 4
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 with n >= 1 (8, 14, 20, 32, 44, 56, 110, ...), got {depth}.")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, blocks, 1, kind, groups)
        self.layer2 = _stage(16, 32, blocks, 2, kind, groups)
        self.layer3 = _stage(32, 64, blocks, 2, kind, groups)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``, 32x32 in the paper."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(x).flatten(1))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int, kind: Kind, groups: int) -> nn.Sequential:
    rest = (CheapBlock(out_channels, out_channels, 1, kind, groups) for _ in range(blocks - 1))
    return nn.Sequential(CheapBlock(in_channels, out_channels, stride, kind, groups), *rest)


def cheap_resnet20(num_classes: int = 10, in_channels: int = 3, **kwargs) -> CheapResNet:
    """20 layers. ``kwargs``: see :class:`CheapResNet`."""
    return CheapResNet(20, num_classes, in_channels, **kwargs)


def cheap_resnet56(num_classes: int = 10, in_channels: int = 3, **kwargs) -> CheapResNet:
    """56 layers: 102,106 parameters, 15.4 million MACs (32x32). ``kwargs``: see :class:`CheapResNet`."""
    return CheapResNet(56, num_classes, in_channels, **kwargs)
