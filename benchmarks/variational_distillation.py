"""What the losses of variational distillation cost: ranks of a batch at once against a loop over anchors.

128 vectors of 512 features, 16 persons with four images in each of two modalities, as in the paper's batches; forward
and backward, after checking that both have one gradient. Then the two modes of the Sinkhorn distance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.distill.variational import cross_modal_rank, sinkhorn

PEOPLE, INSTANCES, FEATURES, CLASSES = 16, 8, 512, 395


def by_loop(vectors: Tensor, labels: Tensor, modality: Tensor) -> Tensor:
    """Anchor by anchor, as the authors go about it."""
    x = F.normalize(vectors, dim=1)
    distance = (2 - 2 * x @ x.T).clamp(min=1e-12).sqrt()
    total = distance.new_zeros(())
    for i in range(len(x)):
        others = torch.arange(len(x)) != i
        for within, margin, boundary in ((True, 0.9, 2.2), (False, 1.0, 2.0)):
            kind = others & ((modality == modality[i]) == within)
            positives = distance[i][kind & (labels == labels[i])]
            negatives = distance[i][kind & (labels != labels[i])]
            negatives = negatives[negatives < boundary]
            total = total + (positives + margin - boundary).clamp(min=0).sum() / (len(positives) + 1e-5)
            weights = (boundary - negatives).exp()
            total = total + (weights * (boundary - negatives)).sum() / (weights.sum() + 1e-5)
    return total / len(x)


def ranks() -> Iterator[Claim]:
    torch.manual_seed(0)
    vectors = torch.randn(PEOPLE * INSTANCES, FEATURES, requires_grad=True)
    labels, modality = torch.arange(len(vectors)) // INSTANCES, torch.arange(len(vectors)) % 2

    def gradient(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(loss(vectors, labels, modality), vectors)[0]

    torch.testing.assert_close(gradient(cross_modal_rank), gradient(by_loop), atol=1e-7, rtol=1e-3)
    loop, ours = best_times(5, lambda: gradient(by_loop), lambda: gradient(cross_modal_rank))
    yield Claim("rank loss, 128 images, against a loop over anchors", loop / ours, 10, detail=milliseconds(loop, ours))


def transport() -> Iterator[Claim]:
    """Posteriors of 64 images and 395 classes: how its two modes compare."""
    torch.manual_seed(0)
    p, q = (3 * torch.randn(64, CLASSES, requires_grad=True) for _ in range(2))

    def gradient(mode: str) -> Tensor:
        return torch.autograd.grad(sinkhorn(p.softmax(1), q.softmax(1), mode=mode), p)[0]  # type: ignore[arg-type]

    log, official = best_times(20, lambda: gradient("log"), lambda: gradient("official"))
    yield Claim(
        "Sinkhorn distance, 64 images: log against official", log / official, detail=milliseconds(log, official)
    )


def claims() -> Iterator[Claim]:
    with threads(1):
        yield from ranks()
        yield from transport()


if __name__ == "__main__":
    print(machine())
    report(claims())
