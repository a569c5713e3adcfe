"""A method against uniform L1-norm pruning at the same MACs, after the same short fine-tuning, on real data.

    LC_DATA=~/data python benchmarks/short_finetune.py WhiteBox target_macs=0.5 end_epoch=2 --search-epochs 2

Both start from the trained ResNet-56 in ``$LC_DATA/weights``, see the same CIFAR-10 batches in the same order, and are
fine-tuned for the same number of steps with the same schedule; what a method trains while it searches comes on top, and
is told. The baseline removes the same share of channels, those with the smallest L1 norm, from every layer, as many as
leave the MACs that the method left. Accuracies are of the first test images (`--test-batches` of 128), so half a per
cent is noise. Not part of `run_all.py`: it takes minutes and promises nothing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from _alternate import machine
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_compress import callbacks, modules
from lightning_compress.core.report import Account
from lightning_compress.datamodules import CIFAR10
from lightning_compress.modules import ImageClassifier

DATA = Path(os.environ.get("LC_DATA", "."))


@dataclass(frozen=True)
class Budget:
    """How long to train. The rate falls from `lr` to 0 in a cosine over the epochs of fine-tuning."""

    epochs: int = 8
    batches: int = 12
    test_batches: int = 20
    lr: float = 0.01
    seed: int = 0


def images(budget: Budget) -> CIFAR10:
    """CIFAR-10 as the public checkpoints were trained on it; validated on the test images."""
    return CIFAR10(
        str(DATA), batch_size=128, val_size=0, seed=budget.seed,
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip


def trained(budget: Budget, cls: type[ImageClassifier] = ImageClassifier, **init: Any) -> ImageClassifier:
    """The public ResNet-56; `cls` is a method that is a module."""
    return cls(
        "resnet56",
        weights=str(DATA / "weights" / "resnet56-cifar10.pt"),
        optimizer=partial(torch.optim.SGD, lr=budget.lr, momentum=0.9, weight_decay=5e-4),
        lr_scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=budget.epochs),
        **init,
    )


def run(
    budget: Budget, *own: Callback, module: LightningModule | None = None, search_epochs: int = 0
) -> tuple[float, Account]:
    """Fit and return (accuracy, account); for a `module` that is a method, without callbacks."""
    seed_everything(budget.seed, verbose=False)
    epochs = budget.epochs + search_epochs
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=epochs, limit_train_batches=budget.batches, limit_val_batches=budget.test_batches,
            check_val_every_n_epoch=epochs, num_sanity_val_steps=0, callbacks=list(own), default_root_dir=folder,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            accelerator="cpu",
        )  # fmt: skip
        start = time.perf_counter()
        trainer.fit(module or trained(budget), images(budget))
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
        return float(trainer.callback_metrics["val/acc"]), Account.load(folder)


def compare(name: str, accuracy: float, account: Account, budget: Budget) -> None:
    """Print a line for the method, and one for the baseline at the same MACs."""
    share = account.after.macs / account.before.macs
    baseline, uniform = run(budget, callbacks.L1Norm(target_macs=share))
    for who, acc, after in ((name, accuracy, account.after), ("L1Norm", baseline, uniform.after)):
        macs, params = after.macs / account.before.macs, after.params / account.before.params
        print(f"{who:24} accuracy {acc:.2%}, MACs {macs:.1%}, parameters {params:.1%} of the dense network's")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", help="a class of lightning_compress.callbacks or modules")
    parser.add_argument("init", nargs="*", help="its arguments, name=value in YAML")
    parser.add_argument("--search-epochs", type=int, default=0, help="epochs before the network is narrow")
    for name, default in vars(Budget()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given = vars(parser.parse_args(arguments))
    budget = Budget(**{name: given[name] for name in vars(Budget())})
    init: dict[str, Any] = {key: yaml.safe_load(value) for key, _, value in (p.partition("=") for p in given["init"])}
    print(machine(), budget, init)
    search = given["search_epochs"]
    if hasattr(modules, given["method"]):
        module = trained(budget, getattr(modules, given["method"]), search_epochs=search, **init)
        result = run(budget, module=module, search_epochs=search)
    else:
        result = run(budget, getattr(callbacks, given["method"])(**init), search_epochs=search)
    compare(given["method"], *result, budget)


if __name__ == "__main__":
    main()
