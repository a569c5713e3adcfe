"""Patterns: the few shapes that the kernels of a convolution may keep, and which kernels stay at all.

A library is a bool tensor (P, taps): row p says which taps of a kernel pattern p keeps, all rows equally many. Taps are
numbered row by row, so 0 to 8 with 4 in the centre for 3x3. Two sets, two Euclidean projections:

    patterns      p(k) = argmax_p ||w_k o m_p||^2,  w_k <- w_k o m_p(k)      as ||w - w o m||^2 = ||w||^2 - ||w o m||^2
    connectivity  the alpha kernels with the largest ||w_k|| stay whole, the others become zero

Both can decide for blocks of `block` consecutive output channels together: the filters of a block then share, for every
input channel, one pattern and one decision whether the kernel stays, by the energy of all of them. Equals are settled
by the lowest number of a pattern and by the first kernel, so that every process decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Balance = Literal["filter", "layer"]

# The centre and three of its four neighbours: down, right, up, left missing (Ma et al., arXiv:1909.05073).
SCP4 = ((1, 3, 4, 5), (1, 3, 4, 7), (3, 4, 5, 7), (1, 4, 5, 7))
# The corners and L shapes that trained networks of natural images prefer, in the order of the CIFAR-10 libraries that
# public implementations of arXiv:2001.07710 print. Four of them leave the centre out.
NATURAL8 = (
    (4, 5, 7, 8), (0, 1, 3, 4), (3, 4, 6, 7), (1, 2, 4, 5), (3, 6, 7, 8), (0, 1, 2, 3), (0, 1, 2, 5), (5, 6, 7, 8)
)  # fmt: skip


# ---- libraries


def library_of(taps: Iterable[Sequence[int]], size: int = 9) -> Tensor:
    """Lists of kept taps -> library (P, size).

    Raises:
        ValueError: no pattern, a tap that is not there, patterns of different length, or the same one twice.

    >>> library_of([(0, 1), (2, 3)], size=4).int()
    tensor([[1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.int32)
    """
    shapes = [tuple(sorted(int(tap) for tap in shape)) for shape in taps]
    if not shapes or any(not shape or len(set(shape)) < len(shape) for shape in shapes):
        raise ValueError(f"patterns: each keeps some taps, none twice; got {shapes}.")
    if any(not 0 <= tap < size for shape in shapes for tap in shape):
        raise ValueError(f"patterns: taps are 0 to {size - 1}, got {shapes}.")
    if len({len(shape) for shape in shapes}) > 1 or len(set(shapes)) < len(shapes):
        raise ValueError(f"patterns: all keep equally many taps, and no two are the same; got {shapes}.")
    return torch.zeros(len(shapes), size, dtype=torch.bool).scatter(1, torch.tensor(shapes), True)


def taps_of(library: Tensor) -> Tensor:
    """Library (P, taps) -> the numbers of the kept taps (P, n), ascending, int64."""
    return library.nonzero()[:, 1].view(len(library), -1)


def all_patterns(n: int, *, size: int = 9, centre: bool = False) -> Tensor:
    """Every pattern of n taps, in lexicographic order of its taps.

    Args:
        n: taps that are kept.
        size: taps of a kernel.
        centre: only those that keep the tap in the middle.

    Raises:
        ValueError: n is not between 1 and `size`.

    >>> [len(all_patterns(4)), len(all_patterns(4, centre=True))]
    [126, 56]
    """
    if not 1 <= n <= size:
        raise ValueError(f"n: a pattern keeps 1 to {size} taps, got {n}.")
    return library_of((taps for taps in combinations(range(size), n) if not centre or size // 2 in taps), size)


def most_frequent(candidates: Tensor, votes: Tensor, size: int) -> Tensor:
    """The `size` patterns with most votes, in their order among the candidates; equals by the lower number.

    Args:
        candidates: library (P, taps).
        votes: (P,).
        size: how many; all where there are fewer.

    Returns:
        Library (min(size, P), taps).
    """
    order = votes.argsort(descending=True, stable=True)
    return candidates[order[:size].sort().values.to(candidates.device)]


def count_votes(weights: Iterable[Tensor], candidates: Tensor, block: int = 1) -> Tensor:
    """How many kernels prefer each candidate, one vote per kernel whatever its norm: (P,) int64.

    Args:
        weights: of one or several layers, each (C_out, C_in, kh, kw).
        candidates: library (P, kh * kw).
    """
    chosen = [best_patterns(weight, candidates, block).flatten().cpu() for weight in weights]
    return torch.bincount(torch.cat(chosen), minlength=len(candidates))


# ---- projections


def pattern_energies(weight: Tensor, library: Tensor, block: int = 1) -> Tensor:
    """Squares of the weights that each pattern keeps of each kernel, summed over blocks.

    Args:
        weight: (C_out, C_in, kh, kw).
        library: (P, kh * kw).

    Returns:
        (P, ceil(C_out / block), C_in), float32.
    """
    squares = _by_block(_squares(weight), block)
    taps = taps_of(library.to(weight.device)).T
    # Tap by tap: the same order of additions on every device, where a product of matrices might round to TF32.
    energies = squares[taps[0]]
    for tap in taps[1:]:
        energies += squares[tap]
    return energies


def best_patterns(weight: Tensor, library: Tensor, block: int = 1) -> Tensor:
    """Number of the pattern that keeps most of each kernel: (C_out, C_in, kh, kw) -> (C_out, C_in), int64."""
    # `max` also gives the first of equals, and is several times faster than `argmax` along this dimension
    return _to_filters(pattern_energies(weight, library, block).max(0).indices, block, len(weight))


def pattern_mask(ids: Tensor, library: Tensor, kernel_size: Sequence[int] = (3, 3)) -> Tensor:
    """Numbers of patterns (C_out, C_in) -> mask (C_out, C_in, kh, kw), True where a weight stays."""
    return library.to(ids.device)[ids].unflatten(-1, tuple(kernel_size))


def project_patterns(weight: Tensor, library: Tensor, block: int = 1) -> Tensor:
    """The nearest weight whose kernels lie in the library, (C_out, C_in, kh, kw)."""
    return weight * pattern_mask(best_patterns(weight, library, block), library, weight.shape[2:])


def kept_count(total: int, rate: float) -> int:
    """ceil(total / rate): what stays of `total` kernels.

    >>> [kept_count(n, 3.6) for n in (64, 36, 1)]
    [18, 10, 1]
    """
    return math.ceil(total / rate - 1e-9)  # 108 / 3.6 must not become 31


def strongest_kernels(weight: Tensor, rate: float, balance: Balance = "filter", block: int = 1) -> Tensor:
    """Which kernels stay: those of largest norm, exactly ceil(count / rate) of them.

    Args:
        weight: (C_out, C_in, kh, kw).
        rate: how many times fewer kernels.
        balance: ``"filter"`` counts in every filter (block of filters), ``"layer"`` in all filters together.

    Returns:
        (C_out, C_in), bool.
    """
    norms = _by_block(_squares(weight).sum(0, keepdim=True), block)[0]
    rows = norms if balance == "filter" else norms.view(1, -1)
    kept = largest(rows, kept_count(rows.shape[1], rate)).view_as(norms)
    return _to_filters(kept, block, len(weight))


def project_connectivity(weight: Tensor, rate: float, balance: Balance = "filter", block: int = 1) -> Tensor:
    """The nearest weight with so few kernels, (C_out, C_in, kh, kw)."""
    return weight * strongest_kernels(weight, rate, balance, block)[:, :, None, None]


def kernel_mask(
    weight: Tensor, library: Tensor | None, rate: float = 1.0, balance: Balance = "filter", block: int = 1
) -> Tensor:
    """The hard mask of both: kernels first, by the norm of the whole kernel, then the pattern of each that stays.

    Args:
        weight: (C_out, C_in, kh, kw).
        library: (P, kh * kw), or None where kernels stay whole.
        rate: 1 keeps all kernels.

    Returns:
        (C_out, C_in, kh, kw), bool, True where a weight stays; also where that weight happens to be zero.
    """
    kept = strongest_kernels(weight, rate, balance, block)[:, :, None, None]
    if library is None:
        return kept.expand_as(weight)
    return kept & pattern_mask(best_patterns(weight, library, block), library, weight.shape[2:])


def kept_energy(weight: Tensor, library: Tensor) -> float:
    """Share of the sum of squares that is left after the projection on the patterns."""
    return float(pattern_energies(weight, library).amax(0).double().sum() / weight.double().square().sum())


def largest(values: Tensor, k: int) -> Tensor:
    """Mark the k largest entries of every row; of equals, the first.

    The same choice as a stable sort makes, several times faster.

    >>> largest(torch.tensor([[1.0, 2.0, 1.0, 1.0]]), 2)
    tensor([[ True,  True, False, False]])
    """
    if k >= values.shape[1]:
        return torch.ones_like(values, dtype=torch.bool)
    least = values.kthvalue(values.shape[1] - k + 1, dim=1, keepdim=True).values
    above, level = values > least, values == least
    return above | (level & (level.cumsum(1) <= k - above.sum(1, keepdim=True)))


def _squares(weight: Tensor) -> Tensor:
    """(C_out, C_in, kh, kw) -> (taps, C_out, C_in), float32."""
    return weight.detach().float().square().flatten(2).permute(2, 0, 1).contiguous()


def _by_block(values: Tensor, block: int) -> Tensor:
    """Sum over blocks of output channels, of which the last may be shorter: (n, C_out, C_in) -> (n, blocks, C_in)."""
    if block == 1:
        return values
    padded = F.pad(values, (0, 0, 0, -values.shape[1] % block))
    return padded.unflatten(1, (-1, block)).sum(2)


def _to_filters(values: Tensor, block: int, filters: int) -> Tensor:
    """(blocks, C_in) -> (C_out, C_in)."""
    return values if block == 1 else values.repeat_interleave(block, 0)[:filters]
