"""Photographs in folders, one folder per class: ImageNet's layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader, make_dataset
from torchvision.transforms import v2

from lightning_compress.datamodules._images import ImageData, Splits, hold_out

LAYOUT = ["train/<class>/*.jpg with val/<class>/*.jpg (and optionally test/<class>/*.jpg)"]


class FolderImages(Dataset):
    """Images read from files when asked for, transformed one at a time.

    Args:
        samples: (path, label) pairs.
        transform: from a PIL image to a tensor; what is random in it must draw from torch's global generator.
        seed: of the transform; an image's draws depend on (seed, epoch, its index) alone.
    """

    def __init__(
        self, samples: list[tuple[str, int]], transform: Callable[[Image.Image], Tensor], seed: int = 0
    ) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return map(self.__getitem__, range(len(self)))  # the first epoch: no index is ever too large here

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return (image, label); an index past the end means a later epoch, see `EpochSampler`."""
        epoch, local = divmod(index, len(self))
        path, label = self.samples[local]
        seed = np.random.SeedSequence((self.seed, epoch, local)).generate_state(1, np.uint64).item()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
            return self.transform(default_loader(path)), label


class ImageFolder(ImageData):
    """Any classes of photographs, by default with the preprocessing of ImageNet papers.

    ``root`` holds ``train/<class>/*`` and ``val/<class>/*``, and optionally ``test/<class>/*``; without
    ``test`` the images of ``val`` are also those to test on (ImageNet's usual practice, so choose nothing by
    that score). Training: random crop, flip. Evaluation: shorter side to 256/224 of ``size``, centre crop.

    Args:
        root: folder that holds the data.
        size: height and width of the images that the network sees.
        val_size: held out of the training images for validation: a share below 1 or a number of images.
            0 validates on ``val``.
        train_crop: ``"resized"``: of 8 % to 100 % of the area, enlarged or shrunk to ``size``; ``"plain"``: anywhere in
            the image as evaluation sees it before its own crop, which suits short fine-tuning.
        num_workers: loader processes; files are decoded there, so give it most of the machine's cores.
        mean: per channel, for images in [0, 1]; None takes ImageNet's.
        std: likewise.
        kwargs: see `CIFAR10`.
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(
        self,
        root: str = "data",
        *,
        size: int = 224,
        val_size: int | float = 0,
        train_crop: Literal["resized", "plain"] = "resized",
        num_workers: int = 0,
        **kwargs: Any,
    ) -> None:
        if train_crop not in ("resized", "plain"):
            raise ValueError(f"train_crop must be 'resized' or 'plain', got {train_crop!r}.")
        self.train_crop = train_crop
        self.input_shape = (3, size, size)
        super().__init__(root, val_size=val_size, num_workers=num_workers, **kwargs)

    @cached_property
    def classes(self) -> list[str]:
        """The names of the classes, sorted: the folders in ``train``."""
        train = self.root / "train"
        classes = sorted(entry.name for entry in train.iterdir() if entry.is_dir()) if train.is_dir() else []
        if not classes:
            raise self.absent(LAYOUT)
        return classes

    @cached_property
    def num_classes(self) -> int:  # type: ignore[override]
        return len(self.classes)

    def make_splits(self) -> Splits:
        size = self.input_shape[1]
        to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        shrink = v2.Resize(round(size * 256 / 224))
        centre = v2.Compose([shrink, v2.CenterCrop(size), *to_tensor])
        crops = [v2.RandomResizedCrop(size)] if self.train_crop == "resized" else [shrink, v2.RandomCrop(size)]
        crop = v2.Compose([*crops, v2.RandomHorizontalFlip(), *to_tensor])

        folders = [name for name in ("val", "test") if (self.root / name).is_dir()]
        if not folders:
            raise self.absent(LAYOUT)
        samples = self._samples("train")
        rest, held_out = hold_out(torch.tensor([label for _, label in samples]), self.val_size, self.seed)
        evaluation = {name: self._samples(name) for name in folders}
        return Splits(
            train=FolderImages([samples[i] for i in rest], crop if self.augment else centre, self.seed),
            val=FolderImages([samples[i] for i in held_out] or evaluation[folders[0]], centre),
            test=FolderImages(evaluation[folders[-1]], centre),
        )

    def _samples(self, folder: str) -> list[tuple[str, int]]:
        """List (path, label) of a folder; labels count the classes of ``train``, also those absent here."""
        path = self.root / folder
        if unknown := sorted({entry.name for entry in path.iterdir() if entry.is_dir()} - set(self.classes)):
            raise MisconfigurationException(
                f"ImageFolder: {path} has classes that {self.root / 'train'} lacks: {', '.join(unknown[:5])}."
            )
        labels = {name: label for label, name in enumerate(self.classes)}
        samples = make_dataset(str(path), labels, IMG_EXTENSIONS, allow_empty=True)
        if not samples:
            raise MisconfigurationException(f"ImageFolder: {path} holds no images ({', '.join(IMG_EXTENSIONS)}).")
        return samples
