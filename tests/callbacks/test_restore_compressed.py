"""RestoreCompressed lets a Trainer load a narrow checkpoint into a fresh module, without the method that made it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from foreign import Foreign, assert_same, digits, fit, made, make_trainer, widths
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_compress
from lightning_compress.callbacks import L1Norm, RestoreCompressed


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Foreign, Path]:
    module = made()
    fit(module, tmp_path, L1Norm(start_epoch=1), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=3)
    return module, tmp_path


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_every_stage_takes_the_checkpoint(stage: str, saved: tuple[Foreign, Path]) -> None:
    module, root = saved
    fresh = made()
    results = [
        getattr(make_trainer(root, RestoreCompressed()), stage)(m, digits(32, 64), ckpt_path=path)
        for m, path in ((module, None), (fresh, root / "epoch=2.ckpt"))
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert_same(fresh, module)


def test_without_it_the_error_names_the_remedy(saved: tuple[Foreign, Path]) -> None:
    with pytest.raises(RuntimeError, match="load_this_with_lightning_compress_load"):
        make_trainer(saved[1]).test(made(), digits(), ckpt_path=saved[1] / "epoch=2.ckpt")


def test_a_fit_goes_on_without_the_method(saved: tuple[Foreign, Path]) -> None:
    module, root = saved
    fresh = made()
    fit(fresh, root, RestoreCompressed(), ckpt_path=root / "epoch=1.ckpt", max_epochs=3)
    assert_same(fresh, module)


def test_the_best_of_a_fit_is_found(tmp_path: Path) -> None:
    trainer = fit(made(), tmp_path, L1Norm(), RestoreCompressed(), ModelCheckpoint(tmp_path, "{epoch}", "val_loss"))
    (found,) = trainer.validate(dataloaders=digits(32, 64), ckpt_path="best", verbose=False)
    assert found["val_loss"] == pytest.approx(float(trainer.checkpoint_callback.best_model_score), rel=1e-6)


def test_a_dense_checkpoint_stays_dense(tmp_path: Path) -> None:
    module, fresh = made(), made()
    fit(module, tmp_path, ModelCheckpoint(tmp_path, "dense"))
    make_trainer(tmp_path, RestoreCompressed()).validate(
        fresh, digits(), ckpt_path=tmp_path / "dense.ckpt", verbose=False
    )
    assert_same(fresh, module)
    assert fresh.state_dict().keys() == module.state_dict().keys()


def test_a_dense_checkpoint_loads_into_a_narrow_module(saved: tuple[Foreign, Path]) -> None:
    module, root = saved
    trainer = make_trainer(root, RestoreCompressed())
    trainer.validate(module, digits(), ckpt_path=root / "epoch=0.ckpt", verbose=False)
    assert widths(module) == widths(made())
    assert_same(module, lightning_compress.load(Foreign, root / "epoch=0.ckpt"))


def test_an_average_copies_the_narrow_network(saved: tuple[Foreign, Path]) -> None:
    """... if it comes after; before, it would copy a dense one that no checkpoint fits."""
    root, path = saved[1], saved[1] / "epoch=1.ckpt"
    module = made()
    fit(module, root, RestoreCompressed(), EMAWeightAveraging(), ckpt_path=path, max_epochs=3)
    assert widths(module)["net.stem"] == 4
    with pytest.raises(MisconfigurationException, match="List RestoreCompressed before EMAWeightAveraging"):
        fit(made(), root, EMAWeightAveraging(), RestoreCompressed(), ckpt_path=path, max_epochs=3)


def test_a_truncated_checkpoint(saved: tuple[Foreign, Path]) -> None:
    half = saved[1] / "half.ckpt"
    half.write_bytes((saved[1] / "epoch=2.ckpt").read_bytes()[:5000])
    with pytest.raises(MisconfigurationException, match=r"half.ckpt' cannot be read as a checkpoint.*cut short"):
        make_trainer(saved[1], RestoreCompressed()).test(made(), digits(), ckpt_path=half)
