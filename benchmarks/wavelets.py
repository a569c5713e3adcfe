"""What the wavelet loss costs: Haar's transform by slicing, of the difference, against a grouped convolution.

Four levels of a batch of images of 256x256 with the student's gradient, on 1 and 2 threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.distill.wavelets import wavelet_loss

IMAGES, PIXELS, LEVELS, REPEATS = 4, 256, 4, 40
BANK = torch.tensor([[[1.0, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]])[:, None] / 2


def grouped(student: Tensor, teacher: Tensor) -> Tensor:
    """One convolution with stride 2 per level, four filters for each channel; of the difference as well."""
    low, total = student - teacher, torch.tensor(0.0)
    for _ in range(LEVELS):
        channels = low.shape[1]
        bands = F.conv2d(low, BANK.repeat(channels, 1, 1, 1), stride=2, groups=channels).unflatten(1, (channels, 4))
        total = total + bands[:, :, 1:].abs().mean()
        low = bands[:, :, 0]
    return total


def twice(student: Tensor, teacher: Tensor) -> Tensor:
    """As the formula is written: both images are transformed."""
    total = torch.tensor(0.0)
    for _ in range(LEVELS):
        both = []
        for images in (student, teacher):
            channels = images.shape[1]
            bands = F.conv2d(images, BANK.repeat(channels, 1, 1, 1), stride=2, groups=channels)
            both.append(bands.unflatten(1, (channels, 4)))
        total = total + (both[0][:, :, 1:] - both[1][:, :, 1:]).abs().mean()
        student, teacher = both[0][:, :, 0], both[1][:, :, 0]
    return total


def claims() -> Iterator[Claim]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(IMAGES, 3, PIXELS, PIXELS, generator=generator) for _ in range(2))
    student.requires_grad_()
    losses = [loss(student, teacher).item() for loss in (wavelet_loss, grouped, twice)]
    assert max(losses) - min(losses) < 1e-4, losses

    def run(loss) -> None:
        student.grad = None
        loss(student, teacher).backward()

    for count in (1, 2):
        with threads(count):
            own, once, both = best_times(REPEATS, *(partial(run, loss) for loss in (wavelet_loss, grouped, twice)))
        setting = f"{IMAGES} images of {PIXELS}x{PIXELS}, {LEVELS} levels, {count} threads"
        yield Claim(f"{setting}: grouped convolution / slicing", once / own, 1.5, detail=milliseconds(once, own))
        yield Claim("... grouped convolution of both images / slicing", both / own, detail=milliseconds(both, own))


if __name__ == "__main__":
    print(machine())
    report(claims())
