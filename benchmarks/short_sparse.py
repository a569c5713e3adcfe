"""A sparsity method against one-shot magnitude pruning at the same sparsity, after a short training, on real data.

    LC_DATA=~/data python benchmarks/short_sparse.py PCONV connectivity=3.6 end_epoch=6 rho=0.3 every_n_epochs=1 \\
        --search-epochs 6

Both start from the trained network in ``$LC_DATA/weights`` and see the same CIFAR-10 batches in the same order for the
same number of steps. The method's learning rate is constant while it searches, then falls in a cosine; the baseline's
falls all the way. The baseline removes the smallest weights of all convolutions together, as many as the method did,
before the first step; its accuracy is also told without any training, with batch norms re-estimated. Accuracies are of
the first test images (`--test-batches` of 128), so half a per cent is noise. Not part of `run_all.py`: it takes minutes
and promises nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from _alternate import machine
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.optim.lr_scheduler import LambdaLR

from lightning_compress import callbacks
from lightning_compress.core.report import Account
from lightning_compress.datamodules import CIFAR10
from lightning_compress.modules import ImageClassifier

DATA = Path(os.environ.get("LC_DATA", "."))


@dataclass(frozen=True)
class Budget:
    """How long to train. `search_epochs` of them have a constant rate, in the method's run.

    `method_lr` is the method's learning rate where it is another one than the baseline's: that of scores, say.
    """

    network: str = "resnet20"
    search_epochs: int = 0
    epochs: int = 6
    batches: int = 30
    test_batches: int = 40
    lr: float = 0.01
    method_lr: float = 0.0
    recalibrate_bn: int = 16
    seed: int = 0


def factor(epoch: int, constant: int, epochs: int) -> float:
    return 1.0 if epoch < constant else (1 + math.cos(math.pi * (epoch - constant) / epochs)) / 2


class AtStart(Callback):
    """Accuracy before the first step."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.accuracy = 0.0

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.eval()
        right = [
            (pl_module(images).argmax(1) == labels).float()
            for images, labels in islice(trainer.datamodule.val_dataloader(), self.batches)  # type: ignore[attr-defined]
        ]
        self.accuracy = float(torch.cat(right).mean())
        pl_module.train()


def run(budget: Budget, own: Callback, constant: int, *others: Callback) -> tuple[float, float, Account]:
    """Fit and return (accuracy at the start, at the end, account)."""
    seed_everything(budget.seed, verbose=False)
    epochs = budget.search_epochs + budget.epochs
    module = ImageClassifier(
        budget.network,
        weights=str(DATA / "weights" / f"{budget.network}-cifar10.pt"),
        optimizer=partial(torch.optim.SGD, lr=budget.lr, momentum=0.9, weight_decay=5e-4),
        lr_scheduler=partial(LambdaLR, lr_lambda=partial(factor, constant=constant, epochs=epochs - constant)),
    )
    images = CIFAR10(
        str(DATA), batch_size=128, val_size=0, seed=budget.seed,
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        first = AtStart(budget.test_batches)
        trainer = Trainer(
            max_epochs=epochs, limit_train_batches=budget.batches, limit_val_batches=budget.test_batches,
            check_val_every_n_epoch=epochs, num_sanity_val_steps=0, default_root_dir=folder,
            callbacks=[own, *others, first],
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            accelerator="cpu",
        )  # fmt: skip
        start = time.perf_counter()
        trainer.fit(module, images)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
        return first.accuracy, float(trainer.callback_metrics["val/acc"]), Account.load(folder)


def compare(name: str, method: Callback, budget: Budget) -> None:
    """Print a line for the dense network, the method, and the baseline at the same sparsity of the convolutions."""
    own_rate = replace(budget, lr=budget.method_lr or budget.lr)
    dense, accuracy, account = run(own_rate, method, budget.search_epochs)
    rows = [row for row in account.after.rows if row.kind == "conv"]
    zero = 1 - sum(row.nonzeros for row in rows) / sum(row.params for row in rows)
    one_shot = callbacks.MagnitudePruning(
        zero, include=[row.name for row in rows], recalibrate_bn=budget.recalibrate_bn
    )
    before, after, _ = run(budget, one_shot, 0)
    steps = (budget.search_epochs + budget.epochs) * budget.batches
    print(f"{zero:.1%} of the convolutions' weights are zero; {steps} steps")
    for what, value in (
        ("dense", dense), (name, accuracy), ("one-shot magnitude, BN re-estimated", before),
        ("one-shot magnitude, as many steps", after),
    ):  # fmt: skip
        print(f"{what:36} accuracy {value:.2%}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", help="a callback of lightning_compress.callbacks")
    parser.add_argument("init", nargs="*", help="its arguments, name=value in YAML")
    for name, default in vars(Budget()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given = vars(parser.parse_args(arguments))
    budget = Budget(**{name: given[name] for name in vars(Budget())})
    init: dict[str, Any] = {key: yaml.safe_load(value) for key, _, value in (p.partition("=") for p in given["init"])}
    print(machine(), budget, init)
    compare(given["method"], getattr(callbacks, given["method"])(**init), budget)


if __name__ == "__main__":
    main()
