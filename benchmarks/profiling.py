"""`lightning_compress.profile` against the counters that a user has at hand.

They count differently, so what each one says is printed beside its time. The reference counts of MACs, of convolution,
linear layers and attention: ResNet-50 4.089 G, ViT-B/16 17.56 G.

(Not `profile.py`, which would hide the standard library's module of that name from the others here.)
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch_pruning as tp
import torchvision
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress import profile

REPEATS = 7
MACS = {"resnet50": 4_089_184_256, "vit_b_16": 17_563_828_224}


def claims() -> Iterator[Claim]:
    with threads(1), torch.no_grad():
        for name, macs in MACS.items():
            yield from measure(name, macs)


def measure(name: str, macs: int) -> Iterator[Claim]:
    network = torchvision.models.get_model(name).eval()
    image = torch.randn(1, 3, 224, 224)

    def flop_counter() -> float:
        with FlopCounterMode(display=False) as counter:
            network(image)
        return counter.get_total_flops() / 2

    def torch_pruning() -> float:
        return tp.utils.count_ops_and_params(network, image)[0]

    assert profile(network, image).macs == macs
    ours, *theirs = best_times(REPEATS, partial(profile, network, image), flop_counter, torch_pruning)
    peers = ("FlopCounterMode", flop_counter), ("torch-pruning", torch_pruning)
    for (peer, count), seconds in zip(peers, theirs, strict=True):
        yield Claim(
            f"{name}: {peer}'s time / profile's",
            seconds / ours,
            1,
            detail=f"{milliseconds(ours, seconds)}; it counts {count() / 1e9:.2f} G, profile {macs / 1e9:.2f} G",
        )


if __name__ == "__main__":
    print(machine())
    report(claims())
