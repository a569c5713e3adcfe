"""What super-resolution networks share: their convolution, sub-pixel upsampling, and the shift by a mean colour.

Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural
Network", CVPR 2016, arXiv:1609.05158.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SCALES = (2, 3, 4, 8)


def check_scale(scale: int) -> None:
    """Raise unless the networks can enlarge by ``scale``."""
    if scale not in SCALES:
        raise ValueError(f"scale: expected one of {', '.join(map(str, SCALES))}, got {scale!r}.")


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A biased 3x3 convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def upsampler(scale: int, features: int) -> list[nn.Module]:
    """Convolutions, each followed by a pixel shuffle: (N, features, H, W) -> (N, features, scale H, scale W).

    Factors 4 and 8 are reached in steps of 2.
    """
    steps = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
    return [layer for step in steps for layer in (conv3x3(features, step * step * features), nn.PixelShuffle(step))]


class MeanShift(nn.Module):
    """Add a colour to every pixel. Nothing in it is learnt.

    ``weight``, (C, C, 1, 1) and diagonal, and ``bias``, (C,), are buffers, as named in the files of the EDSR authors,
    which therefore load.

    Args:
        shift: what is added to each channel.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, shift: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(len(shift))[:, :, None, None])
        self.register_buffer("bias", torch.tensor(shift))

    def forward(self, x: Tensor) -> Tensor:
        # no convolution: pruners and quantisers would take it for a layer, profilers for work
        factor = self.weight[:, :, 0, 0].diagonal()
        return x * factor[:, None, None] + self.bias[:, None, None]
