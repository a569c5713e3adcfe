r"""Images by frequency: orthonormal wavelet transforms, and the distance of the high bands of two images.

Zhang, Chen, Tu, Wan, Xu, Ma, "Wavelet Knowledge Distillation: Towards Efficient Image-to-Image Translation",
CVPR 2022, arXiv:2203.06321:

    loss = sum_{j = 1..J} mean |Psi_j(T) - Psi_j(S)| = sum_j mean |Psi_j(T - S)|

Psi_j are the three detail bands of level j, and each level splits the low band of the one before. For Haar and the four
pixels (a b / c d) of a cell:

    low = (a + b + c + d) / 2      horizontal = (a + b - c - d) / 2     (LH: edges that lie flat)
    vertical = (a - b + c - d) / 2     diagonal = (a - b - c + d) / 2   (HL, HH)

Each transform keeps the energy, sum x^2 = sum low^2 + sum details^2: coefficients of smooth images double with each
level, and coarse levels weigh the more.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.core.select import did_you_mean

Wavelet = Literal["haar", "db2", "db3", "db4"]
Bands = Literal["high", "low", "both"]
DETAILS = ("horizontal", "vertical", "diagonal")

# Daubechies, "Orthonormal Bases of Compactly Supported Wavelets", CPAM 41(7), 1988: low-pass filters of decomposition
LOW_PASS: dict[str, tuple[float, ...]] = {
    "haar": (0.7071067812, 0.7071067812),
    "db2": (-0.1294095226, 0.2241438680, 0.8365163037, 0.4829629131),
    "db3": (0.0352262919, -0.0854412739, -0.1350110200, 0.4598775021, 0.8068915093, 0.3326705530),
    "db4": (
        -0.0105974018,
        0.0328830117,
        0.0308413818,
        -0.1870348117,
        -0.0279837694,
        0.6308807679,
        0.7148465706,
        0.2303778133,
    ),
}


def haar(images: Tensor) -> tuple[Tensor, Tensor]:
    """Split images by slicing: (N, C, H, W) -> low (N, C, H / 2, W / 2), details (3, N, C, H / 2, W / 2).

    Details are horizontal, vertical and diagonal. An odd row or column at the end gets a black one beside it.

    >>> low, details = haar(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
    >>> low.item(), [band.item() for band in details]
    (5.0, [-2.0, -1.0, 0.0])
    """
    height, width = images.shape[-2:]
    if height % 2 or width % 2:
        images = F.pad(images, (0, width % 2, 0, height % 2))
    return _Haar.apply(images)


class _Haar(torch.autograd.Function):
    """Haar's transform is orthonormal: its gradient is the way back, of which autograd would make twice the passes."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        top, bottom = images.unflatten(-2, (-1, 2)).unbind(-2)
        left, right = (top + bottom).unflatten(-1, (-1, 2)).unbind(-1)
        left_step, right_step = (top - bottom).unflatten(-1, (-1, 2)).unbind(-1)
        details = images.new_empty(3, *left.shape)
        torch.add(left_step, right_step, out=details[0])
        torch.sub(left, right, out=details[1])
        torch.sub(left_step, right_step, out=details[2])
        return (left + right).div_(2), details.div_(2)

    @staticmethod
    def backward(ctx: Any, low: Tensor, details: Tensor) -> Tensor:
        return _HaarBack.apply(low, details)


class _HaarBack(torch.autograd.Function):
    """Images of their bands."""

    @staticmethod
    def forward(ctx: Any, low: Tensor, details: Tensor) -> Tensor:
        horizontal, vertical, diagonal = details / 2
        low = low / 2
        rows, row_steps = (low.new_empty(*low.shape, 2) for _ in range(2))
        torch.add(low, vertical, out=rows[..., 0])
        torch.sub(low, vertical, out=rows[..., 1])
        torch.add(horizontal, diagonal, out=row_steps[..., 0])
        torch.sub(horizontal, diagonal, out=row_steps[..., 1])
        rows, row_steps = rows.flatten(-2), row_steps.flatten(-2)
        images = low.new_empty(*rows.shape[:-1], 2, rows.shape[-1])
        torch.add(rows, row_steps, out=images[..., 0, :])
        torch.sub(rows, row_steps, out=images[..., 1, :])
        return images.flatten(-3, -2)

    @staticmethod
    def backward(ctx: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        return _Haar.apply(images)


def daubechies(images: Tensor, wavelet: Wavelet) -> tuple[Tensor, Tensor]:
    """Split images by a convolution with the filters of an orthonormal wavelet; shapes as :func:`haar`.

    With filters of length L, a side of n gives floor((n + L - 1) / 2) coefficients. Images go on black, which keeps the
    energy.
    """
    low = torch.tensor(LOW_PASS[wavelet], dtype=images.dtype, device=images.device)
    taps = len(low)
    high = low.flip(0) * (1 - 2 * (torch.arange(taps, device=images.device) % 2))
    # torch correlates where a transform convolves: the filters turned round
    low, high = low.flip(0), high.flip(0)
    pairs = ((low, low), (high, low), (low, high), (high, high))  # (along columns, along rows)
    bank = torch.stack([torch.outer(down, across) for down, across in pairs])[:, None]
    count, channels, height, width = images.shape
    padding = [_padding(length, taps) for length in (width, height)]
    padded = F.pad(images, (*padding[0], *padding[1])).flatten(0, 1)[:, None]
    split = F.conv2d(padded, bank, stride=2).unflatten(0, (count, channels))
    return split[:, :, 0], split[:, :, 1:].movedim(2, 0)


def _padding(length: int, taps: int) -> tuple[int, int]:
    """Black pixels before and after a side."""
    total = 2 * ((length + taps - 1) // 2 - 1) - length + taps
    return total // 2, total - total // 2


def split(images: Tensor, wavelet: Wavelet = "haar") -> tuple[Tensor, Tensor]:
    """One level of a transform: low, details; see :func:`haar`."""
    return haar(images) if wavelet == "haar" else daubechies(images, wavelet)


def decompose(images: Tensor, levels: int = 4, wavelet: Wavelet = "haar") -> tuple[Tensor, list[Tensor]]:
    """Transform images (N, C, H, W): the low band of the last level, and the details of all levels from the first.

    >>> low, details = decompose(torch.ones(1, 3, 64, 64), levels=3)
    >>> low.shape, [bands[0].shape[-1] for bands in details]
    (torch.Size([1, 3, 8, 8]), [32, 16, 8])
    """
    details = []
    for _ in range(levels):
        images, bands = split(images, wavelet)
        details.append(bands)
    return images, details


def wavelet_loss(
    student: Tensor, teacher: Tensor, levels: int = 4, wavelet: Wavelet = "haar", bands: Bands = "high"
) -> Tensor:
    """Distance of two batches of images by the bands of their transforms; without gradient for the teacher.

    Bands are linear in the images, so that one transform of the difference is enough. Computed in float32 outside
    autocast, or in float64.

    Args:
        student: (N, C, H, W), in [-1, 1].
        teacher: likewise.
        levels: J, the authors' is 4.
        wavelet: "haar", as the authors', or "db2" to "db4".
        bands: "high": the sum over levels of the mean over the three detail bands; "low": the mean of the last low
            band; "both": the sum of the two.
    """
    with torch.autocast(student.device.type, enabled=False):
        dtype = torch.promote_types(student.dtype, torch.float32)
        low, details = decompose(student.to(dtype) - teacher.detach().to(dtype), levels, wavelet)
        terms = []
        if bands != "low":
            terms += [_mean_size(level) for level in details]
        if bands != "high":
            terms.append(_mean_size(low))
        return torch.stack(terms).sum()


def _mean_size(bands: Tensor) -> Tensor:
    return torch.linalg.vector_norm(bands, 1) / bands.numel()  # a third faster than `bands.abs().mean()`


class WaveletLoss(nn.Module):
    """:func:`wavelet_loss` with its arguments checked and kept.

    Args:
        levels: how often the low band is split.
        wavelet: "haar", "db2", "db3" or "db4".
        bands: "high", "low" or "both".

    Raises:
        ValueError: an argument out of range.

    >>> images = torch.rand(1, 3, 32, 32)
    >>> WaveletLoss()(images + 1, images) < 1e-6  # brightness is in the low band
    tensor(True)
    """

    def __init__(self, levels: int = 4, wavelet: Wavelet = "haar", bands: Bands = "high") -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"levels: expected 1 or more, got {levels}.")
        for argument, value, choices in (("wavelet", wavelet, get_args(Wavelet)), ("bands", bands, get_args(Bands))):
            if value not in choices:
                hint = did_you_mean(value, choices) or f" There is: {', '.join(choices)}."
                raise ValueError(f"{argument}: there is no {value!r}.{hint}")
        self.levels = levels
        self.wavelet: Wavelet = wavelet
        self.bands: Bands = bands

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return wavelet_loss(student, teacher, self.levels, self.wavelet, self.bands)
