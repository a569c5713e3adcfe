"""A teacher of edges that needs no training: the operator that drew them.

Sobel and Feldman, "A 3x3 Isotropic Gradient Operator for Image Processing", 1968.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class EdgeDrawing(nn.Module):
    """Draw the edges of photographs as the `PairedPhotographs` datamodule does, black on white.

    Needs no weights, and is the same every time: a teacher for examples with ``direction="BtoA"``. A drawing differs
    from the datamodule's by the bytes' rounding, and by what lies beyond the square that a crop shows.

    >>> EdgeDrawing()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 3, 32, 32])
    """

    luminance: Tensor
    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("luminance", torch.tensor([0.2125, 0.7154, 0.0721]).view(1, 3, 1, 1) / 2)
        across = torch.outer(torch.tensor([1.0, 2.0, 1.0]) / 4, torch.tensor([1.0, 0.0, -1.0]))
        self.register_buffer("slopes", torch.stack([across, across.T])[:, None])

    def forward(self, images: Tensor) -> Tensor:
        """Photographs (N, 3, H, W) in [-1, 1] -> drawings, likewise."""
        grey = F.conv2d(images, self.luminance)
        slope = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), self.slopes)
        ink = 4 * slope.square().mean(1, keepdim=True).sqrt()  # a quarter of the steepest slope is black
        return (1 - 2 * ink.clamp(max=1)).expand_as(images)
