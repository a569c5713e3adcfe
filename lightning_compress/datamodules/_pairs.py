"""What the super-resolution datamodules share: pairs of images, patches cut from both at the same place, loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_compress.datamodules._images import EpochSampler, make_loader
from lightning_compress.datamodules.bicubic import bicubic

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Pair:
    """One image twice.

    Attributes:
        name: where it comes from.
        low: (3, h, w), uint8.
        high: (3, scale h, scale w), uint8.
    """

    name: str
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, name: str, image: Tensor, scale: int) -> Pair:
        """Make the small one as the papers do; what is left over on the right and below is cut off."""
        height, width = image.shape[1] // scale, image.shape[2] // scale
        image = image[:, : height * scale, : width * scale]
        return cls(name, bicubic(image, (height, width)), image)


class Patches(Dataset):
    """Patches of pairs, mirrored and transposed at random, each of the three with probability 0.5.

    Sample ``i`` of epoch ``e`` is cut from pair ``i % len(pairs)``; where, and how it is turned, depends on
    ``(seed, e, i)`` alone.

    Args:
        pairs: where to cut.
        size: height and width of a patch in the small image.
        scale: how much larger the other one is.
        length: samples in an epoch.
        augment: whether to mirror and transpose.
        seed: of all that is random.
    """

    def __init__(
        self, pairs: Sequence[Pair], size: int, scale: int, length: int, augment: bool = True, seed: int = 0
    ) -> None:
        self.pairs, self.size, self.scale, self.length = pairs, size, scale, length
        self.augment, self.seed = augment, seed

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.__getitem__, range(len(self)))  # the first epoch: no index is ever too large here

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return (low, high), float32 in 0..255; an index past the end means a later epoch, see `EpochSampler`."""
        epoch, local = divmod(index, len(self))
        rng = np.random.default_rng((self.seed, epoch, local))
        pair = self.pairs[local % len(self.pairs)]
        top, left = (int(rng.integers(length - self.size + 1)) for length in pair.low.shape[1:])
        upside_down, mirror, transpose = rng.integers(0, 2 if self.augment else 1, 3)

        def cut(image: Tensor, scale: int) -> Tensor:
            rows, columns = (slice(scale * start, scale * (start + self.size)) for start in (top, left))
            patch = image[:, rows, columns].float().flip([1] * upside_down + [2] * mirror)
            return patch.transpose(1, 2) if transpose else patch

        return cut(pair.low, 1), cut(pair.high, self.scale)


class WholeImages(Dataset):
    """Pairs as they are, one by one: (low, high), float32 in 0..255."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        return pair.low.float(), pair.high.float()


class SuperResolutionData(LightningDataModule, ABC):
    """Small images with the large ones they came from; batches are (low, high), float32 in 0..255.

    Patches to train on; whole images, one at a time, to evaluate on. A split is read when it is first needed, so that
    testing needs no training images. Several test sets have a loader each.

    Args:
        scale: how much larger the large images are.
        patch_size: height and width of the large patches; a multiple of ``scale``.
        batch_size: patches per step and process.
        samples_per_epoch: patches in an epoch, over all processes.
        num_workers: loader processes.
        seed: of order, places and augmentation.
        augment: whether to mirror and transpose the patches.

    Attributes:
        input_shape: (channels, height, width) of a small patch.
        test_names: names of the test sets, in the order of their loaders.
    """

    test_names: Sequence[str]

    def __init__(
        self,
        scale: int,
        patch_size: int,
        batch_size: int,
        samples_per_epoch: int,
        num_workers: int = 0,
        seed: int = 0,
        augment: bool = True,
    ) -> None:
        super().__init__()
        for argument, value, least in (
            ("scale", scale, 2),
            ("patch_size", patch_size, 1),
            ("batch_size", batch_size, 1),
            ("samples_per_epoch", samples_per_epoch, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{argument}: expected {least} or more, got {value}.")
        if patch_size % scale:
            raise ValueError(f"patch_size: expected a multiple of scale={scale}, got {patch_size}.")
        self.scale = scale
        self.patch_size = patch_size
        self.batch_size = batch_size
        self.samples_per_epoch = samples_per_epoch
        self.num_workers = num_workers
        self.seed = seed
        self.augment = augment
        self.input_shape = (3, patch_size // scale, patch_size // scale)
        self._read: dict[Split, Mapping[str, Sequence[Pair]]] = {}

    @abstractmethod
    def read(self, split: Split) -> Mapping[str, Sequence[Pair]]:
        """Read the pairs of a split, by name of the set; called once for each that is needed."""

    def pairs(self, split: Split) -> Mapping[str, Sequence[Pair]]:
        if split not in self._read:
            self._read[split] = self.read(split)
        return self._read[split]

    def setup(self, stage: str) -> None:
        # absent or broken data is reported here, before anything is built
        if stage == "fit":
            self._training_pairs()
        self.pairs("val" if stage in ("fit", "validate") else "test")

    def _training_pairs(self) -> list[Pair]:
        """Those that have room for a patch."""
        pairs = [pair for pairs in self.pairs("train").values() for pair in pairs]
        large = [pair for pair in pairs if min(pair.high.shape[1:]) >= self.patch_size]
        if len(large) < len(pairs):
            least = min(pairs, key=lambda pair: min(pair.high.shape[1:]))
            message = (
                f"patch_size: {len(pairs) - len(large)} of {len(pairs)} training images are smaller than "
                f"{self.patch_size} pixels; {least.name} has {least.high.shape[2]}x{least.high.shape[1]}."
            )
            if not large:
                raise MisconfigurationException(message)
            rank_zero_warn(f"{message} They are left out.")
        return large

    def train_dataloader(self) -> DataLoader:
        size = self.patch_size // self.scale
        patches = Patches(self._training_pairs(), size, self.scale, self.samples_per_epoch, self.augment, self.seed)
        sampler = EpochSampler.of_rank(self.trainer, patches, self.seed)
        return make_loader(patches, self.batch_size, self.num_workers, sampler)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._whole("val")

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._whole("test")

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._whole("test")

    def _whole(self, split: Split) -> DataLoader | list[DataLoader]:
        # one by one, since they differ in size
        loaders = [make_loader(WholeImages(pairs), 1, self.num_workers) for pairs in self.pairs(split).values()]
        return loaders[0] if len(loaders) == 1 else loaders


def as_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) or grey (H, W), uint8, to (3, H, W)."""
    image = np.ascontiguousarray(np.atleast_3d(image))
    return torch.from_numpy(image).permute(2, 0, 1).expand(3, -1, -1).contiguous()
