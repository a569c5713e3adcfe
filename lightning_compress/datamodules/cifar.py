"""CIFAR-10 and CIFAR-100: 60,000 colour photographs of 32x32 pixels."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchvision import datasets

from lightning_compress.datamodules._images import Augmentation, ImageData, Splits


class CIFAR10(ImageData):
    """Ten classes of objects and animals, 50,000 images to train and 10,000 to test.

    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. ``root`` holds either
    ``cifar-10-batches-py/``, torchvision's layout, or ``cifar10.npz`` with the uint8 arrays ``x_train``
    (50000, 32, 32, 3), ``y_train``, ``x_test``, ``y_test``. Augmentation, mean and std as HRank, FilterSketch
    and most papers use them: crop after padding by 4, flip; the std is the mean of the images' own stds.

    >>> data = CIFAR10("data", batch_size=256, val_size=5000)
    >>> data.input_shape
    (3, 32, 32)
    """

    num_classes = 10
    input_shape = (3, 32, 32)
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2023, 0.1994, 0.2010)
    augmentation = Augmentation(padding=4, flip=True)
    source = datasets.CIFAR10

    def prepare_data(self) -> None:
        if not (self.root / "cifar10.npz").exists():
            super().prepare_data()

    def make_splits(self) -> Splits:
        return _make_splits(self, "cifar10.npz")


class CIFAR100(ImageData):
    """A hundred fine classes, 50,000 images to train and 10,000 to test.

    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. ``root`` holds either
    ``cifar-100-python/``, torchvision's layout, or ``cifar100.npz`` with the uint8 arrays ``x_train``
    (50000, 32, 32, 3), ``y_train``, ``x_test``, ``y_test``. Augmentation: crop after padding by 4, flip; mean
    and std are those of the training pixels, as the papers use them.
    """

    num_classes = 100
    input_shape = (3, 32, 32)
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    augmentation = Augmentation(padding=4, flip=True)
    source = datasets.CIFAR100

    def prepare_data(self) -> None:
        if not (self.root / "cifar100.npz").exists():
            super().prepare_data()

    def make_splits(self) -> Splits:
        return _make_splits(self, "cifar100.npz")


def _make_splits(data: CIFAR10 | CIFAR100, packed: str) -> Splits:
    path = data.root / packed
    if path.exists():
        return data.split_arrays(*_read_packed(path))
    try:
        train, test = (data.source(data.root, train=train) for train in (True, False))
    except RuntimeError:  # a file is absent, or its MD5 is not the published one
        folder = data.source.base_folder
        raise data.absent([packed, f"{folder}/ with torchvision's untouched files"]) from None
    return data.split_arrays(_tensors(train.data, train.targets), _tensors(test.data, test.targets))


def _read_packed(path: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    try:
        with np.load(path) as arrays:
            train, test = ((arrays[f"x_{split}"], arrays[f"y_{split}"]) for split in ("train", "test"))
    except (BadZipFile, KeyError, ValueError, OSError) as error:
        raise MisconfigurationException(
            f"{path} is broken or lacks one of x_train, y_train, x_test, y_test: {error}"
        ) from error
    for images, labels in (train, test):
        if images.dtype != np.uint8 or images.shape != (len(labels), 32, 32, 3):
            raise MisconfigurationException(
                f"{path}: expected images of uint8 (N, 32, 32, 3) with N labels, "
                f"got {images.dtype} {images.shape} with {len(labels)}."
            )
    return _tensors(*train), _tensors(*test)


def _tensors(images: np.ndarray, labels: np.ndarray | list[int]) -> tuple[Tensor, Tensor]:
    """(N, 32, 32, 3) uint8 and N labels -> (N, 3, 32, 32) uint8, (N,) int64."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.as_tensor(labels).long()
