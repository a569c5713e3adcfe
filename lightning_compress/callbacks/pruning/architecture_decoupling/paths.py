"""Calculation paths: which filters an image takes, what that costs, and how it differs between images and classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.callbacks.pruning.architecture_decoupling.gates import NAME, gates_of, watching
from lightning_compress.callbacks.pruning.architecture_decoupling.units import Segments
from lightning_compress.core.meta import evaluating
from lightning_compress.core.surgery import ChannelPlan, Cut, attach_record, channel_graph, check_cuts


def masks_of(module: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The eval masks of images: convolution -> bool (B, N). The module is left as it was."""
    masks: dict[str, list[Tensor]] = {name: [] for name in gates_of(module)}
    with evaluating(module), watching(gates_of(module), lambda name, mask, _: masks[name].append(mask > 0)):
        module(images)
    return {name: torch.cat(parts) for name, parts in masks.items()}


def path(module: nn.Module, images: Tensor) -> Tensor:
    """The calculation path of each image, all masks side by side: bool (B, sum of N).

    A ResNet-56 with 54 gates has paths of 2016 bits.
    """
    return torch.cat(list(masks_of(module, images).values()), 1)


def hamming(left: Tensor, right: Tensor) -> Tensor:
    """Number of bits in which paths differ: bool (A, F) and (B, F) -> int64 (A, B).

    >>> hamming(torch.tensor([[True, False, True]]), torch.tensor([[True, True, False], [True, False, True]]))
    tensor([[2, 0]])
    """
    a, b = left.double(), right.double()
    return (a @ (1 - b).T + (1 - a) @ b.T).round().long()


def class_paths(paths: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Mean path of each class: bool (B, F) and int64 (B,) -> (K, F) in [0, 1]; nan for a class without images."""
    member = torch.nn.functional.one_hot(targets, num_classes).double()
    return ((member.T @ paths.double()) / member.sum(0)[:, None]).float()


def expected_macs(
    macs: Mapping[str, int], reads: Mapping[str, Segments], densities: Mapping[str, float]
) -> dict[str, float]:
    """MACs per image of every layer when filters are selected with these probabilities, independently.

    A gated layer costs the share d of its filters, and reads the share d' of masked channels: MACs * d * d'.

    Args:
        macs: layer -> dense MACs.
        reads: layer -> what it reads, see :meth:`.units.Structure.reads`.
        densities: gated convolution -> mean share of ones.
    """

    def share(segments: Segments) -> float:
        return sum(densities.get(name, 1.0) * n for name, n in segments) / sum(n for _, n in segments)

    return {
        name: count * densities.get(name, 1.0) * (share(reads[name]) if name in reads else 1.0)
        for name, count in macs.items()
    }


@dataclass
class PathStatistics:
    """Sums over images, from which shares and costs follow; they may be added up over processes.

    Args:
        widths: gated convolution -> N.
        reads: layer -> what it reads.
        num_classes: K.

    Attributes:
        images: how many.
        ones: (sum of N,), how often each filter was selected.
        by_class: (K, sum of N), the same by class.
        class_sizes: (K,).
        products: layer -> sum over images of the share of its MACs that was needed, in the order of `layers`.
    """

    widths: Mapping[str, int]
    reads: Mapping[str, Segments]
    num_classes: int
    images: Tensor = field(init=False)
    ones: Tensor = field(init=False)
    by_class: Tensor = field(init=False)
    class_sizes: Tensor = field(init=False)
    products: Tensor = field(init=False)

    def __post_init__(self) -> None:
        filters = sum(self.widths.values())
        self.images = torch.zeros(1, dtype=torch.float64)
        self.ones = torch.zeros(filters, dtype=torch.float64)
        self.by_class = torch.zeros(self.num_classes, filters, dtype=torch.float64)
        self.class_sizes = torch.zeros(self.num_classes, dtype=torch.float64)
        self.products = torch.zeros(len(self.layers), dtype=torch.float64)

    @property
    def layers(self) -> list[str]:
        """The layers that cost less than they did: gated ones, and those that read masked channels."""
        return list(dict.fromkeys([*self.widths, *self.reads]))

    def update(self, masks: Mapping[str, Tensor], targets: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            masks: convolution -> (B, N).
            targets: class indices (B,), or soft labels (B, K); without them nothing is learnt of classes.
        """
        masks = {name: masks[name].double() for name in self.widths}
        kept = {name: mask.sum(1).cpu() for name, mask in masks.items()}  # (B,) each
        paths = torch.cat(list(masks.values()), 1).cpu()
        self.images += len(paths)
        self.ones += paths.sum(0)
        for i, layer in enumerate(self.layers):
            share = kept[layer] / self.widths[layer] if layer in kept else torch.ones(len(paths), dtype=torch.float64)
            if layer in self.reads:
                parts = [kept.get(name, torch.tensor(float(n))) for name, n in self.reads[layer]]
                share = share * sum(parts) / sum(n for _, n in self.reads[layer])
            self.products[i] += share.sum()
        if targets is not None and len(targets) == len(paths):
            labels = targets.argmax(1) if targets.ndim > 1 else targets
            member = torch.nn.functional.one_hot(labels.cpu(), self.num_classes).double()
            self.by_class += member.T @ paths
            self.class_sizes += member.sum(0)

    def flat(self) -> Tensor:
        """All sums in one vector, for one reduction over processes."""
        return torch.cat([t.flatten() for t in self._sums()])

    def load_flat(self, sums: Tensor) -> None:
        """Inverse of :meth:`flat`."""
        parts = sums.cpu().split([t.numel() for t in self._sums()])
        for mine, part in zip(self._sums(), parts, strict=True):
            mine.copy_(part.view_as(mine))

    def _sums(self) -> tuple[Tensor, ...]:
        return self.images, self.ones, self.by_class, self.class_sizes, self.products

    @property
    def frequencies(self) -> dict[str, Tensor]:
        """Convolution -> share of the images that select each filter, (N,)."""
        parts = (self.ones / self.images).split(list(self.widths.values()))
        return dict(zip(self.widths, parts, strict=True))

    @property
    def densities(self) -> dict[str, float]:
        """Convolution -> mean share of its filters that are selected."""
        return {name: float(share.mean()) for name, share in self.frequencies.items()}

    @property
    def diversity(self) -> dict[str, float]:
        """Convolution -> mean_b ||m_b - mean m||_1, which is sum_j 2 p_j (1 - p_j) for binary masks."""
        return {name: float((2 * p * (1 - p)).sum()) for name, p in self.frequencies.items()}

    @property
    def class_frequencies(self) -> Tensor:
        """Mean path of each class, (K, sum of N); nan for a class without images."""
        return (self.by_class / self.class_sizes[:, None]).float()

    def mean_macs(self, macs: Mapping[str, int]) -> dict[str, float]:
        """MACs per image of every layer: those of `macs`, less what was not needed."""
        shares = dict(zip(self.layers, (self.products / self.images).tolist(), strict=True))
        return {name: count * shares.get(name, 1.0) for name, count in macs.items()}

    def kinds(self) -> dict[str, Tensor]:
        """Convolution -> (N,) int8: 1 for filters that every image selects, -1 for those that none does, else 0."""
        return {name: (p == 1).to(torch.int8) - (p == 0).to(torch.int8) for name, p in self.frequencies.items()}


def filter_kinds(module: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Which filters are static on a calibration set.

    Args:
        module: a network with gates.
        batches: images (B, C, H, W).

    Returns:
        Convolution -> (N,) int8: 1 static on, -1 static off, 0 dynamic.
    """
    gates = gates_of(module)
    statistics = PathStatistics({name: gate.expand.out_features for name, gate in gates.items()}, {}, 1)
    for images in batches:
        statistics.update(masks_of(module, images))
    return statistics.kinds()


def prune_static(module: nn.Module, example_input: Any, kinds: Mapping[str, Tensor]) -> ChannelPlan:
    """Remove the filters that no image selects, with their row of the controller: exact wherever that holds.

    Only filters whose channels are not added to others can go; at least one stays in every layer. The change enters the
    module's record, so that a checkpoint of it reloads.

    Args:
        module: a network with gates, which is narrowed in place.
        example_input: an input of its forward, or its shape.
        kinds: of :func:`filter_kinds`.

    Returns:
        The plan: convolution -> kept filters.
    """
    graph = channel_graph(module, example_input)
    kept = {}
    for name, kind in kinds.items():
        alone = name in graph.layers and all(
            other == name or other.startswith(f"{NAME}.") for other in graph.group_of(name).layers
        )
        stays = (kind >= 0).nonzero()[:, 0]
        if alone and 0 < len(stays) < len(kind):
            kept[name] = stays
    plan = ChannelPlan(kept)
    heads = [Cut(f"{NAME}.{name}.head.weight", 1, len(kinds[name]), stays) for name, stays in kept.items()]
    cuts = [*plan.cuts(graph), *heads]
    check_cuts(module, cuts, example_input)
    attach_record(module).cut(module, cuts, by="ArchitectureDecoupling.prune_static", epoch=0)
    return plan
