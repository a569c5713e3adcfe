"""What the image translation datamodules share: two images at a time, resized, cut and mirrored; their loaders.

Randomness as in `_images`: what happens to sample ``i`` of epoch ``e`` depends on ``(seed, e, i)`` alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_compress.datamodules._images import EpochSampler, image_files, make_loader, open_image
from lightning_compress.datamodules._pairs import Split

Direction = Literal["AtoB", "BtoA"]
Source = Path | Image.Image  # read when asked for, or held decoded


class Place(NamedTuple):
    """Where an image is cut, in pixels of the resized one, and whether the cut is mirrored left-right."""

    left: int
    top: int
    mirror: bool


@dataclass(frozen=True)
class Preparation:
    """Resize an image, cut a square out of it, and mirror half of them ("resize and crop").

    Attributes:
        load_size: height and width to resize to, bicubic with antialiasing, whatever the proportions; None keeps them.
        crop_size: height and width of what is cut out.
        flip: whether to mirror with probability 0.5.
    """

    load_size: int | None
    crop_size: int
    flip: bool

    def draw(self, rng: np.random.Generator, size: tuple[int, int]) -> Place:
        """Draw a place in an image of (width, height)."""
        width, height = (self.load_size, self.load_size) if self.load_size else size
        left, top = (int(rng.integers(length - self.crop_size + 1)) for length in (width, height))
        return Place(left, top, bool(rng.integers(0, 2 if self.flip else 1)))

    def __call__(self, image: Image.Image, place: Place) -> Tensor:
        """Prepare an image: (3, crop_size, crop_size), float32 in [-1, 1]."""
        if self.load_size and image.size != (self.load_size, self.load_size):
            image = image.resize((self.load_size, self.load_size), Image.Resampling.BICUBIC)
        box = (place.left, place.top, place.left + self.crop_size, place.top + self.crop_size)
        pixels = torch.from_numpy(np.array(image.crop(box))).permute(2, 0, 1)
        return (pixels.flip(2) if place.mirror else pixels).float().div_(127.5).sub_(1)


def opened(source: Source) -> Image.Image:
    return open_image(source) if isinstance(source, Path) else source


class PairedSamples(Dataset):
    """Samples (A, B) of images that hold A and B side by side; both are cut and mirrored alike.

    Args:
        images: A in the left half and B in the right one; sample ``i`` is of ``images[i % len(images)]``.
        preparation: of both.
        direction: "BtoA" exchanges the two.
        length: samples in an epoch; None: as many as there are images.
        seed: of places.
    """

    def __init__(
        self,
        images: Sequence[Source],
        preparation: Preparation,
        direction: Direction = "AtoB",
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        self.images, self.preparation, self.direction, self.seed = images, preparation, direction, seed
        self.length = len(images) if length is None else length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.__getitem__, range(len(self)))  # the first epoch: no index is ever too large here

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return (input, target), (3, H, W) each; an index past the end means a later epoch, see `EpochSampler`."""
        epoch, local = divmod(index, len(self))
        source = self.images[local % len(self.images)]
        both = opened(source)
        width, height = both.size[0] // 2, both.size[1]
        if both.size[0] % 2:
            raise MisconfigurationException(
                f"{source} is {both.size[0]} pixels wide; expected two images of the same width side by side."
            )
        place = self.preparation.draw(np.random.default_rng((self.seed, epoch, local)), (width, height))
        a, b = (self.preparation(both.crop((left, 0, left + width, height)), place) for left in (0, width))
        return (a, b) if self.direction == "AtoB" else (b, a)


class UnpairedSamples(Dataset):
    """Samples (A, B) of two sets of images that have nothing to do with each other; each is cut on its own.

    Args:
        images: of the two sets; A of sample ``i`` is ``images[0][i % len(images[0])]``.
        preparation: of both.
        length: samples in an epoch; None: as many as the larger set has.
        serial_batches: whether B is taken in order as well, instead of at random.
        seed: of choice and places.
    """

    def __init__(
        self,
        images: tuple[Sequence[Source], Sequence[Source]],
        preparation: Preparation,
        length: int | None = None,
        serial_batches: bool = False,
        seed: int = 0,
    ) -> None:
        self.images, self.preparation, self.seed = images, preparation, seed
        self.serial_batches = serial_batches
        self.length = max(map(len, images)) if length is None else length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return (A, B), (3, H, W) each; an index past the end means a later epoch, see `EpochSampler`."""
        epoch, local = divmod(index, len(self))
        rng = np.random.default_rng((self.seed, epoch, local))
        firsts, seconds = self.images
        drawn = int(rng.integers(len(seconds)))
        chosen = (firsts[local % len(firsts)], seconds[local % len(seconds) if self.serial_batches else drawn])
        a, b = (self.preparation(image, self.preparation.draw(rng, image.size)) for image in map(opened, chosen))
        return a, b


class EachOnce(Dataset):
    """To evaluate on two unpaired sets: every image once, (A, B), with None where a set has no more images."""

    def __init__(self, images: tuple[Sequence[Source], Sequence[Source]], preparation: Preparation) -> None:
        self.images, self.preparation = images, preparation

    def __len__(self) -> int:
        return max(map(len, self.images))

    def __getitem__(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        a, b = (
            self.preparation(opened(images[index]), Place(0, 0, False)) if index < len(images) else None
            for images in self.images
        )
        return a, b


def stack_those_present(samples: list[tuple[Tensor | None, Tensor | None]]) -> tuple[Tensor | None, Tensor | None]:
    """Batch samples of `EachOnce`; None where a set has no image left."""
    present = ([image for image in side if image is not None] for side in zip(*samples, strict=True))
    a, b = (torch.stack(images) if images else None for images in present)
    return a, b


class TranslationData(LightningDataModule, ABC):
    """Images of a domain A and of a domain B; batches are (input, target), float32 in [-1, 1].

    A split is read when it is first needed, so that testing needs no training images.

    Args:
        crop_size: height and width of the images that the networks see.
        direction: "AtoB" translates from A to B; "BtoA" exchanges the two.
        flip: whether to mirror half of the training images.
        batch_size: training samples per step and process.
        eval_batch_size: of validation and test; papers take 1.
        num_workers: loader processes.
        seed: of order, choice and places.

    Attributes:
        input_shape: (3, crop_size, crop_size).
    """

    collate_evaluation: Callable[[list[Any]], Any] | None = None

    def __init__(
        self,
        crop_size: int,
        direction: Direction,
        flip: bool,
        batch_size: int,
        eval_batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        for argument, value, least in (
            ("crop_size", crop_size, 1),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{argument}: expected {least} or more, got {value}.")
        if direction not in ("AtoB", "BtoA"):
            raise ValueError(f"direction must be 'AtoB' or 'BtoA', got {direction!r}.")
        self.crop_size = crop_size
        self.direction: Direction = direction
        self.flip = flip
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.input_shape = (3, crop_size, crop_size)
        self._datasets: dict[Split, Dataset] = {}

    @abstractmethod
    def make_dataset(self, split: Split) -> Dataset:
        """Find the images of a split; called once for each that is needed."""

    def dataset(self, split: Split) -> Dataset:
        if split not in self._datasets:
            self._datasets[split] = self.make_dataset(split)
        return self._datasets[split]

    def setup(self, stage: str) -> None:
        # absent data is reported here, before anything is built
        if stage == "fit":
            self.dataset("train")
        self.dataset("val" if stage in ("fit", "validate") else "test")

    def train_dataloader(self) -> DataLoader:
        samples = self.dataset("train")
        sampler = EpochSampler.of_rank(self.trainer, samples, self.seed)
        return make_loader(samples, self.batch_size, self.num_workers, sampler)

    def val_dataloader(self) -> DataLoader:
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader:
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader:
        return self._evaluation("test")

    def _evaluation(self, split: Split) -> DataLoader:
        collate = type(self).collate_evaluation
        return make_loader(self.dataset(split), self.eval_batch_size, self.num_workers, collate=collate)


def in_direction(
    direction: Direction, a: Sequence[Source], b: Sequence[Source]
) -> tuple[Sequence[Source], Sequence[Source]]:
    """(input, target) of the images of A and B."""
    return (a, b) if direction == "AtoB" else (b, a)


def check_sizes(load_size: int, crop_size: int, limit_items: int | None) -> None:
    """Raise for arguments of the datamodules that read folders."""
    if load_size < crop_size:
        raise ValueError(f"load_size: expected at least crop_size={crop_size}, got {load_size}.")
    if limit_items is not None and limit_items < 1:
        raise ValueError(f"limit_items: expected 1 or more, or None for all, got {limit_items}.")


def first_images(folder: Path, limit_items: int | None) -> list[Path]:
    """The images of a folder, sorted by name, or the first of them."""
    return image_files(folder)[:limit_items]


def tiles(image: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut an image, (H, W, 3), into squares that do not overlap; what is left on the right and below is lost."""
    height, width = image.shape[:2]
    corners = [(i, j) for i in range(0, height - size + 1, size) for j in range(0, width - size + 1, size)]
    return [image[i : i + size, j : j + size] for i, j in corners]
