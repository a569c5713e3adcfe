r"""LSQ: quantise to multiples of a step size that is learnt.

Esser, McKinstry, Bablani, Appuswamy, Modha, "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153.

    v_bar = clamp(v / s, -Q_N, Q_P),    v_hat = s round(v_bar)

    signed, b bits:  Q_N = 2^(b-1), Q_P = 2^(b-1) - 1          unsigned:  Q_N = 0, Q_P = 2^b - 1

    dv_hat/dv = 1 for -Q_N < v/s < Q_P, else 0
    dv_hat/ds = round(v/s) - v/s inside,  -Q_N below,  Q_P above;   times g = 1 / sqrt(N Q_P)

with N weights of the layer (of the channel), or N features of one sample. At first s = 2 mean|v| / sqrt(Q_P).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_compress.core.quant.integer import IntegerInput, IntegerWeight
from lightning_compress.core.quant.observe import Moments
from lightning_compress.core.quant.rounding import dot_as, fuses, pass_inside, round_ste

SMALLEST_STEP = 1e-6


def limits(bits: int, *, signed: bool) -> tuple[int, int]:
    """(-Q_N, Q_P).

    Raises:
        ValueError: signed with one bit, which would leave -1 and 0, and a gradient scale of 1 / 0.

    >>> limits(4, signed=True), limits(4, signed=False)
    ((-8, 7), (0, 15))
    """
    if signed and bits < 2:
        raise ValueError(f"LSQ: bits={bits} cannot hold a sign and a value; 2 or more can.")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def first_step(mean_magnitude: Tensor, highest: int) -> Tensor:
    """s = 2 mean|v| / sqrt(Q_P), with which training starts."""
    return (2 * mean_magnitude / math.sqrt(highest)).clamp(min=SMALLEST_STEP)


def quantize_lsq(x: Tensor, step: Tensor, lowest: int, highest: int, count: int) -> Tensor:
    """Round to the multiples lowest * s ... highest * s.

    Args:
        x: any shape.
        step: s, one element or what broadcasts to x.
        lowest, highest: -Q_N and Q_P.
        count: N, of the scale of the gradient of s.

    Returns:
        float32 of x's shape, with gradients to x and `step`.
    """
    scale = 1 / math.sqrt(count * highest)
    if fuses(x, step):
        return _LSQ.apply(x, step, lowest, highest, scale)
    if step.requires_grad:
        step = step * scale + (step - step * scale).detach()
    step = step.clamp(min=SMALLEST_STEP)
    return round_ste((x / step).clamp(lowest, highest)) * step


class _LSQ(torch.autograd.Function):
    """The formulas of this file in few passes over memory; only the input and the result are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, lowest: int, highest: int, scale: float) -> Tensor:
        step = step.clamp(min=SMALLEST_STEP)
        y = torch.div(x, step).round_().clamp_(lowest, highest).mul_(step)
        ctx.save_for_backward(x, step, y)
        ctx.limits, ctx.scale = (lowest, highest), scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, step, y = ctx.saved_tensors
        lowest, highest = ctx.limits
        inside = pass_inside(grads[0], x, lowest * step, highest * step, bounds=False)
        for_step = None
        if ctx.needs_input_grad[1]:
            for_step = (dot_as(grads[0], y, step) - dot_as(inside, x, step)) * (ctx.scale / step)
        return inside.to(x.dtype) if ctx.needs_input_grad[0] else None, for_step, None, None, None


class _Step(nn.Module):
    """The learnt step of an LSQ quantiser.

    Attributes:
        step: s; (1,), or for each output channel (C_out, 1, ...).
    """

    def __init__(self, bits: int, step: Tensor, *, signed: bool) -> None:
        super().__init__()
        self.bits = bits
        self.lowest, self.highest = limits(bits, signed=signed)
        self.step = nn.Parameter(step)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.lowest < 0}"


class LSQWeight(_Step):
    """Quantise a weight to multiples of s; a parametrisation.

    Args:
        weight: (C_out, ...), from which s is taken.
        bits: b, 2 or more.
        per_channel: one s for each output channel.
    """

    def __init__(self, weight: Tensor, bits: int, *, per_channel: bool = False) -> None:
        size = weight.detach().float().abs()
        size = size.flatten(1).mean(1).view(-1, *[1] * (weight.ndim - 1)) if per_channel else size.mean().view(1)
        super().__init__(bits, first_step(size, limits(bits, signed=True)[1]), signed=True)

    def forward(self, weight: Tensor) -> Tensor:
        count = weight.numel() // self.step.numel()
        return quantize_lsq(weight, self.step, self.lowest, self.highest, count)

    def place(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Where weights lie in their range: (v/s + Q_N) / (Q_N + Q_P), not clipped, and the codes 0 ... Q_N + Q_P."""
        position = weight / self.step.clamp(min=SMALLEST_STEP)
        codes = position.round().clamp(self.lowest, self.highest) - self.lowest
        return (position - self.lowest) / (self.highest - self.lowest), codes

    @torch.no_grad()
    def integer(self, weight: Tensor) -> IntegerWeight:
        codes = (self.place(weight)[1] + self.lowest).to(torch.int16)
        scale = self.step.detach().clamp(min=SMALLEST_STEP).flatten()
        return IntegerWeight(codes, scale if len(scale) > 1 else scale[0], self.bits)


class LSQInput(_Step):
    """Quantise a layer's input to multiples of s.

    Args:
        bits: b.
        signed: whether the input has negative values, which would all become zero otherwise.
    """

    def __init__(self, bits: int, *, signed: bool) -> None:
        super().__init__(bits, torch.ones(1), signed=signed)

    def forward(self, x: Tensor) -> Tensor:
        return quantize_lsq(x, self.step, self.lowest, self.highest, math.prod(x.shape[1:]))

    @torch.no_grad()
    def start(self, moments: Moments) -> None:
        """Take s from inputs."""
        self.step.copy_(first_step(torch.tensor(moments.mean_magnitude), self.highest))

    def integer(self) -> IntegerInput:
        step = self.step.detach().clamp(min=SMALLEST_STEP).item()
        return IntegerInput(0.0, step, step, self.lowest, self.highest, self.bits)
