"""Handwritten digits in two views that look unlike: what two cameras are to persons, at hand without a download."""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from lightning_compress.datamodules._identities import Matching, ReIDData, ReIDSplits, Tagged
from lightning_compress.datamodules._images import ImageArrays, hold_out
from lightning_compress.datamodules.digits import Digits

VISIBLE, INFRARED = 0, 1


def edges(images: Tensor) -> Tensor:
    """Dark outlines on white: the spread of the pixels within 3x3, taken from white; (N, C, H, W) in 0..255."""
    return 255 - (F.max_pool2d(images, 3, 1, 1) + F.max_pool2d(-images, 3, 1, 1))


def inverted(images: Tensor) -> Tensor:
    """Dark where it was light; (N, C, H, W) in 0..255."""
    return 255 - images


def tints(count: int, seed: int) -> Tensor:
    """Colours drawn at random, the strongest channel full: (count, 3), in [0, 1]."""
    drawn = torch.from_numpy(np.random.default_rng(seed).random((count, 3))).float()
    return drawn / drawn.amax(1, keepdim=True)


class InfraredToo(Dataset):
    """Images of which some are seen in another view, which is taken after their augmentation.

    Args:
        arrays: the images.
        infrared: (N,), bool, which of them.
        view: from images in 0..255 to images in 0..255.
    """

    def __init__(self, arrays: ImageArrays, infrared: Tensor, view: Any) -> None:
        self.arrays, self.infrared, self.view = arrays, infrared, view

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """Return a batch of (image, label); an index past the end means a later epoch."""
        images, labels = zip(*self.arrays.__getitems__(indices), strict=True)
        batch, mean, std = torch.stack(images), self.arrays.mean, self.arrays.std
        infrared = self.infrared[torch.tensor(indices) % len(self)]
        batch[infrared] = (self.view(batch[infrared] * std + mean) - mean) / std
        return list(zip(batch, labels, strict=True))


class TwoViewDigits(ReIDData):
    """The real scans of `Digits`, half of each class in colours, and half in a grey view that stands for infrared.

    The ink of every visible image has a colour of its own, drawn at random, on black. The identities are the ten
    classes, the same ones in training and in evaluation, so this is a toy: it tells whether a method brings the views
    together, not whether it knows strangers. No scan is there in both views. Training batches are (images (N, 3, H, W)
    float32, labels (N,) int64, infrared (N,) bool). Evaluation looks for infrared images among visible ones, in two
    loaders of (images, identities, cameras, indices); camera 1 is infrared, 0 is not.

    Args:
        batch_size: training images per step and process, a multiple of ``num_instances``; ten classes make at most ten
            times ``num_instances``.
        num_instances: images of a class in a batch, half of them infrared.
        num_workers: loader processes.
        seed: of the held-out split, who is infrared, colours, order, draws and augmentation.
        augment: whether to shift the training images.
        eval_batch_size: None takes ``batch_size``.
        val_size: see `Digits`.
        size: see `Digits`.
        infrared: ``"edges"``: dark outlines on white, or ``"inverted"``: dark ink on white.

    >>> data = TwoViewDigits(batch_size=40, num_instances=4)
    >>> images, labels, infrared = next(iter(data.train_dataloader()))
    >>> images.shape, labels[:5].unique().numel(), infrared[:4].tolist()
    (torch.Size([40, 3, 32, 32]), 2, [False, True, False, True])
    """

    num_classes = 10

    def __init__(
        self,
        batch_size: int = 80,
        num_instances: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        augment: bool = True,
        eval_batch_size: int | None = None,
        val_size: int | float = 250,
        size: int = 32,
        infrared: Literal["edges", "inverted"] = "edges",
    ) -> None:
        if infrared not in ("edges", "inverted"):
            raise ValueError(f"infrared: expected 'edges' or 'inverted', got {infrared!r}.")
        super().__init__("", batch_size, num_instances, num_workers, seed, augment, eval_batch_size)
        self.view = edges if infrared == "edges" else inverted
        self.digits = Digits(val_size=val_size, seed=seed, augment=augment, size=size, channels=3)
        self.input_shape = self.digits.input_shape

    def make_splits(self) -> ReIDSplits:
        train, val, test = (cast(Any, split) for split in self.digits.splits)
        seen = self._seen(train, torch.arange(len(train)))
        return ReIDSplits(Tagged(seen, seen.infrared), self._matching(val), self._matching(test))

    def training_labels(self) -> Tensor:
        return self.splits.train.dataset.arrays.labels

    @property
    def rounds(self) -> int:  # type: ignore[override]
        """As many as it takes to draw about as many images as there are."""
        return max(1, round(len(self.training_labels()) / (self.num_classes * self.num_instances)))

    def _seen(self, part: Any, chosen: Tensor) -> InfraredToo:
        """Images of a split by their numbers in it, each in its own view, the same whichever are chosen."""
        images, labels = part.images[part.indices], part.labels[part.indices]
        infrared = torch.zeros(len(labels), dtype=torch.bool)
        infrared[hold_out(labels, 0.5, self.seed)[1]] = True
        colours = tints(len(labels), self.seed)
        colours[infrared] = 1.0
        coloured = (images * colours[:, :, None, None]).round().byte()[chosen]
        numbers = torch.arange(len(chosen))
        mean, std = self.digits.mean, self.digits.std
        arrays = ImageArrays(coloured, labels[chosen], numbers, mean, std, part.augmentation, self.seed)
        return InfraredToo(arrays, infrared[chosen], self.view)

    def _matching(self, part: Any) -> Matching:
        infrared = self._seen(part, torch.arange(len(part))).infrared
        sides = [(self._seen(part, (infrared == side).nonzero()[:, 0]), int(side)) for side in (INFRARED, VISIBLE)]
        return Matching.of(*((seen, torch.full((len(seen),), camera)) for seen, camera in sides))
