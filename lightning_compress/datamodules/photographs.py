"""Photographs that scikit-image carries: real images to enlarge, at hand without a download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lightning_compress.datamodules._pairs import Pair, Split, SuperResolutionData, as_tensor


def photographs(split: Split) -> dict[str, np.ndarray]:
    """The images of a split by name: (H, W, 3), uint8."""
    from skimage import data  # takes longer to import than all else that `lc --help` needs

    if split == "train":
        return {
            "coffee": data.coffee(),
            "rocket": data.rocket(),
            **dict(zip(("motorcycle_left", "motorcycle_right"), data.stereo_motorcycle()[:2], strict=True)),
            "hubble_deep_field": data.hubble_deep_field(),
            "retina": data.retina(),
            "tissue": data.immunohistochemistry(),
        }
    return {"astronaut": data.astronaut()} if split == "val" else {"cat": data.cat()}


class Photographs(SuperResolutionData):
    """Nine colour images of scikit-image: seven to train on, one to validate on, one to test on.

    To train: a cup of coffee, a rocket, a motorcycle twice, the Hubble deep field, a retina, stained tissue. To
    validate: an astronaut. To test: a cat. Small images are made by `bicubic`.

    Args:
        scale: how much larger the large images are.
        patch_size: height and width of the large patches; a multiple of ``scale``.
        batch_size: patches per step and process.
        samples_per_epoch: patches in an epoch, over all processes.
        num_workers: loader processes.
        seed: of order, places and augmentation.
        augment: whether to mirror and transpose the patches.

    >>> data = Photographs(scale=2, patch_size=48, batch_size=4)
    >>> data.setup("fit")
    >>> low, high = next(iter(data.train_dataloader()))
    >>> low.shape, high.shape
    (torch.Size([4, 3, 24, 24]), torch.Size([4, 3, 48, 48]))
    """

    test_names = ("cat",)

    def __init__(
        self,
        scale: int = 2,
        patch_size: int = 96,
        batch_size: int = 16,
        samples_per_epoch: int = 512,
        num_workers: int = 0,
        seed: int = 0,
        augment: bool = True,
    ) -> None:
        super().__init__(scale, patch_size, batch_size, samples_per_epoch, num_workers, seed, augment)

    def read(self, split: Split) -> Mapping[str, Sequence[Pair]]:
        pairs = [Pair.of(name, as_tensor(image), self.scale) for name, image in photographs(split).items()]
        return {self.test_names[0] if split == "test" else split: pairs}
