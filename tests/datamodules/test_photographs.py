from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_compress.datamodules import Photographs
from lightning_compress.datamodules._pairs import Pair, Patches
from lightning_compress.datamodules.bicubic import bicubic


@pytest.fixture(scope="module")
def photographs() -> Photographs:
    return Photographs(scale=4, patch_size=32, batch_size=3, samples_per_epoch=7)


def enlarged(small: Tensor, scale: int) -> Tensor:
    return small.repeat_interleave(scale, -1).repeat_interleave(scale, -2)


def pairs(*sizes: tuple[int, int], scale: int = 3) -> list[Pair]:
    """Pairs in which every pixel of the small image has its own value, and the large one repeats it."""
    small = [
        torch.stack([torch.full(size, i), *torch.meshgrid(*map(torch.arange, size), indexing="ij")]).byte()
        for i, size in enumerate(sizes)
    ]
    return [Pair(str(i), image, enlarged(image, scale)) for i, image in enumerate(small)]


def test_batches(photographs: Photographs) -> None:
    photographs.setup("fit")
    batches = list(photographs.train_dataloader())
    assert [len(low) for low, _ in batches] == [3, 3, 1]
    low, high = batches[0]
    assert (low.shape, high.shape) == ((3, 3, 8, 8), (3, 3, 32, 32))
    assert photographs.input_shape == (3, 8, 8)
    assert low.dtype == high.dtype == torch.float32
    assert 100 < torch.cat([high for _, high in batches]).max() <= 255


def test_whole_images_to_evaluate_on(photographs: Photographs) -> None:
    photographs.setup("fit")
    photographs.setup("test")
    (val,) = photographs.val_dataloader()
    (test,) = photographs.test_dataloader()
    assert (val[0].shape, val[1].shape) == ((1, 3, 128, 128), (1, 3, 512, 512))
    assert (test[0].shape, test[1].shape) == ((1, 3, 75, 112), (1, 3, 300, 448))  # of 300 by 451 pixels
    assert torch.equal(bicubic(test[1].byte(), (75, 112)).float(), test[0])
    assert [low.shape for low, _ in photographs.predict_dataloader()] == [test[0].shape]


def test_testing_reads_no_other_images() -> None:
    data = Photographs()
    data.setup("test")
    assert list(data._read) == ["test"]


@pytest.mark.parametrize("augment", [False, True])
def test_patches_of_both_images_belong_together(augment: bool) -> None:
    patches = Patches(pairs((9, 7), (5, 12)), size=4, scale=3, length=200, augment=augment)
    turned = 0
    for low, high in patches:
        assert (low.shape, high.shape) == ((3, 4, 4), (3, 12, 12))
        assert torch.equal(high, enlarged(low, 3))
        upright = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
        turned += not torch.equal(low[1:], low[1:, :1, :1] + upright)
    assert (100 < turned < 200) if augment else turned == 0


def test_every_place_and_every_turn_is_drawn() -> None:
    patches = Patches(pairs((6, 7), (5, 5)), size=4, scale=3, length=400)
    corners, turns, images = set(), set(), []
    for low, _ in patches:
        which, row, column = low.long()
        images.append(which[0, 0].item())
        corners.add((images[-1], row.min().item(), column.min().item()))
        turns.add(tuple(((row - row.min()) * 4 + column - column.min())[[0, 0, -1], [0, -1, 0]].tolist()))
    assert corners == {(0, i, j) for i in range(3) for j in range(4)} | {(1, i, j) for i in range(2) for j in range(2)}
    assert len(turns) == 8
    assert images.count(0) == images.count(1) == 200


def test_draws_depend_on_seed_epoch_and_index_alone() -> None:
    patches = Patches(pairs((30, 30)), size=8, scale=3, length=10)
    torch.manual_seed(0)
    once = [low for low, _ in patches]
    torch.manual_seed(1)
    assert all(torch.equal(patches[i][0], once[i]) for i in reversed(range(10)))
    assert not any(torch.equal(patches[10 + i][0], once[i]) for i in range(10))  # the next epoch
    other = Patches(pairs((30, 30)), size=8, scale=3, length=10, seed=1)
    assert not any(torch.equal(other[i][0], once[i]) for i in range(10))


def test_workers_give_the_same_batches(photographs: Photographs) -> None:
    other = Photographs(scale=4, patch_size=32, batch_size=3, samples_per_epoch=7, num_workers=1)
    other._read = photographs._read
    for data in (photographs, other):
        data.setup("fit")
    loaders = photographs.train_dataloader(), other.train_dataloader()
    for loader in loaders:
        loader.sampler.set_epoch(2)
    for (low, high), (other_low, other_high) in zip(*loaders, strict=True):
        assert torch.equal(low, other_low)
        assert torch.equal(high, other_high)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 1}, "scale: expected 2 or more, got 1"),
        ({"scale": 3, "patch_size": 64}, "patch_size: expected a multiple of scale=3, got 64"),
        ({"patch_size": 0}, "patch_size: expected 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size: expected 1 or more, got 0"),
        ({"samples_per_epoch": 0}, "samples_per_epoch: expected 1 or more, got 0"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Photographs(**arguments)
