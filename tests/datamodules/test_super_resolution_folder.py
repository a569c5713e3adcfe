from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from real_data import real_data

from lightning_compress.datamodules import SuperResolutionFolder
from lightning_compress.datamodules.bicubic import bicubic
from lightning_compress.datamodules.super_resolution_folder import find_files


def write(file: Path, height: int, width: int, mode: str = "RGB") -> np.ndarray:
    """Write an image of noise that its name decides."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(list(file.name.encode())).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    image.save(file)
    return np.asarray(image.convert("RGB"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(6):
        write(tmp_path / "train" / f"{i}.png", 40 + i, 50)
    for i in range(3):
        write(tmp_path / "val" / f"{i}.png", 41, 43)
    write(tmp_path / "SetA" / "a.png", 20, 24)
    write(tmp_path / "SetB" / "b.png", 24, 20)
    write(tmp_path / "SetB" / "c.png", 28, 20)
    return tmp_path


def folder(root: Path, **arguments: Any) -> SuperResolutionFolder:
    defaults: dict[str, Any] = {"train": "train", "val": "val", "test": ["SetA", "SetB"], "patch_size": 32}
    return SuperResolutionFolder(str(root), **{**defaults, "samples_per_epoch": 8, **arguments})


LAYOUTS = {
    "plain": ("X/baby.png", "X_LR_bicubic/X4/babyx4.png", "X"),
    "DIV2K": ("DIV2K_train_HR/0001.png", "DIV2K_train_LR_bicubic/X4/0001x4.png", "DIV2K_train_HR"),
    "benchmark": ("Set5/HR/baby.png", "Set5/LR_bicubic/X4/babyx4.png", "Set5"),
    "paired": ("Set5/image_SRF_4/img_001_SRF_4_HR.png", "Set5/image_SRF_4/img_001_SRF_4_LR.png", "Set5"),
}


@pytest.mark.parametrize(("high", "low", "name"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("use_lr_files", [True, False])
def test_small_images_are_read_where_there_are_some(
    tmp_path: Path, high: str, low: str, name: str, use_lr_files: bool
) -> None:
    large = write(tmp_path / high, 26, 35)
    small = write(tmp_path / low, 6, 8)
    assert find_files(tmp_path / name, 4) == [(tmp_path / high, tmp_path / low)]
    ((pair,),) = folder(tmp_path, test=name, use_lr_files=use_lr_files).pairs("test").values()
    assert torch.equal(pair.high, torch.from_numpy(large[:24, :32].copy()).permute(2, 0, 1))
    expected = torch.from_numpy(small.copy()).permute(2, 0, 1) if use_lr_files else bicubic(pair.high, (6, 8))
    assert torch.equal(pair.low, expected)
    (tmp_path / low).unlink()
    assert find_files(tmp_path / name, 4) == [(tmp_path / high, None)]


def test_splits(root: Path) -> None:
    data = folder(root, val_size=2)
    assert [pair.high.shape[1] for pair in data.pairs("train")["train"]] == [40, 40, 40, 40, 44, 44]
    assert [Path(pair.name).name for pair in data.pairs("val")["val"]] == ["0.png", "1.png"]
    assert data.test_names == ("SetA", "SetB")
    data.setup("test")
    assert [len(loader.dataset) for loader in data.test_dataloader()] == [1, 2]
    assert [high.shape for _, high in data.test_dataloader()[1]] == [(1, 3, 24, 20), (1, 3, 28, 20)]


def test_images_are_held_out_where_there_are_none_to_validate_on(root: Path) -> None:
    def names(data: SuperResolutionFolder, split: Any) -> set[str]:
        return {pair.name for pair in data.pairs(split)[split]}

    data = folder(root, train=["train", "val"], val=None, val_size=4)
    assert len(names(data, "val")) == 4
    assert len(names(data, "train")) == 5
    assert not names(data, "train") & names(data, "val")
    seeds = [names(folder(root, val=None, val_size=2, seed=seed), "val") for seed in range(5)]
    assert any(held_out != seeds[0] for held_out in seeds)
    with pytest.raises(ValueError, match="val_size: 6 would leave none of 6 training images"):
        folder(root, val=None, val_size=6).setup("fit")


def test_grey_and_transparent_images_become_colour(tmp_path: Path) -> None:
    grey = write(tmp_path / "X" / "grey.png", 8, 8, "L")
    write(tmp_path / "X" / "transparent.png", 8, 8, "RGBA")
    first, second = folder(tmp_path, test="X").pairs("test")["X"]
    assert first.high.shape == second.high.shape == (3, 8, 8)
    assert torch.equal(first.high[0], torch.from_numpy(grey[..., 0].copy()))


def test_images_without_room_for_a_patch_are_left_out(root: Path) -> None:
    data = folder(root, patch_size=44)
    with pytest.warns(UserWarning, match=r"4 of 6 training images are smaller than 44 pixels; .*0.png has 48x40"):
        data.setup("fit")
    with pytest.warns(UserWarning, match="left out"):
        low, high = next(iter(data.train_dataloader()))
    assert (low.shape, high.shape) == ((8, 3, 11, 11), (8, 3, 44, 44))
    with pytest.raises(MisconfigurationException, match="patch_size: 6 of 6 training images are smaller than 64"):
        folder(root, patch_size=64).setup("fit")


def test_decoded_images_are_kept_and_renewed(root: Path) -> None:
    cache = root / "cache"
    plain, cached = folder(root), folder(root, cache=str(cache))
    expected = [pair for pairs in plain.pairs("test").values() for pair in pairs]
    for data in (cached, folder(root, cache=str(cache))):
        for pair, other in zip(expected, (p for ps in data.pairs("test").values() for p in ps), strict=True):
            assert torch.equal(pair.low, other.low)
            assert torch.equal(pair.high, other.high)
    assert len(list(cache.iterdir())) == 6
    before = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    folder(root, cache=str(cache)).setup("test")
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == before

    file = root / "SetA" / "a.png"
    Image.new("RGB", (24, 20), (1, 2, 3)).save(file)
    os.utime(file, ns=(2**62, 2**62))
    (pair,) = folder(root, cache=str(cache)).pairs("test")["SetA"]
    assert torch.equal(pair.high, torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1).expand(3, 20, 24))
    assert torch.equal(pair.low[:, 0, 0], torch.tensor([1, 2, 3], dtype=torch.uint8))


def test_absent_folders_say_what_is_read(root: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"no such folder.*Expected <folder>/\*.png or <name>_HR"):
        folder(root, train="nowhere").setup("fit")
    (root / "empty").mkdir()
    with pytest.raises(MisconfigurationException, match=r"root='.*empty' \(it holds nothing\)"):
        folder(root, test="empty").setup("test")
    folder(root, train="nowhere").setup("test")  # which needs no training images


def test_what_is_no_image_is_named(root: Path) -> None:
    (root / "SetA" / "broken.png").write_bytes(b"no image")
    with pytest.raises(MisconfigurationException, match=r"broken.png cannot be read as an image"):
        folder(root).setup("test")


def test_small_images_of_another_scale_are_named(tmp_path: Path) -> None:
    write(tmp_path / "Set5" / "HR" / "baby.png", 24, 32)
    write(tmp_path / "Set5" / "LR_bicubic" / "X4" / "babyx4.png", 12, 16)
    with pytest.raises(MisconfigurationException, match=r"babyx4.png has 16x12 pixels, which is not 1/4 of .*32x24"):
        folder(tmp_path, test="Set5").setup("test")


def test_bad_arguments(root: Path) -> None:
    with pytest.raises(ValueError, match="val_size: expected 1 or more, got 0"):
        folder(root, val_size=0)
    with pytest.raises(ValueError, match="test: expected folders of different names, got a/Set5, b/Set5"):
        folder(root, test=["a/Set5", "b/Set5"])


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "count"), [("Set5", 5), ("Set14", 14)])
def test_the_published_sets_are_read(name: str, count: int) -> None:
    root = real_data(f"super-resolution/{name}") / "super-resolution"
    for scale in (2, 3, 4):
        data = SuperResolutionFolder(str(root), test=name, scale=scale, patch_size=12 * scale)
        pairs = data.pairs("test")[name]
        assert len(pairs) == count
        assert all(low is not None for _, low in find_files(root / name, scale))
