"""From a code to a narrow network: which layers a number stands for, how wide they become, what they inherit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.callbacks.pruning.abc_pruner.colony import LEVELS
from lightning_compress.callbacks.pruning.filter_sketch import NARROWED
from lightning_compress.callbacks.pruning.l1_norm import filter_l1
from lightning_compress.core.profile import Profile
from lightning_compress.core.surgery import ChannelGraph, ChannelPlan, allocate
from lightning_compress.core.surgery.shrink import Swap
from lightning_compress.networks.densenet_cifar import DenseLayer

Rule = Literal["random", "random_pretrain", "l1_pretrain"]

# Kind of block -> the layers inside it that get narrower, all by one number of the code.
BLOCKS: dict[type[nn.Module], tuple[str, ...]] = {**NARROWED, DenseLayer: ("conv",)}


def kept_width(width: int, code: int) -> int:
    """Filters that a layer keeps: int(width * code / 10), at least one.

    >>> [kept_width(16, code) for code in range(1, 10)]
    [1, 3, 4, 6, 8, 9, 11, 12, 14]
    """
    return max(1, width * code // LEVELS)


def coded_layers(module: nn.Module, graph: ChannelGraph) -> list[tuple[str, ...]]:
    """The layers that each number of a code narrows, in forward order.

    In the paper's networks: the first convolution of a basic block; the first two of a bottleneck; both reductions and
    the inner convolution of an inception; the convolution of a dense layer; every convolution of a VGG. In a network
    without such blocks, every layer whose channels no other layer writes too (a depthwise convolution follows its
    input): the convolutions, or the linear layers where there are none.

    >>> from lightning_compress.core.surgery import channel_graph
    >>> from lightning_compress.networks import resnet20
    >>> network = resnet20()
    >>> coded_layers(network, channel_graph(network, (1, 3, 32, 32)))[:2]
    [('layer1.0.conv1',), ('layer1.1.conv1',)]
    """
    blocks = [
        tuple(f"{name}.{layer}" for layer in layers)
        for name, block in module.named_modules()
        for kind, layers in BLOCKS.items()
        if isinstance(block, kind)
    ]
    writers = [[name for name in group.layers if not _is_depthwise(module, name)] for group in graph.groups]
    free = [names[0] for names in writers if len(names) == 1]
    if blocks:
        found = [tuple(name for name in block if name in free) for block in blocks]
        return [layers for layers in found if layers]
    convolutions = [name for name in free if not isinstance(module.get_submodule(name), nn.Linear)]
    return [(name,) for name in graph.layers if name in (convolutions or free)]


def _is_depthwise(module: nn.Module, name: str) -> bool:
    """Whether a layer passes channels on without mixing them."""
    layer: Any = module.get_submodule(name)
    return getattr(layer, "groups", 1) == getattr(layer, "in_channels", 0) > 1


def filter_scores(weight: Tensor, rule: Rule, generator: torch.Generator, draw_last: bool = True) -> Tensor:
    """Rank the filters of a layer, (C_out, ...) -> (C_out,), a permutation of 0..C_out-1; the highest are inherited.

    Args:
        rule: ``"l1_pretrain"`` ranks by the sum of absolute weights, the lower index first among equals; the others
            draw without replacement.
        draw_last: False never draws a layer's last filter before all others, as the authors' code.
    """
    width = len(weight)
    if rule == "l1_pretrain":
        order = filter_l1(weight).cpu().argsort(descending=True, stable=True)
    else:
        order = torch.randperm(width if draw_last else width - 1, generator=generator)
        order = torch.cat([order, torch.arange(len(order), width)])
    return torch.empty(width, dtype=torch.int64).scatter_(0, order, torch.arange(width).flip(0))


def inherited_filters(
    module: nn.Module,
    graph: ChannelGraph,
    layers: Sequence[Sequence[str]],
    code: Sequence[int],
    rule: Rule,
    generator: torch.Generator,
    draw_last: bool = True,
) -> ChannelPlan:
    """The filters that the structure of a code keeps.

    What reads a narrowed layer keeps the same indices on its input. (The authors' code draws every axis of a GoogLeNet
    or DenseNet anew, so that channels meet weights that were trained for others.)
    """
    ratios = {name: 1 - number / LEVELS for names, number in zip(layers, code, strict=True) for name in names}
    scores = {}
    for name in ratios:
        layer: Any = module.get_submodule(name)
        weight = layer.weight.transpose(0, 1) if getattr(layer, "transposed", False) else layer.weight
        scores[name] = filter_scores(weight, rule, generator, draw_last)
    return allocate(graph, scores, ratios, width=width_of_ratio)


def width_of_ratio(width: int, ratio: float) -> int:
    """`kept_width`, of the share that goes: 1 - code / 10."""
    return kept_width(width, round(LEVELS * (1 - ratio)))


def start_afresh(module: nn.Module) -> None:
    """Draw all weights anew, as torch initialises a layer of that kind."""
    for layer in module.modules():
        reset = getattr(layer, "reset_parameters", None)
        if reset is not None:
            reset()


def forget_norms(module: nn.Module, swaps: Sequence[Swap]) -> None:
    """What the authors' VGG and ResNets do not inherit: batch norms, biases of convolutions, and a classifier that
    lost inputs."""
    narrowed = {swap.name.rpartition(".")[0] for swap in swaps}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) or (isinstance(layer, nn.Linear) and name in narrowed):
            layer.reset_parameters()
        elif isinstance(layer, nn.modules.conv._ConvNd) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


def published_macs(profile: Profile) -> int:
    """MACs by the rule of the published tables.

    Convolutions, one per output element of a biased convolution, four per output element of a batch norm, and
    (2 * in - 1) * out for a linear layer.
    """
    linear = sum(layer.macs - layer.outputs for layer in profile.layers if layer.kind == "linear")
    return profile.paper_macs(bn_ops=4) + linear
