from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from real_data import real_data

from lightning_compress.datamodules import MNIST, FashionMNIST

RNG = np.random.default_rng(0)
IMAGES = {part: RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8) for part, count in (("train", 40), ("t10k", 20))}


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.tobytes())


def write(root: Path, name: str) -> None:
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for part, images in IMAGES.items():
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", (np.arange(len(images)) % 10).astype(np.uint8))


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST])
def test_reads_torchvisions_layout(kind: type[MNIST], tmp_path: Path) -> None:
    write(tmp_path, kind.__name__)
    data = kind(str(tmp_path), batch_size=16, val_size=0.25)
    splits = data.splits
    assert [len(split) for split in splits] == [30, 10, 20]
    assert torch.equal(splits.train.images[:, 0], torch.from_numpy(IMAGES["train"]))
    assert torch.equal(splits.test.images[:, 0], torch.from_numpy(IMAGES["t10k"]))
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (16, *data.input_shape) == (16, 1, 28, 28)
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST])
def test_augmentation_is_off_unless_asked_for(kind: type[MNIST], tmp_path: Path) -> None:
    write(tmp_path, kind.__name__)
    assert kind(str(tmp_path)).splits.train.augmentation is None
    assert kind(str(tmp_path), augment=True).splits.train.augmentation.padding == 2


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST])
def test_absent_files_say_what_is_read(kind: type[MNIST], tmp_path: Path) -> None:
    write(tmp_path, kind.__name__)
    (tmp_path / kind.__name__ / "raw" / "t10k-labels-idx1-ubyte").unlink()
    message = rf"it holds {kind.__name__}\).*Expected {kind.__name__}/raw/.*t10k.*labels-idx1-ubyte. download=True"
    with pytest.raises(MisconfigurationException, match=message):
        kind(str(tmp_path)).setup("fit")


@pytest.mark.real_data
@pytest.mark.parametrize("kind", [MNIST, FashionMNIST])
def test_real_images_have_the_stated_mean_and_std(kind: type[MNIST]) -> None:
    train, val, test = kind(real_data(f"{kind.__name__}/raw"), val_size=5000).splits
    assert [len(train), len(val), len(test)] == [55000, 5000, 10000]
    pixels = train.images.float() / 255
    assert pixels.mean() == pytest.approx(kind.mean[0], abs=1e-4)
    assert pixels.std() == pytest.approx(kind.std[0], abs=1e-4)
