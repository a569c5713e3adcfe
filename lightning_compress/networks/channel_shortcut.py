"""The parameter-free residual shortcut (option A) as a module whose channel map survives pruning.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385, section 4.2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelShortcut(nn.Module):
    """Subsample a feature map in space and place its channels among ``out_channels``, the rest being zero.

    The map is explicit: ``select`` is a bool buffer of shape ``(out_channels, in_channels)``; output channel
    ``o`` is a copy of input channel ``i`` where ``select[o, i]``, and zero where its row is empty. A dense
    shortcut centres the input: channel ``i`` goes to ``i + (out_channels - in_channels) // 2``, dropped where
    that is out of range. Whoever removes channels slices rows and columns of ``select`` and then calls
    :meth:`after_surgery`. The buffer is not saved: a state dict of the network holds no key of its shortcuts.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; may be smaller than ``in_channels``.
        stride: keep every ``stride``-th row and column.

    Raises:
        ValueError: if an argument is less than 1.

    Example:
        >>> shortcut = ChannelShortcut(2, 4, stride=2)
        >>> shortcut(torch.ones(1, 2, 8, 8)).sum((0, 2, 3))
        tensor([ 0., 16., 16.,  0.])
    """

    select: Tensor

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        for argument, value in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("stride", stride),
        ):
            if value < 1:
                raise ValueError(f"{argument} must be at least 1, got {value}.")
        self.stride = stride
        # Output o copies input o - offset; None once surgery has left a map that no padding can express.
        self.offset: int | None = (out_channels - in_channels) // 2
        self.register_buffer("select", _diagonal(out_channels, in_channels, self.offset), persistent=False)
        self.register_buffer("index", None, persistent=False)
        self.register_buffer("alive", None, persistent=False)

    @property
    def in_channels(self) -> int:
        return self.select.shape[1]

    @property
    def out_channels(self) -> int:
        return self.select.shape[0]

    def after_surgery(self) -> None:
        """Recompute what is derived from ``select``. Call it after every change of that buffer.

        Raises:
            ValueError: if an output channel copies more than one input channel.
        """
        select = self.select
        if not select.is_meta and (select.sum(1) > 1).any():
            raise ValueError("select has a row with more than one True: an output channel copies one channel at most.")
        alive, index = select.any(1), select.long().argmax(1)
        self.offset, self.index, self.alive = None, index, alive[:, None, None]
        if not select.is_meta:
            first = int(alive.long().argmax())
            offset = first - int(index[first])
            if torch.equal(select, _diagonal(self.out_channels, self.in_channels, offset, select.device)):
                self.offset, self.index, self.alive = offset, None, None  # type: ignore[assignment]

    def trace_channels(self, trace: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        """Tell the channel graph that input and output are narrowed apart: columns and rows of ``select``."""
        trace.tie(trace.axis(args[0], 1), trace.axis(self.select, 1))
        rows = trace.axis(self.select, 0)
        trace.put(out, [] if rows is None else [rows.reshape(1, -1, 1, 1)])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H / stride), ceil(W / stride))``."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.offset is None:
            return x.index_select(1, self.index) * self.alive
        behind = self.out_channels - self.in_channels - self.offset
        if self.offset == behind == 0:
            return x
        return F.pad(x, (0, 0, 0, 0, self.offset, behind))  # a negative pad crops

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


def _diagonal(rows: int, columns: int, offset: int, device: torch.device | None = None) -> Tensor:
    """Bool (rows, columns) with True where ``row - column == offset``."""
    row = torch.arange(rows, device=device)[:, None]
    return row - torch.arange(columns, device=device) == offset
