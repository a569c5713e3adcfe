"""What the image translation datamodules share: preparation, order, two images of a sample, evaluation."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_folders import batches, paired_folder, stored, unpaired_folder
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lightning_compress.datamodules import PairedImages, PairedPhotographs, UnpairedImages, UnpairedPhotographs
from lightning_compress.datamodules._translation import PairedSamples, Preparation, tiles


@pytest.fixture(params=["paired", "unpaired", "paired photographs", "unpaired photographs"])
def make_data(request: pytest.FixtureRequest, tmp_path: Path):
    paired_folder(tmp_path / "p", {"train": 7, "val": 3, "test": 2})
    unpaired_folder(tmp_path / "u", {"trainA": 5, "trainB": 7, "testA": 2, "testB": 3})
    small: dict[str, Any] = {"crop_size": 8, "batch_size": 3}
    return {
        "paired": lambda **kw: PairedImages(str(tmp_path / "p"), **{**small, "load_size": 10, **kw}),
        "unpaired": lambda **kw: UnpairedImages(str(tmp_path / "u"), **{**small, "load_size": 10, **kw}),
        "paired photographs": lambda **kw: small_photographs(PairedPhotographs, **small, **kw),
        "unpaired photographs": lambda **kw: UnpairedPhotographs(**{**small, "samples_per_epoch": 7, **kw}),
    }[request.param]


def small_photographs(kind: type[PairedPhotographs], **arguments: Any) -> PairedPhotographs:
    """With noise in place of the seven photographs, whose edges take a second to find."""
    data = kind(samples_per_epoch=7, **arguments)
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 40, 3), dtype=np.uint8)) for i in range(3)]
    preparation = Preparation(None, data.crop_size, data.flip)
    data._datasets["train"] = PairedSamples(images, preparation, data.direction, 7, data.seed)
    return data


def same(one: list[Any], other: list[Any]) -> bool:
    return all(torch.equal(x, y) for xs, ys in zip(one, other, strict=True) for x, y in zip(xs, ys, strict=True))


def test_batches(make_data) -> None:
    data = make_data()
    assert data.input_shape == (3, 8, 8)
    found = batches(data)
    assert [(len(a), len(b)) for a, b in found] == [(3, 3), (3, 3), (1, 1)]
    images = torch.cat([image for pair in found for image in pair])
    assert images.shape[1:] == (3, 8, 8)
    assert images.dtype == torch.float32
    assert -1 <= images.min() < -0.1
    assert images.max() <= 1
    assert torch.equal(stored(images) / 127.5 - 1, images)


def test_order_and_places_depend_on_seed_and_epoch_alone(make_data) -> None:
    data = make_data()
    torch.manual_seed(0)
    first, second = batches(data, 0), batches(data, 1)
    torch.manual_seed(1)
    assert same(batches(make_data(), 1), second)
    assert same(batches(make_data(), 0), first)
    assert not same(first, second)
    assert not same(batches(make_data(seed=1), 0), first)


def test_workers_change_nothing(make_data) -> None:
    assert same(batches(make_data(num_workers=1), 2), batches(make_data(), 2))


def test_the_direction_exchanges_the_two(make_data) -> None:
    data, other = make_data(), make_data(direction="BtoA")
    a, b = next(iter(data.test_dataloader()))
    b2, a2 = next(iter(other.test_dataloader()))
    assert torch.equal(a, a2)
    assert torch.equal(b, b2)


def test_evaluation_repeats_itself(make_data) -> None:
    data = make_data(flip=True)
    for loader in (data.val_dataloader, data.test_dataloader, data.predict_dataloader):
        one, other = ([image for pair in islice(loader(), 3) for image in pair if image is not None] for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
        assert {image.shape for image in one} == {(1, 3, 8, 8)}


class Seen(LightningModule):
    """Not one of ours; remembers its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        return self.weight * batch[0].mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert any(image is not None for image in batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_fit_sees_another_order_in_each_epoch_also_after_a_resume(make_data, tmp_path: Path) -> None:
    def trainer(epochs: int) -> Trainer:
        return Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0, limit_val_batches=4,
        )  # fmt: skip

    whole, second = Seen(), Seen()
    trainer(2).fit(whole, make_data())
    stopped = trainer(1)
    stopped.fit(Seen(), make_data())
    stopped.save_checkpoint(tmp_path / "epoch.ckpt")
    trainer(2).fit(second, make_data(), ckpt_path=tmp_path / "epoch.ckpt")
    assert len(whole.seen) == 6
    assert same(whole.seen[3:], second.seen)
    assert not same(whole.seen[:3], second.seen)


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_halves_of_a_pair_are_cut_and_mirrored_alike(tmp_path: Path, direction: Any) -> None:
    paired_folder(tmp_path, {"train": 5, "test": 1}, twins=True)
    data = PairedImages(str(tmp_path), crop_size=8, load_size=11, direction=direction)
    samples = data.dataset("train")
    seen = set()
    for index in range(100):
        a, b = samples[index]
        assert torch.equal(a, b)
        seen.add(a.numpy().tobytes())
    assert len(seen) > 60  # of 5 images at 16 places, mirrored or not


def test_swapped_direction_swaps_training_pairs(tmp_path: Path) -> None:
    paired_folder(tmp_path, {"train": 5, "test": 1})
    there, back = (
        PairedImages(str(tmp_path), crop_size=8, load_size=11, direction=direction).dataset("train")  # type: ignore[arg-type]
        for direction in ("AtoB", "BtoA")
    )
    for index in range(100):
        (a, b), (b2, a2) = there[index], back[index]
        assert torch.equal(a, a2)
        assert torch.equal(b, b2)
        assert not torch.equal(a, b)


def test_preparation_is_that_of_torchvision() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    preparation = Preparation(load_size=20, crop_size=16, flip=True)
    resized = v2.functional.resize(image, [20, 20], v2.InterpolationMode.BICUBIC)
    whole = v2.functional.to_dtype(v2.functional.to_image(resized), torch.float32, scale=True)
    whole = v2.functional.normalize(whole, [0.5] * 3, [0.5] * 3)
    places = [preparation.draw(np.random.default_rng(seed), image.size) for seed in range(200)]
    for place in places[:20]:
        expected = whole[:, place.top : place.top + 16, place.left : place.left + 16]
        expected = expected.flip(2) if place.mirror else expected
        torch.testing.assert_close(preparation(image, place), expected, rtol=0, atol=1e-6)
    assert {(p.left, p.top) for p in places} == {(i, j) for i in range(5) for j in range(5)}
    assert 70 < sum(p.mirror for p in places) < 130
    still = Preparation(load_size=16, crop_size=16, flip=False)
    assert {still.draw(np.random.default_rng(seed), image.size) for seed in range(20)} == {(0, 0, False)}


def test_tiles() -> None:
    image = np.arange(5 * 7 * 3).reshape(5, 7, 3)
    found = tiles(image, 2)
    assert len(found) == 6
    assert np.array_equal(found[4], image[2:4, 2:4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_size": 0}, "crop_size: expected 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size: expected 1 or more, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size: expected 1 or more, got 0"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
        ({"direction": "AtoC"}, "direction must be 'AtoB' or 'BtoA', got 'AtoC'"),
    ],
)
@pytest.mark.parametrize("kind", [PairedImages, UnpairedImages, PairedPhotographs, UnpairedPhotographs])
def test_bad_arguments(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load_size": 255}, "load_size: expected at least crop_size=256, got 255"),
        ({"limit_items": 0}, "limit_items: expected 1 or more, or None for all, got 0"),
    ],
)
@pytest.mark.parametrize("kind", [PairedImages, UnpairedImages])
def test_bad_arguments_of_folders(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


@pytest.mark.parametrize(("kind", "most"), [(PairedPhotographs, 300), (UnpairedPhotographs, 170)])
def test_bad_arguments_of_photographs(kind: Any, most: int) -> None:
    with pytest.raises(ValueError, match=f"crop_size: expected {most} at most, .*, got {most + 1}"):
        kind(crop_size=most + 1)
    with pytest.raises(ValueError, match="samples_per_epoch: expected 1 or more, got 0"):
        kind(samples_per_epoch=0)
