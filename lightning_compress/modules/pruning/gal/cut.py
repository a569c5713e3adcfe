"""From zeros to a smaller network that computes the same: fold the masks that stay, cut out what has none."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_compress.core.meta import evaluating
from lightning_compress.core.surgery import ChannelGraph, Cut, apply_cuts, channel_graph, replayable
from lightning_compress.modules.pruning.gal.masks import masking
from lightning_compress.modules.pruning.gal.points import Point, bypass

# ---- modules that stand where something was cut out


class Concatenated(nn.Module):
    """Side by side, in order, what its children compute of one input: the branches that are left."""

    def __init__(self, branches: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.children()], 1)


class SelectConv2d(nn.Conv2d):
    """A convolution that reads some channels of its input."""

    index: Tensor

    @classmethod
    def of(cls, conv: nn.Conv2d, index: Tensor) -> SelectConv2d:
        """The same convolution, with the same parameters, behind a selection of channels."""
        new = copy.copy(conv)  # shares the parameters; the registries are copied, so that the old one keeps its own
        new.__class__ = cls
        for registry in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            vars(new)[registry] = vars(conv)[registry].copy()
        new.register_buffer("index", index.to(conv.weight.device), persistent=False)
        return new  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.index_select(1, self.index))


# ---- what to do


@dataclass
class CutPlan:
    """How masks become a smaller network.

    Attributes:
        scales: name of a tensor -> factor that its values take up; broadcasts.
        blocks: residual blocks to bypass.
        branches: branches to remove.
        selected: convolution -> channels of its input that it keeps reading.
        cuts: slices of tensors, to be made last.
    """

    scales: dict[str, Tensor] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    selected: dict[str, Tensor] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)

    def named(self, prefix: str) -> CutPlan:
        """The same for a module that holds the network under a prefix."""
        return CutPlan(
            {prefix + name: scale for name, scale in self.scales.items()},
            [prefix + name for name in self.blocks],
            [prefix + name for name in self.branches],
            {prefix + name: index for name, index in self.selected.items()},
            [cut._replace(tensor=prefix + cut.tensor) for cut in self.cuts],
        )

    @property
    def changes(self) -> dict[str, object]:
        """Arguments of :func:`remove_structures`."""
        return {"blocks": self.blocks, "branches": self.branches, "selected": self.selected}


def plan_cut(
    network: nn.Module, images: Tensor, points: Sequence[Point], masks: Mapping[str, Tensor], thre: float = 0.0
) -> CutPlan:
    """Decide what goes: every structure whose mask is at most `thre`.

    The last branch of a concatenation and the first channel of a layer stay in any case, multiplied by their mask.

    Args:
        network: the network, without masks.
        images: any images that it takes.
        points: its mask points.
        masks: name of a point's module -> mask; on the CPU.
        thre: 0 cuts exactly; above 0 the function changes.
    """
    masks = {name: mask.detach().float().cpu() for name, mask in masks.items()}
    dead = {p.at: masks[p.at] <= thre for p in points}
    plan = CutPlan()
    plan.blocks = [p.unit for p in points if p.kind == "block" and bool(dead[p.at])]
    siblings = defaultdict(list)
    for p in points:
        if p.kind == "branch":
            siblings[p.unit.rpartition(".")[0]].append(p)
    for parent, branches in siblings.items():
        gone = [p for p in branches if bool(dead[p.at])]
        if len(gone) == sum(1 for _ in network.get_submodule(parent).children()):  # all of them: one must stay
            gone.remove(max(branches, key=lambda p: float(masks[p.at])))  # the first of equals
        plan.branches += [p.unit for p in gone]
    removed = tuple(f"{name}." for name in (*plan.blocks, *plan.branches))
    left = [p for p in points if not f"{p.at}.".startswith(removed)]

    graph = channel_graph(network, images) if any(p.kind != "block" for p in points) else None
    unit_scale = np.ones(graph.units) if graph else np.ones(0)
    gone_units = np.zeros(graph.units, bool) if graph else np.zeros(0, bool)
    for p in left:
        mask = masks[p.at].clamp_min(0)  # one that stays although it is dead must not become negative behind ReLU
        if p.kind in ("block", "branch"):
            plan.scales[f"{p.norm}.weight"] = plan.scales[f"{p.norm}.bias"] = mask
            continue
        stays = ~dead[p.at]
        stays[0] |= not stays.any()
        kept = stays.nonzero()[:, 0]
        if p.kind == "input":
            _multiply(plan.scales, f"{p.at}.weight", mask.view(1, -1, 1, 1))
            if len(kept) < p.size:
                plan.selected[p.at] = kept
                plan.cuts.append(Cut(f"{p.at}.weight", 1, p.size, kept))
        elif graph:
            units = graph.layers[p.unit]
            unit_scale[units] = mask.numpy()
            gone_units[units[~stays.numpy()]] = True
    if graph:
        for p in points:
            if p.unit in plan.branches:
                gone_units[graph.layers[p.layer]] = True
        _channels(plan, network, graph, unit_scale, gone_units, removed)
    return plan


def _channels(
    plan: CutPlan,
    network: nn.Module,
    graph: ChannelGraph,
    unit_scale: np.ndarray,
    gone_units: np.ndarray,
    removed: tuple[str, ...],
) -> None:
    """Masks of channels go into the weights that read them; what is gone is sliced from every tensor."""
    for (tensor, dim), units in graph.axes.items():
        if tensor.startswith(removed):
            continue
        owner = network.get_submodule(tensor.rpartition(".")[0])
        if dim == 1 and isinstance(owner, (nn.Conv2d, nn.Linear)) and (unit_scale[units] != 1).any():
            factor = torch.from_numpy(unit_scale[units]).float()
            shape = (1, -1, 1, 1) if isinstance(owner, nn.Conv2d) else (1, -1)
            _multiply(plan.scales, tensor, factor.view(shape))
        stays = ~gone_units[units]
        if not stays.all():
            plan.cuts.append(Cut(tensor, dim, len(units), torch.from_numpy(np.flatnonzero(stays))))


def _multiply(scales: dict[str, Tensor], name: str, factor: Tensor) -> None:
    scales[name] = scales[name] * factor if name in scales else factor


# ---- doing it


@torch.no_grad()
def fold(module: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """Multiply the masks that stay into the weights, in place."""
    for name, scale in scales.items():
        parameter = module.get_parameter(name)
        parameter.mul_(scale.to(parameter))


@replayable
def remove_structures(
    module: nn.Module, blocks: Sequence[str], branches: Sequence[str], selected: Mapping[str, Tensor]
) -> Callable[[nn.Module], None]:
    """Bypass blocks, take out branches, and let convolutions select what they read; names of all that stays remain."""
    old: dict[str, nn.Module] = {}

    def replace(name: str, new: nn.Module) -> None:
        old[name] = module.get_submodule(name)
        module.set_submodule(name, new.train(old[name].training))

    for name in blocks:
        replace(name, bypass(module.get_submodule(name)))
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in branches):
        children = module.get_submodule(parent).named_children()
        replace(parent, Concatenated({name: m for name, m in children if f"{parent}.{name}" not in branches}))
    for name, index in selected.items():
        conv = module.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        replace(name, SelectConv2d.of(conv, index))
    return partial(_put_back, old=old)


def _put_back(module: nn.Module, old: dict[str, nn.Module]) -> None:
    for name in reversed(old):
        module.set_submodule(name, old[name])


def cut_copy(network: nn.Module, plan: CutPlan) -> nn.Module:
    """A smaller copy of a network, without masks and without anything that remembers them."""
    small = copy.deepcopy(network)
    fold(small, plan.scales)
    remove_structures(small, plan.blocks, plan.branches, plan.selected)
    apply_cuts(small, plan.cuts)
    return small


def rehearse(network: nn.Module, images: Tensor, points: Sequence[Point]) -> None:
    """Cut a copy by masks of which half are zero, and see that it computes what the masked network computes.

    Raises:
        MisconfigurationException: it does not: something between a mask and the weights that would take it up does more
            than scale with it.
    """
    generator = torch.Generator().manual_seed(0)
    masks = {p.at: (torch.rand(p.size, generator=generator) - 0.5).clamp_min(0).to(images) for p in points}
    small = cut_copy(network, plan_cut(network, images, points, masks))
    with evaluating(network), evaluating(small):
        with masking(network, points, masks):
            expected = network(images)
        difference, scale = (small(images) - expected).abs().max(), expected.abs().max()
    if not difference <= 0.02 * scale:  # TF32 rounds coarsely, a wrong structure is far off
        raise MisconfigurationException(
            f"mask_points: masks of {type(network).__name__} cannot be folded into its weights: the cut network would "
            f"differ by {float(difference):.3g}, with outputs up to {float(scale):.3g}. Name other points."
        )
