"""Which samples of the training set a batch holds, seen from outside: data set, loader and module stay as they are.

While a fit runs, its loader is replaced by an `IndexedLoader` over the same data. It gives the same batches in the same
order, and says of each where its samples are in the data set. The indices travel with the samples, through worker
processes and pinned memory, so that they are right whatever the sampler, the prefetching or the collation is.

A loader asks its sampler for nothing before the first batch is fetched: Lightning makes the iterator of a resumed run
before it tells the sampler which epoch it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import _shutdown_workers_and_reset_iterator
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.inheritance import get_all_subclasses
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

Wrap = Callable[[DataLoader], DataLoader]


class IndexedLoader(DataLoader):
    """Gives batches as they are, and knows which samples are in the last one; made by :func:`indexed`.

    Attributes:
        drawn: (B,), int64: where the samples of the last batch are in the data set.
    """

    drawn: Tensor

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for indices, batch in super().__iter__():
            self.drawn = indices
            yield batch


def indexed(
    trainer: Trainer, loader: DataLoader, by: str, *, dataset: Dataset | None = None, kept: Tensor | None = None
) -> IndexedLoader:
    """The same loader, which knows what it draws; it needs no `DistributedSampler` any more.

    Args:
        trainer: whose processes share the samples.
        loader: as the user gave it.
        by: the method, for messages.
        dataset: what is read in place of the loader's data set; of the same length.
        kept: indices of the samples that are drawn, (n,); None draws all.

    Raises:
        MisconfigurationException: the loader's samples have no indices, or every process has an order of its own.
    """
    check_loader(loader, by)
    dataset = loader.dataset if dataset is None else dataset
    count = len(dataset)  # type: ignore[arg-type]
    kept = torch.arange(count) if kept is None else kept
    order = training_order(trainer, loader, by)
    return IndexedLoader(
        _IndexedDataset(dataset),
        batch_size=loader.batch_size,
        sampler=PartSampler(order, kept, count, trainer.world_size, trainer.global_rank, by),
        drop_last=loader.drop_last,
        collate_fn=_Collate(loader.collate_fn, count),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        in_order=loader.in_order,
    )


def samples_of_batch(trainer: Trainer) -> Tensor:
    """Where the samples of the batch that is being trained on are in the data set, (B,), int64, on the CPU."""
    loader = trainer.train_dataloader
    assert isinstance(loader, IndexedLoader)
    return loader.drawn


def replace_training_loader(trainer: Trainer, wrap: Wrap) -> ReplacedLoader:
    """Let a fit train with ``wrap(loader)``; to be called in a callback's `setup`.

    Args:
        wrap: called with what the user gave whenever Lightning asks for it; see :func:`reload_training_loader`.

    Returns:
        A handle with ``remove()``. The last call of several counts; handles are removed in reverse.
    """
    replaced = ReplacedLoader(trainer, wrap)
    trainer.fit_loop._data_source = replaced
    return replaced


class ReplacedLoader(_DataLoaderSource):
    """Where Lightning gets the training loader from, in place of what the user gave."""

    def __init__(self, trainer: Trainer, wrap: Wrap) -> None:
        self.given = trainer.fit_loop._data_source
        self.trainer, self.wrap = trainer, wrap
        super().__init__(self.given.instance, self.given.name)

    def dataloader(self) -> DataLoader:
        try:
            loader: Any = super().dataloader()
            return self.wrap(loader)
        except Exception:
            _unwrap_constructors()
            raise

    def remove(self) -> None:
        """Put the user's back; a second call does nothing."""
        if self.trainer.fit_loop._data_source is self:
            self.trainer.fit_loop._data_source = self.given


def _unwrap_constructors() -> None:
    """Lightning wraps constructors while it asks for a loader, and after an error would leave them so for good."""
    for base in (DataLoader, BatchSampler):
        for cls in (base, *get_all_subclasses(base)):
            for name in ("__setattr__", "__delattr__", "__init__"):
                if f"__old{name}" in vars(cls):
                    setattr(cls, name, vars(cls)[f"__old{name}"])
                    delattr(cls, f"__old{name}")


def reload_training_loader(trainer: Trainer) -> None:
    """Ask for the loader anew before the next epoch, and end its workers, who have a copy of what has changed."""
    loaders = trainer.fit_loop._combined_loader
    if loaders is not None:
        for loader in loaders.flattened:
            _shutdown_workers_and_reset_iterator(loader)
        trainer.fit_loop._combined_loader = None  # then Lightning also counts the batches anew


def check_loader(loader: Any, by: str) -> None:
    """A loader whose samples have an index each, drawn by a sampler.

    Raises:
        MisconfigurationException: it is another one.
    """
    what = ""
    if not isinstance(loader, DataLoader):
        what = f"a {type(loader).__name__}"
    elif isinstance(loader.dataset, IterableDataset):
        what = f"an iterable data set ({type(loader.dataset).__name__}), whose samples have no index"
    elif not hasattr(loader.dataset, "__len__"):
        what = f"a data set without a length ({type(loader.dataset).__name__})"
    elif type(loader).__iter__ not in (DataLoader.__iter__, IndexedLoader.__iter__):
        what = f"a {type(loader).__name__}, which iterates in a way of its own"
    elif loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        what = f"one with batches of its own (batch_sampler={type(loader.batch_sampler).__name__})"
    if what:
        raise MisconfigurationException(
            f"{by} needs to know the samples of every batch: train with one torch.utils.data.DataLoader over a data "
            f"set with indices and a length, with a batch_size and, if wanted, a sampler. It got {what}."
        )


def training_order(trainer: Trainer, loader: DataLoader, by: str) -> Sampler:
    """The order in which all processes together go through the data set.

    With several processes this is the sampler that the user or Lightning distributes, before it is distributed.

    Raises:
        MisconfigurationException: every process has an order of its own.
    """
    sampler: Any = trainer._data_connector._resolve_sampler(loader, shuffle=True, mode=RunningStage.TRAINING)
    if isinstance(sampler, DistributedSampler):
        return _Undivided(sampler)
    if trainer.world_size > 1:
        raise MisconfigurationException(
            f"{by}: with {trainer.world_size} processes they share what {type(sampler).__name__} draws. Leave "
            f"use_distributed_sampler=True, or take a torch.utils.data.DistributedSampler."
        )
    return sampler


class PartSampler(DistributedSampler):
    """Draw in the order of another sampler, less what is not kept; every process its share.

    Args:
        order: draws each sample once; an index past the end means the same sample in a later epoch.
        kept: indices of the samples that are drawn, (n,).
        count: samples that there are.
        num_replicas: processes; if n is no multiple, the first samples of an epoch are drawn once more.
        rank: of this one.
        by: the method, for messages.
    """

    def __init__(self, order: Sampler, kept: Tensor, count: int, num_replicas: int, rank: int, by: str) -> None:
        super().__init__(kept, num_replicas, rank, shuffle=False)  # type: ignore[arg-type]  # its length counts
        self.order, self.by = order, by
        self.is_kept = torch.zeros(count, dtype=torch.bool)
        self.is_kept[kept] = True

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        count = len(self.is_kept)
        drawn = torch.tensor(list(self.order))
        local = drawn % count
        if len(drawn) != count or not (local.bincount(minlength=count) == 1).all():
            raise MisconfigurationException(
                f"{self.by}: {type(self.order).__name__} draws {len(drawn)} samples, {len(local.unique())} different "
                f"ones of {count}. It must draw each once: give a part of a data set as torch.utils.data.Subset, and "
                f"leave replacement off."
            )
        chosen = drawn[self.is_kept[local]].tolist()
        return map(chosen.__getitem__, super().__iter__())


class _Undivided(Sampler):
    """All that the processes of a `DistributedSampler` draw together."""

    def __init__(self, sampler: DistributedSampler) -> None:
        self.sampler = sampler
        self.count = len(sampler.dataset)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        shares = ("num_replicas", "rank", "num_samples", "total_size")
        before = {name: getattr(self.sampler, name) for name in shares}
        vars(self.sampler).update(dict(zip(shares, (1, 0, self.count, self.count), strict=True)))
        try:
            return iter(list(self.sampler))
        finally:
            vars(self.sampler).update(before)


class _IndexedDataset(Dataset):
    """Gives (index, sample)."""

    def __init__(self, base: Dataset) -> None:
        self.base = base

    def __len__(self) -> int:
        return len(self.base)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.base[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Any]]:
        return list(zip(indices, read(self.base, indices), strict=True))


class _Collate:
    """Collates the samples, and the indices beside them; a class, as worker processes may have to pickle it."""

    def __init__(self, collate: Callable[[list[Any]], Any], count: int) -> None:
        self.collate, self.count = collate, count

    def __call__(self, pairs: list[tuple[int, Any]]) -> tuple[Tensor, Any]:
        indices, samples = zip(*pairs, strict=True)
        return torch.tensor(indices) % self.count, self.collate(list(samples))


def read(dataset: Dataset, indices: list[int]) -> list[Any]:
    """Samples of a data set, all at once where it can do that."""
    at_once = getattr(dataset, "__getitems__", None)
    return list(at_once(indices)) if at_once else [dataset[index] for index in indices]
