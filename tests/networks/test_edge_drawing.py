from __future__ import annotations

import numpy as np
import torch

from lightning_compress.datamodules.paired_photographs import drawing
from lightning_compress.datamodules.photographs import photographs
from lightning_compress.networks import EdgeDrawing


def test_draws_as_the_datamodule_does() -> None:
    (photograph,) = photographs("val").values()
    square = photograph[100:164, 100:164]
    expected = torch.from_numpy(drawing(square).astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    images = torch.from_numpy(square.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    drawn = EdgeDrawing()(images)
    assert expected.std() > 0.2, "there are edges"
    assert (drawn[0] - expected).abs().max() < 1.1 / 127.5, "bytes are rounded down"


def test_has_nothing_to_train() -> None:
    network = EdgeDrawing()
    assert not list(network.parameters())
    assert torch.equal(network(torch.full((1, 3, 8, 8), 0.3)), torch.ones(1, 3, 8, 8)), "white where nothing changes"
