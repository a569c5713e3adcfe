"""The two sets of ADMM-NN-S and the nearest points in them: few units that are not zero, few levels."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_compress.core.sparse.select_weights import drop_lowest

Kind = Literal["irregular", "filter", "column", "kernel"]
Levels = Literal["uniform", "binary", "ternary"]
StepSearch = Literal["alternate", "scan"]

STARTS = torch.linspace(0.1, 1.2, 111, dtype=torch.float64)  # of the largest |w| / M; one start alone ends 10 % worse


# ---- pruning


def removed(rate: float, units: int) -> int:
    """floor(r N) units go.

    >>> removed(0.66, 24), removed(0.25, 50), removed(0.8, 25_000)
    (15, 12, 20000)
    """
    return math.floor(rate * units + 1e-9)


def unit_norms(weight: Tensor, kind: Kind) -> Tensor:
    """What units are ranked by, in float32, in a shape that broadcasts to the weight's.

    Args:
        weight: (C_out, C_in, ...).
        kind: ``"irregular"``: |w|; else the L2 norm: ``"filter"`` (C_out, 1, ...); ``"column"`` (1, C_in, kh, kw), one
            tap of one input channel in all filters; ``"kernel"`` (C_out, C_in, 1, 1).
    """
    weight = weight.detach().float()
    if kind == "irregular":
        return weight.abs()
    dims = {"filter": range(1, weight.ndim), "column": (0,), "kernel": range(2, weight.ndim)}[kind]
    return torch.linalg.vector_norm(weight, dim=tuple(dims), keepdim=True) if len(dims) else weight.abs()


def prune_mask(weight: Tensor, kind: Kind, rate: float, norms: Tensor | None = None) -> Tensor:
    """True where a unit stays; broadcasts to the weight. Of equal units the first ones go.

    Args:
        norms: what units are ranked by, instead of :func:`unit_norms`.
    """
    norms = unit_norms(weight, kind) if norms is None else norms
    return drop_lowest(norms, removed(rate, norms.numel()))


def project_units(weight: Tensor, kind: Kind, rate: float, norms: Tensor | None = None) -> Tensor:
    """The nearest weight with so few units."""
    return weight * prune_mask(weight, kind, rate, norms)


# ---- quantisation


def level_count(bits: int, levels: Levels = "uniform", shared_zero: bool = False) -> int:
    """M, the levels on each side of zero: 2^(b-1), or one less if the zero shares the codes.

    >>> [level_count(4), level_count(4, shared_zero=True), level_count(4, "binary")]
    [8, 7, 1]
    """
    return 1 if levels != "uniform" else 2 ** (bits - 1) - shared_zero


def level_codes(weight: Tensor, step: float, count: int, levels: Levels = "uniform") -> Tensor:
    """Number of the nearest level, -M to M, in the weight's dtype. Between two levels the upper one.

    Zeros stay zeros; others become zero with ternary levels only.
    """
    codes = (weight.float() / step + 0.5).floor().clamp(-count, count)
    if levels != "ternary":
        codes = torch.where(codes == 0, weight.sign().float(), codes)
    return torch.where(weight == 0, 0.0, codes).to(weight.dtype)


def project_levels(weight: Tensor, step: float, count: int, levels: Levels = "uniform") -> Tensor:
    """The nearest weight of such levels."""
    return level_codes(weight, step, count, levels) * step


def find_step(weight: Tensor, count: int, levels: Levels = "uniform", search: StepSearch = "alternate") -> float:
    """The distance of two levels with the smallest squared error of the weights that are not zero.

    Args:
        weight: any shape.
        count: M.
        levels: ``"uniform"``; ``"binary"``, where it is the mean of |w|; ``"ternary"``, the mean of the t largest |w|
            with the t that maximises (their sum)^2 / t.
        search: ``"alternate"``: codes for the step, the best step for these codes, until nothing changes, from 111
            starts; ``"scan"``: the best of 201 steps within 10 % of the largest |w| / M, the authors' released code.

    Returns:
        The step; 1 where all weights are zero.
    """
    sizes = weight.detach().double().abs().flatten()
    sizes = sizes[sizes > 0].sort().values
    if not len(sizes):
        return 1.0
    if levels == "ternary":
        sums = sizes.flip(0).cumsum(0)
        counts = torch.arange(1, len(sizes) + 1, device=sizes.device)
        best = int((sums.square() / counts).argmax())
        return float(sums[best] / counts[best])
    start = sizes[-1] / count
    if search == "scan":
        steps = start * torch.linspace(0.9, 1.1, 201, dtype=torch.float64, device=sizes.device)
    else:
        steps = start * STARTS.to(sizes.device)
        for _ in range(1000):
            products, squares = _codes_of(sizes, steps, count)
            better = products / squares
            if torch.equal(better, steps):
                break
            steps = better
    products, squares = _codes_of(sizes, steps, count)
    return float(steps[(steps.square() * squares - 2 * steps * products).argmin()])


def _codes_of(sizes: Tensor, steps: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """<w, k> and <k, k> for each step, of weights in ascending order: by where the codes change, and prefix sums."""
    codes = torch.arange(1, count + 1, dtype=torch.float64, device=sizes.device)
    borders = (codes[1:] - 0.5) * steps[:, None]
    places = torch.searchsorted(sizes, borders)
    ends = torch.full((len(steps), 1), len(sizes), device=sizes.device)
    places = torch.cat([torch.zeros_like(ends), places, ends], 1)
    sums = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return (codes * sums[places].diff(dim=1)).sum(1), (codes.square() * places.diff(dim=1)).sum(1)


def closest_to_levels(codes: Tensor, distance: Tensor, share: float) -> Tensor:
    """Of the members of each level, mark the ceil(share * members) that are closest to it.

    Args:
        codes: (N,) level of each weight.
        distance: (N,) to that level.

    Returns:
        (N,), bool.

    >>> closest_to_levels(torch.tensor([1.0, 1.0, -1.0, 1.0]), torch.tensor([0.3, 0.1, 0.9, 0.2]), 0.5)
    tensor([False,  True,  True,  True])
    """
    order = distance.argsort(stable=True)
    order = order[codes[order].argsort(stable=True)]
    _, members, counts = codes[order].unique_consecutive(return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(codes), device=codes.device) - starts[members]
    marked = torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
    marked[order] = rank < (share * counts.double() - 1e-9).ceil()[members]
    return marked
