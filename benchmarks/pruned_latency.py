"""Measured latency gain of a narrowed ResNet-50, as a share of what its MACs promise.

The promise is made for half of the MACs, which is 30 % of the channels of every layer, with widths as they come and
rounded to multiples of 8. What half of the channels, a quarter of the MACs, do is told beside it: at batch 1 some
milliseconds per pass are spent on calling operators, and these do not shrink. Eager mode, channels last, 2 threads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
import torchvision
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from torch import nn

from lightning_compress import profile
from lightning_compress.callbacks.pruning.l1_norm import filter_l1
from lightning_compress.core.surgery import allocate, apply_cuts, channel_graph

REPEATS = {1: 60, 32: 4}  # batch size -> passes of each network
SETTINGS = {(0.3, 1): 0.75, (0.3, 8): 0.75, (0.5, 1): None}  # (pruning_ratio, round_to) -> target


def claims() -> Iterator[Claim]:
    torch.manual_seed(0)
    dense = torchvision.models.resnet50().eval()
    narrow = [narrowed(dense, *setting) for setting in SETTINGS]
    promised = [macs(dense) / macs(network) for network in narrow]
    networks = [n.to(memory_format=torch.channels_last) for n in (dense, *narrow)]
    with threads(2), torch.inference_mode():
        for batch, repeats in REPEATS.items():
            images = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
            runs = [partial(network, images) for network in networks]
            best_times(1, *runs)  # warm up
            before, *after = best_times(repeats, *runs)
            for ((ratio, round_to), target), seconds, gain in zip(SETTINGS.items(), after, promised, strict=True):
                yield Claim(
                    f"batch {batch}, {ratio:.0%} pruned, round_to={round_to}: latency gain / MACs gain",
                    before / seconds / gain,
                    target,
                    detail=f"{before / seconds:.2f}x of {gain:.2f}x, {milliseconds(seconds, before)}",
                )


def narrowed(dense: nn.Module, pruning_ratio: float, round_to: int) -> nn.Module:
    network = copy.deepcopy(dense)
    graph = channel_graph(network, (1, 3, 224, 224))
    scores = {n: filter_l1(network.get_parameter(f"{n}.weight")) for n in graph.layers}
    plan = allocate(graph, scores, dict.fromkeys(graph.layers, pruning_ratio), round_to=round_to)
    apply_cuts(network, plan.cuts(graph))
    return network


def macs(network: nn.Module) -> int:
    return profile(network, (1, 3, 224, 224)).macs


if __name__ == "__main__":
    print(machine())
    report(claims())
