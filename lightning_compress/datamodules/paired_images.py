"""Pairs of images side by side in one file: the layout of facades, cityscapes, maps and edges2shoes."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import Dataset

from lightning_compress.datamodules._images import absent
from lightning_compress.datamodules._pairs import Split
from lightning_compress.datamodules._translation import (
    Direction,
    PairedSamples,
    Preparation,
    TranslationData,
    check_sizes,
    first_images,
)

LAYOUT = "train/*.jpg with test/*.jpg or val/*.jpg, A in the left half of each image and B in the right one"


class PairedImages(TranslationData):
    """Image translation from pairs, for `Pix2Pix`; batches are (input, target), (N, 3, H, W), float32 in [-1, 1].

    ``root`` holds ``train``, ``val`` and ``test``, each with images that show A in their left half and B in their right
    one; where ``val`` is absent, it validates on ``test``, and the other way round. Both halves are resized to
    ``load_size`` squared (bicubic), cut to ``crop_size`` at the same random place, and mirrored together. Evaluation
    resizes to ``crop_size`` and does nothing else. Files are in the order of their names and are decoded when needed.

    The defaults are those of Isola, Zhu, Zhou, Efros, "Image-to-Image Translation with Conditional Adversarial
    Networks", CVPR 2017, arXiv:1611.07004. Facades and cityscapes hold the photograph on the left and the labels on
    the right: to make photographs, ``direction="BtoA"``.

    Args:
        root: folder that holds the data.
        crop_size: height and width of the images that the networks see.
        load_size: height and width that training images are resized to before they are cut.
        direction: "AtoB" translates from the left half to the right one; "BtoA" the other way round.
        flip: whether to mirror half of the training pairs.
        batch_size: training pairs per step and process.
        eval_batch_size: of validation and test; papers take 1.
        limit_items: how many images of each split are used, the first by name; None takes all.
        num_workers: loader processes; files are decoded there.
        seed: of order and places.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: the folder holds no images in this layout.
    """

    def __init__(
        self,
        root: str = "data",
        crop_size: int = 256,
        load_size: int = 286,
        direction: Direction = "AtoB",
        flip: bool = True,
        batch_size: int = 1,
        eval_batch_size: int = 1,
        limit_items: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(crop_size, direction, flip, batch_size, eval_batch_size, num_workers, seed)
        check_sizes(load_size, crop_size, limit_items)
        self.root = Path(root)
        self.load_size = load_size
        self.limit_items = limit_items

    def make_dataset(self, split: Split) -> Dataset:
        folders = {"train": ["train"], "val": ["val", "test"], "test": ["test", "val"]}[split]
        found = [images for folder in folders if (images := first_images(self.root / folder, self.limit_items))]
        if not found:
            raise absent(type(self).__name__, self.root, [LAYOUT])
        if split == "train":
            preparation = Preparation(self.load_size, self.crop_size, self.flip)
        else:
            preparation = Preparation(self.crop_size, self.crop_size, flip=False)
        return PairedSamples(found[0], preparation, self.direction, seed=self.seed)
