"""What an input channel is worth, from the kernels that read it, and how many of them it may keep."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Axis = Literal["paper", "official"]

# Distances that are held at once: 64 MB in float32.
CHUNK = 1 << 24


def kernel_sparsity(weight: Tensor) -> Tensor:
    """Sum of the absolute weights of all kernels of an input channel: (N, C, kh, kw) -> (C,), in float64."""
    return weight.detach().double().abs().flatten(2).sum((0, 2))


def neighbour_distances(points: Tensor, k: int) -> Tensor:
    """Sum of the Euclidean distances of every point to its `k` nearest others in its set: (B, N, D) -> (B, N).

    Points that are equal are others all the same, at distance 0. On a line (D = 1) the neighbours are looked for among
    the `k` before and the `k` behind in sorted order; the sums then come in the order of the points' values.

    Raises:
        ValueError: a set has no `k` other points.
    """
    if points.shape[1] <= k:
        raise ValueError(f"k={k}: each of {points.shape[1]} points has only {points.shape[1] - 1} neighbours.")
    if points.shape[2] == 1:
        edge = points.new_full((len(points), k), math.inf)
        line = torch.cat([-edge, points.squeeze(2).sort(1).values, edge], 1)
        windows = line.unfold(1, 2 * k + 1, 1)  # the point stands in the middle, k others on either side
        apart = (windows - windows[..., k : k + 1]).abs()
        apart[..., k] = math.inf
        return apart.topk(k, 2, largest=False).values.sum(2)
    apart = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")  # exactly 0 for equal points
    apart.diagonal(dim1=1, dim2=2).fill_(math.inf)
    return apart.topk(k, 2, largest=False).values.sum(2)


def kernel_entropy(weight: Tensor, k: int = 5, axis: Axis = "paper") -> Tensor:
    """Entropy in bits of the densities of an input channel's kernels: (N, C, kh, kw) -> (C,), in float64.

    The density of a kernel is dm_i, the sum of its distances to its `k` nearest neighbours, over the sum of all. Where
    all kernels are equal, all densities are: the entropy is log2 N, its limit.

    Args:
        axis: which N kernels form a set. ``"paper"``: those that read the channel. ``"official"``: as the authors' code
            does, which lays the kernels out by input channel and then cuts that memory as if by output channel. With
            N = C these are the kernels of output filter c; else sets of mixed origin.
    """
    n, c = weight.shape[:2]
    sets = weight.detach().float().flatten(2).transpose(0, 1).contiguous()
    if axis == "official":
        sets = sets.view(n, c, -1).transpose(0, 1).contiguous()
    density = n * (2 * k + 1 if sets.shape[2] == 1 else n)
    dm = torch.cat([neighbour_distances(part, k) for part in sets.split(max(1, CHUNK // density))]).double()
    total = dm.sum(1, keepdim=True)
    p = torch.where(total > 0, dm / total, 1 / n)
    return -torch.special.xlogy(p, p).sum(1) / math.log(2)


def importance(sparsity: Tensor, entropy: Tensor, alpha: float = 1.0) -> Tensor:
    """The KSE indicator of a layer's input channels: (C,), (C,) -> (C,) from 0 to 1.

    A layer whose channels cannot be told apart, by their sparsity or at all, keeps them: all are 1.
    """
    v = (_min_max(sparsity) / (1 + alpha * _min_max(entropy))).sqrt()
    return _min_max(v) if sparsity.max() > sparsity.min() and v.max() > v.min() else torch.ones_like(v)


def channel_levels(v: Tensor, levels: int) -> Tensor:
    """Level of every channel, from 0, which goes, to `levels` - 1, which keeps all: (C,) -> (C,) int64.

    Where v * G is a whole number this is the authors' code; the paper's formula would take the level below.
    """
    return (v * levels).floor().long().clamp(max=levels - 1)


def kernel_budgets(kernels: int, levels: int, shift: int = 0) -> list[int]:
    """Kernels that a channel may keep of its `kernels`, by level: 0, ceil(N * 2^(g + 1 - T - G)), N.

    Args:
        kernels: N, the output channels of the layer.
        levels: G.
        shift: T; each step halves what the levels in between may keep.

    >>> kernel_budgets(64, 5), kernel_budgets(64, 5, shift=1), kernel_budgets(24, 5)
    ([0, 8, 16, 32, 64], [0, 4, 8, 16, 64], [0, 3, 6, 12, 24])
    """
    between = (max(1, math.ceil(kernels * 2.0 ** (g + 1 - shift - levels))) for g in range(1, levels - 1))
    return [0, *between, kernels]


def level_count(kernels: int, channels: int, levels: int) -> int:
    """G, or what stands for G = 0: the C input channels, or ceil(C / N) where they are more than the N kernels.

    A layer with a single channel gets 2 levels, so that it has one to keep it.
    """
    return levels or max(2, channels if kernels >= channels else math.ceil(channels / kernels))


def _min_max(x: Tensor) -> Tensor:
    """To [0, 1]; zeros where all are equal."""
    span = x.max() - x.min()
    return (x - x.min()) / span if span > 0 else torch.zeros_like(x)
