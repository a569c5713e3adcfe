from __future__ import annotations

import numpy as np
import torch
from image_folders import stored

from lightning_compress.datamodules import PairedPhotographs
from lightning_compress.datamodules.paired_photographs import drawing


def test_a_drawing_is_dark_where_the_image_changes() -> None:
    image = np.zeros((12, 16, 3), dtype=np.uint8)
    image[:, 8:] = 255
    ink = drawing(image)
    assert (ink.shape, ink.dtype) == (image.shape, np.uint8)
    assert np.array_equal(ink[0, :, 0] == 255, ~np.isin(np.arange(16), [7, 8]))
    assert (ink[:, 7:9] == 0).all()
    faint = drawing(image // 20)  # 12 of 255 levels
    assert 180 < faint[:, 7:9].min() < 255


def test_pairs_to_evaluate_on_are_tiles_of_one_photograph() -> None:
    data = PairedPhotographs(crop_size=128)
    data.setup("validate")
    data.setup("test")
    pairs = list(data.val_dataloader())
    assert [len(data.dataset(split)) for split in ("val", "test")] == [16, 6]  # type: ignore[arg-type]
    for edges, photograph in pairs[:4]:
        edges, photograph = stored(edges)[0], stored(photograph)[0]
        assert torch.equal(edges[0], edges[2])
        inner = drawing(photograph.byte().permute(1, 2, 0).numpy())[1:-1, 1:-1, 0]
        assert np.array_equal(edges[0, 1:-1, 1:-1].byte().numpy(), inner)
    assert list(data._datasets) == ["val", "test"]  # the training photographs were not touched


def test_training_pairs_come_from_seven_photographs() -> None:
    data = PairedPhotographs(crop_size=256, samples_per_epoch=14)
    samples = data.dataset("train")
    assert len(samples) == 14
    assert len(samples.images) == 7
    edges, photograph = samples[0]
    inner = drawing(stored(photograph).byte().permute(1, 2, 0).numpy())[1:-1, 1:-1, 0].astype(int)
    assert np.abs(stored(edges)[0, 1:-1, 1:-1].numpy() - inner).max() <= 1  # mirrored sums round differently
