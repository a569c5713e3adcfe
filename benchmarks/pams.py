"""What PAMS costs while it trains: its quantiser against autograd's own form of it, and a step of EDSR.

The quantiser: forward and backward on the features of 16 patches of 48x48 pixels, as in EDSR's body, against maximum,
minimum and a straight-through rounding that autograd puts together. The step: forward, backward and Adam, on 4 patches,
quantised and with the teacher's forward pass, against the real network's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.callbacks.quantization.pams import PAMSQuantizer, place, quantize, structured_transfer
from lightning_compress.core.distill.taps import InputTap
from lightning_compress.core.distill.teacher import Teacher
from lightning_compress.networks import edsr_baseline

ROUNDS, PATCHES, PIXELS, BITS = 7, 4, 24, 8


def naive(x: Tensor, alpha: Tensor, q: int) -> Tensor:
    codes = torch.maximum(torch.minimum(x, alpha), -alpha) * q / alpha
    return (codes + (codes.round() - codes).detach()) * alpha / q


def training(network: nn.Module, low: Tensor, high: Tensor, teacher: Teacher | None = None) -> Callable[[], None]:
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-6)
    tap = InputTap(network.tail)  # type: ignore[arg-type]

    def step() -> None:
        optimizer.zero_grad()
        loss = F.l1_loss(network(low), high)
        call = tap.take()
        if teacher is not None and call is not None:
            loss = loss + 1000 * structured_transfer(call[0][0], teacher.input_at("tail", low))
        loss.backward()
        optimizer.step()

    return step


def claims() -> Iterator[Claim]:
    torch.manual_seed(0)
    with threads(1):
        x, grad = torch.randn(16, 64, 48, 48, requires_grad=True), torch.randn(16, 64, 48, 48)
        quantizer = PAMSQuantizer(BITS, alpha_init=2.0, ema_epoch=0)
        own = quantizer(x)
        torch.testing.assert_close(naive(x, quantizer.alpha, 127), own, atol=1e-6, rtol=0)
        fused, put_together = best_times(
            ROUNDS, lambda: quantizer(x).backward(grad), lambda: naive(x, quantizer.alpha, 127).backward(grad)
        )
        yield Claim(
            "quantiser, forward and backward / as autograd puts it together", fused / put_together, 0.6, at_most=True,
            detail=milliseconds(fused, put_together),
        )  # fmt: skip
        low, high = 255 * torch.rand(PATCHES, 3, PIXELS, PIXELS), 255 * torch.rand(PATCHES, 3, 4 * PIXELS, 4 * PIXELS)
        real, student = edsr_baseline(4), edsr_baseline(4)
        teacher = Teacher(student)
        quantize(student, **place(student).arguments(), weight_bits=BITS, activation_bits=BITS, measuring={})
        student(low)
        for module in student.modules():
            if isinstance(module, PAMSQuantizer):
                module.begin(2)
        plain, alone, taught = best_times(
            ROUNDS, training(real, low, high), training(student, low, high), training(student, low, high, teacher)
        )
        what = f"EDSR x4, {PATCHES} patches of {PIXELS}x{PIXELS}: step"
        yield Claim(f"{what} with quantisers / real", alone / plain, detail=milliseconds(alone, plain))
        yield Claim(f"{what} with quantisers and teacher / real", taught / plain, detail=milliseconds(taught, plain))


if __name__ == "__main__":
    print(machine())
    report(claims())
