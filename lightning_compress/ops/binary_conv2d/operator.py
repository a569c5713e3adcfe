"""The operator: how its weights are packed, what it computes, and who computes it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from ctypes import CDLL, c_int, c_int64, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from lightning_compress.core.quant.binary import sample_mean
from lightning_compress.ops.native import library

SOURCE = Path(__file__).with_name("kernel.cpp")
SIZES = 16  # sizes of images for which a layer's weights stay laid out


def pack_rows(bits: Tensor) -> Tensor:
    """Pack each row into bytes of its own: bool (O, n) -> uint8 (O, ceil(n / 8)).

    Column j is bit j % 8, counted from the lowest, of byte j // 8; what is left of the last byte is 0.

    >>> pack_rows(torch.tensor([[True, False, False, False, False, False, False, False, True]]))
    tensor([[1, 1]], dtype=torch.uint8)
    """
    rows, n = bits.shape
    digits = F.pad(bits.to(torch.uint8), (0, -n % 8)).view(rows, -1, 8)
    return (digits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(2, dtype=torch.uint8)


def unpack_rows(packed: Tensor, n: int) -> Tensor:
    """What :func:`pack_rows` packed: uint8 (O, ceil(n / 8)) -> bool (O, n).

    Raises:
        ValueError: rows of n bits have another length.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != -(-n // 8):
        raise ValueError(
            f"packed: rows of {n} bits take {-(-n // 8)} bytes of uint8, got {tuple(packed.shape)} of {packed.dtype}."
        )
    digits = (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return digits.flatten(1)[:, :n].bool()


NAME = "lightning_compress::binary_conv2d"
# defined by its schema, as `torch.library.custom_op` would take as long as a third of a small layer
torch.library.define(
    NAME,
    "(Tensor x, Tensor packed, Tensor scale, Tensor? shift, Tensor? slope, Tensor? residual, int[] kernel_size, "
    "int[] stride, int[] padding, int groups, bool center, bool zero_one, bool hardtanh) -> Tensor",
)


def binary_conv2d(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    slope: Tensor | None,
    residual: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    center: bool,
    zero_one: bool,
    hardtanh: bool,
) -> Tensor:
    """Convolve the signs of the input with binary weights. Without gradients.

    On the CPU it runs compiled code, which is made at the first call, where there is a compiler; on CUDA it runs
    Triton, where that is installed. Everything else becomes a convolution of -1 and +1 in float32.

    Args:
        x: (N, C_in, H, W), of any float type; computed in float32.
        packed: uint8 (C_out, ceil(n / 8)) with n = C_in / groups * kh * kw; `pack_rows` of the weight's rows, a bit
            for every +1.
        scale: float32 (C_out,).
        shift: float32 (C_out,) or None.
        slope: float32 (C_out,) of a PReLU that follows, or None.
        residual: added before the activation; of the output's shape, or None.
        kernel_size, stride, padding: (2,).
        groups: as in `torch.nn.functional.conv2d`.
        center: whether `sample_mean` is subtracted before the sign is taken.
        zero_one: whether the weights are {0, +1}, not {-1, +1}.
        hardtanh: whether a clamp to [-1, 1] follows.

    Returns:
        (N, C_out, H', W') in the input's dtype.

    Raises:
        ValueError: sizes that do not belong together.
    """
    return torch.ops.lightning_compress.binary_conv2d.default(
        x, packed, scale, shift, slope, residual, kernel_size, stride, padding, groups, center, zero_one, hardtanh
    )


def _reference(
    x: Tensor, packed: Tensor, scale: Tensor, shift: Tensor | None, slope: Tensor | None, residual: Tensor | None,
    kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int, center: bool,
    zero_one: bool, hardtanh: bool,
) -> Tensor:  # fmt: skip
    shape = (len(x), *check_sizes(x, packed, kernel_size, stride, padding, groups))
    check_others(shape, scale, shift, slope, residual)
    channels = x.shape[1] // groups
    bits = unpack_rows(packed, channels * kernel_size[0] * kernel_size[1]).float()
    weight = (bits if zero_one else 2 * bits - 1).view(-1, channels, *kernel_size)
    signs = torch.where(x.float() >= (sample_mean(x) if center else 0.0), 1.0, -1.0)
    y = F.conv2d(signs, weight, None, list(stride), list(padding), 1, groups) * _per_channel(scale)
    if shift is not None:
        y = y + _per_channel(shift)
    if residual is not None:
        y = y + residual.float()
    if slope is not None:
        y = torch.where(y > 0, y, y * _per_channel(slope))
    if hardtanh:
        y = y.clamp(-1, 1)
    return y.to(x.dtype)


def _per_channel(values: Tensor) -> Tensor:
    return values.float().view(-1, 1, 1)


@torch.library.register_fake(NAME)
def _(
    x: Tensor, packed: Tensor, scale: Tensor, shift: Tensor | None, slope: Tensor | None, residual: Tensor | None,
    kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], *_: Any,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], packed.shape[0], *output_size(x.shape[2:], kernel_size, stride, padding))


@torch.library.impl(NAME, "cpu")
def _(x: Tensor, *arguments: Any) -> Tensor:
    code = compiled_code() if x.numel() else None
    return _reference(x, *arguments) if code is None else run_compiled(code, x, *arguments)


@torch.library.impl(NAME, "cuda")
def _(x: Tensor, *arguments: Any) -> Tensor:
    if x.numel() == 0 or not find_spec("triton"):
        return _reference(x, *arguments)
    from lightning_compress.ops.binary_conv2d.gpu import run_triton

    return run_triton(x, *arguments)


def output_size(
    size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, ...]:
    """(H, W) -> (H', W')."""
    return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel_size, stride, padding, strict=True))


def check_sizes(
    x: Tensor, packed: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int
) -> tuple[int, ...]:  # fmt: skip
    """The shape of one sample of the output.

    Compiled code reads and writes where these sizes say, and they may come from a file.

    Raises:
        ValueError: sizes that do not belong together.
    """
    channels, filters = x.shape[1], len(packed)
    if channels % groups or filters % groups:
        raise ValueError(f"groups={groups} must divide the channels, {channels}, and the filters, {filters}.")
    n = channels // groups * kernel_size[0] * kernel_size[1]
    if packed.dtype != torch.uint8 or packed.shape != (filters, -(-n // 8)):
        raise ValueError(
            f"packed: rows of {n} bits take {-(-n // 8)} bytes of uint8, got {tuple(packed.shape)} of {packed.dtype}."
        )
    shape = (filters, *output_size(x.shape[2:], kernel_size, stride, padding))
    if min(shape) < 1:
        raise ValueError(f"x: {tuple(x.shape)} with padding {tuple(padding)} is smaller than {tuple(kernel_size)}.")
    return shape


def check_others(
    shape: tuple[int, ...], scale: Tensor, shift: Tensor | None, slope: Tensor | None, residual: Tensor | None
) -> None:
    """The same for what comes after the sum, for outputs of `shape`.

    Raises:
        ValueError: a tensor of another size.
    """
    for name, value in (("scale", scale), ("shift", shift), ("slope", slope)):
        if value is not None and value.numel() != shape[1]:
            raise ValueError(f"{name}: expected {shape[1]} numbers, got {value.numel()}.")
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual: expected shape {shape}, got {tuple(residual.shape)}.")


@cache
def compiled_code(target: str = "native") -> CDLL | None:
    """The compiled kernel; None where there is no compiler."""
    code = library(SOURCE, target)
    if code is not None:
        tensor, size, small = c_void_p, c_int64, c_int
        code.binary_conv2d_plan.restype = tensor
        code.binary_conv2d_plan.argtypes = [tensor, *[size] * 11, small]
        code.binary_conv2d_run.argtypes = [*[tensor] * 7, size, *[small] * 3]
        code.binary_conv2d_run.restype = None
        code.binary_conv2d_multiply.argtypes = [tensor]
        code.binary_conv2d_multiply.restype = None
        code.binary_conv2d_free.argtypes = [tensor]
        code.binary_conv2d_free.restype = None
    return code


class Plan:
    """The weights in the order in which they are used for images of one size; memory of the compiled code."""

    def __init__(
        self, code: CDLL, x: Tensor, packed: Tensor, kernel_size: Sequence[int], stride: Sequence[int],
        padding: Sequence[int], groups: int, zero_one: bool,
    ) -> None:  # fmt: skip
        self.output = check_sizes(x, packed, kernel_size, stride, padding, groups)
        self.version = version(packed)
        self.handle = code.binary_conv2d_plan(
            packed.contiguous().data_ptr(), *x.shape[1:], len(packed), groups, *kernel_size, *stride, *padding, zero_one
        )
        self.run = code.binary_conv2d_run
        weakref.finalize(self, code.binary_conv2d_free, self.handle)

    def __call__(
        self, x: Tensor, scale: Tensor, shift: Tensor | None, slope: Tensor | None, residual: Tensor | None,
        center: bool, hardtanh: bool,
    ) -> Tensor:  # fmt: skip
        """Convolve images of that size."""
        shape = (len(x), *self.output)
        check_others(shape, scale, shift, slope, residual)
        values, scale = x.float().contiguous(), scale.float().contiguous()
        shift, slope, residual = (t if t is None else t.float().contiguous() for t in (shift, slope, residual))
        y = values.new_empty(shape)
        self.run(
            self.handle, values.data_ptr(), scale.data_ptr(), shift if shift is None else shift.data_ptr(),
            slope if slope is None else slope.data_ptr(), residual if residual is None else residual.data_ptr(),
            y.data_ptr(), len(x), center, hardtanh, torch.get_num_threads(),
        )  # fmt: skip
        return y.to(x.dtype)


_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()  # packed weight -> what depends on it; gone with it


def run_compiled(
    code: CDLL, x: Tensor, packed: Tensor, scale: Tensor, shift: Tensor | None, slope: Tensor | None,
    residual: Tensor | None, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int,
    center: bool, zero_one: bool, hardtanh: bool,
) -> Tensor:  # fmt: skip
    """`binary_conv2d` by the compiled code."""
    plans: dict[Any, Plan] = _plans.setdefault(packed, {})
    key = (id(code), x.shape[1:], *kernel_size, *stride, *padding, groups, zero_one)
    plan = plans.get(key)
    if plan is None or plan.version != version(packed):
        if len(plans) >= SIZES:
            plans.pop(next(iter(plans)))
        plan = plans[key] = Plan(code, x, packed, kernel_size, stride, padding, groups, zero_one)
    return plan(x, scale, shift, slope, residual, center, hardtanh)


def version(packed: Tensor) -> int:
    """Changes whenever the weight is written to; inference tensors cannot be."""
    return 0 if packed.is_inference() else packed._version
