"""What fake quantisers cost: a convolution's training step with quantised weight and input, against other ways.

Forward and backward pass, in turns, on one thread, 4 bits, on the four stage shapes of ResNet-18 at 16 images and the
three of ResNet-20 at 128:

* torch: `fake_quantize_per_tensor_affine` on the input and `fake_quantize_per_channel_affine` on the weight, whose
  ranges do not learn;
* naive: the formula of the interval quantiser in plain operators, with the straight-through estimator, as papers' code
  has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from _alternate import Claim, best_times, geometric_mean, machine, milliseconds, report, threads
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.quant.interval import quantize_interval
from lightning_compress.core.quant.lsq import quantize_lsq

ROUNDS, BITS = 7, 4
SHAPES = ((16, 64, 56), (16, 128, 28), (16, 256, 14), (16, 512, 7), (128, 16, 32), (128, 32, 16), (128, 64, 8))
Quantiser = Callable[[Tensor], Tensor]


def naive(x: Tensor, lower: Tensor, upper: Tensor, signed: bool) -> Tensor:
    scaled = ((x - lower) / (upper - lower)).clamp(0, 1) * (2**BITS - 1)
    level = (scaled + (scaled.round() - scaled).detach()) / (2**BITS - 1)
    return 2 * (level - 0.5) if signed else level


def scalar(value: float) -> Tensor:
    return torch.tensor([value], requires_grad=True)


def contenders(images: int, channels: int, size: int) -> dict[str, Callable[[], None]]:
    """A training step for each way."""
    x = torch.randn(images, channels, size, size).relu().requires_grad_()
    weight = (0.05 * torch.randn(channels, channels, 3, 3)).requires_grad_()
    grad = torch.randn_like(x)
    lower, upper, low, high = scalar(0.0), scalar(3.0), scalar(-0.15), scalar(0.15)
    step, weight_step = scalar(0.2), scalar(0.02)
    scales, zeros = torch.full((channels,), 0.02), torch.zeros(channels, dtype=torch.int32)
    ways: dict[str, tuple[Quantiser, Quantiser]] = {
        "full precision": (lambda x: x, lambda w: w),
        "torch": (
            lambda x: torch.fake_quantize_per_tensor_affine(x, 0.2, 0, 0, 15),
            lambda w: torch.fake_quantize_per_channel_affine(w, scales, zeros, 0, -8, 7),
        ),
        "naive": (lambda x: naive(x, lower, upper, False), lambda w: naive(w, low, high, True)),
        "interval": (
            lambda x: quantize_interval(x, lower, upper, BITS, signed=False),
            lambda w: quantize_interval(w, low, high, BITS, signed=True),
        ),
        "lsq": (
            lambda x: quantize_lsq(x, step, 0, 15, x[0].numel()),
            lambda w: quantize_lsq(w, weight_step, -8, 7, w.numel()),
        ),
    }
    leaves = (x, weight, lower, upper, low, high, step, weight_step)

    def training(of_input: Quantiser, of_weight: Quantiser) -> Callable[[], None]:
        def run() -> None:
            F.conv2d(of_input(x), of_weight(weight), padding=1).backward(grad)
            for leaf in leaves:
                leaf.grad = None

        return run

    return {name: training(*way) for name, way in ways.items()}


def claims() -> Iterator[Claim]:
    torch.manual_seed(0)
    ratios: dict[tuple[str, str], list[float]] = {}
    with threads(1):
        for shape in SHAPES:
            steps = contenders(*shape)
            times = dict(zip(steps, best_times(ROUNDS, *steps.values()), strict=True))
            for ours in ("interval", "lsq"):
                for other in ("full precision", "torch", "naive"):
                    ratios.setdefault((ours, other), []).append(times[ours] / times[other])
            label = "{} images, {} channels, {}x{}".format(*shape, shape[2])
            for other in ("torch", "naive"):
                detail = milliseconds(times["interval"], times[other])
                yield Claim(f"{label}: interval / {other}", times["interval"] / times[other], detail=detail)
    for (ours, other), values in ratios.items():
        target = {"torch": 1.0, "naive": 0.85}.get(other) if ours == "interval" else None
        yield Claim(f"all shapes, geometric mean: {ours} / {other}", geometric_mean(values), target, at_most=True)


if __name__ == "__main__":
    print(machine())
    report(claims())
