"""AULM, the solver: rows of filters W, their copy F, the multiplier Y. Equations: see the package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_compress.core.surgery import keep_highest

Norm = Literal["l21", "l20"]


def group_rows(tensors: Sequence[Tensor]) -> Tensor:
    """One row per filter: a weight (N, C, kh, kw) or (N, C), and biases or gains (N,), -> (N, d) in float32.

    >>> group_rows([torch.zeros(20, 1, 5, 5), torch.ones(20)]).shape
    torch.Size([20, 26])
    """
    return torch.cat([t.flatten(1) if t.ndim > 1 else t[:, None] for t in tensors], 1).float()


def split_rows(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Inverse of `group_rows`: (N, d) -> tensors of the shapes and dtypes of `like`."""
    columns = rows.split([t[0].numel() for t in like], 1)
    return [c.reshape(t.shape).to(t.dtype) for c, t in zip(columns, like, strict=True)]


def group_shrink_l21(v: Tensor, lambda_: float, rho: float) -> Tensor:
    """argmin_F  lambda ||F||_{2,1} + rho / 2 ||F - V||^2: every row gets shorter by lambda / rho. (N, d) -> (N, d)

    >>> group_shrink_l21(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), lambda_=1, rho=1)
    tensor([[2.4000, 3.2000],
            [0.0000, 0.0000]])
    """
    norms = v.norm(dim=1, keepdim=True)
    return v * ((norms - lambda_ / rho).clamp(min=0) / (norms + 1e-9))


def group_threshold_l20(v: Tensor, lambda_: float, rho: float) -> Tensor:
    """argmin_F  lambda ||F||_{2,0} + rho / 2 ||F - V||^2: rows longer than sqrt(2 lambda / rho) stay as they are."""
    return v * (v.norm(dim=1, keepdim=True) > math.sqrt(2 * lambda_ / rho))


def update_fy(w: Tensor, y: Tensor, lambda_: float, rho: float, norm: Norm = "l21") -> tuple[Tensor, Tensor]:
    """The new F and Y, (N, d) each, from W and the old Y.

    >>> w = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    >>> update_fy(w, torch.zeros_like(w), lambda_=1, rho=1)[1]
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """
    shrink = {"l21": group_shrink_l21, "l20": group_threshold_l20}[norm]
    f = shrink(w + y / rho, lambda_, rho)
    return f, y + rho * (w - f)


def penalty(w: Tensor, f: Tensor, y: Tensor, rho: float) -> Tensor:
    """What pulls W: rho / 2 ||W - (F - Y / rho)||^2, that is <Y, W - F> + rho / 2 ||W - F||^2 up to a constant."""
    return rho / 2 * (w - f + y / rho).square().sum()


def penalty_gradient(w: Tensor, f: Tensor, y: Tensor, rho: float) -> Tensor:
    """Its gradient: rho (W - F) + Y, (N, d)."""
    return rho * (w - f) + y


@dataclass
class Split:
    """One layer while it is searched: its copy and the multiplier that ties it to the weights.

    Attributes:
        f: the copy F, (N, d) float32.
        y: the multiplier Y, (N, d) float32.
        rho: the penalty.
        alive: which rows of F were not zero after each of the last F-steps, newest last, (k, N) bool.
    """

    f: Tensor
    y: Tensor
    rho: float
    alive: Tensor

    @classmethod
    def of(cls, w: Tensor, rho: float) -> Split:
        """Where a search begins. F = 1 is never used: the F-step comes before the first step of SGD."""
        return cls(torch.ones_like(w), torch.zeros_like(w), rho, torch.ones(0, len(w), dtype=torch.bool))

    def to(self, device: torch.device) -> Split:
        return Split(self.f.to(device), self.y.to(device), self.rho, self.alive)

    def survivors(self, w: Tensor) -> Tensor:
        """Indices of the filters that stay: alive in at least half of the F-steps looked at, or else the longest."""
        stays = self.alive.float().mean(0) >= 0.5
        return stays.nonzero()[:, 0] if stays.any() else keep_highest(w.norm(dim=1).cpu(), 1)
