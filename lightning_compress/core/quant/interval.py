r"""The interval quantiser: ranges are mapped onto [0, 1] or [-1, 1], and where they begin and end is learnt.

Lee, Kim, Ham, "Network Quantization with Element-wise Gradient Scaling", CVPR 2021, arXiv:2104.00903, without the
scaling; as Zhong et al. use it for "Exploiting the Partly Scratch-off Lottery Ticket for Quantization-Aware Training",
arXiv:2211.08544.

With L = 2^b levels, a learnt range [l, u] and v = (x - l) / (u - l):

    inputs    x_q = round( (L-1) clamp(v, 0, 1) ) / (L-1)                   in [0, 1]
    weights   W_q = 2 (round( (L-1) clamp(v, 0, 1) ) / (L-1) - 1/2)         in [-1, 1]

Nothing scales back: the batch norm behind the layer absorbs it. Rounding passes gradients, clamp those of 0 <= v <= 1:

    dx_q/dx = 1/(u - l),    dx_q/du = -v/(u - l),    dx_q/dl = -(1 - v)/(u - l)       inside; 0 outside

and twice as much for weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_compress.core.quant.integer import IntegerInput, IntegerWeight
from lightning_compress.core.quant.observe import Moments
from lightning_compress.core.quant.rounding import dot_as, fuses, pass_inside, round_ste, sum_as

SMALLEST_RANGE = 1e-5  # of u - l, which a large learning rate could turn round
WIDTH = 3.0  # standard deviations on each side of zero
HALF_NORMAL = math.sqrt(1 - 2 / math.pi)  # the standard deviation of |x| where that of x is 1


def quantize_interval(x: Tensor, lower: Tensor, upper: Tensor, bits: int, *, signed: bool) -> Tensor:
    """Map [lower, upper] onto 2^bits equally spaced values from 0 to 1, or with `signed` from -1 to 1.

    Args:
        x: any shape.
        lower, upper: l and u, one element or what broadcasts to x.

    Returns:
        float32 of x's shape, with gradients to x, `lower` and `upper`.
    """
    if fuses(x, lower, upper):
        return _Interval.apply(x, lower, upper, bits, signed)
    last = 2**bits - 1
    return _value(round_ste(((x - lower) / _step(lower, upper, last)).clamp(0, last)), last, signed)


def _step(lower: Tensor, upper: Tensor, last: int) -> Tensor:
    return (upper - lower).clamp(min=SMALLEST_RANGE) / last


def _value(code: Tensor, last: int, signed: bool) -> Tensor:
    """What the codes 0 ... last stand for."""
    return (2 * code - last) * (1 / last) if signed else code * (1 / last)


class _Interval(torch.autograd.Function):
    """The formulas of this file in few passes over memory; only the input is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lower: Tensor, upper: Tensor, bits: int, signed: bool) -> Tensor:
        ctx.save_for_backward(x, lower, upper)
        ctx.signed = signed
        last = 2**bits - 1
        code = torch.sub(x, lower).div_(_step(lower, upper, last)).round_().clamp_(0, last)
        if signed:
            code.mul_(2).sub_(last)
        return code.mul_(1 / last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, lower, upper = ctx.saved_tensors
        width = (upper - lower).clamp(min=SMALLEST_RANGE)
        inside = pass_inside(grads[0], x, lower, upper, bounds=True)
        slope = (2 if ctx.signed else 1) / width
        for_lower = for_upper = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            total = sum_as(inside, lower)
            by_v = (dot_as(inside, x, lower) - lower * total) / width
            for_lower, for_upper = slope * (by_v - total), -slope * by_v
        return inside.mul_(slope).to(x.dtype) if ctx.needs_input_grad[0] else None, for_lower, for_upper, None, None


class _Ranges(nn.Module):
    """The learnt range of an interval quantiser.

    Attributes:
        lower, upper: l and u; (1,), or for each output channel (C_out, 1, ...).
    """

    def __init__(self, bits: int, lower: Tensor, upper: Tensor) -> None:
        super().__init__()
        self.bits = bits
        self.lower = nn.Parameter(lower)
        self.upper = nn.Parameter(upper)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class IntervalWeight(_Ranges):
    """Quantise a weight to odd multiples of 1 / (2^bits - 1) in [-1, 1]; a parametrisation.

    The range is at first three standard deviations on each side of zero.

    Args:
        weight: (C_out, ...), from which the range is taken.
        bits: b.
        per_channel: one range for each output channel.
    """

    def __init__(self, weight: Tensor, bits: int, *, per_channel: bool = False) -> None:
        weight = weight.detach().float()
        deviation = weight.flatten(1).std(1).view(-1, *[1] * (weight.ndim - 1)) if per_channel else weight.std().view(1)
        super().__init__(bits, -WIDTH * deviation, WIDTH * deviation)

    def forward(self, weight: Tensor) -> Tensor:
        return quantize_interval(weight, self.lower, self.upper, self.bits, signed=True)

    def place(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Where weights lie in their range: v, not clipped, and the codes 0 ... 2^bits - 1; both float32."""
        last = 2**self.bits - 1
        position = (weight - self.lower) / _step(self.lower, self.upper, last)
        return position / last, position.round().clamp(0, last)

    @torch.no_grad()
    def integer(self, weight: Tensor) -> IntegerWeight:
        last = 2**self.bits - 1
        codes = (2 * self.place(weight)[1] - last).to(torch.int16)
        return IntegerWeight(codes, torch.tensor(1 / last, device=weight.device), self.bits)


class IntervalInput(_Ranges):
    """Quantise a layer's input to 2^bits equally spaced values from 0 to 1.

    Args:
        bits: b.
    """

    def __init__(self, bits: int) -> None:
        super().__init__(bits, torch.zeros(1), torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return quantize_interval(x, self.lower, self.upper, self.bits, signed=False)

    @torch.no_grad()
    def start(self, moments: Moments) -> None:
        """Take the range from inputs: from the least to three of the deviations that a normal variable would have if
        these were its absolute values."""
        self.lower.fill_(moments.minimum)
        self.upper.fill_(WIDTH / HALF_NORMAL * moments.deviation)

    def integer(self) -> IntegerInput:
        last = 2**self.bits - 1
        step = _step(self.lower.detach(), self.upper.detach(), last)
        return IntegerInput(self.lower.item(), step.item(), 1 / last, 0, last, self.bits)
