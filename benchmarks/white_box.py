"""White-Box: what class masks cost in training, and against the shape of the authors' code.

A training step is forward, loss, backward and SGD step of ResNet-56 on random images, batch 64, one thread. With masks:
27 of them before the inner batch norms and 28 that only vote, the draw of their mixtures, and the penalty. The loop
sets one entry of D per sample and layer in Python, and sums the gradient of each class in turn; it draws the same D,
and must give the same gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.callbacks.pruning.white_box import attach_masks, class_mixture, column_penalty, guide
from lightning_compress.callbacks.pruning.white_box.masks import scale_channels
from lightning_compress.callbacks.pruning.white_box.placement import MaskHooks, place_masks, split_layers
from lightning_compress.core.surgery import channel_graph
from lightning_compress.networks import resnet56

BATCH, CLASSES, REPEATS = 64, 10, 6
LAYERS, MANY, WIDTH, PIXELS = 4, 1000, 256, 14  # of the masks alone, as in ResNet-50's third stage


class Loop(torch.autograd.Function):
    """x * (D M), with D and the gradient of M made in Python loops."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, noise: Tensor, targets: Tensor) -> Tensor:
        mixture = noise.clone()
        for sample, target in enumerate(targets):
            mixture[sample, target] = 1
        factor = mixture @ mask
        ctx.save_for_backward(x, mixture, factor)
        return x * factor[:, :, None, None]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        x, mixture, factor = ctx.saved_tensors
        by_sample = (upstream * x).sum((2, 3))
        gradient = by_sample.new_empty(mixture.shape[1], factor.shape[1])
        for k in range(len(gradient)):
            gradient[k] = (mixture[:, k : k + 1] * by_sample).sum(0)
        return upstream * factor[:, :, None, None], gradient, None, None


def claims() -> Iterator[Claim]:
    torch.manual_seed(0)
    images, targets = torch.randn(BATCH, 3, 32, 32), torch.randint(CLASSES, (BATCH,))
    with threads(1):
        plain = resnet56()
        masked, looped = copy.deepcopy(plain), copy.deepcopy(plain)
        steps = [
            stepper(plain, images, targets, lambda: torch.zeros(())),
            stepper(masked, images, targets, with_hooks(masked, targets)),
            stepper(looped, images, targets, with_loops(looped, targets)),
        ]
        torch.manual_seed(1)
        steps[1](update=False)
        torch.manual_seed(1)
        steps[2](update=False)
        for (name, one), other in zip(masked.named_parameters(), looped.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-3, msg=name)
        without, ours, theirs = best_times(REPEATS, *steps)
        yield Claim(
            "ResNet-56 training step with masks / without",
            ours / without,
            1.15,
            at_most=True,
            detail=milliseconds(ours, without),
        )
        yield Claim("the same: loops / masks", theirs / ours, detail=milliseconds(theirs, ours))
        ours, theirs = masks_alone()
        yield Claim(
            f"{LAYERS} masks alone, {MANY} classes, {WIDTH} channels of {PIXELS}x{PIXELS}: loops / masks",
            theirs / ours,
            detail=milliseconds(theirs, ours),
        )


def stepper(network: nn.Module, images: Tensor, targets: Tensor, prepare: Callable[[], Tensor]) -> Callable[..., None]:
    """A training step; `prepare` sets the masks up and returns their penalty."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step(update: bool = True) -> None:
        optimizer.zero_grad()
        penalty = prepare()
        (F.cross_entropy(network(images), targets) + 1e-4 * penalty).backward()
        if update:
            optimizer.step()

    return step


def attach(network: nn.Module) -> tuple[list[Any], list[Tensor]]:
    graph = channel_graph(network, (1, 3, 32, 32))
    alone, coupled = split_layers(network, graph)
    attach_masks(network, alone + coupled, CLASSES)
    masks: list[Tensor] = [network.get_submodule(name).class_mask for name in alone + coupled]  # type: ignore[misc]
    return place_masks(network, graph, alone), masks


def with_hooks(network: nn.Module, targets: Tensor) -> Callable[[], Tensor]:
    places, masks = attach(network)
    hooks = MaskHooks(network, places, normalize=False)

    def prepare() -> Tensor:
        hooks.mixture = class_mixture(targets, CLASSES, layers=len(places))
        return column_penalty(masks)

    return prepare


def with_loops(network: nn.Module, targets: Tensor) -> Callable[[], Tensor]:
    places, masks = attach(network)
    noise: list[Tensor] = []

    def hook(index: int) -> Callable[..., Tensor]:
        return lambda layer, args, out: Loop.apply(out, layer.class_mask, noise[index], targets)

    for index, place in enumerate(places):
        network.get_submodule(place.layer).register_forward_hook(hook(index))

    def prepare() -> Tensor:
        noise[:] = torch.rand(len(places), BATCH, CLASSES)
        return sum((mask.sum(0).norm() for mask in masks), torch.zeros(()))

    return prepare


def masks_alone() -> tuple[float, float]:
    """Forward and backward through masks, without a network."""
    targets, mask = torch.randint(MANY, (BATCH,)), torch.ones(MANY, WIDTH, requires_grad=True)
    x = torch.randn(BATCH, WIDTH, PIXELS, PIXELS)

    def ours() -> None:
        for mixture in class_mixture(targets, MANY, layers=LAYERS):
            scale_channels(x, guide(mixture, mask)).sum().backward()

    def loops() -> None:
        for noise in torch.rand(LAYERS, BATCH, MANY):
            Loop.apply(x, mask, noise, targets).sum().backward()

    one, other = best_times(REPEATS, ours, loops)
    return one, other


if __name__ == "__main__":
    print(machine())
    report(claims())
