"""A teacher without training, which knows digits that it has not seen."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_compress.datamodules import Digits
from lightning_compress.networks import DigitsKernel


@pytest.fixture(scope="module")
def network() -> DigitsKernel:
    return DigitsKernel()


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (16, 1), (32, 3)])
def test_is_right_about_held_out_digits(network: DigitsKernel, size: int, channels: int) -> None:
    splits = Digits(size=size, channels=channels).splits
    for split in (splits.val, splits.test):
        images, labels = next(iter(DataLoader(split, 250)))
        assert (network(images).argmax(1) == labels).float().mean() >= 0.98


def test_is_the_same_every_time_and_has_nothing_to_train(network: DigitsKernel) -> None:
    again = DigitsKernel()
    assert not list(again.parameters())
    for one, other in zip(network.buffers(), again.buffers(), strict=True):
        assert torch.equal(one, other)
    assert len(network.samples) == 1297  # the training digits alone
