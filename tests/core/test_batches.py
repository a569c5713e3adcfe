"""Labels are found where people put them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_compress.core.batches import targets_of

X, Y = torch.zeros(2, 3), torch.tensor([1, 0])


@pytest.mark.parametrize("batch", [(X, Y), [X, Y, "path"], {"image": X, "label": Y}, {"x": X, "targets": Y}])
def test_found(batch: Any) -> None:
    assert targets_of(batch, "Test") is Y


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        (X, "a Tensor"),
        ((X,), "a tuple"),
        ((X, "no label"), "second entry is a str"),
        ({"image": X}, "a dict with image"),
        ((X, torch.tensor(1)), "Tensor"),
    ],
)
def test_absent(batch: Any, got: str) -> None:
    with pytest.raises(MisconfigurationException, match="WhiteBox needs the labels") as caught:
        targets_of(batch, "WhiteBox")
    assert got in str(caught.value)
