"""N:M groups: of every M consecutive inputs of a weight, N stay.

GPUs multiply 2:4 weights twice as fast as dense ones. Groups lie along the dim that a matrix product sums over: the
inputs of a linear layer, the input channels of a convolution.

    linear  (out, in)          -> out * in / M groups
    conv    (out, in, kh, kw)  -> (out, kh, kw, in) -> out * kh * kw * in / M groups, in this order
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def to_groups(weight: Tensor, m: int) -> Tensor:
    """Weight (out, in) or (out, in, kh, kw) -> (numel / m, m), groups of m consecutive inputs.

    >>> to_groups(torch.arange(8.0).view(1, 4, 1, 2), 2)
    tensor([[0., 2.],
            [4., 6.],
            [1., 3.],
            [5., 7.]])
    """
    return (weight.movedim(1, -1) if weight.ndim > 2 else weight).reshape(-1, m)


def from_groups(groups: Tensor, shape: Sequence[int]) -> Tensor:
    """Back from :func:`to_groups` to a weight of this shape."""
    out, inputs, *kernel = shape
    weight = groups.reshape(out, *kernel, inputs)
    return weight.movedim(-1, 1) if kernel else weight


def top_of_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the n highest scores of each group; among equal ones the first leave.

    Args:
        scores: (out, in) or (out, in, kh, kw).

    Returns:
        Bool of the same shape.

    >>> top_of_groups(torch.tensor([[0.1, 0.9, 0.9, 0.9]]), 2, 4)
    tensor([[False, False,  True,  True]])
    """
    groups = to_groups(scores.detach(), m)
    leave = groups.sort(dim=1, stable=True).indices[:, : m - n]
    keep = torch.ones_like(groups, dtype=torch.bool).scatter_(1, leave, False)
    return from_groups(keep, scores.shape).contiguous()


def is_nm(weight: Tensor, n: int, m: int) -> bool:
    """Whether no group has more than n weights that are not zero."""
    return weight.shape[1] % m == 0 and bool((to_groups(weight, m).count_nonzero(dim=1) <= n).all())


def why_not_nm(layer: nn.Module, m: int) -> str | None:
    """The reason why a layer cannot be cut into groups of m inputs; None if it can."""
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return "is neither a Conv2d nor a Linear layer"
    if getattr(layer, "groups", 1) > 1:
        return "is a grouped convolution"
    inputs = layer.weight.shape[1]
    return f"has {inputs} inputs, no multiple of m={m}" if inputs % m else None


def check_nm(n: int, m: int, who: str) -> None:
    """Refuse an impossible pattern.

    Raises:
        ValueError: unless 1 <= n < m.
    """
    for argument, value in (("n", n), ("m", m)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{who}({argument}={value!r}): give a whole number.")
    if not 1 <= n < m:
        raise ValueError(f"{who}(n={n}, m={m}): of m weights n stay, so give 1 <= n < m.")
