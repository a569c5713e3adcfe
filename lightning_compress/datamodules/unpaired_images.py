"""Two folders of images that have nothing to do with each other: the layout of horse2zebra and its like."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import Dataset

from lightning_compress.datamodules._images import absent
from lightning_compress.datamodules._pairs import Split
from lightning_compress.datamodules._translation import (
    Direction,
    EachOnce,
    Preparation,
    TranslationData,
    UnpairedSamples,
    check_sizes,
    first_images,
    in_direction,
    stack_those_present,
)

LAYOUT = "trainA/*.jpg, trainB/*.jpg with testA/*.jpg, testB/*.jpg or valA/*.jpg, valB/*.jpg"


class UnpairedImages(TranslationData):
    """Image translation without pairs, for `CycleGAN`; batches are (A, B), (N, 3, H, W), float32 in [-1, 1].

    ``root`` holds ``trainA``, ``trainB`` and likewise ``testA``, ``testB`` or ``valA``, ``valB``; where one of the
    latter is absent the other takes its place. An epoch has as many samples as the larger set: A in (shuffled) order,
    from the start again where A is the smaller one, each with a B at random. Both are resized to ``load_size`` squared
    (bicubic), cut to ``crop_size`` and mirrored, each on its own. Evaluation resizes to ``crop_size`` and shows every
    image exactly once: where one set has more images, the other side of the last batches has fewer or is None.

    The defaults are those of Zhu, Park, Isola, Efros, "Unpaired Image-to-Image Translation using Cycle-Consistent
    Adversarial Networks", ICCV 2017, arXiv:1703.10593.

    Args:
        root: folder that holds the data.
        crop_size: height and width of the images that the networks see.
        load_size: height and width that training images are resized to before they are cut.
        direction: "BtoA" exchanges the two sets.
        flip: whether to mirror half of the training images.
        serial_batches: whether B is taken in the order of A, instead of at random.
        batch_size: training samples per step and process.
        eval_batch_size: of validation and test; papers take 1.
        limit_items: how many images of each folder are used, the first by name; None takes all.
        num_workers: loader processes; files are decoded there.
        seed: of order, choice and places.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: the folder holds no images in this layout.
    """

    collate_evaluation = staticmethod(stack_those_present)

    def __init__(
        self,
        root: str = "data",
        crop_size: int = 256,
        load_size: int = 286,
        direction: Direction = "AtoB",
        flip: bool = True,
        serial_batches: bool = False,
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
        self.serial_batches = serial_batches
        self.limit_items = limit_items

    def make_dataset(self, split: Split) -> Dataset:
        names = {"train": ["train"], "val": ["val", "test"], "test": ["test", "val"]}[split]
        for name in names:
            a, b = (first_images(self.root / f"{name}{domain}", self.limit_items) for domain in "AB")
            if a and b:
                break
        else:
            raise absent(type(self).__name__, self.root, [LAYOUT])
        images = in_direction(self.direction, a, b)
        if split != "train":
            return EachOnce(images, Preparation(self.crop_size, self.crop_size, flip=False))
        preparation = Preparation(self.load_size, self.crop_size, self.flip)
        return UnpairedSamples(images, preparation, serial_batches=self.serial_batches, seed=self.seed)
