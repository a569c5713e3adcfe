"""A training step of FFSD against the shape of the authors' code, and against as many plain networks.

The authors' code has an optimiser and a backward pass for each student, the fusion module, the leader and each
self-distillation module; FFSD adds all losses up, goes back once, and has two optimisers. The weights must be the same,
bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from _alternate import Claim, best_times, machine, milliseconds, report
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_compress.modules import FFSD
from lightning_compress.modules.distillation.ffsd.module import networks_sgd, self_distillation_adam
from lightning_compress.networks import CIFARResNet

IMAGES, REPEATS = 64, 5


def step(optimizers: Iterable[Optimizer], loss: Tensor) -> None:
    optimizers = list(optimizers)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def ours(module: FFSD, optimizers: list[Optimizer], images: Tensor, labels: Tensor) -> None:
    losses, _ = module.losses(images, labels)
    step(optimizers, torch.stack(list(losses.values())).sum())


def theirs(module: FFSD, optimizers: dict[str, list[Optimizer]], images: Tensor, labels: Tensor) -> None:
    losses, _ = module.losses(images, labels)
    for name, loss in losses.items():
        step(optimizers[name], loss)


def plain(networks: nn.ModuleList, optimizer: Optimizer, images: Tensor, labels: Tensor) -> None:
    for network in networks:
        step([optimizer], F.cross_entropy(network(images), labels))


def their_optimizers(module: FFSD) -> dict[str, list[Optimizer]]:
    parts = {f"student_{i}": [student] for i, student in enumerate(module.students)}
    parts |= {"leader": [module.network, module.trans_fusion]}
    made = {name: [networks_sgd(p for m in part for p in m.parameters())] for name, part in parts.items()}
    made["fusion"] = [networks_sgd([{"params": list(module.fusion.parameters()), "weight_decay": 1e-5}])]
    made["self_distillation"] = [self_distillation_adam(m.parameters()) for m in module.self_distillation]
    return made


def claims() -> Iterator[Claim]:
    images = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(IMAGES) % 10
    torch.manual_seed(0)
    one = FFSD(partial(CIFARResNet, 20, shortcut="projection"))
    two, networks = copy.deepcopy(one), nn.ModuleList([copy.deepcopy(m) for m in (one.network, *one.students)])
    runs = (
        partial(ours, one, one.configure_optimizers()[0], images, labels),
        partial(theirs, two, their_optimizers(two), images, labels),
        partial(plain, networks, networks_sgd(networks.parameters()), images, labels),
    )
    for run in runs:
        run()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    mine, sequence, separate = best_times(REPEATS, *runs)
    what = f"FFSD, ResNet-20, batch {IMAGES}: step / one with the authors' backward passes and optimisers"
    yield Claim(what, mine / sequence, 1.05, at_most=True, detail=milliseconds(mine, sequence))
    yield Claim("the same / steps of three plain networks", mine / separate, detail=milliseconds(mine, separate))


if __name__ == "__main__":
    print(machine())
    report(claims())
