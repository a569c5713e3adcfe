"""The operator on the GPU, in Triton (the extra ``kernels``).

An implicit matrix product: a program makes K filters times `POSITIONS` outputs. The non-zeros of its block are the
inner dimension; for each, one shifted row of the input is gathered. With K >= 16 it is computed in tiles, in float32
throughout; with fewer filters per block, every non-zero is an outer product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

POSITIONS = 128
INNER = 16  # non-zeros at a time


@triton.jit
def _multiply(
    x, taps, bounds, weight, filters, bias, y, channels, height, width, out_channels, out_height, out_width,
    BLOCK: tl.constexpr, POSITIONS: tl.constexpr, INNER: tl.constexpr, STRIDE: tl.constexpr, BIAS: tl.constexpr,
    RELU: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    image = tl.program_id(2)
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    line = position // out_width * STRIDE - 1
    column = position % out_width * STRIDE - 1
    inside = position < out_height * out_width
    x += image.to(tl.int64) * channels * height * width
    filter_of = tl.load(filters + block * BLOCK + tl.arange(0, BLOCK))
    total = tl.zeros((BLOCK, POSITIONS), tl.float32)
    begin = tl.load(bounds + block)
    end = tl.load(bounds + block + 1)
    if BLOCK >= 16:
        for first in range(begin, end, INNER):
            which = first + tl.arange(0, INNER)
            there = which < end
            tap = tl.load(taps + which, there, 0)
            at_line = line[None, :] + (tap % 9 // 3)[:, None]
            at_column = column[None, :] + (tap % 3)[:, None]
            readable = there[:, None] & inside[None, :] & (at_line >= 0) & (at_line < height)
            readable = readable & (at_column >= 0) & (at_column < width)
            rows = tl.load(x + ((tap // 9)[:, None] * height + at_line) * width + at_column, readable, 0.0)
            columns = tl.load(weight + which[None, :] * BLOCK + tl.arange(0, BLOCK)[:, None], there[None, :], 0.0)
            total += tl.dot(columns, rows, input_precision="ieee")
    else:
        for which in range(begin, end):
            tap = tl.load(taps + which)
            at_line = line + tap % 9 // 3
            at_column = column + tap % 3
            readable = inside & (at_line >= 0) & (at_line < height) & (at_column >= 0) & (at_column < width)
            row = tl.load(x + (tap // 9 * height + at_line) * width + at_column, readable, 0.0)
            total += tl.load(weight + which * BLOCK + tl.arange(0, BLOCK))[:, None] * row[None, :]
    if BIAS:
        total += tl.load(bias + filter_of, filter_of >= 0, 0.0)[:, None]
    if RELU:
        total = tl.maximum(total, 0.0)
    to = (image.to(tl.int64) * out_channels + filter_of)[:, None] * out_height * out_width + position[None, :]
    tl.store(y + to, total, (filter_of >= 0)[:, None] & inside[None, :])


def run_triton(
    x: Tensor, taps: Tensor, bounds: Tensor, weight: Tensor, filters: Tensor, bias: Tensor | None, out_channels: int,
    stride: int, relu: bool,
) -> Tensor:  # fmt: skip
    """`pattern_conv2d` for float32 on the GPU; arguments as there. Blocks of any power of two."""
    x = x.contiguous()
    images, channels, height, width = x.shape
    out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    y = torch.empty(images, out_channels, out_height, out_width, device=x.device, dtype=x.dtype)
    grid = (triton.cdiv(out_height * out_width, POSITIONS), len(bounds) - 1, images)
    _multiply[grid](
        x, taps, bounds, weight.contiguous(), filters, weight if bias is None else bias.contiguous(), y,
        channels, height, width, out_channels, out_height, out_width,
        BLOCK=weight.shape[1], POSITIONS=POSITIONS, INNER=INNER, STRIDE=stride, BIAS=bias is not None, RELU=relu,
    )  # fmt: skip
    return y
