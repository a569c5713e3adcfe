"""What a quantised layer is in integers: plain data, and the layer computed with them in int32.

A quantiser says it of itself. The weight's, the last parametrisation of ``layer.weight``, has

    ``integer(weight) -> IntegerWeight``      W_q = scale * codes

and the input's, the submodule ``layer.input_quantizer``,

    ``integer() -> IntegerInput``             code = clamp(round((x - offset) / step), lowest, highest)
                                              x_q = value * code

with rounding half to even. There are no zero points, so that zero padding is the code 0 and a layer is

    y = scale_o * value * sum W_codes x_codes + bias,

whose sum holds integers only. Exports write these codes; nothing here knows by which method they were learnt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn.utils import parametrize


@dataclass(frozen=True)
class IntegerWeight:
    """A weight W_q = scale * codes, without a zero point.

    Attributes:
        codes: int16 (any integer type), of W's shape (C_out, ...).
        scale: float32, () for one of the whole tensor or (C_out,) for one of each output channel.
        bits: what a code takes in storage: there are at most 2^bits different ones.
    """

    codes: Tensor
    scale: Tensor
    bits: int


@dataclass(frozen=True)
class IntegerInput:
    """An input's codes clamp(round((x - offset) / step), lowest, highest), each of which stands for value * code.

    Attributes:
        offset: what the input is counted from; 0 for symmetric quantisers.
        step: the distance of two codes in the input.
        value: the distance of two codes in what the layer computes with; the step, or 1 / (2^bits - 1) where the range
            is mapped onto [0, 1].
        lowest: the smallest code.
        highest: the largest code.
        bits: what a code takes: highest - lowest < 2^bits.
    """

    offset: float
    step: float
    value: float
    lowest: int
    highest: int
    bits: int


@runtime_checkable
class HasIntegerWeight(Protocol):
    """A weight's quantiser."""

    def integer(self, weight: Tensor) -> IntegerWeight:
        """The codes of the weight that this quantiser would get: what comes out of the parametrisations before it."""
        ...


@runtime_checkable
class HasIntegerInput(Protocol):
    """An input's quantiser."""

    def integer(self) -> IntegerInput: ...


def integer_weight(layer: nn.Module) -> IntegerWeight | None:
    """The weight of a layer in integers; None unless its last parametrisation is a quantiser that has them."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    stack: Any = layer.parametrizations["weight"]  # type: ignore[index]
    *before, quantizer = stack
    if not isinstance(quantizer, HasIntegerWeight):
        return None
    weight = stack.original.detach()
    for parametrisation in before:  # masks, which set weights to zero before these are rounded
        weight = parametrisation(weight).detach()
    return quantizer.integer(weight)


def integer_input(layer: nn.Module) -> IntegerInput | None:
    """The input of a layer in integers; None unless it has a quantiser that has them."""
    quantizer = getattr(layer, "input_quantizer", None)
    return quantizer.integer() if isinstance(quantizer, HasIntegerInput) else None
