"""MNIST and Fashion-MNIST: 70,000 grey images of 28x28 pixels."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchvision import datasets

from lightning_compress.datamodules._images import Augmentation, ImageData, Splits


class MNIST(ImageData):
    """Handwritten digits, 60,000 to train and 10,000 to test.

    LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition", 1998.
    ``root`` holds torchvision's layout, ``MNIST/raw/`` with the four unpacked idx files.

    Args:
        root: folder that holds the data.
        augment: whether to shift the training images by up to 2 pixels; the papers do not.
        kwargs: see `CIFAR10`.
    """

    num_classes = 10
    input_shape = (1, 28, 28)
    mean = (0.1307,)
    std = (0.3081,)
    augmentation = Augmentation(padding=2, flip=False)
    source = datasets.MNIST

    def __init__(self, root: str = "data", *, augment: bool = False, **kwargs: Any) -> None:
        super().__init__(root, augment=augment, **kwargs)

    def make_splits(self) -> Splits:
        return _make_splits(self)


class FashionMNIST(ImageData):
    """Photographs of clothes in ten classes, 60,000 to train and 10,000 to test.

    Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
    Algorithms", arXiv:1708.07747. ``root`` holds torchvision's layout, ``FashionMNIST/raw/`` with the four
    unpacked idx files.

    Args:
        root: folder that holds the data.
        augment: whether to shift the training images by up to 2 pixels and mirror half of them; the papers do
            not.
        kwargs: see `CIFAR10`.
    """

    num_classes = 10
    input_shape = (1, 28, 28)
    mean = (0.2860,)
    std = (0.3530,)
    augmentation = Augmentation(padding=2, flip=True)
    source = datasets.FashionMNIST

    def __init__(self, root: str = "data", *, augment: bool = False, **kwargs: Any) -> None:
        super().__init__(root, augment=augment, **kwargs)

    def make_splits(self) -> Splits:
        return _make_splits(self)


def _make_splits(data: MNIST | FashionMNIST) -> Splits:
    try:
        train, test = (data.source(data.root, train=train) for train in (True, False))
    except RuntimeError:  # torchvision does not find its four files
        folder = f"{data.source.__name__}/raw"
        layout = f"{folder}/{{train,t10k}}-images-idx3-ubyte and {folder}/{{train,t10k}}-labels-idx1-ubyte"
        raise data.absent([layout]) from None
    return data.split_arrays(_tensors(train), _tensors(test))


def _tensors(dataset: datasets.MNIST) -> tuple[Tensor, Tensor]:
    """(N, 28, 28) uint8 and (N,) int64 -> (N, 1, 28, 28) uint8, (N,) int64."""
    return dataset.data[:, None], dataset.targets
