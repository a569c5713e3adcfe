"""Distances between feature maps, attention that moves away, and the ramp of their weights.

Maps are (B, C, h, w), lists of them run from shallow to deep; A, N, d, Div and Shift are the symbols of the package's
docstring. All computes in float32: squared features times a weight of 1000 do not fit half precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.distill.losses import attention, in_float32


def ramp_up(epoch: int, epochs: int = 5) -> float:
    """Share of a weight in an epoch, counted from 1: exp(-5 (1 - e / E)^2) up to epoch E, then 1.

    >>> [round(ramp_up(epoch), 6) for epoch in range(1, 7)]
    [0.040762, 0.165299, 0.449329, 0.818731, 1.0, 1.0]
    """
    return exp(-5 * (1 - epoch / epochs) ** 2) if epoch < epochs else 1.0


@in_float32
def distance(own: Tensor, target: Tensor) -> Tensor:
    """d: mean squared difference of two tensors of one shape (B, ...), each image with a norm of 1.

    >>> x = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    >>> round(distance(x, x.flip(1)).item(), 7), round(distance(3 * x, x).item(), 7)
    (0.1282051, 0.0)
    """
    return F.mse_loss(F.normalize(own.flatten(1), dim=1), F.normalize(target.flatten(1), dim=1))


def strength(maps: Tensor) -> Tensor:
    """A: how strong features are at each place, (B, C, h, w) -> (B, 1, h, w), the mean of their squares."""
    return maps.float().square().mean(1, keepdim=True)


def inverted(strengths: Tensor) -> Tensor:
    """Where attention shall be, if not where another has it: (B, 1, h, w) -> (B, h w).

    With n the norm of an image's strengths and a = N(strengths): n - a where a is above its floor(h w / 3)-th smallest
    value, a below it, and n / 2 at it. The inverse mixes n, which is not normalised, with values that are, as the
    authors have it: it is large, hence weights of 1e-5. Maps with many zeros have zero as that value, so that all of
    these places get n / 2.
    """
    flat = strengths.flatten(1)
    norm = flat.norm(dim=1, keepdim=True)
    attended = F.normalize(flat, dim=1)
    # sorted, as kthvalue has no deterministic form on GPUs
    threshold = attended.sort(dim=1).values[:, flat.shape[1] // 3 - 1, None]
    moved = torch.where(attended > threshold, norm - attended, attended)
    return torch.where(attended == threshold, norm / 2, moved)


@in_float32
def diversity(own: Tensor, other: Tensor) -> Tensor:
    """Div: distance of one's normalised attention from the inverse of another's; both are strengths (B, 1, h, w)."""
    return F.mse_loss(F.normalize(own.flatten(1), dim=1), inverted(other))


def shifted(maps: Tensor) -> Tensor:
    """Shift: (B, C, h, w) -> the same, moved by what attention has to change, in equal parts for all channels."""
    maps = maps.float()
    strengths = strength(maps)
    flat = strengths.flatten(1)
    norm = flat.norm(dim=1, keepdim=True)
    change = (inverted(strengths) - F.normalize(flat, dim=1)) * norm / maps.shape[1]
    return maps + change.view_as(strengths)


def imposed(own: Sequence[Tensor], made: Sequence[Tensor]) -> Tensor:
    """Attention of a network's shallower maps against that of maps that were made of a deep one.

    Args:
        own: maps of the network, shallow to deep; the last is left out.
        made: what a `SelfDistillation` made, deep to shallow, without a gradient.
    """
    return torch.stack([attention(f, h) for f, h in zip(reversed(own[:-1]), made, strict=True)]).sum()


def reproduced(made: Sequence[Tensor], own: Sequence[Tensor]) -> Tensor:
    """What trains a `SelfDistillation`: its maps, deep to shallow, against the network's own, shallow to deep."""
    pairs = [(h, f.detach()) for h, f in zip(made, reversed(own[:-1]), strict=True)]
    return torch.stack([distance(h, f) + attention(h, f) for h, f in pairs]).sum()
