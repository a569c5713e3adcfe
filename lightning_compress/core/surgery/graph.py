"""Which channels of a network can be removed, and what goes with each of them.

A *unit* is the smallest set of tensor slices that can only be removed together: one channel of a conv with its bias,
its batch-norm entries and the weights that read it; over a residual sum, that channel in every layer of the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from lightning_compress.core.meta import dry_run
from lightning_compress.core.select import match
from lightning_compress.core.surgery.rules import tensors_in
from lightning_compress.core.surgery.trace import ChannelTrace


@dataclass(frozen=True, eq=False)
class Group:
    """Layers whose output channels are removed together.

    Attributes:
        layers: their names, in forward order.
        units: the units they share, ascending by first appearance.
    """

    layers: tuple[str, ...]
    units: np.ndarray


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """The channels of a network. Made by :meth:`trace`.

    Attributes:
        axes: (tensor name, dim) -> unit of every index along that dim.
        layers: conv or linear layer that can be narrowed -> unit of every output channel, in forward order.
        groups: the same layers, coupled ones together.
        left_alone: layer that cannot be narrowed -> why.
        units: number of units.
        order: all conv and linear layers, narrowable or not, in forward order.
    """

    axes: dict[tuple[str, int], np.ndarray]
    layers: dict[str, np.ndarray]
    groups: tuple[Group, ...]
    left_alone: dict[str, str]
    units: int
    order: tuple[str, ...]

    @classmethod
    def trace(
        cls,
        network: nn.Module,
        example_input: Any,
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> ChannelGraph:
        """Follow the channels through one forward pass on meta tensors. The network is left as it was.

        Args:
            network: any module; eval mode is used and every submodule's mode put back.
            example_input: tensor, shape, tuple of arguments or dict of keyword arguments of its forward.
            include: globs of names of the layers that may be narrowed.
            exclude: globs of names of the layers that must keep their width.

        Raises:
            ValueError: a glob matches no layer.
            MisconfigurationException: the forward pass fails; the layer is named.
        """
        seen: list[ChannelTrace] = []

        @contextmanager
        def observe(tensors: dict[str, Tensor]) -> Iterator[ChannelTrace]:
            seen.append(ChannelTrace(tensors))
            with seen[-1].follow(network), seen[-1]:
                yield seen[-1]

        try:
            trace, out = dry_run(network, example_input, observe)
        except Exception as error:
            where = seen[-1].where if seen else ""
            raise MisconfigurationException(
                f"Cannot follow the channels of {type(network).__name__}: its forward pass fails in layer "
                f"{where or '(the network itself)'!r} with {type(error).__name__}: {error}. Give an `example_input` "
                f"that the network accepts; it got {_describe(example_input)}."
            ) from error
        trace.where = ""
        for tensor in tensors_in(out):
            trace.freeze_tensor(tensor, "is the network's output")
        widths = {name: trace.axes.get(_out_axis(network, name)) for name in trace.producers}
        chosen = match(widths, include, "include")
        refused = match(widths, exclude, "exclude")
        for name, ids in widths.items():
            if name in refused or name not in chosen:
                trace.freeze(ids, "is left out by `exclude`" if name in refused else "is not in `include`")
        return cls._assemble(trace, widths)

    @classmethod
    def _assemble(cls, trace: ChannelTrace, widths: dict[str, np.ndarray | None]) -> ChannelGraph:
        left = np.concatenate([a.reshape(-1) for a, _ in trace.edges] or [np.empty(0, int)])
        right = np.concatenate([b.reshape(-1) for _, b in trace.edges] or [np.empty(0, int)])
        matrix = coo_matrix((np.ones(len(left), bool), (left, right)), (trace.count, trace.count))
        _, unit = connected_components(matrix, directed=False)
        reason: dict[int, str] = {}
        for frozen_ids, why in trace.frozen:
            for u in np.unique(unit[frozen_ids]):
                reason.setdefault(int(u), why)
        layers, left_alone = {}, {}
        for name, ids in widths.items():
            if ids is None:
                left_alone[name] = (
                    "has a single channel, a parametrised or shared weight, or computes it in an unknown way"
                )
                continue
            reasons = [reason[u] for u in unit[ids] if u in reason]
            if reasons:
                left_alone[name] = reasons[0]
            if len(reasons) < len(ids):
                layers[name] = unit[ids]
        axes = {axis: unit[ids] for axis, ids in trace.axes.items()}
        frozen = np.fromiter(reason, int, len(reason))
        groups = _groups({n: u[~np.isin(u, frozen)] for n, u in layers.items()})
        free = np.concatenate([g.units for g in groups] or [np.empty(0, int)])
        layers = {n: np.where(np.isin(u, free), u, -1) for n, u in layers.items()}
        return cls(axes, layers, groups, left_alone, int(unit.max(initial=-1)) + 1, tuple(widths))

    def without(self, groups: Sequence[Group], reason: str) -> ChannelGraph:
        """The same graph with some groups left alone."""
        names = [n for g in groups for n in g.layers]
        return replace(
            self,
            layers={n: u for n, u in self.layers.items() if n not in names},
            groups=tuple(g for g in self.groups if g not in groups),
            left_alone={**self.left_alone, **dict.fromkeys(names, reason)},
        )

    def width(self, name: str) -> int:
        """Number of output channels of a layer."""
        return len(self.layers[name])

    def group_of(self, name: str) -> Group:
        """The group that a layer belongs to."""
        return next(g for g in self.groups if name in g.layers)


def _groups(layers: dict[str, np.ndarray]) -> tuple[Group, ...]:
    """Layers that share a unit, transitively."""
    names = list(layers)
    owner = np.repeat(np.arange(len(names)), [len(u) for u in layers.values()])
    units = np.concatenate([*layers.values(), np.empty(0, int)])
    size = len(names) + (int(units.max()) + 1 if units.size else 0)
    _, label = connected_components(
        coo_matrix((np.ones(len(owner), bool), (owner, units + len(names))), (size, size)), directed=False
    )
    groups = []
    for key in dict.fromkeys(label[: len(names)]):
        members = tuple(n for n, k in zip(names, label, strict=False) if k == key)
        every = np.concatenate([layers[n] for n in members])
        _, first = np.unique(every, return_index=True)
        groups.append(Group(members, every[np.sort(first)]))
    return tuple(groups)


def _out_axis(network: nn.Module, name: str) -> tuple[str, int]:
    """Where the output channels of a conv or linear layer live: (tensor name, dim)."""
    layer = network.get_submodule(name)
    parametrised = "weight" in getattr(layer, "parametrizations", {})
    return (
        (f"{name}." if name else "") + ("parametrizations.weight.original" if parametrised else "weight"),
        int(bool(getattr(layer, "transposed", False))),
    )


def _describe(example_input: Any) -> str:
    shapes = [tuple(t.shape) for t in tensors_in(example_input)]
    return f"tensors of shape {', '.join(map(str, shapes))}" if shapes else repr(example_input)
