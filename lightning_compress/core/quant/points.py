"""Places in a network where an activation may be quantised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

When = Literal["always", "default", "integer"]


class QuantizationPoint(nn.Module):
    """Passes its input on; a quantiser may take its place, or be called behind it.

    A network that knows where its activations are to be quantised (a shortcut, a sum, an input that several layers
    share) says so with these. They compute nothing and have no state.

    Args:
        when: ``"always"``; ``"default"``: only where the network is quantised as its paper's code does;
            ``"integer"``: only where every quantised layer has to receive codes, as integer inference needs.
        feeds: the layers that read what comes out, by their names in the module that holds the point.

    >>> QuantizationPoint("integer", feeds=["body.0"])
    QuantizationPoint(when='integer', feeds=('body.0',))
    """

    def __init__(self, when: When = "always", feeds: Sequence[str] = ()) -> None:
        super().__init__()
        self.when: When = when
        self.feeds = tuple(feeds)

    def forward(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return f"when={self.when!r}, feeds={self.feeds!r}"
