"""HRank's scoring against the shape of the papers' code.

Criterion: `feature_map_rank` on a layer's maps of 256 images, against a Python loop over images and channels that
calls `torch.linalg.matrix_rank` on one map. Scoring pass: all layers read in one pass, against one pass through the
network per layer, each with that loop.

The loop takes minutes, so it runs on the first 8 of the 256 images and its time is multiplied by 32; the ranks of
these must be equal. Of the passes, which are two batches of 128, one batch is timed; a plain one is timed once and
counted once per layer. Weights and images are random; with LC_DATA, a trained ResNet-56 on CIFAR-10 is measured too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from _alternate import Claim, best_times, geometric_mean, machine, report
from torch import Tensor, nn

from lightning_compress.callbacks.pruning.hrank import FeatureRanks, feature_map_rank
from lightning_compress.callbacks.pruning.hrank.published import rank_taps
from lightning_compress.callbacks.pruning.hrank.taps import feature_maps
from lightning_compress.networks import load_weights, resnet56, vgg16_cifar

IMAGES, BATCH, LOOP_IMAGES = 256, 128, 8
LAYER_REPEATS, PASS_REPEATS = 3, 10


def loop(maps: Tensor) -> Tensor:
    return torch.tensor([[torch.linalg.matrix_rank(m).item() for m in image] for image in maps])


def claims() -> Iterator[Claim]:
    torch.manual_seed(0)
    noise = torch.randn(IMAGES, 3, 32, 32)
    criteria, passes = [], []
    for name, make in (("ResNet-56", resnet56), ("VGG-16", vgg16_cifar)):
        ratios, whole = measure(make(), noise)
        yield from told(name, ratios, whole)
        criteria += ratios
        passes.append(whole)
    yield Claim("both: per-map loop / rank criterion, geometric mean over layers", geometric_mean(criteria), 5)
    yield Claim("both: pass per layer / scoring pass, geometric mean", geometric_mean(passes), 20)
    if "LC_DATA" in os.environ:
        yield from told("trained ResNet-56", *measure(*trained(Path(os.environ["LC_DATA"]))))


def told(name: str, ratios: list[float], whole: float) -> Iterator[Claim]:
    spread = f"{len(ratios)} layers, {min(ratios):.1f} to {max(ratios):.1f}"
    yield Claim(f"{name}: per-map loop / rank criterion", geometric_mean(ratios), detail=spread)
    yield Claim(f"{name}: pass per layer / scoring pass", whole)


@torch.no_grad()
def measure(network: nn.Module, images: Tensor) -> tuple[list[float], float]:
    """How many times longer the loop takes, per layer, and the pass per layer."""
    network.eval()
    taps = rank_taps(network)
    ratios: list[float] = []

    def compare(layer: str, maps: Tensor) -> None:
        few = maps[:LOOP_IMAGES]
        assert torch.equal(feature_map_rank(few), loop(few)), f"ranks of {layer} differ"
        ours, theirs = best_times(LAYER_REPEATS, lambda: feature_map_rank(maps), lambda: loop(few))
        ratios.append(IMAGES / LOOP_IMAGES * theirs / ours)

    with feature_maps(network, list(taps), taps, compare):
        network(images)

    def score() -> None:
        ranks = FeatureRanks()
        with feature_maps(network, list(taps), taps, lambda n, maps: ranks.update(n, feature_map_rank(maps))):
            network(images[:BATCH])

    def loops() -> None:
        with feature_maps(network, list(taps), taps, lambda n, maps: loop(maps)):
            network(images[:LOOP_IMAGES])

    ours, forward, few = best_times(PASS_REPEATS, score, lambda: network(images[:BATCH]), loops)
    return ratios, ((len(taps) - 1) * forward + BATCH / LOOP_IMAGES * few) / ours


def trained(data: Path) -> tuple[nn.Module, Tensor]:
    """The public ResNet-56 and the first training images of CIFAR-10."""
    network = resnet56()
    load_weights(network, data / "weights" / "resnet56-cifar10.pt")
    pixels = torch.from_numpy(np.load(data / "cifar10.npz")["x_train"][:IMAGES]).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
    return network, (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)


if __name__ == "__main__":
    print(machine())
    report(claims())
