"""ResNet-20 from scratch on a part of CIFAR-10, with and without the public ResNet-56 as its teacher.

    LC_DATA=~/data python benchmarks/short_knowledge_distillation.py

The same images in the same order, the same schedule, three seeds. There is no augmentation, so that the teacher sees
each image once (`cache`). Accuracies are of the first test images. Not part of `run_all.py`: it takes minutes and
promises nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from _alternate import machine
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader, Subset

from lightning_compress.callbacks import KnowledgeDistillation
from lightning_compress.datamodules import CIFAR10
from lightning_compress.modules import ImageClassifier

DATA = Path(os.environ.get("LC_DATA", "."))
LOSSES = {
    "no teacher": {},
    "logits": {"losses": {"logits": 0.9}, "task_weight": 0.1},
    "logits, attention": {
        "losses": {"logits": 0.9, "attention": 1000.0}, "task_weight": 0.1, "features": {"network.layer?": "layer?"}
    },
}  # fmt: skip


def accuracy(setting: str, seed: int, budget: argparse.Namespace, cache: str) -> float:
    seed_everything(seed, verbose=False)
    images = CIFAR10(
        str(DATA), val_size=0, augment=False, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ).splits  # fmt: skip
    order = torch.Generator().manual_seed(seed)
    train = DataLoader(Subset(images.train, range(budget.images)), budget.batch, shuffle=True, generator=order)
    test = DataLoader(Subset(images.test, range(budget.test_images)), 250)
    module = ImageClassifier(
        "resnet20",
        optimizer=partial(torch.optim.SGD, lr=budget.lr, momentum=0.9, weight_decay=5e-4),
        lr_scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=budget.epochs * len(train)),
        lr_scheduler_interval="step",
    )
    weights = str(DATA / "weights" / "resnet56-cifar10.pt")
    arguments = LOSSES[setting]
    kd = [KnowledgeDistillation("resnet56", teacher_weights=weights, cache=cache, **arguments)] if arguments else []  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=budget.epochs, callbacks=kd, check_val_every_n_epoch=budget.epochs, num_sanity_val_steps=0,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            accelerator="cpu", default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, train, test)
    return 100 * float(trainer.callback_metrics["val/acc"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="*", default=["no teacher", "logits"], choices=list(LOSSES))
    budget = parser.parse_args()
    print(f"{machine()}; {budget.images} images, {budget.epochs} epochs of batches of {budget.batch}, lr {budget.lr}")
    with tempfile.TemporaryDirectory() as cache:
        for setting in budget.settings:
            begin = time.perf_counter()
            seen = [accuracy(setting, seed, budget, cache) for seed in range(budget.seeds)]
            spread = statistics.stdev(seen) if len(seen) > 1 else 0.0
            each = ", ".join(f"{a:.1f}" for a in seen)
            seconds = time.perf_counter() - begin
            print(f"{setting:>20}  {statistics.mean(seen):.1f} ± {spread:.1f} %  ({each})  {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
