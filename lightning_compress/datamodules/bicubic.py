"""Bicubic resizing as MATLAB's `imresize` does it, which made the low resolution images of all super-resolution sets.

Keys, "Cubic Convolution Interpolation for Digital Image Processing", IEEE TASSP 29(6), 1981, with a = -1/2. What
differs from other libraries: to shrink, the kernel is as much wider as the image gets smaller (antialiasing); rows are
resized before columns, and images of bytes are rounded after each of both; images go on mirrored beyond their border.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Border = Literal["mirror", "repeat"]


def cubic(x: Tensor) -> Tensor:
    """The kernel: 1 at 0, 0 at the other whole numbers and outside -2..2."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x <= 1, near, torch.where(x <= 2, far, 0.0))


@lru_cache(maxsize=8)  # 8 MB each for photographs of 2,000 pixels
def resizing(length: int, out: int, border: Border = "mirror") -> Tensor:
    """What every output sample takes of every input sample: (out, length), float64; rows sum to 1."""
    ratio = min(out / length, 1.0)  # what the kernel is widened by
    centre = (torch.arange(out, dtype=torch.float64) + 0.5) * length / out - 0.5
    position = (centre - 2 / ratio).floor()[:, None] + torch.arange(int(4 / ratio) + 3)  # (out, taps), also outside
    share = cubic(ratio * (centre[:, None] - position))
    share = share / share.sum(1, keepdim=True)
    if border == "mirror":
        position = torch.remainder(position, 2 * length)  # there and back
        position = torch.where(position < length, position, 2 * length - 1 - position)
    index = position.clamp(0, length - 1).long()
    return torch.zeros(out, length, dtype=torch.float64).scatter_add_(1, index, share)


def bicubic(images: Tensor, size: tuple[int, int], border: Border = "mirror") -> Tensor:
    """Resize images (..., H, W) to ``size``, (height, width).

    Args:
        images: in 0..255 where they are integers; these come back as integers.
        size: height and width of the result.
        border: what images are beyond their border: ``"mirror"`` as in MATLAB today; ``"repeat"``, the last pixel
            again, as in older versions, with which the files of Set5 and Set14 that come in pairs were made.

    >>> bicubic(torch.arange(8, dtype=torch.uint8).repeat(8, 1), (2, 2))
    tensor([[1, 6],
            [1, 6]], dtype=torch.uint8)
    """
    down = resizing(images.shape[-2], size[0], border).to(images.device)
    across = resizing(images.shape[-1], size[1], border).T.to(images.device)
    if images.is_floating_point():
        return (down @ images.double() @ across).to(images.dtype)
    return _round(_round(down @ images.double()) @ across).to(images.dtype)


def _round(x: Tensor) -> Tensor:
    return (x + 0.5).floor().clamp(0, 255)  # halves up
