"""Batches stay what they were, and each knows its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import foreign
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_compress.core.training_samples import (
    PartSampler,
    _Undivided,
    indexed,
    reload_training_loader,
    replace_training_loader,
    samples_of_batch,
)
from lightning_compress.datamodules import Digits
from lightning_compress.datamodules._images import EpochSampler

DATA = TensorDataset(torch.arange(10.0), torch.arange(10))


def trainer(**kwargs: Any) -> Trainer:
    return foreign.make_trainer(None, **kwargs)  # type: ignore[arg-type]


def as_dict(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {"x": torch.stack([s[0] for s in samples]), "y": torch.stack([s[1] for s in samples])}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_in_the_same_order(workers: int) -> None:
    def loader() -> DataLoader:
        order = torch.Generator().manual_seed(3)
        sampler = RandomSampler(DATA, generator=order)
        return DataLoader(DATA, 4, sampler=sampler, collate_fn=as_dict, num_workers=workers)

    ours = indexed(trainer(), loader(), "Test")
    assert len(ours) == len(loader())
    seen = 0
    for given, batch in zip(loader(), ours, strict=True):
        assert torch.equal(batch["x"], given["x"])
        assert torch.equal(ours.drawn, given["y"])
        seen += len(ours.drawn)
    assert seen == 10


def test_part_of_the_samples_in_the_same_order() -> None:
    order = torch.Generator().manual_seed(3)
    given = [int(i) for i in RandomSampler(DATA, generator=order)]
    order.manual_seed(3)
    loader = DataLoader(DATA, 3, sampler=RandomSampler(DATA, generator=order), drop_last=True)
    ours = indexed(trainer(), loader, "Test", kept=torch.tensor([7, 1, 2, 9, 4, 8, 0]))
    drawn = [int(i) for _, y in ours for i in y]
    assert drawn == [i for i in given if i in (7, 1, 2, 9, 4, 8, 0)][:6]
    assert len(ours) == 2


def test_an_index_past_the_end_is_a_later_epoch() -> None:
    data = Digits(batch_size=64, augment=True)
    loader = data.train_dataloader()
    ours = indexed(trainer(), data.train_dataloader(), "Test")
    for part in (loader, ours):
        part.sampler.set_epoch(5)
    for (x, y), (ours_x, ours_y) in zip(loader, ours, strict=True):
        assert torch.equal(x, ours_x)
        assert torch.equal(data.splits.train.labels[data.splits.train.indices[ours.drawn]], y)  # type: ignore[attr-defined]
        assert torch.equal(y, ours_y)


@pytest.mark.parametrize("kept", [10, 7, 5])
@pytest.mark.parametrize("kind", [DistributedSampler, EpochSampler])
def test_two_processes_share_them(kept: int, kind: type) -> None:
    chosen = torch.randperm(10, generator=torch.Generator().manual_seed(0))[:kept]
    whole = kind(DATA, 1, 0, seed=4)
    whole.set_epoch(2)
    alone = [i for i in whole if i % 10 in chosen]
    shared = []
    for rank in range(2):
        order = kind(DATA, 2, rank, seed=4)
        before = dict(vars(order))
        sampler = PartSampler(_Undivided(order), chosen, 10, 2, rank, "Test")
        sampler.set_epoch(2)
        shared.append(list(sampler))
        assert {**before, "epoch": 2} == vars(order)
        assert len(sampler) == len(shared[-1]) == -(-kept // 2)
    together = [i for pair in zip(*shared, strict=True) for i in pair]
    assert together[:kept] == alone
    assert together[kept:] == alone[: len(together) - kept]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Endless:
    def __getitem__(self, index: int) -> int:
        return index


class OwnWay(DataLoader):
    def __iter__(self) -> Any:
        return iter([])


class OwnBatches(BatchSampler):
    pass


@pytest.mark.parametrize(
    ("loader", "shown"),
    [
        (lambda: [DataLoader(DATA)], "a list"),
        (lambda: DataLoader(Stream()), "Stream"),
        (lambda: DataLoader(Endless(), sampler=range(3)), "Endless"),
        (lambda: DataLoader(DATA, batch_size=None), "NoneType"),
        (lambda: DataLoader(DATA, batch_sampler=OwnBatches(SequentialSampler(DATA), 2, False)), "OwnBatches"),
        (lambda: OwnWay(DATA), "OwnWay"),
        (lambda: DataLoader(DATA, sampler=SubsetRandomSampler(range(4))), "SubsetRandomSampler draws 4"),
        (lambda: DataLoader(DATA, sampler=WeightedRandomSampler([1.0] + [0.0] * 9, 10)), "1 different ones of 10"),
    ],
)
def test_what_has_no_indices_is_refused(loader: Callable[[], Any], shown: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"^Test.*{shown}"):
        list(indexed(trainer(), loader(), "Test"))


def test_a_refusal_in_a_fit_leaves_constructors_as_they_were() -> None:
    class Asking(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            replace_training_loader(trainer, lambda loader: indexed(trainer, loader, "Test"))

    kinds = (DataLoader, BatchSampler, OwnWay)
    before = [(kind.__init__, kind.__setattr__, kind.__delattr__) for kind in kinds]
    with pytest.raises(MisconfigurationException, match="OwnWay"):
        foreign.make_trainer(None, Asking(), max_epochs=1).fit(foreign.made(), OwnWay(DATA))
    assert [(kind.__init__, kind.__setattr__, kind.__delattr__) for kind in kinds] == before


def test_processes_with_orders_of_their_own_are_refused() -> None:
    with (
        patch.object(Trainer, "world_size", 2),
        pytest.raises(MisconfigurationException, match="2 processes they share what RandomSampler draws"),
    ):
        indexed(trainer(), DataLoader(DATA, shuffle=True), "Test")


class Watch(Callback):
    """Trains on fewer and fewer samples."""

    def __init__(self) -> None:
        self.kept, self.asked = torch.arange(64), 0
        self.seen: list[list[int]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        def wrap(given: DataLoader) -> DataLoader:
            self.asked += 1
            return indexed(trainer, given, "Watch", kept=self.kept)

        self.handle = replace_training_loader(trainer, wrap)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append([])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen[-1] += samples_of_batch(trainer).tolist()
        assert len(batch[0]) == len(samples_of_batch(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch != 1:
            self.kept = self.kept[: len(self.kept) // 2]
            reload_training_loader(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.handle.remove()


def test_a_fit_trains_and_validates_on_a_loader_that_changes(tmp_path: Any) -> None:
    watch, module = Watch(), foreign.made()
    validations: list[int] = []
    module.on_validation_end = lambda: validations.append(module.trainer.current_epoch)  # type: ignore[method-assign]
    loader = foreign.digits()
    fit = foreign.make_trainer(tmp_path, watch, max_epochs=4)
    fit.fit(module, loader, foreign.digits(32, 64))
    assert watch.seen == [list(range(n)) for n in (64, 32, 32, 16)]
    assert fit.global_step == 4 + 2 + 2 + 1
    assert validations == [0, 1, 2, 3]
    assert watch.asked == 3
    assert fit.fit_loop._data_source.dataloader() is loader
