"""Zeros into smaller tensors: remove channels that a network computes but that are always zero."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.core.example_input import inputs_for
from lightning_compress.core.meta import evaluating
from lightning_compress.core.surgery.graph import ChannelGraph
from lightning_compress.core.surgery.plan import ChannelPlan
from lightning_compress.core.surgery.probe import channel_graph
from lightning_compress.core.surgery.rules import tensors_in
from lightning_compress.core.surgery.shrink import apply_cuts, sync_attributes

Norm = nn.modules.batchnorm._BatchNorm


class ScatterChannels(nn.Module):
    """Place the channels of (N, C, H, W) at `index` among `channels`, zeros elsewhere.

    What a residual sum needs when its summands keep different channels.
    """

    source: Tensor

    def __init__(self, index: Tensor, channels: int) -> None:
        super().__init__()
        source = torch.full((channels,), len(index), dtype=torch.int64)
        source[index] = torch.arange(len(index))
        self.register_buffer("source", source)  # the channel behind the last is the zero that is appended

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.zeros_like(x[:, :1])], 1).index_select(1, self.source)


def compact(network: nn.Module, example_input: Any, *, tolerance: float = 1e-4) -> nn.Module:
    """A copy of `network` without its dead channels: those whose weights, bias and norm are exactly zero.

    Channels that are dead in every layer that writes them are removed; where a residual sum keeps them alive, the
    convolution and its norm are narrowed alone and their output is put in its place.

    Returns:
        The copy, in the same mode; the network itself if nothing is dead, or if the copy's output on the example
        input would differ by more than `tolerance` (an activation that makes something of zero).
    """
    rows = {n: _zero_rows(m) for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    if not any(r.any() for r in rows.values()):
        return network
    graph = channel_graph(network, example_input)
    dead = {n: rows[n] & _norm_is_zero(network, graph, n) for n in graph.layers if n in rows}
    dead = {n: d for n, d in dead.items() if d.any()}
    if not dead:
        return network
    small = copy.deepcopy(network)
    _narrow(small, graph, dead)
    args, kwargs = inputs_for(network, example_input)
    with evaluating(network), evaluating(small):
        pairs = zip(tensors_in(network(*args, **kwargs)), tensors_in(small(*args, **kwargs)), strict=True)
        same = all(torch.allclose(a, b, atol=tolerance * max(1.0, float(a.abs().max())), rtol=0) for a, b in pairs)
    return small if same else network


def own_norm(network: nn.Module, graph: ChannelGraph, layer: str) -> str | None:
    """Name of the batch norm that reads just this layer's output: the next one defined with the same channels."""
    names = [n for n, m in network.named_modules() if isinstance(m, Norm) or n == layer]
    for name in names[names.index(layer) + 1 :]:
        units = graph.axes.get((f"{name}.weight", 0))
        if units is not None and len(units) == graph.width(layer):
            mine = graph.layers[layer]
            return name if np.array_equal(units[mine >= 0], mine[mine >= 0]) else None
    return None


def norms_reading(network: nn.Module, graph: ChannelGraph, layer: str) -> dict[str, Tensor]:
    """Norm name -> position among its channels of each channel of `layer` (C,).

    Only the layer's own norm where others write the same channels; else every norm that sees them, also behind a
    concatenation.
    """
    if len(graph.group_of(layer).layers) > 1:
        name = own_norm(network, graph, layer)
        return {name: torch.arange(graph.width(layer))} if name else {}
    found = {}
    for name, module in network.named_modules():
        units = graph.axes.get((f"{name}.weight", 0)) if isinstance(module, Norm) else None
        if units is not None and np.isin(graph.layers[layer], units).all():
            order = np.argsort(units, kind="stable")
            found[name] = torch.from_numpy(order[np.searchsorted(units, graph.layers[layer], sorter=order)])
    return found


def _zero_rows(layer: nn.Conv2d | nn.Linear) -> Tensor:
    weight, bias = layer.weight.detach(), layer.bias
    zero = (weight == 0).flatten(1).all(1)
    return (zero if bias is None else zero & (bias.detach() == 0)).cpu()


def _norm_is_zero(network: nn.Module, graph: ChannelGraph, layer: str) -> Tensor:
    zero = torch.ones(graph.width(layer), dtype=torch.bool)
    for name, at in norms_reading(network, graph, layer).items():
        norm: Any = network.get_submodule(name)
        zero &= ((norm.weight == 0) & (norm.bias == 0)).detach().cpu()[at]
    return zero


def _narrow(network: nn.Module, graph: ChannelGraph, dead: dict[str, Tensor]) -> None:
    alive = np.zeros(graph.units + 1, bool)
    alive[-1] = True  # units that must stay are marked -1
    for name, units in graph.layers.items():
        alive[units[~dead[name].numpy()] if name in dead else units] = True
    for (
        tensor,
        dim,
    ), units in graph.axes.items():  # what is no layer writes too: the map of a padded shortcut
        if dim == 0 and (tensor, 1) in graph.axes and tensor.rpartition(".")[0] not in graph.layers:
            alive[units] = True
    for group in graph.groups:
        if not alive[group.units].any():
            alive[group.units[0]] = True
    kept = {n: torch.from_numpy(np.flatnonzero(alive[u])) for n, u in graph.layers.items()}
    norms = {n: own_norm(network, graph, n) for n in dead}
    apply_cuts(network, ChannelPlan({n: k for n, k in kept.items() if len(k) < graph.width(n)}).cuts(graph))
    for name, gone in dead.items():
        stays = (~gone[kept[name]]).nonzero()[:, 0]
        if 0 < len(stays) < len(kept[name]):  # dead here, but another layer of the sum writes these channels
            _narrow_alone(network, name, norms[name], stays)


def _narrow_alone(network: nn.Module, layer: str, norm: str | None, kept: Tensor) -> None:
    last = norm or layer
    width = len(network.get_submodule(layer).weight)  # type: ignore[arg-type]
    for name in filter(None, (layer, norm)):
        module = network.get_submodule(name)
        registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for registry in registries:
            for key, tensor in registry.items():
                if tensor is not None and tensor.ndim and len(tensor) == width:
                    value = tensor.detach()[kept]
                    registry[key] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
        sync_attributes(module)
    parent, _, leaf = last.rpartition(".")
    network.get_submodule(parent).add_module(
        leaf, nn.Sequential(network.get_submodule(last), ScatterChannels(kept, width))
    )
