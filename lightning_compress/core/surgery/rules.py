"""How channel ids pass through torch's operators: a table from operator to rule.

A rule gets the trace, the operator's output, and its arguments; it ties ids that are one channel, freezes those whose
number the operator fixes, and gives the output its ids. The rules are in `operators.py` (what computes) and `shapes.py`
(what only rearranges).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

aten = torch.ops.aten

Ids = np.ndarray  # int64; as many dims as its tensor, of size 1 along every dim that it says nothing about
OpRule = Callable[..., None]
RULES: dict[Any, OpRule] = {}


def rule(*names: str) -> Callable[[OpRule], OpRule]:
    """Register a rule for the aten operators of these names, where this torch has them."""

    def register(function: OpRule) -> OpRule:
        for name in names:
            if hasattr(aten, name):
                RULES[getattr(aten, name)] = function
        return function

    return register


def along(ids: Ids, dim: int, ndim: int) -> Ids:
    """Ids (n,) as an array of `ndim` dims that says something about `dim`."""
    return ids.reshape([-1 if d == dim else 1 for d in range(ndim)])


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        yield from tensors_in(list(tree.values()))
