"""Patches of two photographs: real images of two domains without pairs, at hand without a download."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from lightning_compress.datamodules._pairs import Split
from lightning_compress.datamodules._translation import (
    Direction,
    EachOnce,
    Preparation,
    TranslationData,
    UnpairedSamples,
    in_direction,
    stack_those_present,
    tiles,
)

NARROWEST = 170  # what is kept of the tissue to evaluate on


class UnpairedPhotographs(TranslationData):
    """From patches of a cup of coffee (A) to patches of stained tissue (B); batches as those of `UnpairedImages`.

    Patches of the left two thirds of either photograph are to train on, at random places and at their own scale; the
    right third, cut into squares, is to validate and to test on: choose nothing by the test score.

    Args:
        crop_size: height and width of the images that the networks see, 170 at most.
        samples_per_epoch: training samples in an epoch, over all processes.
        direction: "BtoA" exchanges the two.
        flip: whether to mirror half of the training images.
        batch_size: training samples per step and process.
        eval_batch_size: of validation and test.
        num_workers: loader processes.
        seed: of order and places.

    >>> data = UnpairedPhotographs(crop_size=64, batch_size=4)
    >>> data.setup("fit")
    >>> coffee, tissue = next(iter(data.train_dataloader()))
    >>> coffee.shape, tissue.shape
    (torch.Size([4, 3, 64, 64]), torch.Size([4, 3, 64, 64]))
    """

    collate_evaluation = staticmethod(stack_those_present)

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
        if crop_size > NARROWEST:
            raise ValueError(f"crop_size: expected {NARROWEST} at most, a third of a photograph, got {crop_size}.")
        if samples_per_epoch < 1:
            raise ValueError(f"samples_per_epoch: expected 1 or more, got {samples_per_epoch}.")
        self.samples_per_epoch = samples_per_epoch

    def make_dataset(self, split: Split) -> Dataset:
        from skimage import data  # takes longer to import than all else that `lc --help` needs

        images = data.coffee(), data.immunohistochemistry()
        both = [np.split(image, [2 * image.shape[1] // 3], axis=1) for image in images]
        if split != "train":
            a, b = ([Image.fromarray(tile) for tile in tiles(right, self.crop_size)] for _, right in both)
            return EachOnce(in_direction(self.direction, a, b), Preparation(None, self.crop_size, flip=False))
        a, b = ([Image.fromarray(left)] for left, _ in both)
        preparation = Preparation(None, self.crop_size, self.flip)
        return UnpairedSamples(in_direction(self.direction, a, b), preparation, self.samples_per_epoch, seed=self.seed)
