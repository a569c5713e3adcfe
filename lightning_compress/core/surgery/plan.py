"""What to remove, as plain data: scores -> :class:`ChannelPlan` -> cuts of named tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_compress.core.select import did_you_mean
from lightning_compress.core.surgery.graph import ChannelGraph, Group


class Cut(NamedTuple):
    """Keep the indices `kept` (int64, ascending) of `size` along `dim` of the tensor `tensor`."""

    tensor: str
    dim: int
    size: int
    kept: Tensor


@dataclass(frozen=True)
class ChannelPlan:
    """Layer name -> kept output channels (int64, ascending).

    Plain data: it can be sent, saved, and replayed on a fresh copy of the network. Layers that are coupled to a
    named one (residual sums, depthwise convolutions) follow it and need not be named.

    >>> plan = ChannelPlan({"conv1": torch.tensor([0, 2])})
    >>> ChannelPlan.from_dict(plan.to_dict()).kept["conv1"].tolist()
    [0, 2]
    """

    kept: Mapping[str, Tensor]

    def to_dict(self) -> dict[str, list[int]]:
        """JSON-able form."""
        return {name: kept.tolist() for name, kept in self.kept.items()}

    @classmethod
    def from_dict(cls, kept: Mapping[str, Sequence[int]]) -> ChannelPlan:
        """Inverse of :meth:`to_dict`."""
        return cls({name: torch.as_tensor(indices, dtype=torch.int64) for name, indices in kept.items()})

    def cuts(self, graph: ChannelGraph) -> list[Cut]:
        """The slices of every parameter and buffer that this plan leaves.

        Raises:
            ValueError: unknown layer, index out of range, or nothing left.
            MisconfigurationException: a removed channel must stay, or coupled layers disagree about one.
        """
        gone = np.zeros(graph.units + 1, bool)  # the last is for units that must stay, which are marked -1
        for name in self.kept:
            gone[self._gone(graph, name)] = True
        for name, kept in self.kept.items():
            both = graph.layers[name][kept.numpy()]
            both = both[gone[both]]
            if both.size:
                other = next(n for n in self.kept if n != name and np.isin(self._gone(graph, n), both).any())
                raise MisconfigurationException(
                    f"The plan keeps channels of {name!r} that it removes from {other!r}, but the two are coupled "
                    f"(their channels are added or read together): give both the same kept indices."
                )
        cuts = []
        for (tensor, dim), units in graph.axes.items():
            stays = ~gone[units]
            if not stays.any():
                raise ValueError(f"The plan leaves nothing of {tensor!r} along dim {dim}; keep at least one channel.")
            if not stays.all():
                cuts.append(Cut(tensor, dim, len(units), torch.from_numpy(np.flatnonzero(stays))))
        return cuts

    def _gone(self, graph: ChannelGraph, name: str) -> np.ndarray:
        if name not in graph.layers:
            why = graph.left_alone.get(name)
            if why is not None:
                raise MisconfigurationException(f"Layer {name!r} cannot be narrowed: it {why}.")
            raise ValueError(
                f"The plan names layer {name!r}, which the network does not have.{did_you_mean(name, graph.layers)}"
            )
        units, kept = graph.layers[name], self.kept[name].numpy()
        if not kept.size or kept.min() < 0 or kept.max() >= len(units):
            raise ValueError(
                f"The plan keeps channels {kept.tolist()[:8]} of {name!r}; allowed are 0 to {len(units) - 1}, "
                f"at least one."
            )
        gone = np.delete(units, kept)
        if (gone < 0).any():
            raise MisconfigurationException(f"Some channels of {name!r} must stay: it {graph.left_alone[name]}.")
        return gone


def keep_highest(scores: Tensor, width: int) -> Tensor:
    """Indices of the `width` highest of `scores` (C,), ascending; among equals the lower index goes first.

    >>> keep_highest(torch.tensor([5, 0, 3, 3, 9, 0, 7, 1]), 4).tolist()
    [0, 3, 4, 6]
    """
    order = torch.argsort(scores, stable=True)
    return order[len(scores) - width :].sort().values


def floor_width(width: int, ratio: float) -> int:
    """width - floor(ratio * width), forgiving binary fractions: 0.3 of 10 removes 3."""
    return width - math.floor(ratio * width + 1e-9)


def allocate(
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    ratios: Mapping[str, float],
    *,
    width: Callable[[int, float], int] = floor_width,
    round_to: int = 1,
) -> ChannelPlan:
    """Keep, in every group of coupled layers, the units that score highest.

    Args:
        scores: layer name -> score of every output channel (C_out,); coupled layers are averaged per unit.
        ratios: layer name -> share to remove; layers not named stay whole.
        width: (width, ratio) -> number kept; at least one always stays.
        round_to: kept widths become the nearest multiple of it, where the layer is that wide.

    Raises:
        MisconfigurationException: coupled layers were given different ratios.
    """
    kept = {}
    for group in graph.groups:
        asked = {n: ratios[n] for n in group.layers if ratios.get(n) is not None and n in scores}
        if not any(asked.values()):
            continue
        if len(set(asked.values())) > 1:
            raise MisconfigurationException(
                f"`pruning_ratio` differs between layers whose channels are added or read together: {asked}. "
                f"Give them one ratio."
            )
        ratio = next(iter(asked.values()))
        score = _unit_scores(graph, group, {n: scores[n] for n in asked})
        size = max(1, min(len(group.units), width(len(group.units), ratio)))
        if round_to > 1:
            size = _round(size, len(group.units), graph.width(group.layers[0]) // len(group.units), round_to)
        stays = group.units[keep_highest(score, size).numpy()]
        for name in group.layers:
            units = graph.layers[name]
            kept[name] = torch.from_numpy(np.flatnonzero(np.isin(units, stays) | (units < 0)))
    return ChannelPlan({n: k for n, k in kept.items() if len(k) < graph.width(n)})


def _unit_scores(graph: ChannelGraph, group: Group, scores: Mapping[str, Tensor]) -> Tensor:
    position = np.full(max(int(graph.layers[n].max()) for n in group.layers) + 2, -1)
    position[group.units] = np.arange(len(group.units))
    total = torch.zeros(len(group.units), dtype=torch.float64)
    count = torch.zeros_like(total)
    for name, score in scores.items():
        if len(score) != graph.width(name):
            raise ValueError(f"Layer {name!r} has {graph.width(name)} channels but {len(score)} scores.")
        free = graph.layers[name] >= 0
        at = torch.from_numpy(position[graph.layers[name][free]])
        total.index_add_(0, at, score.detach().double().cpu()[torch.from_numpy(free)])
        count.index_add_(0, at, torch.ones(len(at), dtype=torch.float64))
    return total / count.clamp(min=1)


def _round(size: int, units: int, per_unit: int, round_to: int) -> int:
    """Nearest number of units whose channels are a multiple of `round_to`; halves go up; never more than all."""
    step = round_to // math.gcd(round_to, max(per_unit, 1))
    return min(units, max(1, math.floor(size / step + 0.5)) * step)


def widths(graph: ChannelGraph, plan: ChannelPlan) -> dict[str, tuple[int, int]]:
    """Layer -> (dense width, kept width), for every layer that the graph can narrow."""
    return {n: (graph.width(n), len(plan.kept[n]) if n in plan.kept else graph.width(n)) for n in graph.layers}


def scaled_macs(macs: Mapping[str, int], graph: ChannelGraph, cuts: Sequence[Cut]) -> float:
    """MACs after `cuts`: those of each layer shrink with the kept share of each dim of its weight.

    Args:
        macs: module name -> dense MACs.
    """
    share: dict[str, float] = {}
    for cut in cuts:
        owner, _, tensor = cut.tensor.rpartition(".")
        if tensor == "weight" or tensor == "original":
            owner = owner.removesuffix(".parametrizations.weight")
            share[owner] = share.get(owner, 1.0) * len(cut.kept) / cut.size
    for name in list(share):  # an attention's own products shrink with its heads
        parent, _, leaf = name.rpartition(".")
        if leaf == "qkv" and parent in macs:
            heads = next((len(c.kept) / c.size for c in cuts if c.tensor == f"{name}.weight" and c.dim == 0), 1.0)
            share.setdefault(parent, heads)
    return sum(value * share.get(name, 1.0) for name, value in macs.items())
