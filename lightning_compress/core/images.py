"""Images as networks give them, in [-1, 1], and as files hold them, bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def as_bytes(images: Tensor) -> Tensor:
    """Bytes of images in [-1, 1], as image translation stores them: the fraction of a level is cut off, not rounded.

    >>> as_bytes(torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0]))
    tensor([  0,   0, 127, 254, 255], dtype=torch.uint8)
    """
    return ((images.float() + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
