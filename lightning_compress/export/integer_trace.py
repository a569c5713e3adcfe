"""A quantised network in the form in which it is traced for an ONNX file of integers: one operator for each quantiser.

The operators are ours, and exist in traces only; `integer_graph` writes them with those of the standard.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_compress.core.parametrisation import parametrise
from lightning_compress.core.quant.integer import HasIntegerInput, IntegerInput, IntegerWeight, integer_weight

DOMAIN = "lightning_compress"
INPUT, WEIGHT = "QuantizedInput", "QuantizedWeight"


class TracedInput(nn.Module):
    """A quantiser of activations, as an operator with the fields of its `IntegerInput` as attributes."""

    def __init__(self, spec: IntegerInput) -> None:
        super().__init__()
        self.attributes = asdict(spec)

    def forward(self, x: Tensor) -> Tensor:
        return _symbol(INPUT, (x,), self.attributes, x.shape)


class TracedWeight(nn.Module):
    """A quantiser of a weight, as an operator of its codes, int8 (C_out, ...), and their scales, (C_out,)."""

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__()
        self.register_buffer("codes", weight.codes.detach().to("cpu", torch.int8))
        scale = weight.scale.detach().to("cpu", torch.float32)
        self.register_buffer("scale", scale.expand(len(self.codes)).clone())

    def forward(self, weight: None) -> Tensor:
        return _symbol(WEIGHT, (self.codes, self.scale), {}, self.codes.shape)


def traced_with_integers(module: nn.Module, clone: nn.Module) -> nn.Module:
    """A copy of a network whose quantisers are traced as operators.

    Those of more than 8 bits stay what they are. So do a weight whose codes are not within -128 and 127, and a
    quantiser of activations that raises a ValueError because it has seen none.

    Args:
        module: the network with its quantisers.
        clone: its ``inference_copy``; not changed.

    Raises:
        MisconfigurationException: it has no quantised weight.
    """
    weights = {
        name.replace("_orig_mod.", ""): weight
        for name, submodule in module.named_modules()
        if (weight := integer_weight(submodule)) is not None
    }
    if not weights:
        raise MisconfigurationException(
            f"format='int8' needs quantised layers, and {type(module).__name__} has none: train it with a method that "
            f"quantises weights, such as QAT, or take format='onnx'."
        )
    traced = copy.deepcopy(clone)
    for name, weight in weights.items():
        if weight.codes.amin() < -128 or weight.codes.amax() > 127:
            rank_zero_info(f"The weight of {name} stays in floating point: its codes do not fit 8 bits.")
            continue
        layer: Any = traced.get_submodule(name)
        parametrise(layer, "weight", TracedWeight(weight))
        layer.parametrizations["weight"].original = None  # nothing reads it
    for parent in list(traced.modules()):
        for name, child in list(parent.named_children()):
            spec = _codes_of(child)
            if spec is not None and spec.highest - spec.lowest < 256:
                setattr(parent, name, TracedInput(spec))
    return traced


def _codes_of(quantizer: nn.Module) -> IntegerInput | None:
    """The codes of a quantiser of activations; None for other modules, and for one that passes its input on as yet."""
    try:
        return quantizer.integer() if isinstance(quantizer, HasIntegerInput) else None
    except ValueError:
        return None


def _symbol(name: str, tensors: Sequence[Tensor], attributes: dict[str, Any], shape: Sequence[int]) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", tensors, attributes, dtype=torch.float32, shape=shape, version=1
    )
