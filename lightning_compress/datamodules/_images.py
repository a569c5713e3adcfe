"""What the image datamodules share: arrays, batch augmentation, a resumable order, held-out splits.

Randomness. The order of epoch ``e`` depends on ``(seed, e)`` alone, and the augmentation of image ``i`` in
that epoch on ``(seed, e, i)`` alone: never on the global generators, the batch size, the rank or the number
of workers. A run that is stopped after an epoch and resumed sees the batches that it would have seen.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.datasets.folder import IMG_EXTENSIONS


class EpochSampler(DistributedSampler):
    """Shuffle by ``(seed, epoch)``, give this rank its share, and tell the dataset which epoch it is.

    Sample ``i`` of epoch ``e`` is drawn as the index ``e * len(dataset) + i``, so that the epoch reaches the
    dataset also through worker processes that outlive it. Lightning calls ``set_epoch`` before each epoch,
    with the right epoch after a resume, and leaves a `DistributedSampler` in place under DDP.
    """

    @classmethod
    def of_rank(cls, trainer: Trainer | None, dataset: Dataset, seed: int) -> EpochSampler:
        """Make one with Lightning's share for this rank; there is no trainer where a datamodule is used without one."""
        shares = getattr(trainer, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        return cls(dataset, seed=seed, **shares)

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * len(self.dataset)  # type: ignore[arg-type]
        return (first + index for index in super().__iter__())


PaddingMode = Literal["constant", "reflect"]


@dataclass(frozen=True)
class Augmentation:
    """Crop at a random place of the padded image, and mirror half of the images.

    Attributes:
        padding: pixels on each side; the crop keeps the image's size.
        flip: whether to mirror left-right with probability 0.5.
        mode: what the padding holds: ``"constant"``, zeros (black), or ``"reflect"``, the image mirrored at its edge.
    """

    padding: int
    flip: bool
    mode: PaddingMode = "constant"

    def draw(self, count: int, seed: int, epoch: int) -> Tensor:
        """Draw for ``count`` images their top row, left column and mirroring: (count, 3), int64."""
        rng = np.random.default_rng((seed, epoch))
        corner = rng.integers(0, 2 * self.padding + 1, (count, 2))
        flip = rng.integers(0, 2 if self.flip else 1, (count, 1))
        return torch.from_numpy(np.concatenate([corner, flip], axis=1))

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Crop and mirror a batch, (N, C, H, W), as drawn, (N, 3)."""
        count, channels, height, width = images.shape
        top, left, flip = draws.T[..., None]
        rows = top + torch.arange(height)
        columns = left + torch.where(flip == 1, torch.arange(width).flip(0), torch.arange(width))
        if self.mode == "reflect":
            padded = images
            rows, columns = _reflected(rows - self.padding, height), _reflected(columns - self.padding, width)
        else:
            padded = F.pad(images, (self.padding,) * 4)
        pixels = rows[:, :, None] * padded.shape[-1] + columns[:, None, :]  # (N, H, W), flat
        # one gather over flat pixels: seven times faster than indexing by four tensors
        pixels = pixels.view(count, 1, -1).expand(-1, channels, -1)
        return padded.flatten(2).gather(2, pixels).view_as(images)


def _reflected(places: Tensor, size: int) -> Tensor:
    """Bring places beyond 0 ... size - 1 back as a mirror there would; the edge itself is not repeated."""
    return size - 1 - (size - 1 - places.abs()).abs()


class ImageArrays(Dataset):
    """Images held as one uint8 tensor, cut, augmented and normalised a batch at a time.

    Args:
        images: (N, C, H, W), uint8.
        labels: (N,), int64.
        indices: the images that belong to this split, int64.
        mean: per channel, for images in [0, 1].
        std: likewise.
        augmentation: None for evaluation.
        seed: of the augmentation.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.images, self.labels, self.indices = images, labels, indices
        # on the scale of the stored bytes
        self.mean = 255 * torch.tensor(mean)[:, None, None]
        self.std = 255 * torch.tensor(std)[:, None, None]
        self.augmentation = augmentation
        self.seed = seed
        self._drawn: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return map(self.__getitem__, range(len(self)))  # the first epoch: no index is ever too large here

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """Return a batch of (image, label); an index past the end means a later epoch, see `EpochSampler`."""
        epoch, local = indices[0] // len(self), torch.tensor(indices) % len(self)
        chosen = self.indices[local]
        images = self.images[chosen]
        if self.augmentation is not None:
            images = self.augmentation(images, self._draws(epoch)[local])
        normalised = images.float().sub_(self.mean).div_(self.std)
        return list(zip(normalised, self.labels[chosen].tolist(), strict=True))

    def pixels(self, indices: Tensor) -> Tensor:
        """A copy of images of this split as they are stored: (n,) -> (n, C, H, W), uint8."""
        return self.images[self.indices[indices]]

    def with_pixels(self, pixels: Tensor) -> ImageArrays:
        """The same split, in the same order and with the same augmentation, over other pixels, (len(self), C, H, W)."""
        other = copy.copy(self)
        other.images, other.labels, other.indices = pixels, self.labels[self.indices], torch.arange(len(self))
        return other

    def _draws(self, epoch: int) -> Tensor:
        """Draw once per epoch for all images, so that no image's draw depends on its batch."""
        assert self.augmentation is not None
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, self.augmentation.draw(len(self), self.seed, epoch)
        return self._drawn[1]


class Splits(NamedTuple):
    train: Dataset
    val: Dataset
    test: Dataset


class ImageData(LightningDataModule, ABC):
    """A labelled image set with train, validation and test split; batches are (float32 images, int64 labels).

    Args:
        root: folder that holds the data.
        batch_size: training images per step and process.
        num_workers: loader processes; 0 is usually fastest here, as whole batches are prepared at once.
        val_size: held out of the training images for validation: a share below 1 or a number of images.
            0 validates on the test images, as the papers do: then choose nothing by the validation score.
        seed: of the held-out split, the order and the augmentation.
        mean: per channel, for images in [0, 1]; None takes the data's own.
        std: likewise.
        augment: whether to augment the training images as the papers do.
        download: whether to fetch absent data (once, on one process).
        eval_batch_size: None takes ``batch_size``.
        padding_mode: what the crops of the augmentation see beyond the edge: ``"constant"``, black, or ``"reflect"``,
            the image mirrored.

    Attributes:
        num_classes: number of classes.
        input_shape: (channels, height, width) of an image.
    """

    num_classes: int
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    source: type | None = None  # torchvision's dataset, where it can fetch one

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        num_workers: int = 0,
        val_size: int | float = 0.1,
        seed: int = 0,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        augment: bool = True,
        download: bool = False,
        eval_batch_size: int | None = None,
        padding_mode: PaddingMode = "constant",
    ) -> None:
        super().__init__()
        if padding_mode not in get_args(PaddingMode):
            raise ValueError(f"padding_mode: expected 'constant' or 'reflect', got {padding_mode!r}.")
        for argument, value, least in (
            ("batch_size", batch_size, 1),
            ("val_size", val_size, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{argument}: expected {least} or more, got {value}.")
        self.root = Path(root)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_size = val_size
        self.seed = seed
        self.mean = tuple(mean or self.mean)
        self.std = tuple(std or self.std)
        if not len(self.mean) == len(self.std) == self.input_shape[0]:
            raise ValueError(
                f"mean, std: expected {self.input_shape[0]} values each, one per channel, "
                f"got {self.mean} and {self.std}."
            )
        if download and self.source is None:
            raise ValueError(f"download: {type(self).__name__} cannot be fetched, it has to lie under root.")
        self.augment = augment
        self.padding_mode = padding_mode
        self.download = download
        self.eval_batch_size = eval_batch_size

    def prepare_data(self) -> None:
        if self.download and self.source is not None:
            for train in (True, False):
                self.source(self.root, train=train, download=True)

    @abstractmethod
    def make_splits(self) -> Splits:
        """Read the data; called once, when first needed."""

    @cached_property
    def splits(self) -> Splits:
        return self.make_splits()

    def setup(self, stage: str) -> None:
        _ = self.splits  # absent or broken data is reported here, before anything is built

    def train_dataloader(self) -> DataLoader:
        sampler = EpochSampler.of_rank(self.trainer, self.splits.train, self.seed)
        return make_loader(self.splits.train, self.batch_size, self.num_workers, sampler)

    def val_dataloader(self) -> DataLoader:
        return make_loader(self.splits.val, self.eval_batch_size or self.batch_size, self.num_workers)

    def test_dataloader(self) -> DataLoader:
        return make_loader(self.splits.test, self.eval_batch_size or self.batch_size, self.num_workers)

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()

    def split_arrays(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Splits:
        """Make the three splits of (images (N, C, H, W) uint8, labels (N,) int64) pairs."""

        def split(arrays: tuple[Tensor, Tensor], indices: Tensor, augmentation: Augmentation | None = None):
            return ImageArrays(*arrays, indices, self.mean, self.std, augmentation, self.seed)

        rest, held_out = hold_out(train[1], self.val_size, self.seed)
        test_split = split(test, torch.arange(len(test[1])))
        return Splits(
            train=split(train, rest, replace(self.augmentation, mode=self.padding_mode) if self.augment else None),
            val=split(train, held_out) if len(held_out) else test_split,
            test=test_split,
        )

    def absent(self, layouts: Sequence[str]) -> MisconfigurationException:
        """Say which layouts are read, relative to the root, and what was found instead."""
        return absent(type(self).__name__, self.root, layouts, " download=True fetches it." if self.source else "")


def make_loader(
    dataset: Dataset,
    batch_size: int,
    num_workers: int,
    sampler: DistributedSampler | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
) -> DataLoader:
    """A loader in the dataset's own order, or the sampler's; its workers live as long as it does."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def image_files(folder: Path) -> list[Path]:
    """The images in a folder, sorted by name; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMG_EXTENSIONS)


def open_image(file: Path) -> Image.Image:
    """Decode a file to RGB."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except OSError as error:
        raise MisconfigurationException(f"{file} cannot be read as an image: {error}") from error


def absent(name: str, folder: Path, layouts: Sequence[str], remedy: str = "") -> MisconfigurationException:
    """Say which layouts the datamodule `name` reads, relative to the folder, and what was found instead."""
    if not folder.is_dir():
        found = "there is no such folder"
    else:
        entries = sorted(entry.name for entry in folder.iterdir())
        found = f"it holds {', '.join(entries[:8]) + (', ...' if len(entries) > 8 else '') or 'nothing'}"
    return MisconfigurationException(
        f"{name}: no data under root={str(folder)!r} ({found}). Expected {' or '.join(layouts)}.{remedy}"
    )


def hold_out(labels: Tensor, size: int | float, seed: int) -> tuple[Tensor, Tensor]:
    """Hold a share of every class out.

    Args:
        labels: (N,), int64.
        size: a share below 1 or a number of images; every class gives its share, rounded.
        seed: of the choice.

    Returns:
        Indices of the rest and of the images held out, both ascending.

    Raises:
        ValueError: nothing would be left.

    >>> rest, held_out = hold_out(torch.tensor([0, 0, 0, 1, 1, 1]), 2, seed=0)
    >>> len(rest), sorted((held_out // 3).tolist())
    (4, [0, 1])
    """
    total = len(labels)
    count = round(size * total) if size < 1 else int(size)
    if count >= total:
        raise ValueError(f"val_size: {size} would leave none of {total} training images.")
    shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(total))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    # the classes laid end to end, every (total / count)-th image: exactly `count`, each class within one
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[by_class[(torch.arange(count) * total + total // 2) // max(count, 1)]] = True
    return (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]
