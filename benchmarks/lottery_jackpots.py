"""What finding the mask costs: Lottery Jackpots' update of all scores of ResNet-50 against a training step.

The step is forward, backward and the optimiser's step on 8 images of 224x224, where the paper takes 256: the update
does not depend on the images. Scores are near 1 as in training, 80 % of the weights are out. Beside it, two plain
updates: a sort of every layer's scores, which must lead to the same masks, and `torch.kthvalue`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from torch.nn import functional as F
from torchvision.models import resnet50

from lightning_compress.callbacks.sparsity.lottery_jackpots import swap
from lightning_compress.callbacks.sparsity.lottery_jackpots.lots import draw_lots, lots_in
from lightning_compress.core.sparse.layers import weight_layers
from lightning_compress.core.sparse.select_weights import drop_lowest

ROUNDS, IMAGES = 3, 8


def claims() -> Iterator[Claim]:
    torch.manual_seed(0)
    images, labels = torch.randn(IMAGES, 3, 224, 224), torch.randint(1000, (IMAGES,))
    with threads(1):
        network = resnet50()
        names = list(weight_layers(network))[:-1]
        draw_lots(network, names)
        lots = lots_in(network)
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        with torch.no_grad():
            for one in lots.values():
                one.start(drop_lowest(torch.rand(one.mask.shape), int(0.8 * one.mask.numel())), 0.99, 1.0)
                one.score.add_(0.05 * torch.randn(one.score.shape)).requires_grad_(True)
        optimizer = torch.optim.SGD([one.score for one in lots.values()], lr=0.1, momentum=0.9, weight_decay=1e-4)

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()

        def update() -> list[torch.Tensor]:
            return [swap(one.score, one.mask) for one in lots.values()]

        def by_sort() -> list[torch.Tensor]:
            return [top(one.score, int(one.mask.sum())) for one in lots.values()]

        def by_kthvalue() -> list[torch.Tensor]:
            return [one.score > one.score.flatten().kthvalue(int((~one.mask).sum())).values for one in lots.values()]

        assert all(map(torch.equal, update(), by_sort()))
        one_step, ours, sort, kthvalue = best_times(ROUNDS, step, update, by_sort, by_kthvalue)
        yield Claim(
            f"ResNet-50, {IMAGES} images: mask update / training step", ours / one_step, 0.05, at_most=True,
            detail=milliseconds(ours, one_step),
        )  # fmt: skip
        yield Claim("sort of every layer / our update", sort / ours, detail=milliseconds(sort, ours))
        yield Claim("torch.kthvalue of every layer / our update", kthvalue / ours, detail=milliseconds(kthvalue, ours))


def top(scores: torch.Tensor, count: int) -> torch.Tensor:
    kept = scores.detach().flatten().sort(stable=True).indices[-count:]
    return torch.zeros(scores.shape, dtype=torch.bool).flatten().index_fill_(0, kept, True).view_as(scores)


if __name__ == "__main__":
    print(machine())
    report(claims())
