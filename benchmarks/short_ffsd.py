"""A ResNet from scratch on a part of CIFAR-10: alone, and as the leader of FFSD beside two others of its kind.

    LC_DATA=~/data python benchmarks/short_ffsd.py

The same images in the same order and with the same crops and flips, the same optimiser and schedule for the network,
and FFSD's own weights; shares of the first test images, by mean and standard deviation over the seeds. "likeness" is
the cosine of the attention of the two students' deepest maps. Not part of `run_all.py`: it takes minutes and promises
nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _alternate import machine
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from lightning_compress.core.distill.losses import attention_map
from lightning_compress.datamodules import CIFAR10
from lightning_compress.datamodules._images import EpochSampler, ImageArrays
from lightning_compress.modules import FFSD, ImageClassifier
from lightning_compress.modules.distillation.ffsd.maps import see
from lightning_compress.networks import CIFARResNet

DATA = Path(os.environ.get("LC_DATA", "."))
SETTINGS: dict[str, dict[str, Any]] = {
    "alone": {},
    "FFSD": {"lambda_diversity": 1e-5},
    "FFSD without diversity": {"lambda_diversity": 0.0},
}


def data(seed: int, budget: argparse.Namespace) -> tuple[DataLoader, DataLoader]:
    """The first images, shuffled and augmented by the seed alone; and the first test images."""
    whole = CIFAR10(str(DATA), val_size=0, seed=seed).splits
    train = whole.train
    assert isinstance(train, ImageArrays)
    train.indices = train.indices[: budget.images]
    sampler = EpochSampler(train, num_replicas=1, rank=0, seed=seed)
    return DataLoader(train, budget.batch, sampler=sampler), DataLoader(Subset(whole.test, range(budget.tested)), 250)


def made(setting: str, budget: argparse.Namespace) -> LightningModule:
    network = partial(CIFARResNet, budget.depth, shortcut="projection")
    optimizer = partial(torch.optim.SGD, lr=budget.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    milestones = [budget.epochs // 2, budget.epochs * 3 // 4]
    schedule = partial(torch.optim.lr_scheduler.MultiStepLR, milestones=milestones)
    if setting == "alone":
        return ImageClassifier(network(), optimizer=optimizer, lr_scheduler=schedule)
    return FFSD(
        network, optimizer=optimizer, lr_scheduler=schedule, self_distillation_lr_scheduler=schedule,
        warmup_epochs=min(5, budget.epochs - 1), **SETTINGS[setting],
    )  # fmt: skip


def run(setting: str, seed: int, budget: argparse.Namespace) -> dict[str, float]:
    """Accuracies in %, by name; "leader" is what is deployed."""
    train, test = data(seed, budget)
    seed_everything(seed, verbose=False)
    module = made(setting, budget)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=budget.epochs, check_val_every_n_epoch=budget.epochs, num_sanity_val_steps=0, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
            default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, train, test)
    found = {key.removeprefix("val/"): 100 * float(value) for key, value in trainer.callback_metrics.items()}
    names = [key for key in found if key.endswith("acc") and not key.startswith("train")]
    result = {name.removesuffix("_acc").replace("acc", "leader"): found[name] for name in names}
    if isinstance(module, FFSD):
        result["likeness"] = 100 * likeness(module.eval(), next(iter(test))[0])
    return result


@torch.no_grad()
def likeness(module: FFSD, images: Tensor) -> float:
    one, two = (see(student, module.feature_layers, images).maps[-1] for student in module.students)
    return float(F.cosine_similarity(attention_map(one), attention_map(two)).mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--depth", type=int, default=20, help="of the ResNet, 6n + 2")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--tested", type=int, default=2000, help="test images")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="*", default=["alone", "FFSD"], choices=list(SETTINGS))
    budget = parser.parse_args()
    how = f"{budget.images} images, {budget.epochs} epochs of batches of {budget.batch}, lr {budget.lr}"
    print(f"{machine()}; ResNet-{budget.depth}, {how}")
    for setting in budget.settings:
        begin = time.perf_counter()
        results = []
        for seed in budget.seeds:
            results.append(run(setting, seed, budget))
            print(f"{setting}, seed {seed}: " + ", ".join(f"{k} {v:.2f}" for k, v in results[-1].items()), flush=True)
        for name in results[0]:
            values = [result[name] for result in results]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"{setting:>24} {name:>10}  {statistics.mean(values):.1f} ± {spread:.1f} %", flush=True)
        print(f"{setting:>24}  {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
