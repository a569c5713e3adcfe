"""The operator on the GPU, in Triton (the extra ``kernels``).

1. Signs become words of 32 channels, a plane per word: (N, words, H, W).
2. An implicit matrix product: a program makes `FILTERS` filters times `POSITIONS` outputs of one image. For every tap
   and word, products are counted where the position lies inside; then comes whatever follows the sum.

Population counts run at 16 per clock and multiprocessor, so that this wins where memory is what takes the time: few
images, many weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary
from triton.runtime.interpreter import InterpretedFunction

from lightning_compress.core.quant.binary import sample_mean
from lightning_compress.ops.binary_conv2d.operator import check_others, check_sizes, unpack_rows, version

POSITIONS = 64
FILTERS = 32
BITS = 32  # of a word


@triton.jit
def _popcount(x, NATIVE: tl.constexpr):
    if NATIVE:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 0x3F


@triton.jit
def _pack(
    x, threshold, words, group_channels, group_words, channels, positions,
    POSITIONS: tl.constexpr, BITS: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    word = tl.program_id(1)
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    bit = tl.arange(0, BITS)
    channel = word % group_words * BITS + bit  # in its group
    there = (position < positions)[:, None] & (channel < group_channels)[None, :]
    channel += word // group_words * group_channels
    value = tl.load(x + (image * channels + channel[None, :]) * positions + position[:, None], there, 0.0)
    limit = 0.0
    if CENTER:
        limit = tl.load(threshold + image)
    bits = ((value >= limit) & there).to(tl.int32) << bit[None, :]
    to = words + (image * tl.num_programs(1) + word) * positions + position
    tl.store(to, tl.sum(bits, 1), position < positions)


@triton.jit
def _multiply(
    words, weight, scale, shift, slope, residual, y, height, width, filters, group_filters, group_channels, groups,
    group_words, out_height, out_width, stride_y, stride_x, pad_y, pad_x, kernel_height, kernel_width,
    POSITIONS: tl.constexpr, FILTERS: tl.constexpr, ZERO_ONE: tl.constexpr, SHIFT: tl.constexpr, SLOPE: tl.constexpr,
    RESIDUAL: tl.constexpr, HARDTANH: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    tiles = tl.cdiv(group_filters, FILTERS)
    group = tl.program_id(1) // tiles
    filter = tl.program_id(1) % tiles * FILTERS + tl.arange(0, FILTERS)
    known = filter < group_filters
    filter += group * group_filters
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    line = position // out_width * stride_y - pad_y
    column = position % out_width * stride_x - pad_x
    words += (image * groups + group) * group_words * height * width
    taps = kernel_height * kernel_width
    differ = tl.zeros((POSITIONS, FILTERS), tl.int32)
    products = tl.zeros((POSITIONS,), tl.int32)
    positive = tl.zeros((POSITIONS,), tl.int32)
    for tap in range(0, taps):
        at_line = line + tap // kernel_width
        at_column = column + tap % kernel_width
        inside = (at_line >= 0) & (at_line < height) & (at_column >= 0) & (at_column < width)
        inside = inside & (position < out_height * out_width)
        products += tl.where(inside, group_channels, 0)
        for word in range(0, group_words):
            a = tl.load(words + (word * height + at_line) * width + at_column, inside, 0)
            w = tl.load(weight + (filter * taps + tap) * group_words + word, known, 0)
            count = _popcount(a[:, None] ^ w[None, :], NATIVE)
            differ += tl.where(inside[:, None], count, 0)
            if ZERO_ONE:
                positive += _popcount(a, NATIVE)
    total = products[:, None] - 2 * differ
    if ZERO_ONE:  # half of that and half of the sum of the inputs
        total = (total + 2 * positive[:, None] - products[:, None]) // 2
    result = total.to(tl.float32) * tl.load(scale + filter, known, 0.0)[None, :]
    if SHIFT:
        result += tl.load(shift + filter, known, 0.0)[None, :]
    to = (image * filters + filter)[None, :] * out_height * out_width + position[:, None]
    there = known[None, :] & (position < out_height * out_width)[:, None]
    if RESIDUAL:
        result += tl.load(residual + to, there, 0.0)
    if SLOPE:
        result = tl.where(result > 0, result, result * tl.load(slope + filter, known, 0.0)[None, :])
    if HARDTANH:
        result = tl.minimum(tl.maximum(result, -1.0), 1.0)
    tl.store(y + to, result, there)


_words: WeakIdKeyDictionary = WeakIdKeyDictionary()  # packed weight -> (version, the same as words)


def _weight_words(packed: Tensor, channels: int, taps: int) -> Tensor:
    """The rows' bits as int32 (filters, taps, ceil(channels / 32)); bit c % 32 of word c // 32 is channel c."""
    made = _words.get(packed)
    if made is None or made[0] != version(packed):
        bits = unpack_rows(packed, channels * taps).view(len(packed), channels, taps).transpose(1, 2)
        bits = F.pad(bits, (0, -channels % BITS)).unflatten(2, (-1, BITS)).int()
        words = (bits << torch.arange(BITS, dtype=torch.int32, device=packed.device)).sum(3, dtype=torch.int32)
        made = _words[packed] = (version(packed), words)
    return made[1]


def run_triton(
    x: Tensor, packed: Tensor, scale: Tensor, shift: Tensor | None, slope: Tensor | None, residual: Tensor | None,
    kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int, center: bool,
    zero_one: bool, hardtanh: bool,
) -> Tensor:  # fmt: skip
    """`binary_conv2d` on the GPU; arguments as there."""
    shape = (len(x), *check_sizes(x, packed, kernel_size, stride, padding, groups))
    check_others(shape, scale, shift, slope, residual)
    values = x.float().contiguous()
    images, channels, height, width = x.shape
    group_channels, group_filters = channels // groups, len(packed) // groups
    group_words = triton.cdiv(group_channels, BITS)
    weight = _weight_words(packed, group_channels, kernel_size[0] * kernel_size[1])
    words = torch.empty(images, groups * group_words, height, width, dtype=torch.int32, device=x.device)
    threshold = sample_mean(x).flatten() if center else values
    _pack[(triton.cdiv(height * width, POSITIONS), groups * group_words, images)](
        values, threshold, words, group_channels, group_words, channels, height * width,
        POSITIONS=POSITIONS, BITS=BITS, CENTER=center,
    )  # fmt: skip
    y = values.new_empty(shape)
    others = [values if t is None else t.float().contiguous() for t in (scale, shift, slope, residual)]
    grid = (triton.cdiv(shape[2] * shape[3], POSITIONS), groups * triton.cdiv(group_filters, FILTERS), images)
    native = torch.version.hip is None and not isinstance(_multiply, InterpretedFunction)
    _multiply[grid](
        words, weight, *others, y, height, width, len(packed), group_filters, group_channels, groups, group_words,
        *shape[2:], *stride, *padding, *kernel_size, POSITIONS=POSITIONS, FILTERS=FILTERS, ZERO_ONE=zero_one,
        SHIFT=shift is not None, SLOPE=slope is not None, RESIDUAL=residual is not None, HARDTANH=hardtanh,
        NATIVE=native,
    )  # fmt: skip
    return y.to(x.dtype)
