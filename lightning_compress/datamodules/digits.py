"""Handwritten digits that scikit-learn carries: real scans, at hand without a download."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lightning_compress.datamodules._images import Augmentation, ImageData, Splits, hold_out


class Digits(ImageData):
    """The 1,797 digits of scikit-learn's `load_digits`, 8x8 scans in 17 grey levels, ten classes.

    Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
    By default 1,297 images to train, 250 to validate, 250 to test, every class in its share. The test images
    are the same for every seed. Augmentation: a random shift by up to one pixel of the original scan.

    Args:
        batch_size: training images per step and process.
        num_workers: loader processes.
        val_size: held out of the 1,547 images that are not for testing: a share below 1 or a number of
            images; 0 validates on the test images.
        seed: of the held-out split, the order and the augmentation.
        mean: per channel, for images in [0, 1]; None takes the data's own at 32x32.
        std: likewise.
        augment: whether to shift the training images.
        eval_batch_size: None takes ``batch_size``.
        size: height and width, enlarged bilinearly once; 8 leaves the scans as they are.
        channels: 1, or 3 equal ones for networks that expect colour.

    >>> data = Digits(batch_size=32)
    >>> images, labels = next(iter(data.train_dataloader()))
    >>> images.shape, labels.shape
    (torch.Size([32, 1, 32, 32]), torch.Size([32]))
    """

    num_classes = 10

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        val_size: int | float = 250,
        seed: int = 0,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        augment: bool = True,
        eval_batch_size: int | None = None,
        size: int = 32,
        channels: int = 1,
    ) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels: expected 1 or 3, got {channels}.")
        if size < 8:
            raise ValueError(f"size: expected 8 (the scans' own) or more, got {size}.")
        self.input_shape = (channels, size, size)
        self.mean, self.std = (0.3053,) * channels, (0.3235,) * channels
        self.augmentation = Augmentation(padding=size // 8, flip=False)  # a mirrored digit is no digit
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            val_size=val_size,
            seed=seed,
            mean=mean,
            std=std,
            augment=augment,
            eval_batch_size=eval_batch_size,
        )

    def make_splits(self) -> Splits:
        from sklearn.datasets import load_digits  # imported late: not needed to read a command line

        digits = load_digits()
        grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)  # (1797, 1, 8, 8)
        channels, *size = self.input_shape
        images = F.interpolate(grey, size, mode="bilinear").round().byte().repeat(1, channels, 1, 1)
        labels = torch.from_numpy(digits.target).long()
        train, test = hold_out(labels, 250, seed=0)
        return self.split_arrays((images[train], labels[train]), (images[test], labels[test]))
