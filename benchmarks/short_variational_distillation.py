"""A bottleneck of eight numbers on handwritten digits: without its teacher, and with both readings of the divergence.

    python benchmarks/short_variational_distillation.py

ResNet-20, the same images, order and schedule in every setting; accuracies of the observation's and of the
representation's classifier on 500 held-out digits. The data are scikit-learn's. Not part of `run_all.py`: it
takes minutes and promises nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from functools import partial
from typing import Any

import torch
from _alternate import machine
from lightning.pytorch import LightningModule, Trainer, seed_everything

from lightning_compress.callbacks import VariationalDistillation
from lightning_compress.datamodules import Digits
from lightning_compress.modules import ImageClassifier

SETTINGS: dict[str, dict[str, Any] | None] = {
    "network alone": None,
    "bottleneck, labels alone": {"weight": 0.0},
    "official k, weight 2": {"kl_mode": "official", "weight": 2.0},
    "true KL, weight 0.2": {"kl_mode": "kl", "weight": 0.2},
    "true KL, weight 2": {"kl_mode": "kl", "weight": 2.0},
}
SIZES: dict[str, Any] = {"z_dim": 4, "hidden": [64, 32], "classifier_dim": 32, "dropout": 0.1}


def accuracies(setting: str, seed: int, budget: argparse.Namespace) -> list[float]:
    """Of the observation, and of the representation if there is one."""
    seed_everything(seed, verbose=False)
    module = ImageClassifier(
        "resnet20",
        optimizer=partial(torch.optim.SGD, lr=budget.lr, momentum=0.9, weight_decay=5e-4),
        lr_scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=budget.epochs),
        input_shape=(1, 16, 16),
    )
    given = SETTINGS[setting]
    callbacks = [] if given is None else [VariationalDistillation(deploy="observation", **SIZES, **given)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # the account
        trainer = Trainer(
            max_epochs=budget.epochs, callbacks=callbacks, limit_train_batches=budget.images // 32,
            limit_val_batches=0, num_sanity_val_steps=0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, datamodule=Digits(batch_size=32, size=16))
        images, labels = _held_out(trainer)
    found = [_accuracy(module, images, labels)]
    if given is not None:
        head: Any = module.network.get_submodule("linear")
        head.deployed = "representation"
        found.append(_accuracy(module, images, labels))
    return found


def _held_out(trainer: Trainer) -> list[torch.Tensor]:
    """Images and labels of the 250 digits for validation and of the 250 for tests."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    data.setup("test")
    batches = [*data.val_dataloader(), *data.test_dataloader()]
    return [torch.cat(part) for part in zip(*batches, strict=True)]


def _accuracy(module: LightningModule, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return 100 * float((module.eval()(images).argmax(1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1280, help="in an epoch")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    budget = parser.parse_args()
    print(f"{machine()}; {budget.epochs} epochs of {budget.images} digits, lr {budget.lr}")
    for setting in budget.settings:
        begin = time.perf_counter()
        runs = [accuracies(setting, seed, budget) for seed in range(budget.seeds)]
        each = [
            f"{name} {statistics.mean(seen):.1f} ± {statistics.stdev(seen) if len(seen) > 1 else 0:.1f} %"
            for name, seen in zip(("observation", "representation"), zip(*runs, strict=True), strict=False)
        ]
        print(f"{setting:>26}  {', '.join(each)}  {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
