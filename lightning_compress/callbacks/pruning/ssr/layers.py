"""Which layers SSR narrows, and how hard it pulls on each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_compress.core.select import match
from lightning_compress.core.surgery import ChannelGraph


def why_not(network: nn.Module, graph: ChannelGraph, name: str) -> str:
    """Why a layer of the graph cannot be narrowed by the norms of its own filters; empty if it can."""
    layer: Any = network.get_submodule(name)
    group = graph.group_of(name)
    others = [n for n in group.layers if n != name]
    if others:
        return f"shares its channels with {', '.join(others[:3])}{' ...' if len(others) > 3 else ''}"
    if len(group.units) < graph.width(name):
        return "has channels that can only be removed together"
    if getattr(layer, "transposed", False):
        return "is transposed"
    if is_parametrized(layer) or not isinstance(layer.weight, nn.Parameter):
        return "computes its weight or bias from other tensors"
    return "" if layer.weight.requires_grad else "does not learn"


def lambda_by_layer(lambda_: float | Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """One number for all, or globs of layer names; a later glob wins, a layer that none matches is left out.

    Raises:
        ValueError: a glob matches no layer.

    >>> lambda_by_layer({"conv*": 0.4, "conv2": 0.15}, ["conv1", "conv2", "fc1"])
    {'conv1': 0.4, 'conv2': 0.15}
    """
    if not isinstance(lambda_, Mapping):
        return dict.fromkeys(names, float(lambda_))
    found = {n: float(value) for glob, value in lambda_.items() for n in match(names, [glob], "lambda_")}
    return {name: found[name] for name in names if name in found}
