from __future__ import annotations

from pathlib import Path

import pytest
from image_folders import batches, stored, unpaired_folder
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_compress.datamodules import UnpairedImages


def folder(root: Path, **arguments) -> UnpairedImages:
    """Image i of A has the value i + 1 everywhere, image i of B has i + 101."""
    unpaired_folder(root, {"trainA": 3, "trainB": 8, "testA": 5, "testB": 2})
    return UnpairedImages(str(root), crop_size=8, load_size=10, **arguments)


def values(images) -> list[int]:
    return [int(stored(image).unique()) for image in images]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_epoch_shows_the_larger_set_once_and_b_at_random(tmp_path: Path, batch_size: int) -> None:
    data = folder(tmp_path, batch_size=batch_size)
    of_a, of_b, orders = [], [], []
    for epoch in range(30):
        found = batches(data, epoch)
        orders.append([value for a, _ in found for value in values(a)])
        assert sorted(orders[-1]) == [1, 1, 1, 2, 2, 2, 3, 3]
        of_a += orders[-1]
        of_b += [value for _, b in found for value in values(b)]
    assert len({tuple(order) for order in orders}) > 20
    assert set(of_b) == set(range(101, 109))
    assert len(set(zip(of_a, of_b, strict=True))) == 24  # all pairs
    assert max(map(of_b.count, set(of_b))) < 55  # of 240, 30 on average


def test_serial_batches_keep_a_and_b_together(tmp_path: Path) -> None:
    data = folder(tmp_path, serial_batches=True)
    seen = {(values(a)[0], values(b)[0]) for epoch in range(3) for a, b in batches(data, epoch)}
    assert seen == {(i % 3 + 1, i + 101) for i in range(8)}


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_evaluation_shows_every_image_once(tmp_path: Path, direction: str) -> None:
    data = folder(tmp_path, eval_batch_size=3, direction=direction)
    found = [[None if image is None else values(image) for image in pair] for pair in data.test_dataloader()]
    if direction == "BtoA":
        found = [pair[::-1] for pair in found]
    assert found == [[[1, 2, 3], [101, 102]], [[4, 5], None]]


def test_each_image_is_cut_and_mirrored_on_its_own(tmp_path: Path) -> None:
    samples = folder(tmp_path, serial_batches=True).dataset("train")
    places = []
    prepare = type(samples.preparation).__call__

    class Noted(type(samples.preparation)):
        def __call__(self, image, place):
            places.append(place)
            return prepare(self, image, place)

    samples.preparation = Noted(10, 8, True)
    for index in range(50):
        samples[index]
    assert sum(a == b for a, b in zip(places[::2], places[1::2], strict=True)) < 10
    assert {place.mirror for place in places[::2]} == {place.mirror for place in places[1::2]} == {False, True}


def test_validation_images_stand_in_for_test_images(tmp_path: Path) -> None:
    unpaired_folder(tmp_path, {"trainA": 1, "trainB": 1, "valA": 2, "valB": 3})
    data = UnpairedImages(str(tmp_path), crop_size=8, load_size=8)
    assert [len(images) for images in data.dataset("test").images] == [2, 3]
    assert [len(images) for images in data.dataset("val").images] == [2, 3]
    limited = UnpairedImages(str(tmp_path), crop_size=8, load_size=8, limit_items=2)
    assert [len(images) for images in limited.dataset("test").images] == [2, 2]


def test_absent_folders_say_what_is_read(tmp_path: Path) -> None:
    unpaired_folder(tmp_path, {"trainA": 1, "testA": 1, "testB": 1})
    data = UnpairedImages(str(tmp_path), crop_size=8, load_size=8)
    data.setup("test")
    with pytest.raises(MisconfigurationException, match=r"it holds testA, testB, trainA\). Expected trainA/"):
        data.setup("fit")
