"""ResNets made to be binarised: Hardtanh or PReLU for ReLU, more shortcuts, a norm before the last layer.

The networks of RBNN (Lin et al., NeurIPS 2020, arXiv:2009.13055) and SiMaN (Lin et al., TPAMI 2023, arXiv:2102.07981).
They are ordinary networks of real weights: `RBNN` and `SiMaN` make them binary, all but the stem and the last layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn

from lightning_compress.core.select import did_you_mean
from lightning_compress.networks.channel_shortcut import ChannelShortcut

Activation = Literal["hardtanh", "prelu"]
StemActivation = Literal["hardtanh", "relu", "none"]


def activation_layer(kind: Activation, channels: int) -> nn.Module:
    """Hardtanh, or a PReLU with one slope per channel.

    Raises:
        ValueError: any other name.
    """
    if kind not in ("hardtanh", "prelu"):
        raise ValueError(
            f"activation={kind!r}: choose 'hardtanh' or 'prelu'.{did_you_mean(kind, ['hardtanh', 'prelu'])}"
        )
    return nn.Hardtanh() if kind == "hardtanh" else nn.PReLU(channels)


class BinaryBlock(nn.Module):
    """Two 3x3 convolutions with norms.

    Args:
        in_channels: channels of the input.
        out_channels: channels of both convolutions.
        stride: of the first convolution and of the shortcut.
        shortcut: brings the input to the shape of the output.
        bireal: a shortcut around each convolution, as in Bi-Real networks, not one around both.
        activation: behind each convolution's norm, and shortcut where it has one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        shortcut: nn.Module,
        bireal: bool,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act1 = activation_layer(activation, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = activation_layer(activation, out_channels)
        self.shortcut = shortcut
        self.bireal = bireal

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        if self.bireal:
            x = self.act1(out + self.shortcut(x))
            return self.act2(self.bn2(self.conv2(x)) + x)
        return self.act2(self.bn2(self.conv2(self.act1(out))) + self.shortcut(x))


class BinaryResNet(nn.Module):
    """A stem, stages of :class:`BinaryBlock`, a batch norm of the pooled features, one linear layer.

    Args:
        blocks: blocks of each stage.
        widths: channels of each stage; the stem has those of the first. All stages but the first halve the map.
        num_classes: outputs of the last layer.
        in_channels: channels of the images.
        stem: ``"small"`` is a 3x3 convolution, ``"large"`` a 7x7 one of stride 2 and a max-pool of stride 2.
        stem_activation: behind the stem's norm.
        shortcut: where stride or width change, ``"pad"`` subsamples and pads with zero channels, ``"projection"`` is a
            1x1 convolution with a norm.
        bireal: a shortcut around each convolution.
        activation: of the blocks.
        gamma: what the scales of all two-dimensional batch norms start with.
        kaiming: ``"all"``: convolutions and the last layer start as He et al. would have it (fan-in, gain sqrt 2);
            ``"conv"``: convolutions alone; ``"none"``: torch's defaults.

    Raises:
        ValueError: one of these words is another one, or `blocks` and `widths` are not as many.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        stem: Literal["small", "large"] = "small",
        stem_activation: StemActivation = "hardtanh",
        shortcut: Literal["pad", "projection"] = "projection",
        bireal: bool = True,
        activation: Activation = "hardtanh",
        gamma: float = 1.0,
        kaiming: Literal["all", "conv", "none"] = "none",
    ) -> None:
        super().__init__()
        if len(blocks) != len(widths):
            raise ValueError(f"blocks={tuple(blocks)} and widths={tuple(widths)} must be as many.")
        for argument, value, choices in (
            ("stem", stem, ("small", "large")), ("stem_activation", stem_activation, ("hardtanh", "relu", "none")),
            ("shortcut", shortcut, ("pad", "projection")), ("kaiming", kaiming, ("all", "conv", "none")),
        ):  # fmt: skip
            if value not in choices:
                hint = did_you_mean(value, choices)
                raise ValueError(f"{argument}={value!r}: choose one of {', '.join(map(repr, choices))}.{hint}")
        width = widths[0]
        large = stem == "large"
        self.conv1 = nn.Conv2d(in_channels, width, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act = {"hardtanh": nn.Hardtanh, "relu": nn.ReLU, "none": nn.Identity}[stem_activation]()
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        block = partial(BinaryBlock, bireal=bireal, activation=activation)
        stages: list[nn.Module] = []
        for index, (count, channels) in enumerate(zip(blocks, widths, strict=True)):
            stride = 2 if index else 1
            first = block(width, channels, stride, _shortcut(width, channels, stride, shortcut))
            rest = (block(channels, channels, 1, nn.Identity()) for _ in range(count - 1))
            stages.append(nn.Sequential(first, *rest))
            width = channels
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.bn2 = nn.BatchNorm1d(width)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if (kaiming != "none" and isinstance(module, nn.Conv2d)) or (kaiming == "all" and module is self.fc):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, gamma)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``."""
        x = self.maxpool(self.act(self.bn1(self.conv1(x))))
        return self.fc(self.bn2(self.pool(self.stages(x)).flatten(1)))


def _shortcut(in_channels: int, out_channels: int, stride: int, kind: str) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if kind == "pad":
        return ChannelShortcut(in_channels, out_channels, stride)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


def binary_resnet20(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    bireal: bool = False,
    activation: Activation = "hardtanh",
    stem_activation: StemActivation = "hardtanh",
    gamma: float = 1e-8,
) -> BinaryResNet:
    """20 layers for small images: 267,264 weights to binarise and 1,082 others, 40.6 million MACs (32x32).

    RBNN's as it stands or with ``bireal``; SiMaN's with ``bireal``, ``activation="prelu"``, ``stem_activation="relu"``,
    ``gamma=1``. The arguments are those of :class:`BinaryResNet`.
    """
    return BinaryResNet(
        (3, 3, 3), (16, 32, 64), num_classes, in_channels, stem_activation=stem_activation, shortcut="pad",
        bireal=bireal, activation=activation, gamma=gamma, kaiming="all",
    )  # fmt: skip


def binary_resnet18_cifar(num_classes: int = 10, in_channels: int = 3) -> BinaryResNet:
    """18 layers for small images: 11,157,504 weights to binarise and 6,858 others, 555 million MACs (32x32).

    The same for RBNN and SiMaN, with ``exclude_downsample=False``: the 1x1 convolutions of shortcuts are binary here.
    """
    return BinaryResNet(
        (2, 2, 2, 2), (64, 128, 256, 512), num_classes, in_channels, stem_activation="none", bireal=False
    )


def binary_resnet18(
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    activation: Activation = "hardtanh",
    stem_activation: StemActivation = "hardtanh",
) -> BinaryResNet:
    """18 layers for large images: 10,985,472 weights to binarise, 694,440 others, 1.81 billion MACs (224x224).

    RBNN's as it stands; SiMaN's with ``activation="prelu"`` and ``stem_activation="relu"``.
    """
    return _for_imagenet((2, 2, 2, 2), num_classes, in_channels, activation, stem_activation)


def binary_resnet34(
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    activation: Activation = "hardtanh",
    stem_activation: StemActivation = "hardtanh",
) -> BinaryResNet:
    """34 layers for large images: 21,086,208 weights to binarise, 3.66 billion MACs (224x224).

    Its arguments are those of :func:`binary_resnet18`.
    """
    return _for_imagenet((3, 4, 6, 3), num_classes, in_channels, activation, stem_activation)


def _for_imagenet(
    blocks: Sequence[int], num_classes: int, in_channels: int, activation: Activation, stem_activation: StemActivation
) -> BinaryResNet:
    return BinaryResNet(
        blocks, (64, 128, 256, 512), num_classes, in_channels, stem="large", stem_activation=stem_activation,
        bireal=True, activation=activation, gamma=1e-8, kaiming="conv",
    )  # fmt: skip
