"""The set shrinks as the paper says, its images are blended as the code does, and nothing of the user's changes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import foreign
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, WeightedRandomSampler
from torchvision.datasets import VisionDataset

from lightning_compress.callbacks import KCD, KnowledgeDistillation, L1Norm
from lightning_compress.callbacks.distillation.kcd.condensation import (
    KnowledgeSet,
    blend,
    entropies,
    next_size,
    partition,
    shares,
    values,
)
from lightning_compress.callbacks.distillation.kcd.data import BlendedDataset, blended, stored_pixels
from lightning_compress.catalog import Row, card
from lightning_compress.cli.configs import find_config
from lightning_compress.core.distill.losses import soft_targets
from lightning_compress.core.example_input import training_loaders
from lightning_compress.core.profile import profile
from lightning_compress.core.report import Account
from lightning_compress.core.training_samples import indexed
from lightning_compress.datamodules import Digits
from lightning_compress.networks import CIFARResNet
from lightning_compress.networks.find import build

SIZES = {
    0.7: [50_000, 47_500, 45_000, 42_500, 40_000, 37_500, 35_000],
    0.5: [50_000, 45_834, 41_668, 37_502, 33_336, 29_170, 25_004],
    0.3: [50_000, 44_167, 38_334, 32_501, 26_668, 20_835, 15_002],
    1.0: [50_000] * 7,
}


@pytest.fixture(autouse=True)
def no_account(request: pytest.FixtureRequest) -> Iterator[None]:
    """Counting and timing the student takes longer than such a fit."""
    if "account" in request.node.name:
        yield
        return
    with patch("lightning_compress.callbacks.distillation.knowledge_distillation.callback.open_account"):
        yield


def teacher() -> nn.Module:
    torch.manual_seed(7)
    network = foreign.Network()
    network(torch.rand(16, 1, 8, 8))
    return network


def fit(root: Path, *callbacks: Any, ckpt_path: Any = None, data: Any = None, **kwargs: Any) -> LightningModule:
    seed_everything(0, verbose=False)
    module = foreign.made()
    trainer = foreign.make_trainer(root, *callbacks, **{"max_epochs": 4, "limit_val_batches": 0, **kwargs})
    with foreign.no_pictures:
        trainer.fit(module, foreign.digits() if data is None else data, ckpt_path=ckpt_path)
    return module


# ---- values


def test_entropy() -> None:
    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(0)) * 5
    p = logits.double().softmax(1).numpy()
    np.testing.assert_allclose(entropies(logits), -(p * np.log(p)).sum(1), rtol=2e-5)
    assert entropies(torch.zeros(1, 100)).item() == pytest.approx(4.605170, abs=1e-6)
    extreme = entropies(torch.tensor([[500.0, 0, 0], [0, -torch.inf, 0]]))
    torch.testing.assert_close(extreme, torch.tensor([0.0, 0.693147]))
    assert entropies(logits.bfloat16()).dtype == torch.float32


def test_values_and_order() -> None:
    """Four records of four epochs, as the authors' code ranks them; -1: dropped by then."""
    records = torch.tensor([[1.0, 0.8, 0.6, -1], [0.5] * 4, [0.9, -1, -1, -1], [0.2] * 4])
    known = KnowledgeSet.full(4)
    for column in records.T:
        known.hear(column)
    worth = values(known.total, known.visits, 40)
    np.testing.assert_allclose(worth, [0.740188, 0.466627, 0.805714, 0.186651], atol=1e-6)
    assert partition(worth, 3, 4).kept.tolist() == [2, 0, 1]


def test_visits_count_a_little() -> None:
    visits = torch.arange(1, 7) * 40
    factors = values(visits.double(), visits, 40)
    np.testing.assert_allclose(factors, [1, 1.0210, 1.0335, 1.0425, 1.0495, 1.0552], atol=5e-5)
    assert factors[0] == 1


def test_what_was_never_seen_is_kept() -> None:
    known = KnowledgeSet.full(5)
    known.hear(torch.tensor([0.0, -1.0, 0.3, torch.nan, 0.3]))
    assert known.visits.tolist() == [1, 0, 1, 0, 1]
    worth = values(known.total, known.visits, 1)
    assert not worth.isnan().any()
    assert partition(worth, 4, 5).kept.tolist() == [1, 3, 2, 4]  # equal ones in their order


@pytest.mark.parametrize(
    ("keep_ratio", "sizes"), SIZES.items(), ids=lambda v: f"theta={v}" if v.__class__ is float else ""
)
def test_sizes(keep_ratio: float, sizes: list[int]) -> None:
    for before, after in pairwise(sizes):
        assert next_size(before, 50_000, keep_ratio, 6) == after


def test_sizes_are_not_cut_by_rounding_errors() -> None:
    assert next_size(100, 100, 0.9, 1) == 90  # 100 * (1 - 0.9) is 9.999999999999998
    assert next_size(91, 100, 0.9, 10) == 90
    assert next_size(90, 100, 0.9, 10) == 90
    assert next_size(3, 5, 0.01, 1) == 1


def test_steps_of_the_published_schedule() -> None:
    data = DataLoader(TensorDataset(torch.zeros(50_000)), 64)
    trainer = foreign.make_trainer(None)  # type: ignore[arg-type]
    steps = [len(indexed(trainer, data, "Test", kept=torch.arange(size))) for size in SIZES[0.7][:6]]
    assert steps == [782, 743, 704, 665, 625, 586]
    assert sum(SIZES[0.7][:6]) / 6 / 50_000 == 0.875


def test_the_authors_loss() -> None:
    student, expert = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 2.0, 1.0]])
    assert soft_targets(student, expert, 4.0).item() == pytest.approx(1.319630, abs=1e-6)


# ---- the partition and the blends


def test_high_middle_and_low() -> None:
    worth = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.3, 0.6])
    parts = partition(worth, 4, 6)
    assert parts.kept.tolist() == [1, 3, 5, 2]
    assert parts.tail.tolist() == [5, 2]
    assert parts.lost.tolist() == [4, 0]
    again = partition(worth, 3, 4)  # over all samples: what was lost may come back
    assert (again.kept.tolist(), again.tail.tolist(), again.lost.tolist()) == ([1, 3, 5], [5], [2])
    few = partition(worth, 2, 6)  # more go than stay
    assert (few.tail.tolist(), few.lost.tolist()) == ([1, 3], [5, 2])
    parts.kept[0] = 99
    assert parts.tail.tolist() == [5, 2]


def test_shares_and_blend() -> None:
    np.testing.assert_allclose(shares(4), [1.0, 0.925, 0.85, 0.775])
    assert shares(0).shape == (0,)
    assert blend(torch.tensor([[200]]).byte(), torch.tensor([[100]]).byte(), torch.tensor([0.85])).item() == 185
    kept, lost = (torch.randint(256, (20, 3, 4, 4), generator=torch.Generator().manual_seed(s)).byte() for s in (1, 2))
    own = np.float32([0.7 + 0.3 * (20 - i) / 20 for i in range(20)])
    pairs = zip(own, kept.numpy(), lost.numpy(), strict=True)
    expected = np.stack([(a * x + (1 - a) * y).astype(np.uint8) for a, x, y in pairs])
    made = blend(kept, lost, shares(20)).numpy().astype(int)
    assert np.abs(made - expected).max() <= 1
    assert (made == expected).mean() > 0.99


BLENDS = [(torch.tensor([1, 2]), torch.tensor([3, 4])), (torch.tensor([2, 0]), torch.tensor([1, 3]))]


class InMemory(VisionDataset):
    """As torchvision's CIFAR-10 holds its images."""

    def __init__(self, images: np.ndarray) -> None:
        super().__init__("")
        self.data, self.targets = images, list(range(len(images)))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.data[index]), self.targets[index]


class FromFiles(Dataset):
    """Gives other tensors in every epoch, and only one at a time."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, local = divmod(index, len(self))
        return {"label": local, "image": self.images[local] + epoch}


def one_by_one(images: Tensor) -> Tensor:
    images = images.clone()
    for tail, lost in BLENDS:
        for i in range(len(tail)):
            a = 0.7 + 0.3 * (len(tail) - i) / len(tail)
            images[tail[i]] = (a * images[tail[i]].float() + (1 - a) * images[lost[i]].float()).to(images.dtype)
    return images


def test_stored_bytes_are_blended_and_nothing_else_changes() -> None:
    images = torch.randint(256, (6, 4, 4, 3), generator=torch.Generator().manual_seed(0)).byte()
    expected = one_by_one(images)
    data = InMemory(images.numpy().copy())
    made = blended(data, BLENDS, 0.7)
    assert [y for _, y in made] == list(range(6))  # type: ignore[attr-defined]
    torch.testing.assert_close(torch.stack([made[i][0] for i in range(6)]), expected, atol=1, rtol=0)
    assert not torch.equal(expected[2], images[2])
    assert torch.equal(expected[3:], images[3:])  # only the tails
    assert (data.data == images.numpy()).all()
    assert blended(data, [], 0.7) is data


def test_a_subset_blends_its_own_images() -> None:
    images = torch.randint(256, (9, 4, 4, 3), generator=torch.Generator().manual_seed(0)).byte()
    data = Subset(InMemory(images.numpy()), [8, 1, 2, 7, 4, 5])
    made = blended(data, BLENDS, 0.7)
    pixels = torch.stack([made[i][0] for i in range(6)])
    torch.testing.assert_close(pixels, one_by_one(images[data.indices]), atol=1, rtol=0)
    assert [made[i][1] for i in range(6)] == data.indices
    assert stored_pixels(Subset(data, [0, 0]), torch.tensor([0])) is None
    assert stored_pixels(TensorDataset(images), torch.tensor([0])) is None


def test_our_arrays_are_blended_before_augmentation() -> None:
    split: Any = Digits(augment=True).splits.train
    made: Any = blended(split, BLENDS, 0.7)
    everything = torch.arange(len(split))
    torch.testing.assert_close(made.pixels(everything), one_by_one(split.pixels(everything)), atol=1, rtol=0)
    assert len(made) == len(split)
    count = len(split)
    for index in (count + 5, 3 * count + 700):  # in later epochs: the same crop
        assert torch.equal(made[index][0], split[index][0])
        assert made[index][1] == split[index][1]
    plain: Any = Digits(augment=False)
    one = blended(plain.splits.train, BLENDS, 0.7)[2][0]
    pixels = one_by_one(plain.splits.train.pixels(torch.arange(5)))[2].float() / 255
    torch.testing.assert_close(one, (pixels - plain.mean[0]) / plain.std[0], atol=0.02, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_what_is_read_from_files_is_blended_at_each_access(dtype: torch.dtype) -> None:
    images = torch.randint(200, (6, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(dtype)
    made = blended(FromFiles(images), BLENDS, 0.7)
    assert isinstance(made, BlendedDataset)
    samples = made.__getitems__([12 + i for i in range(6)])
    expected = torch.stack([s["image"] for s in samples])
    assert expected.dtype == dtype
    torch.testing.assert_close(expected, one_by_one(images + 2), atol=2 if dtype != torch.float32 else 1e-4, rtol=0)
    assert [s["label"] for s in samples] == list(range(6))
    assert made.recipe(5, 2) == {5: 1.0}
    assert sum(made.recipe(0, 2).values()) == pytest.approx(1)


# ---- in a fit


def test_the_set_shrinks_after_every_stage(tmp_path: Path) -> None:
    """... also after the last one, with all labels and all of the user's data as they were."""
    loader = foreign.digits()
    before = copy.deepcopy(loader.dataset.tensors)  # type: ignore[attr-defined]
    kcd = KCD(teacher(), keep_ratio=0.5, every_n_epochs=2)
    module = fit(tmp_path, kcd, data=loader)
    assert kcd.knowledge is not None
    known = kcd.knowledge
    assert len(known) == 32
    assert [len(tail) for tail, _ in known.blends] == [16, 16]
    assert known.visits.unique().tolist() == [2, 4]
    assert (known.visits == 4).sum() == 48
    assert module.trainer.global_step == 4 + 4 + 3 + 3
    assert float(module.trainer.callback_metrics["kcd/kept"]) == 0.75
    worth = values(known.total, known.visits, 2)
    assert (
        worth[known.kept].min() >= worth[known.visits == 4].sort().values[-33 if (known.visits == 4).sum() > 32 else 0]
    )
    for then, now in zip(before, loader.dataset.tensors, strict=True):  # type: ignore[attr-defined]
        assert torch.equal(then, now)


def test_entropies_are_those_of_the_students_own_forward(tmp_path: Path) -> None:
    kcd = KCD(teacher(), every_n_epochs=1)
    fit(tmp_path, kcd, max_epochs=1, limit_train_batches=2)
    images, _ = next(iter(foreign.digits()))
    logits = foreign.made().train()(images)
    assert kcd.knowledge is not None
    torch.testing.assert_close(kcd.knowledge.total[:16].float(), entropies(logits))
    assert kcd.knowledge.visits.tolist() == [1] * 32 + [0] * 32
    assert kcd.knowledge.kept[:32].tolist() == list(range(32, 64))  # not judged yet


def test_all_samples_are_plain_distillation(tmp_path: Path) -> None:
    """theta = 1: bit for bit."""
    kcd = KCD(teacher(), keep_ratio=1.0, every_n_epochs=1)
    plain = KnowledgeDistillation(teacher(), {"logits": 0.9}, task_weight=0.1)
    foreign.assert_same(fit(tmp_path, kcd), fit(tmp_path, plain))
    assert kcd.knowledge is not None
    assert (len(kcd.knowledge), kcd.knowledge.blends) == (64, [])


def test_without_mixing_images_stay(tmp_path: Path) -> None:
    one, other = (KCD(teacher(), keep_ratio=0.5, every_n_epochs=1, mix=mix) for mix in (True, False))
    modules = [fit(tmp_path, kcd, max_epochs=2) for kcd in (one, other)]
    assert other.knowledge is not None
    assert other.knowledge.blends == []
    assert not torch.equal(modules[0].net.stem.weight, modules[1].net.stem.weight)


@pytest.mark.parametrize("at_epoch_end", [True, False], ids=["after_the_epoch", "after_validation"])
def test_resumed_equals_uninterrupted(at_epoch_end: bool, tmp_path: Path) -> None:
    """The set, what is known of each sample, the blended images and the weights."""

    def data() -> Digits:
        return Digits(batch_size=64, size=8, val_size=1200)

    def kcd() -> KCD:
        return KCD(teacher(), keep_ratio=0.4, every_n_epochs=2)

    class Reads(Callback):
        """Asks for the data before the checkpoint is loaded."""

        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            with isolate_rng(include_cuda=False):
                next(iter(training_loaders(trainer, pl_module)))

    def run(*callbacks: Any, ckpt_path: Any = None) -> LightningModule:
        return fit(tmp_path, *callbacks, Reads(), data=data(), ckpt_path=ckpt_path, limit_val_batches=1)

    whole = kcd()
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=at_epoch_end)
    module = run(whole, checkpoint)
    for epoch in range(3) if at_epoch_end else [1]:
        again = kcd()
        foreign.assert_same(run(again, ckpt_path=tmp_path / f"epoch={epoch}.ckpt"), module)
        assert whole.knowledge is not None
        assert again.knowledge is not None
        for name in ("total", "visits", "kept"):
            assert torch.equal(getattr(again.knowledge, name), getattr(whole.knowledge, name)), name
        split: Any = data().splits.train
        sets: list[Any] = [split, *(blended(split, k.knowledge.blends, 0.7) for k in (whole, again))]  # type: ignore[union-attr]
        images = [part.pixels(torch.arange(len(split))) for part in sets]
        assert torch.equal(images[1], images[2])
        assert not torch.equal(images[1], images[0])
    saved = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)["callbacks"][whole.state_key]
    assert saved["teachers"]
    assert len(saved["knowledge"]["kept"]) == (139 if at_epoch_end else 243)


def test_workers_that_live_on_have_no_old_images(tmp_path: Path) -> None:
    modules, sets = [], []
    for workers in (0, 2):
        kcd = KCD(teacher(), keep_ratio=0.4, every_n_epochs=1)
        modules.append(fit(tmp_path, kcd, data=Digits(64, num_workers=workers, val_size=1200, size=8), max_epochs=3))
        sets.append(kcd.knowledge)
    foreign.assert_same(*modules)
    assert torch.equal(sets[0].kept, sets[1].kept)


def test_two_processes_decide_as_one() -> None:
    """What both have heard, with one sample that both were given, makes the set of one process."""
    first, second = torch.rand(2, 3, 9, generator=torch.Generator().manual_seed(0))
    first[:, ::2] = -1
    second[:, 3::2] = -1
    second[:, 1] = first[:, 1] - 0.01
    alone = KnowledgeSet.full(9)
    for column in torch.where(first >= 0, first, second):
        alone.hear(column)
    expected = values(alone.total, alone.visits, 40)
    for mine, others in ((first, second), (second, first)):
        kcd, trainer = KCD(teacher()), foreign.make_trainer(None)  # type: ignore[arg-type]
        kcd.knowledge = KnowledgeSet.full(9)
        for kcd._heard, other in zip(mine, others, strict=True):
            with patch.object(trainer.strategy, "reduce", side_effect=[torch.maximum(kcd._heard, other)]) as reduced:
                kcd._add_up(trainer)
            assert reduced.call_args.kwargs == {"reduce_op": "max"}
            assert kcd._heard is None
        assert torch.equal(values(kcd.knowledge.total, kcd.knowledge.visits, 40), expected)


def test_a_cache_changes_nothing(tmp_path: Path) -> None:
    """Blended images are new to it, and asked for once more."""
    modules = [
        fit(tmp_path, KCD(teacher(), keep_ratio=0.5, every_n_epochs=1, cache=cache))
        for cache in (None, str(tmp_path / "cache"))
    ]
    foreign.assert_same(*modules)


@pytest.mark.parametrize("losses", [{"similarity": 3000.0}, {"noise_contrast": 0.8}], ids=str)
def test_features_are_distilled_on_the_same_set(losses: dict[str, float], tmp_path: Path) -> None:
    """... also with a memory of all images, which has its own way to know them."""
    loader = foreign.digits()
    kcd = KCD(teacher(), losses, keep_ratio=0.5, every_n_epochs=1, task_weight=1.0, contrast_negatives=16)
    module = fit(tmp_path, kcd, data=loader, max_epochs=2)
    assert kcd.knowledge is not None
    assert len(kcd.knowledge) == 32
    assert module.trainer.fit_loop._data_source.dataloader() is loader


def test_channels_may_fall_in_mid_fit(tmp_path: Path) -> None:
    kcd = KCD(teacher(), keep_ratio=0.5, every_n_epochs=1)
    module = fit(tmp_path, kcd, L1Norm(pruning_ratio=0.5, start_epoch=2))
    assert module.net.blocks[0].conv1.weight.shape[0] == 6
    assert kcd.knowledge is not None
    assert len(kcd.knowledge) == 32
    assert module.trainer.global_step == 4 + 4 + 3 + 3


def test_what_is_left_is_in_the_account(tmp_path: Path) -> None:
    fit(tmp_path, KCD(teacher(), keep_ratio=0.5, every_n_epochs=1), max_epochs=1)
    (note,) = Account.load(tmp_path).notes
    assert note == "Teacher: Network, 226 k MACs and 3.72 k parameters. 32 of 64 training samples are left."


def test_a_schedule_by_steps_is_warned_of(tmp_path: Path) -> None:
    class ByStep(foreign.Foreign):
        def configure_optimizers(self) -> Any:
            ((optimizer,), (scheduler,)) = super().configure_optimizers()
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    for keep_ratio, warned in ((0.9, True), (1.0, False)):
        trainer = foreign.make_trainer(tmp_path, KCD(teacher(), keep_ratio=keep_ratio, every_n_epochs=1), max_epochs=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(ByStep(), foreign.digits())
        assert any("epochs become shorter" in str(w.message) for w in caught) == warned


# ---- what cannot be


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(TensorDataset(*next(iter(foreign.digits()))))


def digits_with(**kwargs: Any) -> DataLoader:
    return DataLoader(foreign.digits().dataset, 16, **kwargs)


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (lambda: DataLoader(Stream(), 4), "Stream.*no index"),
        (lambda: [foreign.digits(), foreign.digits()], "a list"),
        (lambda: digits_with(sampler=WeightedRandomSampler([1.0] * 64, 64)), "draw each once"),
        (lambda: digits_with(sampler=WeightedRandomSampler([1.0] * 64, 32)), "draws 32 samples"),
    ],
)
def test_data_without_indices_are_refused(data: Callable[[], Any], shown: str, tmp_path: Path) -> None:
    module = foreign.made()
    module.example_input_array = torch.rand(1, 1, 8, 8)
    trainer = foreign.make_trainer(tmp_path, KCD(teacher(), every_n_epochs=1))
    with pytest.raises(MisconfigurationException, match=shown):
        trainer.fit(module, data())
    assert not trainer.global_step


class Tokens(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        return torch.arange(64).view(1, 8, 8), 3


def test_what_cannot_be_blended_is_refused(tmp_path: Path) -> None:
    class Embed(foreign.Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0].float()), batch[1])

    for mix in (True, False):
        module = Embed()
        module.example_input_array = torch.rand(1, 1, 8, 8)
        trainer = foreign.make_trainer(tmp_path, KCD(teacher(), every_n_epochs=1, mix=mix))
        if mix:
            with pytest.raises(MisconfigurationException, match=r"mix=True.*Tokens gives none.*int64"):
                trainer.fit(module, DataLoader(Tokens(), 8))
        else:
            trainer.fit(module, DataLoader(Tokens(), 8))


def test_images_of_several_sizes_cannot_be_blended() -> None:
    data: Any = [(torch.rand(1, 4 + i, 4), i) for i in range(6)]
    with pytest.raises(ValueError, match=r"\(1, 6, 4\), \(1, 8, 4\)|\(1, 6, 4\)"):
        blended(data, BLENDS, 0.7).__getitems__([2])  # type: ignore[attr-defined]


def test_logits_of_another_batch_are_refused(tmp_path: Path) -> None:
    class Twice(foreign.Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(torch.cat([batch[0], batch[0]])), torch.cat([batch[1], batch[1]]))

    trainer = foreign.make_trainer(tmp_path, KCD(teacher(), every_n_epochs=1))
    with pytest.raises(MisconfigurationException, match=r"16 samples of the batch.*logits \(32, 10\)"):
        trainer.fit(Twice(), foreign.digits())
    assert not trainer.global_step


def test_another_training_set_is_refused_on_resume(tmp_path: Path) -> None:
    def kcd() -> KCD:
        return KCD(teacher(), every_n_epochs=1)

    fit(tmp_path, kcd(), ModelCheckpoint(tmp_path, "last"), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="has 48 samples, and had 64"):
        fit(tmp_path, kcd(), ckpt_path=tmp_path / "last.ckpt", data=foreign.digits(48))


@pytest.mark.parametrize(
    ("arguments", "of_trainer", "shown"),
    [
        ({"every_n_epochs": 5}, {}, r"every_n_epochs=5\) never.*max_epochs=4"),
        ({"every_n_epochs": 3, "start_epoch": 3}, {"max_epochs": 2}, "start_epoch=3"),
        ({}, {"max_epochs": -1}, "num_stages=None"),
        ({"every_n_epochs": 1}, {"overfit_batches": 2}, "overfit_batches=2"),
    ],
)
def test_schedules_that_cannot_be(arguments: Any, of_trainer: Any, shown: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=shown):
        fit(tmp_path, KCD(teacher(), **arguments), **of_trainer)


def test_stages(tmp_path: Path) -> None:
    def ends(max_epochs: int, **arguments: Any) -> list[int]:
        trainer = Trainer(max_epochs=max_epochs, logger=False, accelerator="cpu", enable_checkpointing=False)
        return list(KCD(teacher(), **arguments)._ends(trainer)[:7])

    assert ends(240) == [40, 80, 120, 160, 200, 240]
    assert ends(240, start_epoch=81) == [120, 160, 200, 240]
    assert ends(7, every_n_epochs=3, start_epoch=3) == [3, 6]
    assert len(ends(-1, num_stages=6)) == 7


# ---- the paper's students


@pytest.mark.parametrize("row", card("kcd").published, ids=lambda row: f"{row.network} {row.setting}, arXiv:2207.05409")
def test_published_students_and_their_recipes(row: Row) -> None:
    recipe = yaml.safe_load(find_config(row.config).read_text())
    given = recipe["model"]["init_args"]
    with torch.device("meta"):
        network = given["network"]
        student = build(network, num_classes=100) if isinstance(network, str) else CIFARResNet(**network["init_args"])
    cost = profile(student, (1, 3, 32, 32))
    assert (cost.macs, cost.params) == (row.result["macs"], row.result["params"])
    arguments = recipe["trainer"]["callbacks"][0]["init_args"]
    kcd = KCD(**{**arguments, "teacher": "resnet56"})
    alone = {"probability": 30_000.0, "noise_contrast": 0.8}
    loss = row.setting.partition(", ")[2]
    assert kcd.losses == ({loss: alone[loss]} if loss else {"logits": 0.9})
    assert (kcd.task_weight, kcd.temperature) == (1.0 if loss else 0.1, 4.0)
    assert (kcd.keep_ratio, kcd.every_n_epochs, kcd.visit_norm, kcd.visit_exponent) == (0.7, 40, 40, 0.03)
    assert (kcd.mix, kcd.mix_low, kcd.start_epoch) == (True, 0.7, 0)
    trainer = Trainer(max_epochs=recipe["trainer"]["max_epochs"], logger=False, accelerator="cpu")
    assert len(kcd._ends(trainer)) == 6
    small = any(name in row.network for name in ("MobileNet", "ShuffleNet"))
    assert given["optimizer"]["init_args"] == {"lr": 0.01 if small else 0.05, "momentum": 0.9, "weight_decay": 5e-4}
    assert given["lr_scheduler"]["init_args"] == {"milestones": [150, 180, 210], "gamma": 0.1}
