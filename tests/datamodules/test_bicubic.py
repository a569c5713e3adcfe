from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from real_data import real_data
from skimage import data

from lightning_compress.datamodules._pairs import as_tensor
from lightning_compress.datamodules.bicubic import bicubic, cubic, resizing
from lightning_compress.metrics import LuminancePSNR


def test_the_kernel_is_keys() -> None:
    x = torch.tensor([0.0, 0.25, 0.75, 1.0, 1.25, -1.75, 2.0, 2.5], dtype=torch.float64)
    expected = [1, 111 / 128, 29 / 128, 0, -9 / 128, -3 / 128, 0, 0]
    np.testing.assert_allclose(cubic(x).numpy(), expected, atol=1e-15)


@pytest.mark.parametrize(
    ("length", "out", "row", "first", "expected"),
    [
        (16, 8, 4, 5, np.array([-3, -9, 29, 111, 111, 29, -9, -3]) / 256),  # eight taps instead of four
        (15, 5, 2, 2, np.array([-3, -6, 0, 27, 63, 81, 63, 27, 0, -6, -3]) / 243),
        (8, 16, 7, 2, np.array([-9, 111, 29, -3]) / 128),
        (8, 16, 8, 2, np.array([-3, 29, 111, -9]) / 128),
    ],
    ids=["half", "third", "double", "double, next phase"],
)
def test_known_weights(length: int, out: int, row: int, first: int, expected: np.ndarray) -> None:
    found = resizing(length, out)[row].numpy()
    np.testing.assert_allclose(found[first : first + len(expected)], expected, atol=1e-12)
    assert np.abs(found).sum() == pytest.approx(np.abs(expected).sum())


@pytest.mark.parametrize("border", ["mirror", "repeat"])
@pytest.mark.parametrize(("length", "out"), [(12, 6), (12, 4), (12, 3), (7, 28), (10, 10), (3, 1)])
def test_weights_sum_to_one_and_are_symmetric(length: int, out: int, border: str) -> None:
    weights = resizing(length, out, border)
    assert weights.shape == (out, length)
    torch.testing.assert_close(weights.sum(1), torch.ones(out, dtype=torch.float64))
    torch.testing.assert_close(weights, weights.flip(0, 1))
    if length == out:
        torch.testing.assert_close(weights, torch.eye(out, dtype=torch.float64))


def test_a_ramp_stays_one_inside_and_borders_differ() -> None:
    ramp = torch.arange(24, dtype=torch.float64).repeat(24, 1)
    for border in ("mirror", "repeat"):
        small = bicubic(ramp, (12, 12), border)
        torch.testing.assert_close(
            small[:, 2:-2], (2 * torch.arange(12, dtype=torch.float64) + 0.5)[2:-2].repeat(12, 1)
        )
    assert not torch.equal(bicubic(ramp, (12, 12), "mirror"), bicubic(ramp, (12, 12), "repeat"))


def test_bytes_are_rounded_twice_and_floats_never() -> None:
    image = as_tensor(data.astronaut()[:64, :64])
    columns_first = bicubic(image.mT, (32, 16)).mT
    assert bicubic(image, (16, 32)).dtype == torch.uint8
    assert not torch.equal(bicubic(image, (16, 32)), columns_first)  # rounded between rows and columns
    exact = bicubic(image.float(), (16, 32))
    assert exact.dtype == torch.float32
    torch.testing.assert_close(bicubic(image.float().mT, (32, 16)).mT, exact)
    assert (exact - bicubic(image, (16, 32))).abs().max() < 1.5


def test_inside_it_is_pillows() -> None:
    image = data.coffee()[:120, :180]
    theirs = np.asarray(Image.fromarray(image).resize((60, 40), Image.Resampling.BICUBIC)).astype(int)
    ours = bicubic(as_tensor(image), (40, 60)).permute(1, 2, 0).numpy()
    assert np.abs(ours - theirs)[3:-3, 3:-3].max() <= 1  # which rounds columns first


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("scale", "psnr"),
    [(2, 33.64), (3, 30.39), (4, 28.42)],
    ids=["vdsr-set5-x2", "vdsr-set5-x3", "vdsr-set5-x4"],
)
def test_set5_is_reproduced_bit_by_bit(scale: int, psnr: float) -> None:
    folder = real_data(f"super-resolution/Set5/image_SRF_{scale}") / f"super-resolution/Set5/image_SRF_{scale}"
    metric = LuminancePSNR(scale)
    for file in sorted(folder.glob("*_HR.png")):
        high, low = (
            as_tensor(np.array(Image.open(f))) for f in (file, file.with_name(file.name.replace("_HR", "_LR")))
        )
        small = bicubic(high, (low.shape[1], low.shape[2]), "repeat")
        assert torch.equal(small, low)
        metric.update(bicubic(low, (high.shape[1], high.shape[2]))[None], high[None])
    assert metric.compute() == pytest.approx(psnr, abs=0.05)  # papers resize the luminance alone
