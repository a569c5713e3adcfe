"""Errors by frequency, over a set of images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_compress.core.distill.wavelets import decompose
from lightning_compress.metrics import BandErrors


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Generated images and references, of different contrast."""
    return [(randn(2, 3, 16, 16, seed=2 * i), (i + 1) * randn(2, 3, 16, 16, seed=2 * i + 1)) for i in range(2)]


def test_they_are_of_all_images_together() -> None:
    errors = BandErrors(levels=2)
    for generated, reference in batches():
        errors.update(generated, reference)
    found = errors.compute()
    assert list(found) == [f"{band}_{j}" for j in (1, 2) for band in ("horizontal", "vertical", "diagonal")] + ["low_2"]
    generated, reference = (torch.cat(images) for images in zip(*batches(), strict=True))
    (apart_low, apart), (low, details) = decompose(generated - reference, 2), decompose(reference, 2)
    assert found["low_2"].item() == pytest.approx((apart_low.abs().sum() / low.abs().sum()).item(), rel=1e-5)
    expected = (apart[1][1].abs().mean() / details[1][1].abs().mean()).item()
    assert found["vertical_2"].item() == pytest.approx(expected, rel=1e-5)


def test_sums_of_processes_are_added() -> None:
    apart = [BandErrors(levels=2) for _ in range(2)]
    whole = BandErrors(levels=2)
    for errors, (generated, reference) in zip(apart, batches(), strict=True):
        errors.update(generated, reference)
        whole.update(generated, reference)
    assert {kind.__name__ for kind in apart[0]._reductions.values()} == {"dim_zero_sum"}
    apart[0].sums = apart[0].sums + apart[1].sums
    assert apart[0].compute() == whole.compute()


def test_nothing_is_kept_of_a_graph() -> None:
    errors = BandErrors(levels=1, wavelet="db2")
    image = randn(1, 1, 7, 9, seed=0).requires_grad_()
    errors.update(2 * image, image)
    assert not errors.sums.requires_grad
    assert {round(error.item(), 6) for error in errors.compute().values()} == {1.0}
    errors.reset()
    assert not errors.sums.any()
