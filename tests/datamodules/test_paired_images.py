from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import paired_folder, stored, write
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from real_data import real_data

from lightning_compress.datamodules import PairedImages


def test_the_left_half_is_a(tmp_path: Path) -> None:
    pixels = write(tmp_path / "test" / "1.png", 16, 8)
    ((a, b),) = PairedImages(str(tmp_path), crop_size=8, load_size=8).test_dataloader()
    assert torch.equal(stored(a[0]), torch.from_numpy(pixels[:, :8].copy()).permute(2, 0, 1).long())
    assert torch.equal(stored(b[0]), torch.from_numpy(pixels[:, 8:].copy()).permute(2, 0, 1).long())


def test_splits_and_their_stand_ins(tmp_path: Path) -> None:
    def counts(root: Path, **arguments: int) -> list[int]:
        data = PairedImages(str(root), crop_size=8, load_size=8, **arguments)  # type: ignore[arg-type]
        return [len(data.dataset(split)) for split in ("train", "val", "test")]  # type: ignore[arg-type]

    assert counts(paired_folder(tmp_path / "facades", {"train": 4, "val": 1, "test": 2})) == [4, 1, 2]
    assert counts(paired_folder(tmp_path / "cityscapes", {"train": 4, "val": 3})) == [4, 3, 3]
    assert counts(paired_folder(tmp_path / "other", {"train": 4, "test": 3})) == [4, 3, 3]
    assert counts(tmp_path / "facades", limit_items=2) == [2, 1, 2]


def test_files_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.png", "10.png", "9.PNG", "a.jpeg"):
        write(tmp_path / "val" / name, 16, 8)
    (tmp_path / "val" / "notes.txt").write_text("no image")
    samples = PairedImages(str(tmp_path), crop_size=8, load_size=8).dataset("val")
    assert [path.name for path in samples.images] == ["10.png", "9.PNG", "a.jpeg", "b.png"]


def test_testing_needs_no_training_images(tmp_path: Path) -> None:
    paired_folder(tmp_path, {"test": 1})
    data = PairedImages(str(tmp_path), crop_size=8, load_size=8)
    data.setup("test")
    with pytest.raises(MisconfigurationException, match=r"PairedImages: no data .*it holds test.*Expected train/"):
        data.setup("fit")
    with pytest.raises(MisconfigurationException, match="there is no such folder"):
        PairedImages(str(tmp_path / "nowhere")).setup("test")


def test_what_is_no_pair_is_named(tmp_path: Path) -> None:
    write(tmp_path / "test" / "odd.png", 15, 8)
    with pytest.raises(MisconfigurationException, match=r"odd.png is 15 pixels wide; expected two images"):
        next(iter(PairedImages(str(tmp_path), crop_size=8, load_size=8).test_dataloader()))
    (tmp_path / "test" / "odd.png").write_bytes(b"no image")
    with pytest.raises(MisconfigurationException, match=r"odd.png cannot be read as an image"):
        next(iter(PairedImages(str(tmp_path), crop_size=8, load_size=8).test_dataloader()))


@pytest.mark.real_data
def test_facades() -> None:
    root = real_data("facades/train", "facades/val", "facades/test") / "facades"
    data = PairedImages(str(root), direction="BtoA")
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [400, 100, 106]  # type: ignore[arg-type]
    labels, photograph = next(iter(data.test_dataloader()))
    assert labels.shape == photograph.shape == (1, 3, 256, 256)
    with Image.open(root / "test" / "1.jpg") as image:
        left, right = np.split(np.asarray(image), 2, axis=1)
    assert torch.equal(stored(photograph[0]), torch.from_numpy(left.copy()).permute(2, 0, 1).long())
    assert torch.equal(stored(labels[0]), torch.from_numpy(right.copy()).permute(2, 0, 1).long())
    gaudy, plain = ((image.amax(1) - image.amin(1)).mean() for image in (labels, photograph))
    assert gaudy > 3 * plain
    labels, photograph = next(iter(data.train_dataloader()))
    assert labels.shape == photograph.shape == (1, 3, 256, 256)
