"""What turning the weights costs: RBNN's update of all rotations of ResNet-18, which happens once per epoch.

Against the authors' shape of code, layer by layer, with a sum over filters in Python; and against the same layer by
layer with those sums as products of matrices, one layer's singular vectors at a time. Beside it, the update as a share
of a training step of 16 images, and a step of the binary network against one of the real one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.callbacks import RBNN
from lightning_compress.callbacks.quantization.rbnn import (
    factor_pair,
    random_rotation,
    rotate_and_binarize,
    update_rotations,
)
from lightning_compress.networks import binary_resnet18

REPEATS, ROUNDS, IMAGES, PIXELS = 3, 3, 16, 224
Rotations = list[tuple[Tensor, Tensor]]


def by_filter(xs: list[Tensor], r1s: list[Tensor], r2s: list[Tensor]) -> Rotations:
    """One small product per filter, and one decomposition per layer."""
    result = []
    for x, r1, r2 in zip(xs, r1s, r2s, strict=True):
        for _ in range(ROUNDS):
            codes = (r1.T @ x @ r2).sign()
            u, _, vh = torch.linalg.svd(sum(b @ r2.T @ w.T for b, w in zip(codes, x, strict=True)))
            r1 = vh.T @ u.T
            u, _, vh = torch.linalg.svd(sum(w.T @ r1 @ b for b, w in zip(codes, x, strict=True)))
            r2 = u @ vh
        result.append((r1, r2))
    return result


def by_layer(xs: list[Tensor], r1s: list[Tensor], r2s: list[Tensor]) -> Rotations:
    """The sums over filters as einsum."""
    result = []
    for x, r1, r2 in zip(xs, r1s, r2s, strict=True):
        for _ in range(ROUNDS):
            codes = (r1.T @ x @ r2).sign()
            u, _, vh = torch.linalg.svd(torch.einsum("nab,ncb->ac", codes, x @ r2))
            r1 = vh.T @ u.T
            u, _, vh = torch.linalg.svd(torch.einsum("nca,ncb->ab", x, r1 @ codes))
            r2 = u @ vh
        result.append((r1, r2))
    return result


def batched(xs: list[Tensor], r1s: list[Tensor], r2s: list[Tensor]) -> Rotations:
    return [(rotation.r1, rotation.r2) for rotation in update_rotations(xs, r1s, r2s, ROUNDS)]


def training(network: nn.Module, images: Tensor, labels: Tensor):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def claims() -> Iterator[Claim]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = binary_resnet18()
    names, _ = RBNN().choose(network)
    xs, r1s, r2s = [], [], []
    for name in names:
        weight = network.get_submodule(name).weight.detach()
        a, b = factor_pair(weight[0].numel())
        xs.append(weight.reshape(-1, a, b))
        r1s.append(random_rotation(a, generator))
        r2s.append(random_rotation(b, generator))
    arguments = xs, r1s, r2s
    for one, other in zip(batched(*arguments), by_layer(*arguments), strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert (mine - theirs).abs().max() < 1e-2  # a sign that is nearly zero may differ
    for count in (1, 2):
        with threads(count):
            ours, filters, layers = best_times(
                REPEATS, *(lambda f=f: f(*arguments) for f in (batched, by_filter, by_layer))
            )
        word = f"rotations of ResNet-18, {count} thread{'s' * (count > 1)}"
        target = 3.0 if count == 2 else None  # small products cannot be shared out among threads
        yield Claim(f"{word}: loop over filters / batched", filters / ours, target, detail=milliseconds(filters, ours))
        yield Claim(f"{word}: loop over layers / batched", layers / ours, detail=milliseconds(layers, ours))
    images, labels = torch.randn(IMAGES, 3, PIXELS, PIXELS), torch.randint(1000, (IMAGES,))
    binary = binary_resnet18()
    rotate_and_binarize(binary, names, 1, False, 0)
    with threads(2):
        real, one_bit = best_times(REPEATS, training(network, images, labels), training(binary, images, labels))
    yield Claim(f"step of {IMAGES} images: one-bit / real network", one_bit / real, detail=milliseconds(one_bit, real))
    yield Claim("rotations / step, once per epoch", ours / one_bit, detail=milliseconds(ours, one_bit))


if __name__ == "__main__":
    print(machine())
    report(claims())
