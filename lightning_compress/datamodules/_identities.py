"""What the datamodules of re-identification share: batches of whole identities in two views, queries and galleries.

Randomness is that of `_images`: what epoch ``e`` draws depends on ``(seed, e)`` alone, on no rank and no worker.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import v2

from lightning_compress.datamodules._images import make_loader
from lightning_compress.datamodules.image_folder import FolderImages
from lightning_compress.metrics import CrossCameraRetrieval

# ImageNet's, with which the trunks were trained.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def draw_instances(
    identities: Tensor, infrared: Tensor, num_instances: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Draw for every identity half of its instances from each view.

    Args:
        identities: of every image, (N,), int64.
        infrared: of every image, (N,), bool; every identity has images of both kinds.
        num_instances: of an identity; even. Where it has fewer images of a view than half of that, they repeat.
        rng: what draws.

    Returns:
        The identities, (I,), ascending, and their images, (I, num_instances), indices: visible, infrared, visible, ...

    >>> draw_instances(torch.tensor([7, 7, 3, 3]), torch.tensor([True, False] * 2), 2, np.random.default_rng(0))
    (tensor([3, 7]), tensor([[3, 2],
            [1, 0]]))
    """
    half = num_instances // 2
    names, numbers = np.unique(identities.numpy(), return_inverse=True)
    group = 2 * numbers + infrared.numpy()
    order = np.lexsort((rng.random(len(group)), group))  # the images of each group side by side, shuffled
    counts = np.bincount(group, minlength=2 * len(names))[:, None]
    again = (rng.random((len(counts), half)) * counts).astype(np.int64)
    places = np.where(counts < half, again, np.arange(half))
    chosen = order[counts.cumsum()[:, None] - counts + places]  # (2 I, half)
    views = chosen.reshape(len(names), 2, half).swapaxes(1, 2).reshape(len(names), num_instances)
    return torch.from_numpy(names), torch.from_numpy(views.copy())


class IdentityModalitySampler(DistributedSampler):
    """Batches of whole identities, each with as many images of one view as of the other, in turns.

    An epoch goes ``rounds`` times through all identities in random order. Of each it draws images without repetition,
    as far as there are enough. Identities that fill no batch are left out. Processes get other batches, never parts of
    an identity. Image ``i`` in epoch ``e`` is drawn as the index ``e * len(dataset) + i``, as by `EpochSampler`.

    Args:
        dataset: what is drawn from.
        identities: of every image, (N,), int64.
        infrared: of every image, (N,), bool.
        batch_size: images of a batch.
        num_instances: images of an identity in a batch.
        seed: of order and draws.
        rounds: how often an epoch goes through the identities.
        num_replicas: processes.
        rank: of this one.

    Raises:
        ValueError: `num_instances` is odd, or `batch_size` no multiple of it.
        MisconfigurationException: an identity lacks a view, or there are too few for a batch on each process.
    """

    def __init__(
        self,
        dataset: Dataset,
        identities: Tensor,
        infrared: Tensor,
        batch_size: int,
        num_instances: int = 8,
        seed: int = 0,
        rounds: int = 1,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        check_batch(batch_size, num_instances)
        super().__init__(dataset, num_replicas, rank, seed=seed)
        names, numbers = identities.unique(return_inverse=True)
        lacking = [kind for kind in (False, True) if len(numbers[infrared == kind].unique()) < len(names)]
        if lacking:
            first = next(n for n in names.tolist() if not (infrared[identities == n] == lacking[0]).any())
            raise MisconfigurationException(
                f"Identity {first} has no {'infrared' if lacking[0] else 'visible'} image; every one needs both kinds."
            )
        self.identities, self.infrared = identities, infrared
        self.per_batch = batch_size // num_instances
        self.num_instances = num_instances
        self.rounds = rounds
        self.batches = rounds * (len(names) // self.per_batch) // self.num_replicas
        if not self.batches:
            raise MisconfigurationException(
                f"batch_size: {batch_size} takes {self.per_batch} identities with num_instances={num_instances}; "
                f"{len(names)} do not make a batch for each of {self.num_replicas} processes."
            )
        self.num_samples = self.batches * batch_size

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        drawn = []
        for _ in range(self.rounds):
            _, images = draw_instances(self.identities, self.infrared, self.num_instances, rng)
            whole = len(images) // self.per_batch * self.per_batch
            drawn.append(images[torch.from_numpy(rng.permutation(len(images))[:whole])])
        batches = torch.cat(drawn).view(-1, self.per_batch * self.num_instances)
        mine = batches[self.rank :: self.num_replicas][: self.batches]
        return iter((mine.flatten() + self.epoch * len(self.dataset)).tolist())  # type: ignore[arg-type]


def check_batch(batch_size: int, num_instances: int) -> None:
    """Raise unless such batches can be."""
    if num_instances < 2 or num_instances % 2:
        raise ValueError(f"num_instances: expected an even number, half for each view, got {num_instances}.")
    if batch_size < num_instances or batch_size % num_instances:
        raise ValueError(f"batch_size: expected a multiple of num_instances={num_instances}, got {batch_size}.")


class Tagged(Dataset):
    """(image, label) of another dataset, with tags for each image: (image, label, tag, ...).

    An index past the end means a later epoch, as for the other.
    """

    def __init__(self, dataset: Any, *tags: Tensor) -> None:
        self.dataset, self.tags = dataset, tags

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return map(self.__getitem__, range(len(self)))  # the first epoch: no index is ever too large here

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, ...]]:
        many = getattr(self.dataset, "__getitems__", None)
        items = many(indices) if many else [self.dataset[index] for index in indices]
        local = torch.tensor(indices) % len(self)
        return list(zip(*zip(*items, strict=True), *(tag[local].tolist() for tag in self.tags), strict=True))


class Shots(NamedTuple):
    """Images of persons, by file.

    Attributes:
        paths: (N,) files.
        identities: (N,), int64.
        cameras: (N,), int64.
        infrared: (N,), bool.
    """

    paths: list[str]
    identities: Tensor
    cameras: Tensor
    infrared: Tensor

    @classmethod
    def of(cls, rows: Sequence[tuple[str, int, int, bool]]) -> Shots:
        """From (path, identity, camera, infrared) of each."""
        paths, identities, cameras, infrared = zip(*rows, strict=True) if rows else ([],) * 4
        return cls(list(paths), torch.tensor(identities), torch.tensor(cameras), torch.tensor(infrared))


class Matching(NamedTuple):
    """Who is looked for, and among whom: datasets of (image, identity, camera, its own index)."""

    query: Tagged
    gallery: Tagged

    @classmethod
    def of(cls, query: tuple[Dataset, Tensor], gallery: tuple[Dataset, Tensor]) -> Matching:
        """From (dataset of (image, identity), cameras) of each."""
        return cls(*(Tagged(part, cameras, torch.arange(len(cameras))) for part, cameras in (query, gallery)))


class ReIDSplits(NamedTuple):
    """Training images as (image, label, infrared), and who is to be found in validation and test."""

    train: Tagged
    val: Matching
    test: Matching


class ReIDData(LightningDataModule, ABC):
    """Persons, or what stands for them, in visible and infrared images.

    Training batches are (images (N, C, H, W) float32, labels (N,) int64, infrared (N,) bool), see
    `IdentityModalitySampler`. Evaluation has two loaders, queries and gallery, with (images, identities, cameras,
    indices); identities are the data's own numbers, indices those of the images within queries or gallery.

    Args:
        root: folder that holds the data.
        batch_size: training images per step and process.
        num_instances: images of an identity in a batch, half of them infrared.
        num_workers: loader processes.
        seed: of order, draws and augmentation.
        augment: whether to augment the training images.
        eval_batch_size: None takes ``batch_size``.

    Attributes:
        num_classes: identities to train on.
        input_shape: (channels, height, width) of an image.
        rounds: how often an epoch goes through them.
    """

    num_classes: int
    input_shape: tuple[int, int, int]
    rounds: int = 1

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 64,
        num_instances: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        augment: bool = True,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        check_batch(batch_size, num_instances)
        if seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {seed}.")
        self.root = Path(root)
        self.batch_size = batch_size
        self.num_instances = num_instances
        self.num_workers = num_workers
        self.seed = seed
        self.augment = augment
        self.eval_batch_size = eval_batch_size

    @abstractmethod
    def make_splits(self) -> ReIDSplits:
        """Read the data; called once, when first needed."""

    @abstractmethod
    def training_labels(self) -> Tensor:
        """Labels of the training images, (N,), int64."""

    def retrieval(self) -> CrossCameraRetrieval:
        """How these data are evaluated: a fresh metric."""
        return CrossCameraRetrieval()

    @cached_property
    def splits(self) -> ReIDSplits:
        return self.make_splits()

    def setup(self, stage: str) -> None:
        _ = self.splits  # absent or broken data is reported here, before anything is built

    def sampler(self, trainer: Trainer | None) -> IdentityModalitySampler:
        """The sampler of this process; there is no trainer where a datamodule is used without one."""
        shares = getattr(trainer, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        train = self.splits.train
        return IdentityModalitySampler(
            train, self.training_labels(), train.tags[0], self.batch_size, self.num_instances, self.seed, self.rounds,
            num_replicas=shares["num_replicas"], rank=shares["rank"],
        )  # fmt: skip

    def train_dataloader(self) -> DataLoader:
        return make_loader(self.splits.train, self.batch_size, self.num_workers, self.sampler(self.trainer))

    def val_dataloader(self) -> list[DataLoader]:
        return self._loaders(self.splits.val)

    def test_dataloader(self) -> list[DataLoader]:
        return self._loaders(self.splits.test)

    def predict_dataloader(self) -> list[DataLoader]:
        return self.test_dataloader()

    def _loaders(self, matching: Matching) -> list[DataLoader]:
        return [make_loader(part, self.eval_batch_size or self.batch_size, self.num_workers) for part in matching]


class ReIDFolder(ReIDData):
    """Persons in files; images are read when asked for, brought to one size and normalised with ImageNet's numbers.

    Half of the training images are mirrored. See `ReIDData` for the other arguments.

    Args:
        size: height and width of the images that the network sees.
    """

    def __init__(self, root: str, *, size: tuple[int, int] = (256, 128), **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        if min(size) < 1:
            raise ValueError(f"size: expected a height and a width of at least 1 pixel, got {tuple(size)}.")
        self.input_shape = (3, *size)

    @abstractmethod
    def training_shots(self) -> Shots:
        """What to train on."""

    @abstractmethod
    def matching_shots(self, split: Literal["val", "test"]) -> tuple[Shots, Shots]:
        """Queries and gallery."""

    @cached_property
    def _training(self) -> Shots:
        return self.training_shots()

    @cached_property
    def num_classes(self) -> int:  # type: ignore[override]
        return len(self._training.identities.unique())

    def training_labels(self) -> Tensor:
        """Identities counted from 0 in ascending order."""
        return self._training.identities.unique(return_inverse=True)[1]

    def make_splits(self) -> ReIDSplits:
        normalised = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        still = v2.Compose([v2.Resize(self.input_shape[1:]), *normalised])
        mirrored = v2.Compose([v2.Resize(self.input_shape[1:]), v2.RandomHorizontalFlip(), *normalised])

        def images(shots: Shots, labels: Tensor, transform: v2.Compose) -> FolderImages:
            return FolderImages(list(zip(shots.paths, labels.tolist(), strict=True)), transform, self.seed)

        def matching(split: Literal["val", "test"]) -> Matching:
            return Matching.of(*((images(s, s.identities, still), s.cameras) for s in self.matching_shots(split)))

        train = images(self._training, self.training_labels(), mirrored if self.augment else still)
        return ReIDSplits(Tagged(train, self._training.infrared), matching("val"), matching("test"))
