"""What can be masked in a network, found from how it computes: blocks, branches, channels."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_compress.core.meta import evaluating
from lightning_compress.core.select import match
from lightning_compress.core.surgery import ChannelGraph, channel_graph

KINDS = ("auto", "block", "branch", "channel", "joint")
Norm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Point:
    """Where one mask multiplies, and what goes where it is zero.

    Attributes:
        at: name of the module whose output is multiplied, or whose input is (`front`).
        kind: ``"block"``: what stands beside a shortcut, multiplied behind its last batch norm. ``"branch"``: what is
            concatenated with others. ``"channel"``: the outputs of a layer that no sum ties to others, multiplied
            behind their activation. ``"input"``: the channels that a convolution reads of a tensor that others read
            too.
        unit: the block, the branch, the layer that writes the channels, or the convolution that reads them.
        size: entries of the mask: 1, or the number of channels.
        front: whether the mask multiplies the input of `at`.
        norm: batch norm that takes up the mask of a block or branch which stays.
        layer: convolution that writes a branch's output.
        uniform: whether the authors draw the mask from U(0, 1), as for the layers inside a dense block, not N(0, 1).
    """

    at: str
    kind: Literal["block", "branch", "channel", "input"]
    unit: str
    size: int = 1
    front: bool = False
    norm: str = ""
    layer: str = ""
    uniform: bool = False


@dataclass(frozen=True)
class Call:
    """One run of a module: the first tensor it read, and the one it wrote."""

    name: str
    module: nn.Module
    read: Tensor
    wrote: Tensor

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]


def watch(network: nn.Module, images: Tensor) -> list[Call]:
    """All runs of modules in one forward pass in eval mode, in the order in which they end."""
    seen: list[Call] = []

    def note(name: str, module: nn.Module, args: tuple, out: object) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
            seen.append(Call(name, module, args[0], out))

    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: note(name, module, args, out))
        for name, module in network.named_modules()
    ]
    try:
        with evaluating(network):
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def bypass(block: nn.Module) -> nn.Module:
    """What is left of a residual block without its convolutions: its shortcut, and ReLU if that computes something."""
    for name in ("shortcut", "downsample"):
        path = getattr(block, name, None)
        if path is not None and not isinstance(path, nn.Identity):
            relu = {"relu": nn.ReLU()} if any(True for _ in path.parameters()) else {}
            return nn.Sequential(OrderedDict({name: path, **relu}))
    return nn.Identity()


def find_blocks(network: nn.Module, seen: Sequence[Call]) -> list[Point]:
    """Residual blocks: modules that, with their last batch norm silenced, compute what :func:`bypass` computes."""
    points = []
    for call in seen:
        inside = [c for c in seen if c.parent == call.name and c.name]
        norms = [c for c in inside if isinstance(c.module, Norm)]
        if len(norms) < 2 or sum(isinstance(c.module, nn.Conv2d) for c in inside) < 2:
            continue
        around = bypass(call.module)
        with evaluating(around):
            expected = around(call.read)
        if _same(_scaled(call, norms[-1].module, 0.0), expected):
            points.append(Point(norms[-1].name, "block", call.name, norm=norms[-1].name))
    return points


def find_branches(network: nn.Module, seen: Sequence[Call]) -> list[Point]:
    """Branches: modules that read the same tensor, and whose outputs, put side by side, are that of their parent."""
    points = []
    for call in seen:
        branches = [c for c in seen if c.parent == call.name and c.name and c.read is call.read]
        if len(branches) < 2 or any(b.wrote.ndim != 4 for b in branches):
            continue
        if sum(b.wrote.shape[1] for b in branches) != call.wrote.shape[1]:
            continue
        if not _same(torch.cat([b.wrote for b in branches], 1), call.wrote):
            continue
        for branch in branches:
            inside = [c for c in seen if c.name.startswith(f"{branch.name}.")]
            norms = [c for c in inside if isinstance(c.module, Norm)]
            layers = [c for c in inside if isinstance(c.module, nn.Conv2d)]
            if norms and layers and _same(_scaled(branch, norms[-1].module, 0.5), 0.5 * branch.wrote):
                name, norm, layer = branch.name, norms[-1].name, layers[-1].name
                points.append(Point(name, "branch", name, norm=norm, layer=layer))
    return points


def find_channels(seen: Sequence[Call], graph: ChannelGraph) -> list[Point]:
    """Outputs of layers that no sum ties to others: masked behind their own ReLU, else in front of their one reader."""
    calls = Counter(call.name for call in seen)
    norms = [graph.axes.get((f"{c.name}.weight", 0), np.empty(0)) for c in seen if isinstance(c.module, Norm)]
    reads = {tensor.removesuffix(".weight"): units for (tensor, dim), units in graph.axes.items() if dim == 1}
    points = []
    for layer, units in graph.layers.items():
        if (units < 0).any() or len(graph.group_of(layer).layers) > 1:
            continue
        if sum(bool(np.isin(units, normed).any()) for normed in norms) > 1:
            continue  # they pass on without the first norm and its ReLU, too
        relu = _own_relu(layer, seen)
        if relu is not None and calls[relu] == 1:
            points.append(Point(relu, "channel", layer, len(units)))
            continue
        readers = [n for n, u in reads.items() if calls[n] and np.isin(units, u).any()]
        if len(readers) == 1 and calls[readers[0]] == 1 and np.array_equal(reads[readers[0]], units):
            points.append(Point(readers[0], "channel", layer, len(units), front=True))
    return points


def find_inputs(seen: Sequence[Call], graph: ChannelGraph, masked: Sequence[Point]) -> list[Point]:
    """Convolutions behind batch norm and ReLU whose input others read too: those of dense blocks and transitions."""
    ruled = np.concatenate([graph.layers[p.unit] for p in masked if p.kind == "channel"] or [np.empty(0, int)])
    points = []
    for i, call in enumerate(seen):
        relu = _writer(seen[:i], call.read, nn.ReLU) if isinstance(call.module, nn.Conv2d) else None
        norm = _writer(seen[:i], relu.read, Norm) if relu else None
        units = graph.axes.get((f"{call.name}.weight", 1))
        if norm is not None and units is not None and not np.isin(units, ruled).any():
            points.append(_input(call.name, graph))
    return points


def find_joint(seen: Sequence[Call], graph: ChannelGraph, blocks: Sequence[Point]) -> list[Point]:
    """Blocks, the input of each block's first convolution, and the channels between its convolutions."""
    channels = find_channels(seen, graph)
    points = []
    for block in blocks:
        first = next(c.name for c in seen if c.parent == block.unit and isinstance(c.module, nn.Conv2d))
        points += [block, _input(first, graph)]
        points += [p for p in channels if p.unit.rpartition(".")[0] == block.unit]
    return points


def find_points(network: nn.Module, images: Tensor, which: str | Sequence[str] = "auto") -> list[Point]:
    """What is masked in a network.

    Args:
        network: the network.
        images: any images, (N, C, H, W), on its device; they pass through it once.
        which: ``"block"``, ``"branch"``, ``"channel"``, or ``"joint"``: blocks and the channels inside them. ``"auto"``
            takes the first of the first three that the network has. Or globs of names of blocks, branches and layers.

    Raises:
        ValueError: a glob that matches nothing.
        MisconfigurationException: the network has nothing of that kind.
    """
    seen = watch(network, images)
    graph = None

    def found(kind: str) -> list[Point]:
        nonlocal graph
        if kind in ("block", "joint"):
            blocks = find_blocks(network, seen)
            if kind == "block" or not blocks:
                return blocks
        if kind == "branch":
            return find_branches(network, seen)
        graph = graph or channel_graph(network, images)
        if kind == "joint":
            return find_joint(seen, graph, blocks)
        channels = find_channels(seen, graph)
        return channels + find_inputs(seen, graph, channels)

    if isinstance(which, str) and which in KINDS:
        points = next((p for kind in (KINDS[1:4] if which == "auto" else [which]) if (p := found(kind))), [])
    else:
        every = [p for kind in KINDS[1:4] for p in found(kind)]
        chosen = match([p.unit for p in every], [which] if isinstance(which, str) else which, "mask_points")
        points = [p for p in every if p.unit in chosen]
    if not points:
        raise MisconfigurationException(
            f"mask_points={which!r}: {type(network).__name__} has nothing of the kind. A block stands beside a "
            f"shortcut and ends in a batch norm, branches are concatenated, a channel is written by one layer alone."
        )
    return points


def _input(conv: str, graph: ChannelGraph) -> Point:
    """The mask in front of a convolution. In a dense block what it writes lies beside what it reads."""
    reads, writes = graph.axes[f"{conv}.weight", 1], graph.axes[f"{conv}.weight", 0]
    both = np.union1d(reads, writes)
    beside = any(len(units) >= len(both) and np.isin(both, units).all() for units in graph.axes.values())
    return Point(conv, "input", conv, len(reads), front=True, layer=conv, uniform=beside and len(both) > len(reads))


def _own_relu(layer: str, seen: Sequence[Call]) -> str | None:
    """The ReLU that reads what a layer wrote, maybe through batch norm."""
    start = next(i for i, call in enumerate(seen) if call.name == layer)
    tensor = seen[start].wrote
    for call in seen[start + 1 :]:
        if call.read is tensor:
            if isinstance(call.module, nn.ReLU):
                return call.name
            if not isinstance(call.module, Norm):
                return None
            tensor = call.wrote
    return None


def _writer(seen: Sequence[Call], tensor: Tensor, kind: type[nn.Module]) -> Call | None:
    """The last module that wrote a tensor, if it is of a kind."""
    last: Iterator[Call] = (call for call in reversed(seen) if call.wrote is tensor and isinstance(call.module, kind))
    return next(last, None)


def _scaled(call: Call, norm: nn.Module, factor: float) -> Tensor:
    """What a module computes with the output of one of its batch norms multiplied."""
    handle = norm.register_forward_hook(lambda module, args, out: out * factor)
    try:
        with evaluating(call.module):
            return call.module(call.read)
    finally:
        handle.remove()


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-6)
