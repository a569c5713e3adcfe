"""Quantised layers computed in integers: the slow, exact reference of what the kernels of an inference engine do.

    a = sum W_codes x_codes            in int32,        y = scale_o * value * a + bias

A chain of layers need not leave the integers. With the batch norm and the next layer's range folded into one multiplier
and one bias for each channel, the next codes are

    clamp(round(a * M_o + B_o), lowest, highest),

and where there is no floating point unit M is a mantissa of 31 bits and a shift, M = mantissa * 2^-shift
(Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
arXiv:1712.05877).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.core.quant.integer import IntegerInput, IntegerWeight, integer_input, integer_weight


def encode(x: Tensor, spec: IntegerInput) -> Tensor:
    """The codes of an input, of its shape, int32.

    >>> encode(torch.tensor([-0.3, 0.24, 0.26, 9.0]), IntegerInput(0.0, 0.1, 0.1, 0, 15, 4))
    tensor([ 0,  2,  3, 15], dtype=torch.int32)
    """
    return ((x - spec.offset) / spec.step).round().clamp(spec.lowest, spec.highest).to(torch.int32)


class IntegerLayer(nn.Module):
    """A convolution or linear layer that multiplies and adds integers.

    Args:
        layer: a Conv2d with zero padding, or a Linear.
        weight: its weight's codes.
        spec: its input's codes.

    Raises:
        ValueError: another layer or padding; or a sum of codes can leave int32.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Module, weight: IntegerWeight, spec: IntegerInput) -> None:
        super().__init__()
        self.geometry = _geometry(layer)
        self.spec = spec
        self.register_buffer("codes", _dilated(weight.codes.to(torch.int32), layer))
        self.register_buffer("scale", weight.scale.float() * spec.value)
        bias = layer.bias
        self.register_buffer("bias", bias.detach().clone() if isinstance(bias, Tensor) else None)
        largest = int(self.codes.abs().flatten(1).sum(1).max()) * max(-spec.lowest, spec.highest)
        if largest >= 2**31:
            raise ValueError(f"weight: a sum of its codes times inputs can reach {largest:,}, and int32 ends at 2^31.")

    def accumulate(self, x: Tensor) -> Tensor:
        """The sums of products of codes: int32, of the output's shape. ``x`` must be on the CPU."""
        codes = encode(x, self.spec)
        if self.geometry is None:
            return F.linear(codes, self.codes)
        return F.conv2d(codes, self.codes, **self.geometry)

    def forward(self, x: Tensor) -> Tensor:
        y = self.accumulate(x) * self._per_channel(self.scale)
        return y if self.bias is None else y + self._per_channel(self.bias)

    def _per_channel(self, values: Tensor) -> Tensor:
        return values if self.geometry is None or not values.ndim else values[:, None, None]


def to_integer(module: nn.Module) -> nn.Module:
    """A copy of a network, in eval mode, whose layers with both quantisers are each an :class:`IntegerLayer`.

    It gives what the fake-quantised network gives, to the rounding of float32 sums, on the CPU. Everything else, and a
    layer with one quantiser only, computes as it did.

    Raises:
        MisconfigurationException: no layer has both quantisers.
    """
    layers = dict(integer_layers(module))
    clone = inference_copy(module).cpu()
    for name, (weight, spec) in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(clone.get_submodule(parent), leaf, IntegerLayer(clone.get_submodule(name), weight, spec))
    if not layers:
        raise MisconfigurationException(f"to_integer finds no layer with both quantisers in {type(module).__name__}.")
    return clone


def integer_layers(module: nn.Module) -> Mapping[str, tuple[IntegerWeight, IntegerInput]]:
    """The layers with both quantisers: name, as in an ``inference_copy`` -> what they are in integers, on the CPU."""
    found = {}
    for name, layer in module.named_modules():
        weight, spec = integer_weight(layer), integer_input(layer)
        if weight is not None and spec is not None:
            weight = IntegerWeight(weight.codes.cpu(), weight.scale.detach().cpu(), weight.bits)
            found[name.replace("_orig_mod.", "")] = (weight, spec)
    return found


def fixed_point(multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """Factors as mantissa * 2^-shift, with 2^30 <= |mantissa| < 2^31 unless that takes a shift above 62.

    Args:
        multiplier: of any shape.

    Returns:
        mantissa: int64 that fits int32, of that shape; 0 for 0.
        shift: int64, of that shape.

    >>> fixed_point(torch.tensor(0.005, dtype=torch.float64))
    (tensor(1374389535), tensor(38))
    """
    fraction, exponent = torch.frexp(multiplier.double())  # 0.5 <= |fraction| < 1
    mantissa = (fraction * 2**31).round().long()
    over = (mantissa.abs() == 2**31).long()
    shift = 31 - exponent.long() - over
    beyond = (shift - 62).clamp(min=0)  # a factor below 2^-31, whose products would be shifted out of int64
    return mantissa >> (over + beyond), shift - beyond


def requantize(sums: Tensor, mantissa: Tensor, shift: Tensor, bias: Tensor, lowest: int, highest: int) -> Tensor:
    """The next layer's codes from a layer's sums, without floating point: int32.

    Args:
        sums: int32, (N, C, ...).
        mantissa: of the multiplier M_o; () or (C,).
        shift: of the multiplier, at least 1.
        bias: what M_o a is added to before rounding, in units of a code of the next layer times 2^shift: int64.
        lowest: the next layer's smallest code.
        highest: its largest code.
    """
    shape = (-1, *(1 for _ in range(sums.ndim - 2)))
    mantissa, shift, bias = (value.view(shape) if value.ndim else value for value in (mantissa, shift, bias))
    scaled: Any = sums.long() * mantissa + bias
    return ((scaled + (1 << (shift - 1))) >> shift).clamp(lowest, highest).to(torch.int32)


def _geometry(layer: nn.Module) -> dict[str, Any] | None:
    """How a convolution moves its kernel, once that is dilated; None for a linear layer."""
    if isinstance(layer, nn.Linear):
        return None
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros":
        raise ValueError(f"layer: expected a Linear or a Conv2d that pads with zeros, got {layer}.")
    return {name: getattr(layer, name) for name in ("stride", "padding", "groups")}


def _dilated(codes: Tensor, layer: nn.Module) -> Tensor:
    """A dilated kernel as the larger one that it is: torch has no dilated convolution of integers."""
    if not isinstance(layer, nn.Conv2d) or layer.dilation == (1, 1):
        return codes
    (rows, columns), (height, width) = layer.dilation, codes.shape[2:]
    larger = codes.new_zeros(*codes.shape[:2], (height - 1) * rows + 1, (width - 1) * columns + 1)
    larger[:, :, ::rows, ::columns] = codes
    return larger
