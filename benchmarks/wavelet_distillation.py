"""How much faster the published students are than their teachers, and what distillation adds to a training step.

    python benchmarks/wavelet_distillation.py

What is felt of the MACs that are saved is promised for files in ONNX Runtime, and told for eager mode, where narrow
layers keep a CPU less busy, and norms and paddings are saved only by the ratio of widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from _latency import felt
from torch import Tensor, nn

from lightning_compress.core.distill.wavelets import wavelet_loss
from lightning_compress.networks import PatchDiscriminator, ResNetGenerator, UNetGenerator

TARGET = 0.7


def latencies() -> Iterator[Claim]:
    image = torch.zeros(1, 3, 256, 256)
    for name, build, widths in (
        ("ResNet generator", ResNetGenerator, (24, 16)),
        ("U-Net", lambda ngf: UNetGenerator(ngf=ngf, dropout=0.0), (32, 16)),
    ):
        students = {f"ngf {ngf}": build(ngf=ngf).eval() for ngf in widths}
        targets = dict.fromkeys(students, TARGET)
        yield from felt(f"{name}, ngf 64", build(ngf=64).eval(), students, image, targets)


def step_of(student: nn.Module, judge: nn.Module, teacher: nn.Module | None, images: Tensor) -> Callable[[], None]:
    """What the generator's half of a Pix2Pix step computes, gradients included."""

    def step() -> None:
        made = student(images)
        loss = judge(torch.cat([images, made], 1)).square().mean() + 100 * (made - images).abs().mean()
        if teacher is not None:
            with torch.no_grad():
                taught = teacher(images)
            loss = loss + wavelet_loss(made, taught)
        student.zero_grad()
        loss.backward()

    return step


def steps() -> Iterator[Claim]:
    images = torch.rand(1, 3, 256, 256) * 2 - 1
    student, judge = UNetGenerator(ngf=16, dropout=0.0), PatchDiscriminator(6, ndf=32, norm="batch")
    teacher = UNetGenerator(dropout=0.0).eval()
    alone, taught = best_times(5, *(step_of(student, judge, t, images) for t in (None, teacher)))
    yield Claim("a step of the generator, with distillation", taught / alone, detail=milliseconds(taught, alone))
    made, of_teacher = torch.rand(2, 1, 3, 256, 256).unbind()
    made.requires_grad_()
    loss, whole = best_times(20, lambda: wavelet_loss(made, of_teacher).backward(), lambda: teacher(images))
    yield Claim("the loss and its gradient, of a teacher's pass", loss / whole, detail=milliseconds(loss, whole))


def claims() -> Iterator[Claim]:
    with threads(1):
        yield from latencies()
        yield from steps()


if __name__ == "__main__":
    print(machine())
    report(claims())
