"""Where the quantisers of PAMS sit, and how they get there and away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_compress.callbacks.quantization.pams.quantizers import MaxScaleWeight, OnGrid, PAMSQuantizer
from lightning_compress.core.quant.attach import quantize_input, quantize_weight, quantized_layers, remove_quantizers
from lightning_compress.core.quant.layers import choose_quantized
from lightning_compress.core.quant.points import QuantizationPoint
from lightning_compress.core.select import match
from lightning_compress.core.surgery import replayable


@dataclass(frozen=True)
class Placement:
    """Names of what is quantised.

    Attributes:
        weights: layers with a quantised weight.
        inputs: those of them whose input has a quantiser of its own.
        points: places between layers that get one, in networks that name such places.
        left_alone: the other layers, and why.
    """

    weights: list[str]
    inputs: list[str]
    points: list[str]
    left_alone: dict[str, str] = field(default_factory=dict)

    def arguments(self) -> dict[str, list[str]]:
        """Those of :func:`quantize`."""
        return {name: value for name, value in asdict(self).items() if name != "left_alone"}


def place(
    module: nn.Module,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] | None = None,
    *,
    quantize_block_input: bool = False,
) -> Placement:
    """Choose what to quantise. See :class:`PAMS`."""
    named = _named_by_networks(module)
    ends = exclude is None and not named
    weights, left_alone = choose_quantized(module, include, exclude or (), exclude_first=ends, exclude_last=ends)
    if exclude is None and named:
        left_alone.update({name: "is left real by its network" for name in weights if name not in named})
        weights = [name for name in weights if name in named]
    wanted = {"always", "integer" if quantize_block_input else "default"}
    points = [
        name
        for name, point in module.named_modules()
        if isinstance(point, QuantizationPoint) and point.when in wanted and _serves(name, point, weights)
    ]
    return Placement(weights, [name for name in weights if name not in named], points, left_alone)


@replayable
def quantize(
    module: nn.Module,
    weights: Sequence[str],
    inputs: Sequence[str],
    points: Sequence[str],
    weight_bits: int,
    activation_bits: int,
    measuring: Mapping[str, Any],
) -> Any:
    """Give layers a :class:`MaxScaleWeight`, and inputs and points a :class:`PAMSQuantizer`.

    Args:
        measuring: further arguments of the activations' quantisers.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))

    def quantizer() -> PAMSQuantizer:
        return PAMSQuantizer(activation_bits, **measuring).to(device)

    for name in weights:
        quantize_weight(module.get_submodule(name), MaxScaleWeight(weight_bits))
    for name in inputs:
        quantize_input(module.get_submodule(name), quantizer())
    removed = {}
    for name in points:
        point, filled = module.get_submodule(name), quantizer()
        removed[name] = point
        module.set_submodule(name, filled)
        for layer in _fed(name, point):
            if layer in weights:
                quantize_input(module.get_submodule(layer), OnGrid(filled))
    return partial(unquantize, layers=list(weights), points=removed)


def unquantize(module: nn.Module, layers: Sequence[str], points: Mapping[str, nn.Module]) -> None:
    """Take the quantisers of :func:`quantize` off again."""
    for name in layers:
        remove_quantizers(module.get_submodule(name))
    for name, point in points.items():
        module.set_submodule(name, point)


def without_quantizers(network: nn.Module) -> nn.Module:
    """Take all quantisers off a copy of a network, whichever method they are of; returns it."""
    for layer in quantized_layers(network).values():
        remove_quantizers(layer)
    for name, part in list(network.named_modules()):
        if isinstance(part, PAMSQuantizer):
            network.set_submodule(name, nn.Identity())
    return network


def _named_by_networks(module: nn.Module) -> set[str]:
    """The layers that networks inside the module name as `quantizable`; their activations have points."""
    names = [name for name, _ in module.named_modules()]
    globs = [
        f"{home}.{glob}" if home else glob
        for home, network in module.named_modules()
        for glob in getattr(network, "quantizable", ())
    ]
    return set(match(names, globs, "quantizable"))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _fed(name: str, point: Any) -> list[str]:
    return [f"{_parent(name)}.{layer}" if _parent(name) else layer for layer in point.feeds]


def _serves(name: str, point: QuantizationPoint, layers: Sequence[str]) -> bool:
    """Whether a point is in front of one of the layers, or, in front of none, beside one in its block."""
    if point.feeds:
        return any(layer in layers for layer in _fed(name, point))
    return any(layer.startswith(f"{_parent(name)}.") for layer in layers)
