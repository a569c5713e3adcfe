from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from real_data import real_data
from torchvision import datasets

from lightning_compress.datamodules import CIFAR10, CIFAR100

RNG = np.random.default_rng(0)
TRAIN, TEST = (RNG.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8) for count in (50, 20))
KINDS = [(CIFAR10, "cifar10.npz"), (CIFAR100, "cifar100.npz")]


def labels(images: np.ndarray, classes: int) -> np.ndarray:
    return np.arange(len(images)) % classes


def write_packed(root: Path, name: str, classes: int) -> None:
    np.savez(root / name, x_train=TRAIN, y_train=labels(TRAIN, classes), x_test=TEST, y_test=labels(TEST, classes))


def write_torchvision(root: Path, monkeypatch: pytest.MonkeyPatch, source: type, classes: int) -> None:
    """Write torchvision's layout, and let torchvision expect these files' MD5."""
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    key = "labels" if classes == 10 else "fine_labels"

    def write(name: str, content: dict) -> list[str]:
        written = pickle.dumps(content)
        (folder / name).write_bytes(written)
        return [name, hashlib.md5(written).hexdigest()]

    def batch(images: np.ndarray, targets: np.ndarray) -> dict:
        return {"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1), key: targets.tolist()}

    names = [name for name, _ in source.train_list]
    parts = zip(names, np.split(TRAIN, len(names)), np.split(labels(TRAIN, classes), len(names)), strict=True)
    monkeypatch.setattr(source, "train_list", [write(name, batch(x, y)) for name, x, y in parts])
    test = batch(TEST, labels(TEST, classes))
    monkeypatch.setattr(source, "test_list", [write(source.test_list[0][0], test)])
    meta = write(source.meta["filename"], {source.meta["key"]: [str(i) for i in range(classes)]})
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": meta[1]})


@pytest.mark.parametrize(("kind", "packed"), KINDS)
def test_both_layouts_give_the_same_images(
    kind: type[CIFAR10] | type[CIFAR100], packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "packed").mkdir()
    write_packed(tmp_path / "packed", packed, kind.num_classes)
    write_torchvision(tmp_path / "unpacked", monkeypatch, kind.source, kind.num_classes)
    one, other = (kind(str(tmp_path / name), val_size=10).splits for name in ("packed", "unpacked"))
    assert [len(split) for split in one] == [40, 10, 20]
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.indices, b.indices)
    assert torch.equal(one.test.images, torch.from_numpy(TEST).permute(0, 3, 1, 2))
    assert one.train.labels.tolist() == labels(TRAIN, kind.num_classes).tolist()


def test_batches(tmp_path: Path) -> None:
    write_packed(tmp_path, "cifar10.npz", 10)
    data = CIFAR10(str(tmp_path), batch_size=32, eval_batch_size=8)
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (32, 3, 32, 32)
    assert images.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert [len(split) for split in data.splits] == [45, 5, 20]
    assert len(data.test_dataloader()) == 3
    black = (0 - torch.tensor(data.mean)) / torch.tensor(data.std)
    assert torch.isclose(images.amin((0, 2, 3)), black).all()  # the padding is black, not grey


@pytest.mark.parametrize(("kind", "packed"), KINDS)
def test_an_absent_folder_says_what_is_read(kind: type[CIFAR10], packed: str, tmp_path: Path) -> None:
    folder = kind.source.base_folder
    expected = rf"{packed} or {folder}/ with torchvision's untouched files. download=True fetches it"
    with pytest.raises(MisconfigurationException, match=rf"{kind.__name__}: no data.*no such folder.*{expected}"):
        kind(str(tmp_path / "nowhere")).setup("fit")
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(MisconfigurationException, match=rf"it holds holiday.jpg.*{expected}"):
        kind(str(tmp_path)).setup("fit")


def test_damaged_torchvision_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_torchvision(tmp_path, monkeypatch, datasets.CIFAR10, 10)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"half")
    with pytest.raises(MisconfigurationException, match=r"it holds cifar-10-batches-py.*untouched files"):
        CIFAR10(str(tmp_path)).setup("fit")


def test_damaged_packed_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cifar10.npz"
    write_packed(tmp_path, "cifar10.npz", 10)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(MisconfigurationException, match=r"cifar10.npz is broken or lacks one of x_train, y_train"):
        CIFAR10(str(tmp_path)).setup("fit")
    np.savez(path, x_train=TRAIN, y_train=labels(TRAIN, 10))
    with pytest.raises(MisconfigurationException, match="x_test"):
        CIFAR10(str(tmp_path)).setup("fit")
    np.savez(path, x_train=TRAIN / 255, y_train=labels(TRAIN, 10), x_test=TEST, y_test=labels(TEST, 10))
    with pytest.raises(MisconfigurationException, match=r"expected images of uint8.*got float64 \(50, 32, 32, 3\)"):
        CIFAR10(str(tmp_path)).setup("fit")


def test_downloads_only_when_asked_and_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(root: Path, train: bool, download: bool) -> None:
        asked.append((root, train, download))

    monkeypatch.setattr(CIFAR10, "source", staticmethod(fetch))
    CIFAR10(str(tmp_path)).prepare_data()
    assert asked == []
    CIFAR10(str(tmp_path), download=True).prepare_data()
    assert asked == [(tmp_path, True, True), (tmp_path, False, True)]
    write_packed(tmp_path, "cifar10.npz", 10)
    CIFAR10(str(tmp_path), download=True).prepare_data()
    assert len(asked) == 2


@pytest.mark.real_data
@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100])
def test_real_images_have_the_stated_mean(kind: type[CIFAR10]) -> None:
    train, val, test = kind(real_data(f"{kind.__name__.lower()}.npz"), val_size=5000).splits
    assert [len(train), len(val), len(test)] == [45000, 5000, 10000]
    assert (val.labels[val.indices].bincount() == 5000 // kind.num_classes).all()
    mean = train.images.float().mean((0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor(kind.mean), atol=1e-4)
