"""Where masks act in a network, the hooks that let them, and how their mean goes into the weights afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_compress.callbacks.pruning.white_box.masks import MASK, guide, scale_channels
from lightning_compress.core.surgery import ChannelGraph
from lightning_compress.core.surgery.compact import own_norm

Position = Literal["auto", "before_bn", "after_activation"]
Conv = nn.modules.conv._ConvNd


@dataclass(frozen=True)
class Place:
    """Where the mask of a layer acts.

    Attributes:
        layer: the convolution.
        norms: batch norms that see its channels first: its own, and that of a depthwise convolution behind it.
        readers: layer that reads its channels -> (C_in,), which of them each of its inputs is, -1 for others'. The
            mask scales what they read, behind norm and activation. Empty: it scales what the layer writes.
    """

    layer: str
    norms: tuple[str, ...]
    readers: Mapping[str, Tensor]


def split_layers(network: nn.Module, graph: ChannelGraph) -> tuple[list[str], list[str]]:
    """Convolutions that own their channels, and those whose channels are a residual stream's.

    A depthwise convolution follows the one that it reads and is in neither list.
    """
    streams = _streams(network, graph)
    alone: list[str] = []
    coupled: list[str] = []
    for group in graph.groups:
        convs = [name for name in group.layers if not _is_depthwise(network.get_submodule(name))]
        if all(isinstance(layer, Conv) and not layer.transposed for layer in map(network.get_submodule, convs)):
            own = len(convs) == 1 and (graph.layers[convs[0]] >= 0).all() and streams.isdisjoint(group.units.tolist())
            (alone if own else coupled).extend(convs)
    in_order = {name: i for i, name in enumerate(graph.order)}.__getitem__
    return sorted(alone, key=in_order), sorted(coupled, key=in_order)


def place_masks(
    network: nn.Module, graph: ChannelGraph, layers: Iterable[str], position: Position = "auto"
) -> list[Place]:
    """Choose where each mask acts.

    Args:
        layers: from the first list of :func:`split_layers`.
        position: ``"before_bn"`` on the output of the convolution; ``"after_activation"`` on the input of the layers
            that read it. ``"auto"`` is the paper's choice: before the norm where a residual block has no other layer
            inside (ResNets of two convolutions per block), after the activation elsewhere.
    """
    streams = _streams(network, graph)

    def is_stream(name: str, *, reads: bool) -> bool:
        return not streams.isdisjoint(_axis(network, graph, name, reads=reads).tolist())

    places = []
    for name in layers:
        group = graph.group_of(name).layers
        norms = tuple(norm for n in group if (norm := own_norm(network, graph, n)))
        readers = readers_of(network, graph, name)
        inner = len(readers) == len(group) == 1 and is_stream(name, reads=True)
        inner = inner and all(is_stream(reader, reads=False) for reader in readers)
        before = position == "before_bn" or (position == "auto" and inner and bool(norms))
        places.append(Place(name, norms, {} if before else readers))
    return places


def readers_of(network: nn.Module, graph: ChannelGraph, name: str) -> dict[str, Tensor]:
    """Layers that read the channels of `name`, as in :class:`Place`; {} if one reads them in an unclear order."""
    units, group = graph.layers[name], graph.group_of(name).layers
    readers = {}
    for reader in graph.order:
        layer: Any = network.get_submodule(reader)
        read = _axis(network, graph, reader, reads=True)
        if reader in group or not np.isin(read, units).any():
            continue
        groups = getattr(layer, "groups", 1)
        if np.array_equal(read, units) or (groups > 1 and layer.in_channels == len(units)):
            readers[reader] = torch.arange(len(units))
        elif groups > 1 or len(np.unique(units)) < len(units):
            return {}
        else:
            order = np.argsort(units)
            at = order[np.searchsorted(units, read, sorter=order).clip(max=len(units) - 1)]
            readers[reader] = torch.from_numpy(np.where(units[at] == read, at, -1))
    return readers


class MaskHooks:
    """Masks at work: while `mixture` is set, they scale feature maps; else the network is as without them.

    `mixture` holds D, (layers, B, K), in the order of `places`. The guide is computed from it at each use, so that a
    block whose activations are computed a second time in the backward pass gets the same again.
    """

    def __init__(self, network: nn.Module, places: Sequence[Place], normalize: bool) -> None:
        self.mixture: Tensor | None = None
        self.normalize = normalize
        self._handles = []
        sources: dict[str, list[tuple[int, nn.Module, Tensor]]] = {}
        for index, place in enumerate(places):
            layer = network.get_submodule(place.layer)
            if not place.readers:
                self._handles.append(layer.register_forward_hook(partial(self._scale_output, index)))
            for reader, at in place.readers.items():
                sources.setdefault(reader, []).append((index, layer, at))
        for reader, found in sources.items():
            columns = None if len(found) == 1 and _is_identity(found[0]) else _columns(found)
            hook = partial(self._scale_input, [(index, layer) for index, layer, _ in found], columns)
            self._handles.append(network.get_submodule(reader).register_forward_pre_hook(hook))

    def remove(self) -> None:
        self.mixture = None
        for handle in self._handles:
            handle.remove()

    def _scale_output(self, index: int, layer: nn.Module, args: Any, out: Tensor) -> Tensor:
        if self.mixture is None:
            return out
        return self._scale(out, self._guide(index, layer), 1, layer)

    def _scale_input(
        self, sources: list[tuple[int, nn.Module]], columns: Tensor | None, reader: nn.Module, args: Any
    ) -> Any:
        if self.mixture is None:
            return None
        guides = [self._guide(index, layer) for index, layer in sources]
        factor = guides[0]
        if columns is not None:
            ones = factor.new_ones(len(factor), 1)
            factor = torch.cat([*guides, ones], 1).index_select(1, columns.to(factor.device))
        return (self._scale(args[0], factor, 1 if isinstance(reader, Conv) else -1, reader), *args[1:])

    def _guide(self, index: int, layer: nn.Module) -> Tensor:
        assert self.mixture is not None
        return guide(self.mixture[index], getattr(layer, MASK), self.normalize)

    def _scale(self, x: Tensor, factor: Tensor, dim: int, layer: nn.Module) -> Tensor:
        if (len(x), x.shape[dim]) != tuple(factor.shape):
            raise MisconfigurationException(
                f"WhiteBox has labels for {len(factor)} samples and masks for {factor.shape[1]} channels, but a "
                f"{type(layer).__name__} sees {tuple(x.shape)}. Each training step must run the whole batch, and no "
                f"other callback may narrow masked layers before the vote: `exclude` them, or list it before WhiteBox."
            )
        return scale_channels(x, factor, dim)


@torch.no_grad()
def fold_into_weights(network: nn.Module, place: Place, factor: Tensor) -> None:
    """Let the network compute, without a mask, what it computed with the guide `factor` (C,) for every sample.

    A mask on the output of a convolution goes into its weight and bias; one behind the activation into the weights
    that read it, which is exact for every activation and every sign.
    """
    if not place.readers:
        layer: Any = network.get_submodule(place.layer)
        _multiply(_weight(layer), factor)
        _multiply(layer.bias, factor)
    for name, at in place.readers.items():
        reader: Any = network.get_submodule(name)
        column = torch.cat([factor, factor.new_ones(1)])[at.to(factor.device)]
        weight, groups = _weight(reader), getattr(reader, "groups", 1)
        if getattr(reader, "transposed", False):
            _multiply(weight, column)
        else:  # (groups, C_out / groups, C_in / groups, ...)
            by_group = column.to(weight.dtype).view(groups, 1, -1, *[1] * (weight.ndim - 2))
            weight.copy_((weight.unflatten(0, (groups, -1)) * by_group).flatten(0, 1))


@torch.no_grad()
def fold_into_norms(network: nn.Module, norms: Iterable[str], factor: Tensor) -> None:
    """The authors' fold: weight and bias of batch norms times `factor` (C,).

    Right where the mask acts behind a ReLU and the factor is positive. Where it acts before the norm, the norm had
    already taken the factor away.
    """
    for name in norms:
        norm: Any = network.get_submodule(name)
        _multiply(norm.weight, factor)
        _multiply(norm.bias, factor)


def _multiply(tensor: Tensor | None, factor: Tensor) -> None:
    if tensor is not None:
        tensor.mul_(factor.to(tensor).view(-1, *[1] * (tensor.ndim - 1)))


def _stored(layer: nn.Module) -> str:
    """Name of a layer's weight, below any parametrisation."""
    parametrised = nn.utils.parametrize.is_parametrized(layer, "weight")
    return "parametrizations.weight.original" if parametrised else "weight"


def _weight(layer: nn.Module) -> Tensor:
    return layer.get_parameter(_stored(layer))


def _axis(network: nn.Module, graph: ChannelGraph, name: str, *, reads: bool) -> np.ndarray:
    """Units that a layer reads, or writes."""
    layer = network.get_submodule(name)
    dim = int(reads != bool(getattr(layer, "transposed", False)))
    return graph.axes.get((f"{name}.{_stored(layer)}", dim), np.empty(0, int))


def _streams(network: nn.Module, graph: ChannelGraph) -> set[int]:
    """Units that several convolutions write, or that something other than weights maps, as a padded shortcut does."""
    layers = {name: network.get_submodule(name) for name in graph.order}
    weights = {f"{name}.{_stored(layer)}" for name, layer in layers.items()}
    writers = Counter(
        unit
        for name, layer in layers.items()
        if not _is_depthwise(layer)
        for unit in set(_axis(network, graph, name, reads=False).tolist())
    )
    streams = {unit for unit, number in writers.items() if number > 1}
    for (tensor, dim), units in graph.axes.items():
        if tensor not in weights and (dim or (tensor, 1) in graph.axes):
            streams.update(units.tolist())
    return streams


def _columns(sources: Sequence[tuple[int, nn.Module, Tensor]]) -> Tensor:
    """For each input of a reader, the column of its guide in [all guides side by side, 1]."""
    widths = [getattr(layer, MASK).shape[1] for _, layer, _ in sources]
    columns = torch.full_like(sources[0][2], sum(widths))
    for (_, _, at), start in zip(sources, np.cumsum([0, *widths]), strict=False):
        columns = torch.where(at >= 0, at + int(start), columns)
    return columns


def _is_identity(source: tuple[int, nn.Module, Tensor]) -> bool:
    _, layer, at = source
    return torch.equal(at, torch.arange(getattr(layer, MASK).shape[1]))


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, Conv) and layer.groups > 1 and layer.groups == layer.in_channels
