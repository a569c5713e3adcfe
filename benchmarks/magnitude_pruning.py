"""What masks cost in a training step of ResNet-18: `FixedMasks` against `torch.nn.utils.prune`.

Half of the weights of every layer are zero. The dense step, the same with the masks applied after it, and the step of a
network pruned by torch, which multiplies in the forward and in the backward pass, are run in turns. What the masks cost
does not depend on the images, so it is measured by itself, after a step that has left the caches as it leaves them, and
set against steps of three sizes: with very small ones nearly all time goes into the weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from _alternate import Claim, machine, milliseconds, report, threads
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torchvision.models import resnet18

from lightning_compress.core.sparse.fixed_masks import FixedMasks
from lightning_compress.core.sparse.select_weights import drop_lowest

ROUNDS = 8
SIZES = {(8, 32): None, (32, 32): 1.04, (16, 112): 1.04}  # (images, pixels) -> target


class Training:
    """A network with its optimiser, and one step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = resnet18(num_classes=10)
        self.start()

    def start(self) -> None:
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.network(images), labels).backward()
        self.optimizer.step()
        return time.perf_counter() - begin


def claims() -> Iterator[Claim]:
    with threads(1):
        dense, pruned = Training(), Training()
        layers = {n: m for n, m in dense.network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        keep = {f"{n}.weight": drop_lowest(m.weight.abs(), m.weight.numel() // 2) for n, m in layers.items()}
        for name in layers:
            prune.custom_from_mask(pruned.network.get_submodule(name), "weight", keep[f"{name}.weight"])
        pruned.start()  # with the parameters that torch put in place of the weights
        masks = FixedMasks()
        module: object = dense.network
        masks.set(module, keep)  # type: ignore[arg-type]
        masks.attach(SimpleNamespace(optimizers=[]), module)  # type: ignore[arg-type]
        for (count, pixels), target in SIZES.items():
            images, labels = torch.randn(count, 3, pixels, pixels), torch.randint(10, (count,))
            step = upkeep = theirs = float("inf")
            for _ in range(ROUNDS):
                step = min(step, dense.step(images, labels))
                begin = time.perf_counter()
                masks._step(dense.optimizer, module)  # type: ignore[arg-type]
                upkeep = min(upkeep, time.perf_counter() - begin)
                theirs = min(theirs, pruned.step(images, labels))
            assert all((m.weight[~keep[f"{n}.weight"]] == 0).all() for n, m in layers.items())
            what = f"ResNet-18, {count} images of {pixels}x{pixels}"
            yield Claim(
                f"{what}: step with masks / dense", 1 + upkeep / step, target, at_most=True,
                detail=f"{1e3 * upkeep:.2f} ms on {1e3 * step:.0f}",
            )  # fmt: skip
            yield Claim(f"{what}: step pruned by torch / dense", theirs / step, detail=milliseconds(theirs, step))


if __name__ == "__main__":
    print(machine())
    report(claims())
