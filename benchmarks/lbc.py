"""What learning 2:4 sparsity costs: a training step of ResNet-18 with LBC's scores against the dense one.

Forward, backward and the optimiser's step on 16 images of 224x224 (the paper: 64 per GPU), in turns, while all
combinations are alive and while two of six are left. The finished network has no scores: see `magnitude_pruning.py` for
what its masks cost. Beside it, one removal of combinations, which happens once per epoch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from lightning_compress.callbacks.sparsity.lbc import CombinationMask, compete, layers_to_learn
from lightning_compress.core.sparse.learnt_mask import masks_in

ROUNDS, IMAGES, PIXELS = 5, 16, 224


def training(network: nn.Module, images: torch.Tensor, labels: torch.Tensor):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def claims() -> Iterator[Claim]:
    torch.manual_seed(0)
    images, labels = torch.randn(IMAGES, 3, PIXELS, PIXELS), torch.randint(1000, (IMAGES,))
    with threads(1):
        dense, sparse = resnet18(), resnet18()
        names, _ = layers_to_learn(sparse, 4)
        compete(sparse, names, 2, 4)
        masks = masks_in(sparse, CombinationMask).values()
        steps = training(dense, images, labels), training(sparse, images, labels)
        for gone, target in ((0, 1.15), (4, 1.15)):
            begin = time.perf_counter()
            for mask in masks:
                mask.remove(gone)
            removal = time.perf_counter() - begin
            plain, learning = best_times(ROUNDS, *steps)
            yield Claim(
                f"ResNet-18, {IMAGES} images, 2:4, {gone} of 6 gone: step with scores / dense",
                learning / plain, target, at_most=True, detail=milliseconds(learning, plain),
            )  # fmt: skip
        yield Claim("one removal / dense step, once per epoch", removal / plain, detail=milliseconds(removal, plain))


if __name__ == "__main__":
    print(machine())
    report(claims())
