from __future__ import annotations

import numpy as np
import pytest
import torch
from image_folders import stored
from skimage import data as photographs

from lightning_compress.datamodules import UnpairedPhotographs


@pytest.mark.parametrize(("crop_size", "tiles"), [(64, (18, 16)), (128, (3, 4)), (170, (2, 3))])
def test_the_right_thirds_are_to_evaluate_on(crop_size: int, tiles: tuple[int, int]) -> None:
    data = UnpairedPhotographs(crop_size=crop_size)
    samples = data.dataset("test")
    assert tuple(len(images) for images in samples.images) == tiles
    a, b = samples[0]
    assert a is not None
    assert b is not None
    coffee, tissue = photographs.coffee(), photographs.immunohistochemistry()
    for image, whole, left in ((a, coffee, 400), (b, tissue, 341)):
        expected = whole[:crop_size, left : left + crop_size]
        assert torch.equal(stored(image), torch.from_numpy(np.ascontiguousarray(expected)).permute(2, 0, 1).long())


def test_the_left_two_thirds_are_to_train_on() -> None:
    samples = UnpairedPhotographs(crop_size=32, samples_per_epoch=20).dataset("train")
    assert len(samples) == 20
    assert [images[0].size for images in samples.images] == [(400, 400), (341, 512)]
    means = torch.stack([torch.stack([image.mean() for image in pair]) for pair in samples])
    assert means.std(0).min() > 0.05  # from many places
