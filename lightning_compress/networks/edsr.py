"""EDSR: enlarge photographs with residual blocks without batch norm, and upsample at the very end.

Lim, Son, Kim, Nah, Lee, "Enhanced Deep Residual Networks for Single Image Super-Resolution", CVPR Workshops 2017,
arXiv:1707.02921. Layers are named as in the authors' files, so these load.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_compress.core.quant.points import QuantizationPoint
from lightning_compress.networks.upsampler import MeanShift, check_scale, conv3x3, upsampler

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)  # RGB in [0, 1]


class ResidualBlock(nn.Module):
    """``x + res_scale * conv(relu(conv(x)))``, with the points at which PAMS quantises (arXiv:2011.04212).

    ``block_input`` feeds both branches, ``shortcut`` the sum alone: one of the two is in use, see `QuantizationPoint`.

    Args:
        features: channels.
        res_scale: factor of the residual branch; 0.1 keeps wide networks stable.
    """

    def __init__(self, features: int, res_scale: float) -> None:
        super().__init__()
        self.body = nn.Sequential(conv3x3(features, features), nn.ReLU(), conv3x3(features, features))
        self.res_scale = res_scale
        self.block_input = QuantizationPoint("integer", feeds=["body.0"])
        self.shortcut = QuantizationPoint("default")
        self.hidden = QuantizationPoint(feeds=["body.2"])
        self.residual = QuantizationPoint()

    def forward(self, x: Tensor) -> Tensor:
        conv1, relu, conv2 = self.body
        x = self.block_input(x)
        y = conv2(self.hidden(relu(conv1(x))))
        return self.residual(y * self.res_scale if self.res_scale != 1 else y) + self.shortcut(x)


class EDSR(nn.Module):
    """Images (N, channels, H, W) in 0..255 to enlarged ones, (N, channels, scale H, scale W), not clamped.

    Args:
        scale: 2, 3, 4 or 8.
        blocks: residual blocks; 16 in the baseline, 32 in the paper's large network.
        features: their channels; 64 and 256.
        res_scale: factor of each residual branch; 1 and 0.1.
        mean: colour that is subtracted from the input and added to the output, for images in [0, 1];
            the default is that of DIV2K.

    Attributes:
        quantizable: globs on the layers that compress well, the residual blocks'; the head, the last convolution of the
            body and the tail are left.
        feature_layer: the layer whose input holds the deep features.

    Raises:
        ValueError: a scale that is none of these.
    """

    quantizable = ("body.*.body.*",)
    feature_layer = "tail"

    def __init__(
        self,
        scale: int = 4,
        blocks: int = 16,
        features: int = 64,
        res_scale: float = 1.0,
        mean: Sequence[float] = DIV2K_MEAN,
    ) -> None:
        super().__init__()
        check_scale(scale)
        self.scale = scale
        channels = len(mean)
        self.sub_mean = MeanShift([-255 * m for m in mean])
        self.head = nn.Sequential(conv3x3(channels, features))
        self.body = nn.Sequential(
            *(ResidualBlock(features, res_scale) for _ in range(blocks)), conv3x3(features, features)
        )
        self.tail = nn.Sequential(nn.Sequential(*upsampler(scale, features)), conv3x3(features, channels))
        self.add_mean = MeanShift([255 * m for m in mean])

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.sub_mean(x))
        return self.add_mean(self.tail(self.body(x) + x))


def edsr_baseline(scale: int = 4) -> EDSR:
    """16 blocks of 64: 1,517,571 parameters at x4, 1,369,859 at x2. Arguments: see :class:`EDSR`."""
    return EDSR(scale)


def edsr_large(scale: int = 4) -> EDSR:
    """32 blocks of 256: 43,089,923 parameters at x4, 40,729,603 at x2. Arguments: see :class:`EDSR`."""
    return EDSR(scale, blocks=32, features=256, res_scale=0.1)
