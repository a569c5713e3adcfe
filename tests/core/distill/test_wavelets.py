from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_pairs import waves
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.distill.wavelets import (
    LOW_PASS,
    Wavelet,
    WaveletLoss,
    daubechies,
    decompose,
    haar,
    wavelet_loss,
)

WAVELETS: tuple[Any, ...] = get_args(Wavelet)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- transforms


def test_four_pixels() -> None:
    low, details = haar(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
    assert low.item() == 5
    assert [abs(band.item()) for band in details] == [2, 1, 0]


def test_two_levels() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4)
    low, details = decompose(image, levels=2)
    assert low.item() == 30
    for bands, sizes in zip(details, ((4, 1, 0), (16, 4, 0)), strict=True):
        for band, size in zip(bands, sizes, strict=True):
            assert torch.equal(band.abs(), torch.full_like(band, size))
    student = torch.zeros_like(image)
    assert wavelet_loss(student, image, levels=1).item() == pytest.approx(5 / 3)
    assert wavelet_loss(student, image, levels=2).item() == pytest.approx(25 / 3)
    assert wavelet_loss(student, image, levels=2, bands="low").item() == 30
    assert wavelet_loss(student, image, levels=2, bands="both").item() == pytest.approx(25 / 3 + 30)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_filters_are_orthonormal(wavelet: Wavelet) -> None:
    low = np.array(LOW_PASS[wavelet])
    assert low.sum() == pytest.approx(2**0.5, abs=1e-9)
    for shift in range(0, len(low), 2):
        product = (low[shift:] * low[: len(low) - shift]).sum()
        assert product == pytest.approx(float(shift == 0), abs=1e-9)
    # vanishing moments, half as many as the filter is long
    high = low[::-1] * (-1) ** np.arange(len(low))
    for power in range(len(low) // 2):
        assert (high * np.arange(len(low)) ** power).sum() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("wavelet", WAVELETS)
@settings(deadline=None, max_examples=20)
@given(height=st.integers(1, 40), width=st.integers(1, 40), levels=st.integers(1, 4))
def test_the_energy_is_kept(wavelet: Wavelet, height: int, width: int, levels: int) -> None:
    image = randn(1, 2, height, width)
    low, details = decompose(image, levels, wavelet)
    energy = low.square().sum() + sum(band.square().sum() for bands in details for band in bands)
    assert energy.item() == pytest.approx(image.square().sum().item(), rel=1e-6)


def test_sizes() -> None:
    def sizes(image: Tensor, wavelet: Wavelet, levels: int) -> list[tuple[int, ...]]:
        return [tuple(bands[0].shape[2:]) for bands in decompose(image, levels, wavelet)[1]]

    assert sizes(torch.zeros(1, 1, 64, 65), "db2", 1) == [(33, 34)]
    assert [size[0] for size in sizes(torch.zeros(1, 1, 256, 256), "db2", 4)] == [129, 66, 34, 18]
    assert sizes(torch.zeros(1, 1, 7, 12), "haar", 3) == [(4, 6), (2, 3), (1, 2)]


def test_a_convolution_with_haars_filters_is_haar() -> None:
    for shape in ((2, 3, 8, 10), (1, 2, 7, 9)):
        image = randn(*shape)
        low, details = haar(image)
        other_low, other_details = daubechies(image, "haar")
        torch.testing.assert_close(other_low, low)
        for band, other in zip(details, other_details, strict=True):
            torch.testing.assert_close(other.abs(), band.abs())


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_coefficients_are_those_of_the_definition(wavelet: Wavelet) -> None:
    """c_k = sum_j h_j x_{2k + 1 - j}, one side after the other."""
    low = np.array(LOW_PASS[wavelet])
    high = low[::-1] * (-1) ** np.arange(len(low))

    def transformed(x: np.ndarray, taps: np.ndarray) -> np.ndarray:
        count = (len(x) + len(taps) - 1) // 2
        inside = lambda n: x[n] if 0 <= n < len(x) else 0 * x[0]  # noqa: E731
        return np.stack([sum(taps[j] * inside(2 * k + 1 - j) for j in range(len(taps))) for k in range(count)])

    image = randn(1, 1, 9, 12)
    found_low, (horizontal, vertical, diagonal) = decompose(image, 1, wavelet)[0], decompose(image, 1, wavelet)[1][0]
    pixels = image[0, 0].numpy()
    for band, down, across in (
        (found_low, low, low),
        (horizontal, high, low),
        (vertical, low, high),
        (diagonal, high, high),
    ):
        expected = transformed(transformed(pixels, down).T, across).T
        np.testing.assert_allclose(np.abs(band[0, 0].numpy()), np.abs(expected), atol=1e-8)


def test_bands_are_named_by_the_direction_of_edges() -> None:
    flat = torch.tensor([1.0, -1.0]).repeat(4)[:, None].expand(8, 8)[None, None]  # lines that lie flat
    for wavelet in WAVELETS:
        for image, largest in ((flat, 0), (flat.mT, 1), (flat * flat.mT, 2)):
            _, (bands,) = decompose(image, 1, wavelet)
            assert max(range(3), key=lambda band: bands[band].abs().sum()) == largest


# ---- the loss


@pytest.mark.parametrize(
    ("wavelet", "levels", "total", "low"),
    [
        ("haar", (0.009144, 0.037230, 0.148459, 0.465732), 0.660566, 1.653798),
        ("db2", (0.002067, 0.014777, 0.095164, 0.471535), 0.583542, None),
    ],
)
def test_waves(wavelet: Any, levels: tuple[float, ...], total: float, low: float | None) -> None:
    student, teacher = waves(torch.float64)
    sums = [wavelet_loss(student, teacher, level, wavelet).item() for level in (1, 2, 3, 4)]
    assert np.diff([0, *sums]) == pytest.approx(levels, abs=6e-7)
    assert sums[-1] == pytest.approx(total, abs=6e-7)
    if low is not None:
        assert wavelet_loss(student, teacher, 4, wavelet, "low").item() == pytest.approx(low, abs=1e-6)
    assert wavelet_loss(student.float(), teacher.float(), 4, wavelet).item() == pytest.approx(total, rel=1e-5)


def test_what_the_low_band_holds_does_not_count() -> None:
    student, teacher = (randn(2, 3, 32, 32, seed=seed, dtype=torch.float32) for seed in range(2))
    expected = wavelet_loss(student, teacher).item()
    brighter = student + torch.tensor([0.5, -1.0, 2.0])[:, None, None]
    assert wavelet_loss(brighter, teacher).item() == pytest.approx(expected, abs=2e-6)
    cells = F.interpolate(randn(2, 3, 2, 2, dtype=torch.float32), scale_factor=16)
    assert wavelet_loss(student + cells, teacher).item() == pytest.approx(expected, abs=2e-6)
    finer = F.interpolate(randn(2, 3, 4, 4, dtype=torch.float32), scale_factor=8)
    assert abs(wavelet_loss(student + finer, teacher).item() - expected) > 1e-2


@pytest.mark.parametrize("wavelet", ["haar", "db3"])
def test_it_is_a_distance(wavelet: Wavelet) -> None:
    student, teacher = (randn(1, 3, 32, 32, seed=seed) for seed in range(2))
    loss = wavelet_loss(student, teacher, wavelet=wavelet).item()
    assert wavelet_loss(student, student, wavelet=wavelet).item() == 0
    assert wavelet_loss(teacher, student, wavelet=wavelet).item() == pytest.approx(loss, rel=1e-12)
    assert wavelet_loss(-3 * student, -3 * teacher, wavelet=wavelet).item() == pytest.approx(3 * loss, rel=1e-12)


def test_gradients() -> None:
    student, teacher = (randn(1, 2, 32, 32, seed=seed).requires_grad_() for seed in range(2))
    wavelet_loss(student, teacher, levels=3).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().min() > 0
    # brightness of a 8x8 block is free
    assert F.avg_pool2d(student.grad, 8).abs().max() < 1e-15


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_gradcheck(wavelet: Wavelet) -> None:
    student, teacher = (randn(1, 1, 7, 6, seed=seed) for seed in range(2))
    check = lambda s: wavelet_loss(s, teacher, 2, wavelet, "both")  # noqa: E731
    assert torch.autograd.gradcheck(check, student.requires_grad_())


def test_the_way_back_has_a_gradient_too() -> None:
    image = randn(1, 2, 5, 6).requires_grad_()
    assert torch.autograd.gradgradcheck(haar, image)


def test_half_precision_around_it_changes_nothing() -> None:
    student, teacher = waves(torch.float32)
    loss = WaveletLoss()
    expected = loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(student, teacher), expected)
        assert loss(student.half(), teacher.half()).item() == pytest.approx(expected.item(), rel=1e-3)
    assert loss(student.bfloat16(), teacher).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": 0}, "levels: expected 1 or more, got 0"),
        ({"wavelet": "har"}, r"wavelet: there is no 'har'. Did you mean 'haar'\?"),
        ({"wavelet": "morlet"}, "wavelet: there is no 'morlet'. There is: haar, db2, db3, db4."),
        ({"bands": "hihg"}, r"bands: there is no 'hihg'. Did you mean 'high'\?"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WaveletLoss(**arguments)
