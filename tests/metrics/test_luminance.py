from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage import data
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from lightning_compress.metrics import LuminancePSNR, LuminanceSSIM
from lightning_compress.metrics.luminance import luminance


def photographs() -> list[Tensor]:
    """Two of different size, (1, 3, H, W)."""
    crops = data.coffee()[100:180, 200:260], data.astronaut()[20:70, 200:280]
    return [torch.from_numpy(crop.copy()).permute(2, 0, 1)[None].float() for crop in crops]


def noisy(image: Tensor, seed: int, sigma: float) -> Tensor:
    return image + sigma * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))


def reference(image: Tensor, border: int) -> np.ndarray:
    stored = image[0].permute(1, 2, 0).round().clamp(0, 255).numpy().astype(np.uint8)
    return rgb2ycbcr(stored)[border:-border, border:-border, 0]


def test_luminance_is_that_of_bt601() -> None:
    for image in photographs():
        found = luminance(noisy(image, 0, 30.0), 3)  # beyond 0..255, and between the bytes
        np.testing.assert_allclose(found[0, 0].numpy(), reference(noisy(image, 0, 30.0), 3), atol=1e-3)


def test_grey_images_and_bytes_are_taken_as_they_are() -> None:
    grey = torch.tensor([[[[-3.0, 7.4], [7.6, 300.0]]]])
    assert torch.equal(luminance(grey), torch.tensor([[[[0.0, 7.0], [8.0, 255.0]]]]))
    image = photographs()[0]
    assert torch.equal(luminance(image.byte()), luminance(image))


def test_scores_are_the_mean_over_images_of_different_size() -> None:
    psnr, ssim = LuminancePSNR(border=2), LuminanceSSIM(border=2)
    expected = []
    for i, image in enumerate(photographs()):
        wrong = noisy(image, i, 10.0 * (i + 1))
        for metric in (psnr, ssim):
            metric.update(wrong, image)
        ours, theirs = reference(image, 2), reference(wrong, 2)
        like_wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        expected.append(
            (
                peak_signal_noise_ratio(ours, theirs, data_range=255),
                structural_similarity(ours, theirs, data_range=255, **like_wang),
            )
        )
    assert psnr.compute().item() == pytest.approx(np.mean([p for p, _ in expected]), abs=1e-4)
    assert ssim.compute().item() == pytest.approx(np.mean([s for _, s in expected]), abs=1e-4)


def test_an_error_in_the_border_does_not_count() -> None:
    image = photographs()[0]
    wrong = image.clone()
    wrong[..., :4, :] = 0
    assert LuminanceSSIM(border=4)(wrong, image) == pytest.approx(1.0)
    assert LuminancePSNR(border=4)(wrong, image).isinf()
    assert LuminancePSNR(border=3)(wrong, image) < 40


def test_half_precision_around_it_changes_nothing() -> None:
    image = photographs()[0]
    wrong = noisy(image, 0, 2.0)
    for metric in (LuminancePSNR(), LuminanceSSIM()):
        expected = metric(wrong, image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert metric(wrong, image) == expected


@pytest.mark.parametrize(
    ("shape", "border", "message"),
    [
        ((1, 4, 8, 8), 0, r"images: expected \(N, 3, H, W\) or \(N, 1, H, W\), got \(1, 4, 8, 8\)"),
        ((3, 8, 8), 0, r"images: expected .*, got \(3, 8, 8\)"),
        ((1, 3, 8, 8), 4, "border: 4 pixels on each side leave nothing of 8x8 pixels"),
        ((1, 3, 8, 8), -1, "border: -1"),
    ],
)
def test_what_has_no_luminance(shape: tuple[int, ...], border: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        luminance(torch.zeros(shape), border)
