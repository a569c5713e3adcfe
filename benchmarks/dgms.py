"""What DGMS costs in training: soft weights forward and backward, against plain autograd through the formula.

The plain form is what the paper's equations become when they are typed in: K densities, posteriors and their softmax as
K x n tensors, all of which autograd keeps. Both get the mixtures of k-means (16 components) on the 19 convolutions of
ResNet-18 that DGMS quantises, 11.2 million weights, and the same gradient of the soft weights. First all soft weights
are made, then all gradients, as in a training step, in turns; that they agree is checked before. Memory is what either
takes at its peak above weights, parameters and gradients, measured as resident memory of a process of its own, without
the allocator's caches. Whole training steps of the network with both are told beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from _memory import peak, watched
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import resnet18

from lightning_compress.callbacks.quantization.dgms import MixtureQuantizer, initial_mixture, soft_weight
from lightning_compress.core.quant.attach import quantize_weight
from lightning_compress.core.quant.layers import choose_quantized

ROUNDS, BITS, IMAGES, PIXELS = 3, 4, 16, 112
Soft = Callable[..., Tensor]


def plain(weight: Tensor, mu: Tensor, pi: Tensor, sigma: Tensor, tau: Tensor) -> Tensor:
    """The equations, one after the other."""
    flat, level = weight.flatten(), F.pad(mu, (1, 0))
    share = pi.abs() / pi.abs().sum()
    density = [
        p / torch.sqrt(2 * torch.pi * s**2) * torch.exp(-((flat - m) ** 2) / (2 * s**2))
        for p, m, s in zip(share, level, sigma, strict=True)
    ]
    total = sum(density) + 1e-11
    posterior = torch.stack([d / total for d in density])
    region = F.softmax(posterior / tau, dim=0)
    return (region * level[:, None]).sum(0).view(weight.shape)


def layers() -> list[list[Tensor]]:
    """Weights with their mixtures, ready to be trained, and a gradient for each."""
    torch.manual_seed(0)
    network = resnet18()
    names, _ = choose_quantized(network, exclude_first=True, exclude_linear=True)
    made = []
    for name in names:
        weight: Any = network.get_submodule(name).weight.detach()
        mixture = initial_mixture(weight, 2**BITS)
        trained = [t.clone().requires_grad_() for t in (weight, *mixture, torch.tensor([0.01]))]
        made.append([*trained, torch.randn_like(weight)])
    return made


def step(soft: Soft, made: list[list[Tensor]]) -> None:
    """Soft weights of all layers, then their gradients."""
    for *trained, _ in made:
        for tensor in trained:
            tensor.grad = None
    outputs = [soft(*trained) for *trained, _ in made]
    torch.autograd.backward(outputs, [gradient for *_, gradient in made])


def print_peak(which: str) -> None:
    """Bytes above the start while `step` runs once."""
    torch.set_num_threads(1)
    made = layers()
    for *trained, _ in made:  # gradients are there in both cases
        for tensor in trained:
            tensor.grad = torch.zeros_like(tensor)
    print(watched(partial(step, plain if which == "plain" else soft_weight, made)))


class Plain(MixtureQuantizer):
    """The quantiser with the plain form."""

    def forward(self, weight: Tensor) -> Tensor:
        return plain(weight, self.mu, self.pi, self.sigma, self.tau)


def training(kind: type[MixtureQuantizer] | None, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A training step of ResNet-18 with mixtures of this kind, or without any."""
    torch.manual_seed(0)
    network = resnet18()
    names, _ = choose_quantized(network, exclude_first=True, exclude_linear=True)
    for name in names if kind else []:
        layer: Any = network.get_submodule(name)
        quantizer = kind(BITS)  # type: ignore[misc]
        quantizer.start(initial_mixture(layer.weight, 2**BITS))
        quantize_weight(layer, quantizer)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return run


def check(made: list[list[Tensor]]) -> None:
    """Both forms give the same soft weights and gradients."""
    *trained, gradient = made[4]
    found = []
    for soft in (plain, partial(soft_weight, official_eps=True)):
        output = soft(*trained)
        found.append([output, *torch.autograd.grad(output, trained, gradient)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4 * float(one.abs().max()))


def claims() -> Iterator[Claim]:
    with threads(1):
        made = layers()
        check(made)
        naive, own = best_times(ROUNDS, partial(step, plain, made), partial(step, soft_weight, made))
        yield Claim(
            "ResNet-18, 16 components: soft weights and their gradients / plain autograd", own / naive, 0.5,
            at_most=True, detail=milliseconds(own, naive),
        )  # fmt: skip
        del made
        small, large = (peak(__file__, which) for which in ("own", "plain"))
        yield Claim(
            "... their peak memory / plain autograd's", small / large, 0.35, at_most=True,
            detail=f"{small / 2**20:.0f} against {large / 2**20:.0f} MiB",
        )  # fmt: skip
        images, labels = torch.randn(IMAGES, 3, PIXELS, PIXELS), torch.randint(1000, (IMAGES,))
        steps = [training(kind, images, labels) for kind in (None, MixtureQuantizer, Plain)]
        dense, own, naive = best_times(ROUNDS, *steps)
        what = f"training step of ResNet-18, {IMAGES} images of {PIXELS}x{PIXELS}, with DGMS"
        yield Claim(f"{what} / with plain autograd", own / naive, detail=milliseconds(own, naive))
        yield Claim(f"{what} / without", own / dense, detail=milliseconds(own, dense))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print_peak(sys.argv[2])
    else:
        print(machine())
        report(claims())
