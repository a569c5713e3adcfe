"""Drawings and photographs: real pairs to translate, at hand without a download."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from lightning_compress.datamodules._pairs import Split
from lightning_compress.datamodules._translation import (
    Direction,
    PairedSamples,
    Preparation,
    TranslationData,
    tiles,
)
from lightning_compress.datamodules.photographs import photographs

SHORTEST = 300  # of the photographs' sides


def drawing(image: np.ndarray) -> np.ndarray:
    """Draw the edges of an image, (H, W, 3), uint8, in black on white; the steeper the darker.

    Sobel's gradient of the luminance; a quarter of the steepest edge that there can be is black.
    """
    from skimage.color import rgb2gray
    from skimage.filters import sobel

    ink = np.clip(4 * sobel(rgb2gray(image)), 0, 1)
    return np.repeat((255 * (1 - ink)).astype(np.uint8)[..., None], 3, axis=2)


@cache
def _pairs(split: Split) -> list[tuple[np.ndarray, np.ndarray]]:
    """Drawings and photographs of a split."""
    return [(drawing(image), image) for image in photographs(split).values()]


class PairedPhotographs(TranslationData):
    """From edges (A) to photographs (B); batches are (input, target), (N, 3, H, W), float32 in [-1, 1].

    The photographs are those of `Photographs`, seven to train on, at random places and at their own scale. One is to
    validate on and one to test on, cut into squares.

    Args:
        crop_size: height and width of the images that the networks see, 300 at most.
        samples_per_epoch: training pairs in an epoch, over all processes.
        direction: "BtoA" draws the edges of photographs instead.
        flip: whether to mirror half of the training pairs.
        batch_size: training pairs per step and process.
        eval_batch_size: of validation and test.
        num_workers: loader processes.
        seed: of order and places.

    >>> data = PairedPhotographs(crop_size=64, batch_size=4)
    >>> data.setup("validate")
    >>> edges, photograph = next(iter(data.val_dataloader()))
    >>> edges.shape, photograph.shape
    (torch.Size([1, 3, 64, 64]), torch.Size([1, 3, 64, 64]))
    """

    def __init__(
        self,
        crop_size: int = 64,
        samples_per_epoch: int = 256,
        direction: Direction = "AtoB",
        flip: bool = True,
        batch_size: int = 1,
        eval_batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(crop_size, direction, flip, batch_size, eval_batch_size, num_workers, seed)
        if crop_size > SHORTEST:
            raise ValueError(f"crop_size: expected {SHORTEST} at most, a photograph's height, got {crop_size}.")
        if samples_per_epoch < 1:
            raise ValueError(f"samples_per_epoch: expected 1 or more, got {samples_per_epoch}.")
        self.samples_per_epoch = samples_per_epoch

    def make_dataset(self, split: Split) -> Dataset:
        pairs = _pairs(split)
        if split == "train":
            preparation = Preparation(None, self.crop_size, self.flip)
            images = [Image.fromarray(np.concatenate(pair, axis=1)) for pair in pairs]
            return PairedSamples(images, preparation, self.direction, self.samples_per_epoch, self.seed)
        size = self.crop_size
        squares = [
            Image.fromarray(np.concatenate(both, axis=1))
            for pair in pairs
            for both in zip(*(tiles(image, size) for image in pair), strict=True)
        ]
        return PairedSamples(squares, Preparation(None, size, flip=False), self.direction)
