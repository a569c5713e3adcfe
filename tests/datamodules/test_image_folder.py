from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image

from lightning_compress.datamodules import ImageFolder

LAYOUT = r"Expected train/<class>/\*.jpg with val/<class>/\*.jpg"


def write(root: Path, split: str, counts: dict[str, int]) -> None:
    """Write images whose colour tells their class, with a brighter left half."""
    for label, (name, count) in enumerate(counts.items()):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = np.full((40, 60, 3), 40 + 40 * label, dtype=np.uint8)
            pixels[:, :30] += 60
            Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "train", {"ant": 8, "bee": 4, "cat": 4})
    write(tmp_path, "val", {"ant": 2, "bee": 2, "cat": 2})
    return tmp_path


def test_classes_and_labels(root: Path) -> None:
    data = ImageFolder(str(root), size=16)
    assert data.num_classes == 3
    assert data.classes == ["ant", "bee", "cat"]
    assert data.input_shape == (3, 16, 16)
    assert [len(split) for split in data.splits] == [16, 6, 6]
    assert [label for _, label in data.splits.val.samples] == [0, 0, 1, 1, 2, 2]


def test_held_out_images_leave_the_training_split(root: Path) -> None:
    train, val, test = ImageFolder(str(root), size=16, val_size=4).splits
    assert [len(train), len(val), len(test)] == [12, 4, 6]
    assert not set(train.samples) & set(val.samples)
    assert sorted(label for _, label in val.samples) == [0, 0, 1, 2]
    assert val.transform is test.transform


def test_a_test_folder_is_used_when_there_is_one(root: Path) -> None:
    write(root, "test", {"bee": 5})
    train, val, test = ImageFolder(str(root), size=16).splits
    assert [len(train), len(val), len(test)] == [16, 6, 5]
    assert {label for _, label in test.samples} == {1}  # counted among the classes of train


def test_evaluation_resizes_and_cuts_the_centre(root: Path) -> None:
    data = ImageFolder(str(root), size=28, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    image, _ = data.splits.val[0]
    assert image.shape == (3, 28, 28)
    assert torch.allclose(image[:, :, :10], torch.tensor(100 / 255))  # the left half, then the right one
    assert torch.allclose(image[:, :, 18:], torch.tensor(40 / 255))


@pytest.mark.parametrize("train_crop", ["plain", "resized"])
def test_a_plain_crop_does_not_scale(root: Path, train_crop: str) -> None:
    ramp = np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], 40, 0).repeat(3, 2)
    Image.fromarray(ramp).save(root / "train" / "ant" / "0.png")
    data = ImageFolder(str(root), size=28, train_crop=train_crop, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    views = torch.stack([data.splits.train[epoch * 16][0] for epoch in range(12)])
    slopes = (views[:, 0, 14, 20] - views[:, 0, 14, 8]).abs() * 255 / 12  # 4 for a pixel of 40, 5 for one of 32
    assert len(views[:, 0, 14, 14].unique()) > 4
    assert bool((slopes - 5).abs().max() < 0.3) == (train_crop == "plain")


def test_an_unknown_crop_is_named(root: Path) -> None:
    with pytest.raises(ValueError, match="train_crop must be 'resized' or 'plain', got 'centre'"):
        ImageFolder(str(root), train_crop="centre")


def test_training_crops_and_mirrors(root: Path) -> None:
    train = ImageFolder(str(root), size=8).splits.train
    views = torch.stack([train[epoch * len(train)][0] for epoch in range(40)])
    brighter_left = (views[..., 0] - views[..., -1]).mean((1, 2)).sign()
    assert {-1.0, 1.0} <= set(brighter_left.tolist())
    assert len(views.unique(dim=0)) > 10


def test_reading_leaves_the_global_generator_alone(root: Path) -> None:
    train = ImageFolder(str(root), size=8).splits.train
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    train[0]
    assert torch.equal(torch.rand(1), expected)


def test_absent_folders_say_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=rf"ImageFolder: no data.*no such folder.*{LAYOUT}"):
        ImageFolder(str(tmp_path / "nowhere")).setup("fit")
    with pytest.raises(MisconfigurationException, match=rf"it holds nothing.*{LAYOUT}"):
        _ = ImageFolder(str(tmp_path)).num_classes
    write(tmp_path, "train", {"ant": 1})
    with pytest.raises(MisconfigurationException, match=rf"it holds train.*{LAYOUT}"):
        ImageFolder(str(tmp_path)).setup("fit")


def test_classes_unknown_to_train_are_refused(root: Path) -> None:
    write(root, "test", {"dog": 1})
    with pytest.raises(MisconfigurationException, match=r"has classes that .*train lacks: dog"):
        ImageFolder(str(root)).setup("fit")


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "ant").mkdir(parents=True)
    with pytest.raises(MisconfigurationException, match=r"train holds no images \(.jpg"):
        ImageFolder(str(tmp_path)).setup("fit")


def test_it_cannot_be_downloaded() -> None:
    with pytest.raises(ValueError, match="download: ImageFolder cannot be fetched"):
        ImageFolder(download=True)
