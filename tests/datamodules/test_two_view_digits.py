from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from lightning_compress.datamodules import TwoViewDigits
from lightning_compress.datamodules.two_view_digits import edges, inverted


def test_half_of_every_class_is_infrared() -> None:
    data = TwoViewDigits(size=16)
    train, val, test = data.splits
    assert [len(train), len(val.query) + len(val.gallery), len(test.query) + len(test.gallery)] == [1297, 250, 250]
    labels, infrared = data.training_labels(), train.tags[0]
    assert (labels.bincount() - 2 * labels[infrared].bincount()).abs().max() <= 2
    for part, camera in ((test.query, 1), (test.gallery, 0)):
        assert part.tags[0].unique().tolist() == [camera]
        assert part.tags[1].tolist() == list(range(len(part)))
        assert {item[1] for item in map(part.__getitem__, range(len(part)))} == set(range(10))


def test_no_scan_is_in_two_places() -> None:
    splits = TwoViewDigits(size=8).splits
    places = [splits.train, splits.val.query, splits.val.gallery, splits.test.query, splits.test.gallery]
    # the strongest channel of a colour is full, so it holds the scan
    scans = torch.cat([place.dataset.arrays.images.amax(1).flatten(1) for place in places])
    assert len(scans) == 1797
    assert len(scans.unique(dim=0)) == len(torch.from_numpy(load_digits().images).flatten(1).unique(dim=0))


def test_views() -> None:
    square = torch.zeros(1, 1, 8, 8)
    square[..., 2:6, 2:6] = 200
    outline = edges(square)
    assert outline[0, 0, 3:5, 3:5].eq(255).all()  # inside
    assert outline[0, 0, 0].eq(255).all()  # far outside
    assert outline[0, 0, 2, 2:6].eq(55).all()  # on the rim
    assert torch.equal(inverted(square), 255 - square)


def test_batches_and_their_order() -> None:
    data = TwoViewDigits(batch_size=40, num_instances=4, size=8)
    images, labels, infrared = next(iter(data.train_dataloader()))
    assert images.shape == (40, 3, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert infrared.dtype == torch.bool
    assert torch.equal(labels.view(10, 4), labels.view(10, 4)[:, :1].expand(10, 4))
    assert torch.equal(infrared, torch.tensor([False, True] * 20))
    again = next(iter(TwoViewDigits(batch_size=40, num_instances=4, size=8).train_dataloader()))
    assert all(torch.equal(one, other) for one, other in zip((images, labels, infrared), again, strict=True))
    assert len(data.train_dataloader()) == data.rounds == 32  # about as many images as there are


@pytest.mark.parametrize("augment", [False, True])
def test_visible_ink_is_coloured_on_black_and_infrared_is_grey_on_white(augment: bool) -> None:
    """... also where a shift has brought in a new border."""
    data = TwoViewDigits(size=16, augment=augment)
    images, _, infrared = next(iter(data.train_dataloader()))
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.digits.mean, data.digits.std))
    shown = images * std + mean
    grey = (shown.amax(1) - shown.amin(1)).amax((1, 2)) < 1e-3
    assert torch.equal(grey, infrared)
    corners = shown[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].mean(1)
    assert corners[infrared].median() == pytest.approx(1.0, abs=1e-3)
    assert corners[~infrared].median() == pytest.approx(0.0, abs=1e-3)
    colours = shown[~infrared].amax((2, 3))
    assert len(colours.mul(20).round().unique(dim=0)) > 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"infrared": "heat"}, "infrared: expected 'edges' or 'inverted', got 'heat'"),
        ({"batch_size": 20}, "batch_size: expected a multiple of num_instances=8, got 20"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
        ({"size": 4}, "size: expected 8"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwoViewDigits(**arguments)
