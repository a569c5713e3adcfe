"""What freezing saves: the backward pass with half of the filters frozen, against none.

Interval quantisers of 4 bits on weights and inputs, as QAT puts them there; half of the filters of every convolution
rest, chosen at random. The gradients of the others are checked to be equal. On one thread, in turns: 3x3 convolutions
of ResNet-18's four stages, for which a ratio is promised, and whole networks, where batch norms, quantisers and the
gradients of inputs take their time whatever is frozen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from _alternate import Claim, geometric_mean, machine, milliseconds, report, threads
from torch import Tensor, nn
from torchvision.models import resnet18

from lightning_compress.callbacks.quantization.qat import attach_quantizers
from lightning_compress.core.quant.attach import quantized_layers
from lightning_compress.core.quant.layers import choose_quantized
from lightning_compress.core.quant.live_conv import computed_filters, rest_filters
from lightning_compress.networks import resnet20

ROUNDS = 9
LAYERS = ((16, 64, 56), (16, 128, 28), (16, 256, 14), (16, 512, 7))


def quantised(network: nn.Module) -> nn.Module:
    names, _ = choose_quantized(network)
    spec = {"weight_bits": 4, "activation_bits": 4, "signed": False}
    attach_quantizers(network, dict.fromkeys(names, spec), "interval", False)
    return network


def rest(network: nn.Module, share: float) -> dict[str, Tensor]:
    """Let a share of the filters of every convolution rest: name -> the filters whose gradient is still computed."""
    generator = torch.Generator().manual_seed(0)
    computed = {}
    for name, layer in quantized_layers(network).items():
        filters = len(layer.weight)  # type: ignore[arg-type]
        order = torch.randperm(filters, generator=generator)
        resting = torch.zeros(filters, dtype=torch.bool).index_fill(0, order[: int(share * filters)], True)
        if rest_filters(layer, resting):
            computed[name] = computed_filters(resting)
    return computed


def backward(network: nn.Module, images: Tensor) -> Callable[[], float]:
    """Seconds of a backward pass; the forward pass before it is not counted."""
    weights = torch.randn_like(network(images))

    def run() -> float:
        network.zero_grad()
        images.grad = None
        output = network(images)
        start = time.perf_counter()
        output.backward(weights)
        return time.perf_counter() - start

    return run


def compare(network: nn.Module, images: Tensor, share: float) -> tuple[float, float]:
    """Shortest backward pass with no filter frozen, and with a share of them, in seconds."""
    free = quantised(network)
    frozen = deepcopy(free)
    computed = rest(frozen, share)
    torch.manual_seed(1)
    one = backward(free, images)
    torch.manual_seed(1)
    other = backward(frozen, images)
    times = [(one(), other()) for _ in range(ROUNDS)]
    for name, live in computed.items():
        grads = [n.get_submodule(name).parametrizations["weight"].original.grad for n in (frozen, free)]  # type: ignore[index, union-attr]
        torch.testing.assert_close(grads[0][live], grads[1][live], atol=1e-3, rtol=1e-3)
    first, second = zip(*times, strict=True)
    return min(first), min(second)


def claims() -> Iterator[Claim]:
    torch.manual_seed(0)
    with threads(1):
        ratios = []
        for images, channels, size in LAYERS:
            layer = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
            x = torch.rand(images, channels, size, size, requires_grad=True)
            free, frozen = compare(layer, x, 0.5)
            ratios.append(free / frozen)
            what = f"{images} images, {channels} channels, {size}x{size}: backward, none / half of the filters frozen"
            yield Claim(what, ratios[-1], detail=milliseconds(free, frozen))
        yield Claim("these layers, geometric mean", geometric_mean(ratios), 1.15)
        networks = (
            ("ResNet-18, 4 images of 224x224", resnet18, (4, 3, 224, 224)),
            ("ResNet-20, 128 images of 32x32", lambda: resnet20(shortcut="projection"), (128, 3, 32, 32)),
        )
        for label, build, shape in networks:
            for share in (0.5, 1.0):
                free, frozen = compare(build(), torch.rand(shape), share)
                what = f"{label}: backward, none / {share:.0%} of the filters frozen"
                yield Claim(what, free / frozen, detail=milliseconds(free, frozen))


if __name__ == "__main__":
    print(machine())
    report(claims())
