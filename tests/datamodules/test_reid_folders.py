"""SYSU-MM01 and RegDB, as small trees in their layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image

from lightning_compress.datamodules import SYSUMM01, RegDB


def draw(path: Path, value: int, width: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((50, width, 3), value, dtype=np.uint8)
    pixels[:, : width // 2] //= 2
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def sysu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sysu")
    for name, identities in (("train", "2,5,9"), ("val", "7"), ("test", "1,4")):
        (root / "exp").mkdir(exist_ok=True)
        (root / "exp" / f"{name}_id.txt").write_text(identities + "\n")
    for identity in (1, 2, 4, 5, 7, 9):
        for camera in range(1, 7):
            if (identity, camera) != (4, 5):  # nobody is seen by all cameras
                for shot in (1, 2):
                    draw(root / f"cam{camera}" / f"{identity:04d}" / f"{shot:04d}.jpg", 10 * identity + camera)
    return root


@pytest.fixture(scope="module")
def regdb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("regdb")
    (root / "idx").mkdir()
    for kind, folder in (("visible", "Visible"), ("thermal", "Thermal")):
        for split, persons in (("train", (1, 4, 6)), ("test", (2, 3))):
            lines = []
            for label, person in enumerate(persons):
                for shot in range(2):
                    path = f"{folder}/{person}/someone {kind[0]}_{shot}.bmp"  # a path may have blanks
                    draw(root / path, 20 * person)
                    lines.append(f"{path} {label}")
            (root / "idx" / f"{split}_{kind}_3.txt").write_text("\n".join(lines) + "\n")
    return root


def test_sysu_trains_on_both_lists_and_validates_on_the_third(sysu: Path) -> None:
    data = SYSUMM01(str(sysu), batch_size=8, num_instances=4, size=(16, 8))
    assert data.num_classes == 4
    train, val, test = data.splits
    assert len(train) == 4 * 6 * 2
    assert train.tags[0].sum() == 4 * 2 * 2
    assert data.training_labels().unique().tolist() == [0, 1, 2, 3]
    for matching in (val, test):
        assert [len(part) for part in matching] == [2 * 2 * 2, 2 * 4 * 2 - 2]
        assert [part.tags[0].unique().tolist() for part in matching] == [[3, 6], [1, 2, 4, 5]]
        assert {label for _, label in matching.query.dataset.samples} == {1, 4}


def test_sysu_indoors_and_with_a_validation_list(sysu: Path) -> None:
    data = SYSUMM01(str(sysu), mode="indoor", train_on_val=False, batch_size=8, num_instances=4, size=(16, 8))
    assert data.num_classes == 3
    assert {label for _, label in data.splits.val.query.dataset.samples} == {7}
    assert {label for _, label in data.splits.test.query.dataset.samples} == {1, 4}
    assert data.splits.test.gallery.tags[0].unique().tolist() == [1, 2]
    assert data.retrieval().gallery_cameras == (1, 2)
    assert (data.retrieval().trials, data.retrieval().shots, data.retrieval().unique_identities) == (10, 1, True)


@pytest.mark.parametrize(("query", "camera"), [("visible", 1), ("thermal", 2)])
def test_regdb_has_trials_and_two_directions(regdb: Path, query: str, camera: int) -> None:
    data = RegDB(str(regdb), trial=3, query=query, batch_size=8, num_instances=4, size=(16, 8))
    assert data.num_classes == 3
    train, val, test = data.splits
    assert len(train) == 3 * 4
    assert train.tags[0].sum() == 6
    assert [part.tags[0].unique().tolist() for part in test] == [[camera], [3 - camera]]
    assert [len(part) for part in val] == [4, 4]
    with pytest.raises(MisconfigurationException, match=r"RegDB: no data under root=.*Expected Visible/ and Thermal/"):
        _ = RegDB(str(regdb), trial=4).num_classes


@pytest.mark.parametrize("cls", [SYSUMM01, RegDB])
def test_batches(cls: type, sysu: Path, regdb: Path) -> None:
    kwargs = {"root": str(sysu)} if cls is SYSUMM01 else {"root": str(regdb), "trial": 3}
    data = cls(**kwargs, batch_size=8, num_instances=4, size=(16, 8))
    assert isinstance(data, LightningDataModule)
    assert data.input_shape == (3, 16, 8)
    images, labels, infrared = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 16, 8)
    assert labels.unique().numel() == 2
    assert infrared.tolist() == [False, True] * 4
    query, gallery = (next(iter(loader)) for loader in data.test_dataloader())
    assert [t.shape[0] for t in query] == [8 if cls is SYSUMM01 else 4] * 4
    assert query[3].tolist() == list(range(len(query[0])))
    assert gallery[0].dtype == torch.float32


def test_images_are_brought_to_size_normalised_and_mirrored(sysu: Path) -> None:
    data = SYSUMM01(str(sysu), size=(16, 8))
    train = data.splits.train
    views = torch.stack([train[epoch * len(train)][0] for epoch in range(12)])
    brighter_right = views[:, 0, :, 5:].mean((1, 2)) > views[:, 0, :, :3].mean((1, 2))
    assert 2 <= brighter_right.sum() <= 10
    still = SYSUMM01(str(sysu), size=(16, 8), augment=False).splits.train
    assert all(torch.equal(still[0][0], still[epoch * len(still)][0]) for epoch in range(4))
    # identity 2, camera 1: 21 of 255, halved on the left; JPEG rounds
    right = still[0][0][:, :, 6:].mean((1, 2)) * torch.tensor(data_std()) + torch.tensor(data_mean())
    torch.testing.assert_close(right, torch.full((3,), 21 / 255), atol=0.01, rtol=0)


def data_mean() -> tuple[float, ...]:
    return (0.485, 0.456, 0.406)


def data_std() -> tuple[float, ...]:
    return (0.229, 0.224, 0.225)


@pytest.mark.parametrize("cls", [SYSUMM01, RegDB])
def test_absent_data_are_described(cls: type, tmp_path: Path) -> None:
    for root, found in ((tmp_path, "it holds nothing"), (tmp_path / "no", "there is no such folder")):
        with pytest.raises(MisconfigurationException, match=f"{cls.__name__}: no data under root=.*{found}.*Expected"):
            cls(str(root)).setup("fit")


def test_a_broken_list_is_named(regdb: Path, tmp_path: Path) -> None:
    (tmp_path / "idx").mkdir()
    (tmp_path / "idx" / "train_visible_1.txt").write_text("Visible/1/a.bmp\n")
    with pytest.raises(MisconfigurationException, match=r"train_visible_1.txt: expected lines of '<path> <identity>'"):
        RegDB(str(tmp_path)).setup("fit")


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (SYSUMM01, {"mode": "outdoor"}, "mode: expected 'all' or 'indoor', got 'outdoor'"),
        (RegDB, {"trial": 11}, "trial: expected 1 to 10, got 11"),
        (RegDB, {"query": "infrared"}, "query: expected 'visible' or 'thermal', got 'infrared'"),
        (RegDB, {"size": (0, 8)}, "size: expected a height and a width"),
    ],
)
def test_bad_arguments(cls: type, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**arguments)
