"""Four cheap students in one fused pass against four passes, one after the other: forward and backward.

The same networks, images and gradients; where fusing pays, `OnlineDistillation` does it by itself. On a CPU that is
with small images, where every call of an operator costs more than its arithmetic, and most with shifts. What it is with
images of CIFAR's size, where it is not done, and what the channels-last format is worth there, is told too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from torch import Tensor, nn

from lightning_compress.modules import OnlineDistillation
from lightning_compress.modules.distillation.online_distillation.losses import online_losses
from lightning_compress.networks import CheapResNet
from lightning_compress.networks.cheap import Kind

IMAGES, SMALL, LARGE = 32, (8, 16), 32
KINDS: tuple[Kind, ...] = ("shift", "dw", "group")


def students(kind: Kind, size: int, channels_last: bool = False) -> OnlineDistillation:
    torch.manual_seed(0)
    network = partial(CheapResNet, 20, kind=kind)
    return OnlineDistillation(network, input_shape=(3, size, size), channels_last=channels_last)


def step(module: OnlineDistillation, images: Tensor, labels: Tensor, together: bool) -> None:
    module.zero_grad()
    logits, teacher = module._all_logits(images, together)
    online_losses(logits, teacher, labels).total().backward()


def gradients(module: nn.Module, run: Callable[[], None]) -> Tensor:
    run()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def claims() -> Iterator[Claim]:
    for kind, size, count in product(KINDS, SMALL, (1, 2)):
        module = students(kind, size)
        x, y = torch.randn(IMAGES, 3, size, size), torch.randint(10, (IMAGES,))
        apart, fused = (partial(step, module, x, y, together) for together in (False, True))
        one, other = gradients(module, apart), gradients(module, fused)
        assert (one - other).norm() < 1e-3 * one.norm()
        with threads(count):
            times = best_times(10, apart, fused)
        what = (
            f"four {kind} ResNet-20, {IMAGES} images of {size}x{size}, {count} threads: four passes against one fused"
        )
        promised = 1.2 if kind == "shift" and count == 2 else None
        yield Claim(what, times[0] / times[1], promised, detail=milliseconds(*times))
    for kind in KINDS:
        plain, last = students(kind, LARGE), students(kind, LARGE, channels_last=True)
        x, y = torch.randn(IMAGES, 3, LARGE, LARGE), torch.randint(10, (IMAGES,))
        runs = [partial(step, plain, x, y, False), partial(step, plain, x, y, True), partial(step, last, x, y, False)]
        with threads(2):
            apart_s, fused_s, last_s = best_times(3, *runs)
        what = f"four {kind} ResNet-20, {IMAGES} images of {LARGE}x{LARGE}, 2 threads: four passes against"
        yield Claim(f"{what} one fused", apart_s / fused_s, detail=milliseconds(apart_s, fused_s))
        yield Claim(f"{what} channels last", apart_s / last_s, detail=milliseconds(apart_s, last_s))


if __name__ == "__main__":
    print(machine())
    report(claims())
