"""Structural pruning of half of all channels, against torch-pruning removing the same channels.

Ours: follow the channels, allocate, cut, slice parameters and SGD's momentum. Theirs: build the dependency graph, then
prune each group; optimiser state is not carried there. Scores are given to both. Both pruned networks must compute the
same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch_pruning as tp
import torchvision
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from torch import Tensor, nn
from torch.optim import SGD

from lightning_compress.callbacks.pruning.l1_norm import filter_l1
from lightning_compress.core.surgery import allocate, apply_cuts, carry_optimizer, channel_graph

REPEATS = 5
TARGETS = {"resnet50": 1.5, "densenet121": None, "vgg16_bn": None}


def claims() -> Iterator[Claim]:
    with threads(1):
        for name, target in TARGETS.items():
            yield measure(name, target)


def measure(name: str, target: float | None) -> Claim:
    torch.manual_seed(0)
    dense = torchvision.models.get_model(name).eval()
    example = torch.randn(1, 3, 224, 224)
    graph = channel_graph(dense, example)
    scores = {n: filter_l1(dense.get_parameter(f"{n}.weight")) for n in graph.layers}
    ratios = dict.fromkeys(graph.layers, 0.5)
    plan = allocate(graph, scores, ratios)
    gone = {g.layers[0]: removed(plan.kept[g.layers[0]], graph.width(g.layers[0])) for g in graph.groups}

    def prepare() -> tuple[nn.Module, SGD]:
        network = copy.deepcopy(dense)
        optimizer = SGD(network.parameters(), lr=0.1, momentum=0.9)
        for p in network.parameters():
            optimizer.state[p]["momentum_buffer"] = p.detach().clone()
        return network, optimizer

    def ours(network: nn.Module, optimizer: SGD) -> None:
        graph = channel_graph(network, example)
        cuts = allocate(graph, scores, ratios).cuts(graph)
        carry_optimizer(optimizer, apply_cuts(network, cuts))

    def theirs(network: nn.Module, optimizer: SGD) -> None:
        graph = tp.DependencyGraph().build_dependency(network, example)
        for layer, indices in gone.items():
            module = network.get_submodule(layer)
            prune = tp.prune_conv_out_channels if isinstance(module, nn.Conv2d) else tp.prune_linear_out_channels
            graph.get_pruning_group(module, prune, idxs=indices).prune()

    network, optimizer = prepare()
    reference, unused = prepare()
    ours(network, optimizer)
    theirs(reference, unused)
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], p) for p in network.parameters())
    with torch.no_grad():
        torch.testing.assert_close(network(example), reference(example))
    del network, optimizer, reference, unused  # of VGG, two gigabytes
    here, there = best_times(REPEATS, ours, theirs, prepare=prepare)
    return Claim(
        f"{name}: time to prune 50 % / torch-pruning's",
        here / there,
        target,
        at_most=True,
        detail=milliseconds(here, there),
    )


def removed(kept: Tensor, width: int) -> list[int]:
    return sorted(set(range(width)) - set(kept.tolist()))


if __name__ == "__main__":
    print(machine())
    report(claims())
