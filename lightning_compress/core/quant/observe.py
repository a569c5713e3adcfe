"""What quantisers have to know of the values that they will get, before training begins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class Moments:
    """Statistics of all values seen so far, summed in float64.

    Attributes:
        count: of values.
        minimum: the smallest.
    """

    def __init__(self) -> None:
        self.count = 0
        self.minimum = math.inf
        self._sum = self._magnitude = self._squares = 0.0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """See more values, of any shape."""
        x = x.detach().flatten().double()
        if not len(x):
            return
        self.count += len(x)
        self.minimum = min(self.minimum, x.min().item())
        self._sum += x.sum().item()
        self._magnitude += x.abs().sum().item()
        self._squares += x.dot(x).item()

    @property
    def mean_magnitude(self) -> float:
        """Mean of the absolute values."""
        return self._magnitude / self.count

    @property
    def deviation(self) -> float:
        """The unbiased standard deviation; 0 of fewer than two values."""
        variance = (self._squares - self._sum**2 / self.count) / max(1, self.count - 1)
        return math.sqrt(max(0.0, variance))


def observe_inputs(
    module: nn.Module, watched: Mapping[str, nn.Module], batches: Iterable[Tensor]
) -> dict[str, Moments]:
    """Run a network on batches, without gradients, and take the statistics of what goes into some of its parts.

    A part with a method ``start(moments)`` is told at once, before it computes: it is then ready for its first value,
    and the parts behind it see what it makes of it. Modes are as they are, so batch norms in training mode learn.

    Args:
        module: the network.
        watched: parts of it, by name.
        batches: its inputs.

    Returns:
        name -> statistics of the first positional input, of those that were reached.
    """
    seen: dict[str, Moments] = {}

    def see(name: str, part: nn.Module, args: tuple[Any, ...]) -> None:
        moments = seen.setdefault(name, Moments())
        moments.update(args[0])
        if hasattr(part, "start"):
            part.start(moments)  # type: ignore[operator]

    with torch.no_grad(), ExitStack() as hooks:
        for name, part in watched.items():
            hooks.callback(part.register_forward_pre_hook(partial(see, name)).remove)
        for batch in batches:
            module(batch)
    return seen
