"""What all image datamodules share: splits, order, augmentation, resuming."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_compress.datamodules import Digits, ImageFolder
from lightning_compress.datamodules._images import Augmentation, EpochSampler, ImageArrays, hold_out


class TinyClassifier(LightningModule):
    """Not one of ours: the datamodules must work with any module."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(shape[0], 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
        self.net(torch.zeros(1, *shape))
        self.seen: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch[0].clone())
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def trainer(epochs: int, folder: Path, **arguments: Any) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"limit_train_batches": 5, "limit_val_batches": 0, "enable_checkpointing": False, **arguments},
    )


def write_photographs(root: Path, per_class: int = 6) -> Path:
    """Noise in ImageNet's layout: three classes, train and val."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ant", "bee", "cat"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                height, width = rng.integers(24, 48, 2)
                Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(params=["digits", "folder"])
def make_data(request: pytest.FixtureRequest, tmp_path: Path):
    if request.param == "digits":
        return lambda **kwargs: Digits(**{"batch_size": 16, **kwargs})
    root = write_photographs(tmp_path / "photographs")
    return lambda **kwargs: ImageFolder(str(root), **{"batch_size": 4, "size": 16, **kwargs})


def batches(data: LightningDataModule, epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def assert_same_batches(one: list[Any], other: list[Any]) -> None:
    assert len(one) == len(other)
    for (x, y), (x2, y2) in zip(one, other, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(make_data, tmp_path: Path) -> None:
    def fit(epochs: int, seed: int, ckpt_path: Path | None = None) -> tuple[TinyClassifier, Trainer]:
        seed_everything(0, verbose=False)
        data = make_data()
        module = TinyClassifier(data.input_shape)
        seed_everything(seed, verbose=False)  # the global generators must play no part in the batches
        run = trainer(epochs, tmp_path)
        run.fit(module, data, ckpt_path=ckpt_path)
        return module, run

    whole, _ = fit(2, seed=1)
    _, first_half = fit(1, seed=2)
    first_half.save_checkpoint(tmp_path / "one.ckpt")
    resumed, _ = fit(2, seed=3, ckpt_path=tmp_path / "one.ckpt")

    half = len(whole.seen) // 2
    assert not torch.equal(whole.seen[0], whole.seen[half])
    assert len(resumed.seen) == half
    assert all(map(torch.equal, whole.seen[half:], resumed.seen))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_epochs_and_seeds_differ_and_repeat(make_data) -> None:
    first = batches(make_data(), epoch=3)
    assert_same_batches(first, batches(make_data(), epoch=3))
    for other in (batches(make_data(), epoch=4), batches(make_data(seed=1), epoch=3)):
        assert not torch.equal(first[0][0], other[0][0])


def test_workers_that_live_through_epochs_change_nothing(make_data) -> None:
    loader = make_data(num_workers=2).train_dataloader()
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        assert_same_batches(list(loader), batches(make_data(), epoch))


def test_the_ranks_share_the_images_and_their_augmentation(make_data) -> None:
    def keys(loaded: list[tuple[Tensor, Tensor]]) -> set[bytes]:
        return {image.numpy().tobytes() for images, _ in loaded for image in images}

    shares = []
    for rank in range(2):
        data = make_data()
        data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": rank})
        shares.append(batches(data, epoch=1))
    assert len(shares[0]) == len(shares[1])
    assert keys(shares[0]) | keys(shares[1]) == keys(batches(make_data(), epoch=1))


def test_the_batch_size_does_not_change_an_images_augmentation(make_data) -> None:
    one, other = (torch.cat([x for x, _ in batches(make_data(batch_size=size), 2)]) for size in (5, 7))
    assert torch.equal(one, other)


def test_a_loader_that_a_user_builds_over_the_dataset_works(make_data) -> None:
    data = make_data()
    images, labels = next(iter(DataLoader(data.splits.train, batch_size=3)))
    assert images.shape == (3, *data.input_shape)
    assert labels.dtype == torch.int64
    assert torch.equal(data.splits.train[1][0], images[1])


def test_iterating_over_a_dataset_ends(make_data) -> None:
    train = make_data().splits.train
    assert sum(1 for _ in train) == len(train)


def test_evaluation_is_never_augmented_or_shuffled(make_data) -> None:
    data = make_data(eval_batch_size=7)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert loader.batch_size == 7
        assert_same_batches(list(loader), list(loader))
    still = make_data(augment=False)
    loaded = torch.cat([x for x, _ in batches(still, 5)]).flatten(1).sort(0).values
    assert torch.equal(loaded, torch.stack([x for x, _ in still.splits.train]).flatten(1).sort(0).values)


def test_lightning_keeps_the_sampler_under_ddp_and_turns_it_off_to_overfit(tmp_path: Path) -> None:
    for arguments, kind in (
        ({"strategy": "ddp"}, EpochSampler),
        ({"overfit_batches": 2}, torch.utils.data.SequentialSampler),
    ):
        run = trainer(1, tmp_path, **arguments)
        run.fit(TinyClassifier((1, 32, 32)), Digits(batch_size=16))
        assert type(run.train_dataloader.sampler) is kind
    torch.distributed.destroy_process_group()  # Lightning leaves it to the end of the process


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_crop_and_flip_against_a_loop(mode: Literal["constant", "reflect"]) -> None:
    augmentation = Augmentation(padding=3, flip=True, mode=mode)
    images = torch.randint(0, 256, (200, 2, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = augmentation.draw(200, seed=4, epoch=9)
    expected = []
    for image, (top, left, flip) in zip(images, draws.tolist(), strict=True):
        crop = F.pad(image.float(), (3, 3, 3, 3), mode).byte()[:, top : top + 5, left : left + 6]
        expected.append(crop.flip(-1) if flip else crop)
    assert torch.equal(augmentation(images, draws), torch.stack(expected))
    assert [column.unique().tolist() for column in draws.T] == [list(range(7)), list(range(7)), [0, 1]]
    assert Augmentation(padding=3, flip=False).draw(200, 4, 9)[:, 2].max() == 0


def test_images_are_normalised_as_torchvision_does() -> None:
    from torchvision.transforms import v2

    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    dataset = ImageArrays(images, torch.arange(4), torch.tensor([2, 0]), mean, std)
    reference = v2.Normalize(mean, std)(images[[2, 0]].float() / 255)
    loaded = dataset.__getitems__([0, 1])
    torch.testing.assert_close(torch.stack([x for x, _ in loaded]), reference)
    assert [y for _, y in loaded] == [2, 0]


@pytest.mark.parametrize("size", [0, 1, 7, 30, 0.1, 0.5])
def test_hold_out_takes_every_class_in_its_share(size: float) -> None:
    counts = torch.tensor([10, 20, 30, 41])
    labels = torch.repeat_interleave(torch.arange(4), counts)[torch.randperm(101)]
    rest, held_out = hold_out(labels, size, seed=0)
    count = round(size * 101) if size < 1 else size
    assert torch.equal(torch.cat([rest, held_out]).sort().values, torch.arange(101))
    assert len(held_out) == count
    assert (labels[held_out].bincount(minlength=4) - counts * count / 101).abs().max() <= 1
    assert torch.equal(hold_out(labels, size, seed=0)[1], held_out)


def test_hold_out_by_seed() -> None:
    labels = torch.arange(100) % 2
    assert not torch.equal(hold_out(labels, 20, seed=0)[1], hold_out(labels, 20, seed=1)[1])
    with pytest.raises(ValueError, match="val_size: 100 would leave none of 100 training images"):
        hold_out(labels, 100, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected 1 or more, got 0"),
        ({"val_size": -1}, "val_size: expected 0 or more, got -1"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
        ({"mean": (0.1, 0.2)}, r"mean, std: expected 1 values each, one per channel, got \(0.1, 0.2\)"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(**arguments)
