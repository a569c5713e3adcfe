"""The masks: a step with a band, what pushes it, and how the band closes. `w` are the learnt numbers, one a channel."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

BandRule = Literal["cube", "double"]
LossType = Literal["bound", "relu", "uprelu"]

CLOSED = 1e-9  # a band this narrow is the rounding of a closed one


def band_mask(w: Tensor, band: Tensor) -> Tensor:
    """The values m of masks, (C,) in [0, 1], differentiable in w (C,); `band` is a scalar b >= 0.

    The slope is (b - |w|) / b^2 inside the band and zero outside; with b = 0, m is 1 where w > 0 and has no slope.

    >>> band_mask(torch.tensor([-1.5, -0.5, 0.0, 0.5, 1.5]), torch.tensor(1.0)).tolist()
    [0.0, 0.125, 0.5, 0.875, 1.0]
    """
    u = (w / torch.where(band > 0, band, 1.0)).clamp(-1, 1)
    m = torch.where(u <= 0, (1 + u).square() / 2, 1 - (1 - u).square() / 2)
    return torch.where(band > 0, m, (w > 0).to(m))


def band_at(seen: float, total: float, end: float = 0.75, rule: BandRule = "cube") -> float:
    """Half-width of the band after `seen` of `total` images (or batches); 0 from the share `end` of them on.

    >>> round(band_at(1, 1000), 6), band_at(750, 1000)
    (0.889936, 0.0)
    """
    band = 1 - (seen / (end * total)) ** (1 / 3 if rule == "cube" else 1 / 2)
    return band if band > CLOSED else 0.0


def relu_loss(w: Tensor, band: Tensor) -> Tensor:
    """Push every w inside the band down, towards -b: the sum of w + b. Any shape to a scalar."""
    return _inside(w, band, w + band).sum()


def uprelu_loss(w: Tensor, band: Tensor) -> Tensor:
    """Push every w inside the band up, towards b: the sum of b - w."""
    return _inside(w, band, band - w).sum()


def bound_loss(w: Tensor, band: Tensor) -> Tensor:
    """Push every w inside the band to its nearer end: the L2 norm of b - |w|."""
    return torch.linalg.vector_norm((band - w.abs()).clamp(min=0))


def group_loss(w: Tensor, band: Tensor, rho: Tensor) -> Tensor:
    """`relu_loss` of K masks over the same channels, w (K, C), channel by channel weighted by rho (C,)."""
    return (rho * _inside(w, band, w + band)).sum()


def group_weights(w: Tensor, band: Tensor, lambda_update_coeff: float) -> Tensor:
    """How hard the channels that K masks share are pushed: w (K, C) to rho (C,).

    Not at all once one mask has passed a channel for good, or all have given it up; else lambda_u K / (masks that are
    still undecided).
    """
    k = len(w)
    dead, alive = (w < -band).sum(0), (w > band).sum(0)
    undecided = k - dead - alive
    return torch.where((alive > 0) | (dead == k), 0.0, lambda_update_coeff * k / undecided.clamp(min=1))


LOSSES = dict(zip(get_args(LossType), (bound_loss, relu_loss, uprelu_loss), strict=True))


class BandMask(nn.Module):
    """Multiply the channels of (N, C, H, W) by their masks.

    Args:
        w: the first values, (C,).

    Attributes:
        weight: w, the learnt numbers.
        band: b, a scalar buffer; 1 at the beginning.
    """

    band: Tensor

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(w)
        self.register_buffer("band", torch.ones(()))

    def values(self) -> Tensor:
        """m, (C,)."""
        return band_mask(self.weight, self.band)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.values().to(x).view(-1, 1, 1)


def _inside(w: Tensor, band: Tensor, value: Tensor) -> Tensor:
    return torch.where(w.abs() < band, value, 0.0)
