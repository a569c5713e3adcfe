from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from lightning_compress.datamodules import Digits


def test_splits_have_every_class_in_its_share_and_do_not_overlap() -> None:
    splits = Digits().splits
    assert [len(split) for split in splits] == [1297, 250, 250]
    train, val, test = splits
    assert train.images is val.images
    assert not set(train.indices.tolist()) & set(val.indices.tolist())
    scans = load_digits()
    shares = torch.from_numpy(scans.target).bincount() / 1797
    for split in splits:
        counts = split.labels[split.indices].bincount(minlength=10)
        assert (counts - shares * len(split)).abs().max() <= 2
    everything = torch.cat([train.images, test.images]).flatten(1)
    assert len(everything) == 1797
    assert len(everything.unique(dim=0)) == len(torch.from_numpy(scans.images).flatten(1).unique(dim=0))


def test_the_seed_moves_the_validation_split_but_not_the_test_split() -> None:
    one, other = Digits(seed=0).splits, Digits(seed=1).splits
    assert torch.equal(one.test.images, other.test.images)
    assert not torch.equal(one.val.indices, other.val.indices)


def test_without_a_held_out_split_it_validates_on_the_test_images() -> None:
    splits = Digits(val_size=0).splits
    assert len(splits.train) == 1547
    assert splits.val is splits.test


@pytest.mark.parametrize(("size", "channels"), [(32, 1), (32, 3), (8, 1), (28, 1)])
def test_shapes(size: int, channels: int) -> None:
    data = Digits(size=size, channels=channels, augment=False)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (64, channels, size, size)
    assert data.input_shape == (channels, size, size)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.equal(images[:, :1].expand_as(images), images)


def test_the_scans_are_unchanged_at_their_own_size() -> None:
    scans = torch.from_numpy(load_digits().images[0]).round()
    stored = Digits(size=8).splits
    grey = torch.cat([stored.train.images, stored.test.images]) * (16 / 255)
    assert (grey.round()[:, 0] == scans).flatten(1).all(1).any()


def test_images_are_normalised() -> None:
    images = torch.stack([image for image, _ in Digits(augment=False, val_size=0).splits.train])
    assert images.mean().abs() < 0.02
    assert (images.std() - 1).abs() < 0.02


def test_the_shift_is_at_most_one_pixel_of_the_scan() -> None:
    train = Digits().splits.train
    still = train.images[train.indices]
    shifted = train.augmentation(still, train.augmentation.draw(len(still), 0, 0))
    ink, ink_shifted = (images.float().sum((1, 2, 3)) for images in (still, shifted))
    centre, centre_shifted = ((images.float().sum((1, 2)) * torch.arange(32.0)).sum(1) for images in (still, shifted))
    moved = ((centre_shifted - centre) / ink)[ink == ink_shifted]  # where no ink left the image
    assert len(moved) > 50  # most digits reach from the first row to the last
    assert moved.round().unique().tolist() == list(range(-4, 5))
    assert torch.allclose(moved, moved.round(), atol=1e-4)
    assert not (shifted == still.flip(-1)).flatten(1).all(1).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"channels": 2}, "channels: expected 1 or 3"), ({"size": 4}, "size: expected 8")],
)
def test_bad_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(**arguments)
