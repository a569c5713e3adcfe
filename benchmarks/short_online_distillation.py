"""Cheap ResNet-20s from scratch on a part of CIFAR-10: the best of four with online distillation, and one alone.

    LC_DATA=~/data python benchmarks/short_online_distillation.py --kind shift

The same images, the same schedule, three seeds; a seed's run can be repeated alone (`--first-seed`, `--seeds 1`). The
student is chosen by its accuracy on some test images, and judged by other ones, on which the network alone is judged
too. Not part of `run_all.py`: it takes minutes and promises nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from _alternate import machine
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, Subset

from lightning_compress.datamodules import CIFAR10
from lightning_compress.modules import ImageClassifier, OnlineDistillation
from lightning_compress.networks import CheapResNet

DATA = Path(os.environ.get("LC_DATA", "."))


def accuracies(setting: str, seed: int, budget: argparse.Namespace) -> dict[str, float]:
    """In percent, after the last epoch, on the images by which nothing was chosen."""
    seed_everything(seed, verbose=False)
    images = CIFAR10(str(DATA), val_size=0, augment=False).splits
    order = torch.Generator().manual_seed(seed)
    train = DataLoader(Subset(images.train, range(budget.images)), budget.batch, shuffle=True, generator=order)
    chosen, judged = (
        DataLoader(Subset(images.test, range(first, first + budget.test_images)), 250)
        for first in (0, budget.test_images)
    )
    network = partial(CheapResNet, budget.depth, kind=budget.kind)
    common = {
        "optimizer": partial(torch.optim.SGD, lr=budget.lr, momentum=0.9, weight_decay=2e-4),
        "lr_scheduler": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=budget.epochs * len(train)),
        "lr_scheduler_interval": "step",
        "channels_last": True,
    }
    module: LightningModule
    if setting == "alone":
        module = ImageClassifier(network(), **common)  # type: ignore[arg-type]
    else:
        module = OnlineDistillation(network, kl_reduction=budget.kl_reduction, **common)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=budget.epochs, check_val_every_n_epoch=budget.epochs, num_sanity_val_steps=0, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
            default_root_dir=folder,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):  # the account of every run
            trainer.fit(module, train, chosen)
            seen = trainer.validate(module, judged, verbose=False)[0]
    students = [value for name, value in seen.items() if "student" in name]
    found = {"network": seen["val/acc"]}
    if students:
        found |= {"mean of students": statistics.mean(students), "teacher": seen["val/teacher_acc"]}
    return {name: 100 * value for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", default="shift", choices=["shift", "dw", "group"])
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--kl-reduction", default="mean", choices=["mean", "batchmean"])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="*", default=["alone", "online"], choices=["alone", "online"])
    budget = parser.parse_args()
    print(
        f"{machine()}; {budget.kind} ResNet-{budget.depth}, {budget.images} images, {budget.epochs} epochs, batches of "
        f"{budget.batch}, lr {budget.lr}, KL {budget.kl_reduction}"
    )
    for setting in budget.settings:
        begin = time.perf_counter()
        runs = []
        for seed in range(budget.first_seed, budget.first_seed + budget.seeds):
            runs.append(accuracies(setting, seed, budget))
            print(f"  {setting}, seed {seed}: {', '.join(f'{k} {v:.2f}' for k, v in runs[-1].items())}", flush=True)
        for name in runs[0]:
            seen = [run[name] for run in runs]
            spread = statistics.stdev(seen) if len(seen) > 1 else 0.0
            print(f"{setting + ', ' + name:>26}  {statistics.mean(seen):.1f} ± {spread:.1f} %", flush=True)
        print(f"{setting:>26}  {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
