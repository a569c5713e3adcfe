"""The layer: a convolution of which signs and a few numbers per channel are left."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.core.select import did_you_mean
from lightning_compress.ops.binary_conv2d.operator import binary_conv2d, pack_rows, unpack_rows

Code = Literal["pm1", "01"]
Activation = Literal["none", "hardtanh", "prelu"]


class BinaryConv2d(nn.Module):
    """A convolution with binary weights and binary inputs, for inference.

        y = activation(scale * conv(sign(x - mean(x)), w) + shift + residual)

    The mean is that of each sample, in float64 (`sample_mean`); sign(0) = +1; padding adds nothing to the sum. Every
    backend gives the same integers. There are no gradients.

    Args:
        packed: uint8 (C_out, ceil(n / 8)), n = C_in / groups * kh * kw: `pack_rows(weight.flatten(1) > 0)`, so the bits
            of one filter in the order (C_in / groups, kh, kw), the first one lowest, each filter in bytes of its own.
        scale: (C_out,): the weights' alpha, times that of a BatchNorm that follows.
        shift: (C_out,) or None.
        in_channels: C_in.
        out_channels: C_out.
        kernel_size, stride, padding: a number, or one each for height and width.
        groups: as in `nn.Conv2d`.
        center: subtract each sample's mean before the sign is taken.
        code: ``"pm1"``, weights -1 and +1, or ``"01"``, weights 0 and +1.
        activation: ``"none"``, ``"hardtanh"`` (clamp to [-1, 1]) or ``"prelu"``.
        slope: (C_out,) of the PReLU.

    Raises:
        ValueError: sizes or dtypes that do not belong together, an unknown `code` or `activation`.

    >>> conv = BinaryConv2d.from_signs(torch.tensor([1.0, -1, 1, 1]).view(1, 4, 1, 1), scale=torch.tensor([0.5]))
    >>> conv(torch.tensor([3.0, 2, -1, 0]).view(1, 4, 1, 1)).item()  # 0.5 * (1 - 1 - 1 + 1)
    0.0
    """

    packed: Tensor
    scale: Tensor
    shift: Tensor | None
    slope: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        *,
        center: bool = False,
        code: Code = "pm1",
        activation: Activation = "none",
        slope: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size, "kernel_size", 1)
        self.stride = _pair(stride, "stride", 1)
        self.padding = _pair(padding, "padding", 0)
        self.groups = groups
        self.center = center
        self.code: Code = _one_of(code, "code", ("pm1", "01"))
        self.activation: Activation = _one_of(activation, "activation", ("none", "hardtanh", "prelu"))
        if groups < 1 or in_channels < 1 or in_channels % groups or out_channels < 1 or out_channels % groups:
            raise ValueError(f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}.")
        if packed.dtype != torch.uint8 or tuple(packed.shape) != (out_channels, -(-self.bits_per_filter // 8)):
            raise ValueError(
                f"packed: expected uint8 of shape {(out_channels, -(-self.bits_per_filter // 8))}, got "
                f"{packed.dtype} of {tuple(packed.shape)}."
            )
        if (slope is None) == (activation == "prelu"):
            raise ValueError(f"slope: activation={activation!r} takes {'one' if slope is None else 'none'}.")
        self.register_buffer("packed", packed.detach().clone())
        for name, value in (("scale", scale), ("shift", shift), ("slope", slope)):
            if value is not None and tuple(value.shape) != (out_channels,):
                raise ValueError(f"{name}: expected shape {(out_channels,)}, got {tuple(value.shape)}.")
            self.register_buffer(name, None if value is None else value.detach().clone().float())

    @classmethod
    def from_signs(
        cls,
        weight: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        center: bool = False,
        code: Code = "pm1",
        activation: Activation = "none",
        slope: Tensor | None = None,
    ) -> BinaryConv2d:
        """Pack a weight that is binary already.

        Args:
            weight: (C_out, C_in / groups, kh, kw) of -1 and +1, or of 0 and +1 with code ``"01"``.
            scale: (C_out,), 1 if None.

        Raises:
            ValueError: the weight has other values.
        """
        low = -1 if _one_of(code, "code", ("pm1", "01")) == "pm1" else 0
        if weight.ndim != 4 or not bool(((weight == 1) | (weight == low)).all()):
            raise ValueError(f"weight: code={code!r} takes (C_out, C_in / groups, kh, kw) of {low} and 1.")
        out_channels, channels, *kernel_size = weight.shape
        return cls(
            pack_rows(weight.flatten(1) > 0), weight.new_ones(out_channels) if scale is None else scale, shift,
            channels * groups, out_channels, tuple(kernel_size), stride, padding, groups,
            center=center, code=code, activation=activation, slope=slope,
        )  # fmt: skip

    @property
    def bits_per_filter(self) -> int:
        return self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]

    @property
    def weight(self) -> Tensor:
        """The weight unpacked, float32 (C_out, C_in / groups, kh, kw)."""
        bits = unpack_rows(self.packed, self.bits_per_filter).float()
        return (bits if self.code == "01" else 2 * bits - 1).view(self.out_channels, -1, *self.kernel_size)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W'); `residual` of the output's shape is added before the activation."""
        return binary_conv2d(
            x, self.packed, self.scale, self.shift, self.slope, residual, self.kernel_size, self.stride, self.padding,
            self.groups, self.center, self.code == "01", self.activation == "hardtanh",
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, groups={self.groups}, center={self.center}, code={self.code!r}, "
            f"activation={self.activation!r}"
        )


def _pair(value: int | tuple[int, ...], name: str, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{name}={value!r}: choose a number from {least}, or two.")
    return pair[0], pair[1]


def _one_of(value: Any, name: str, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}.{did_you_mean(value, choices)}")
    return value
