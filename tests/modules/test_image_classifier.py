from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from real_data import real_data
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.datamodules import CIFAR10, Digits
from lightning_compress.modules import ImageClassifier


def small_network() -> nn.Module:
    seed_everything(0, verbose=False)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10))


def small(**arguments: Any) -> ImageClassifier:
    return ImageClassifier(small_network(), **{"input_shape": (1, 8, 8), **arguments})


def trainer(folder: Path | None = None, *callbacks: Any, **arguments: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def test_a_resnet20_learns_the_digits() -> None:
    seed_everything(0, verbose=False)
    data = Digits(size=16)
    module = ImageClassifier(
        "resnet20",
        input_shape=data.input_shape,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4),
    )
    run = trainer(max_epochs=4)
    run.fit(module, data)
    assert run.callback_metrics["train/loss"] < 0.4
    assert run.callback_metrics["train/acc"] > 0.85
    assert run.callback_metrics["val/acc"] > 0.9
    assert run.test(module, data, verbose=False)[0]["test/acc"] > 0.9


def test_logged_numbers_are_those_of_the_whole_split() -> None:
    module, data = small(), Digits(size=8, batch_size=60)  # 250 images: the last batch is shorter
    metrics = trainer().validate(module, data, verbose=False)[0]
    images, labels = map(torch.cat, zip(*data.val_dataloader(), strict=True))
    with torch.no_grad():
        logits = module.eval()(images)
    assert metrics["val/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert metrics["val/acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_labels_are_smoothed_in_training_alone() -> None:
    module = small(label_smoothing=0.2)
    module.log = lambda *_, **__: None
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6)
    logits = module(images)
    assert module.training_step((images, labels), 0) == F.cross_entropy(logits, labels, label_smoothing=0.2)
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: value})
    module.validation_step((images, labels), 0)
    assert logged["val/loss"] == F.cross_entropy(logits, labels)


def test_prediction_gives_probabilities_with_and_without_labels() -> None:
    module, data = small(), Digits(size=8)
    with_labels = torch.cat(trainer().predict(module, data))
    images = torch.stack([image for image, _ in data.splits.test])
    without = torch.cat(trainer().predict(module, DataLoader(images, batch_size=100)))
    assert with_labels.shape == (250, 10)
    assert torch.allclose(with_labels.sum(1), torch.ones(250))
    assert torch.allclose(with_labels, without, atol=1e-6)


def test_a_named_network_gets_classes_and_channels() -> None:
    module = ImageClassifier("resnet20", num_classes=7, input_shape=(1, 16, 16))
    assert module(module.example_input_array).shape == (1, 7)
    timm = ImageClassifier("timm/resnet18", num_classes=7, input_shape=(1, 32, 32)).eval()
    assert timm(timm.example_input_array).shape == (1, 7)
    with pytest.raises(ValueError, match="input_shape: 'resnet18' is built for 3 channels, got 1"):
        ImageClassifier("resnet18", input_shape=(1, 32, 32))
    with pytest.raises(ValueError, match=r"resnet21.*Did you mean"):
        ImageClassifier("resnet21")


def test_weights_are_there_after_construction(tmp_path: Path) -> None:
    source = small_network()
    torch.save({"state_dict": {f"module.{k}": v + 1 for k, v in source.state_dict().items()}}, tmp_path / "w.pt")
    module = small(weights=str(tmp_path / "w.pt"))
    for value, original in zip(module.network.state_dict().values(), source.state_dict().values(), strict=True):
        assert torch.equal(value, original + 1)


def test_checkpoints_hold_plain_values_and_rebuild_a_named_network(tmp_path: Path) -> None:
    module = ImageClassifier("resnet20", input_shape=(1, 8, 8), label_smoothing=0.1)
    run = trainer(tmp_path, ModelCheckpoint(tmp_path, filename="last"), max_epochs=1, limit_train_batches=1)
    run.fit(module, Digits(size=8))
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["hyper_parameters"] == {
        "network": "resnet20",
        "num_classes": 10,
        "lr_scheduler_interval": "epoch",
        "label_smoothing": 0.1,
        "input_shape": (1, 8, 8),
        "channels_last": False,
    }
    assert all(key.startswith("network.") for key in content["state_dict"])
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.label_smoothing == 0.1
    for name, value in module.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_a_network_given_as_a_module_is_not_stored_twice(tmp_path: Path) -> None:
    assert "network" not in small().hparams


def test_the_default_optimizer_and_schedules() -> None:
    module = small()
    optimizer = module.configure_optimizers()
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.SGD)
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 5e-4)
    assert len(group["params"]) == 4

    steps = small(
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3),
        lr_scheduler_interval="step",
    ).configure_optimizers()
    assert isinstance(steps["optimizer"], torch.optim.AdamW)
    assert steps["lr_scheduler"]["interval"] == "step"
    assert "monitor" not in steps["lr_scheduler"]

    plateau = small(lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau).configure_optimizers()
    assert plateau["lr_scheduler"]["monitor"] == "val/loss"


def test_channels_last_changes_the_format_alone() -> None:
    plain, channels_last = small(), small(channels_last=True)
    assert channels_last.network[0].weight.is_contiguous(memory_format=torch.channels_last)
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(channels_last(images), plain(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"lr_scheduler_interval": "batch"},
            "lr_scheduler_interval: expected 'epoch' or 'step', got 'batch'",
        ),
        ({"label_smoothing": 1.0}, r"label_smoothing: expected a share in \[0, 1\), got 1.0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 7}, "num_classes: Digits has 10, ImageClassifier got 7"),
        (
            {"input_shape": (3, 32, 32)},
            r"input_shape: Digits has \(1, 8, 8\), ImageClassifier got \(3, 32, 32\)",
        ),
    ],
)
def test_data_that_do_not_fit_are_refused_before_the_first_step(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        trainer(max_epochs=1).fit(small(**arguments), Digits(size=8))


@pytest.mark.parametrize(
    ("loader", "got"),
    [
        (DataLoader(torch.zeros(4, 1, 8, 8), batch_size=2), r"one tensor of shape \(2, 1, 8, 8\)"),
        (DataLoader(TensorDataset(torch.zeros(4, 1, 8, 8)), batch_size=2), "a list of 1"),
    ],
)
def test_missing_labels_are_refused(loader: DataLoader, got: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"train batches must be \(images, labels\), got {got}"):
        trainer(max_epochs=1).fit(small(), loader)


@pytest.mark.real_data
def test_the_public_resnet20_scores_on_cifar10() -> None:
    """8.27 % error on all 10,000 test images (measured: 91.73 %); here the first 1,000."""
    root = real_data("cifar10.npz", "weights/resnet20-cifar10.pt")
    data = CIFAR10(str(root), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), eval_batch_size=250)
    module = ImageClassifier("resnet20", weights=str(root / "weights" / "resnet20-cifar10.pt"))
    metrics = trainer(limit_test_batches=4).test(module, data, verbose=False)[0]
    assert metrics["test/acc"] == pytest.approx(0.915, abs=0.002)
