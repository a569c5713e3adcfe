"""ResNet-20 from scratch on a part of CIFAR-10: alone, with the public ResNet-56 as its teacher, and with KCD.

    LC_DATA=~/data python benchmarks/short_knowledge_distillation.py --results kd.json

The same images, first order and schedule, one seed after the other. There is no augmentation, so that the teacher sees
each image once (`cache`), and a blended one once more. Accuracies are of the first test images, after the last epoch.
`seconds` are those of the fit: KCD trains on fewer images in later stages. With `--results` each run is noted when it
ends, and those that are noted are not run again. Not part of `run_all.py`: it takes an hour and promises nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _alternate import machine
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader, Subset

from lightning_compress.callbacks import KCD, KnowledgeDistillation
from lightning_compress.datamodules import CIFAR10
from lightning_compress.modules import ImageClassifier

DATA = Path(os.environ.get("LC_DATA", "."))
LOGITS: dict[str, Any] = {"losses": {"logits": 0.9}, "task_weight": 0.1}
ATTENTION: dict[str, Any] = {
    "losses": {"logits": 0.9, "attention": 1000.0}, "task_weight": 0.1, "features": {"network.layer?": "layer?"}
}  # fmt: skip
SETTINGS: dict[str, tuple[type[KnowledgeDistillation] | None, dict[str, Any]]] = {
    "no teacher": (None, {}),
    "KD": (KnowledgeDistillation, LOGITS),
    "KCD": (KCD, LOGITS),
    "KCD without mixing": (KCD, {**LOGITS, "mix": False}),
    "KD, attention": (KnowledgeDistillation, ATTENTION),
    "KCD, attention": (KCD, ATTENTION),
}


def teacher(setting: str, budget: argparse.Namespace, cache: str) -> list[Callback]:
    kind, arguments = SETTINGS[setting]
    if kind is None:
        return []
    if kind is KCD:
        stages = {"keep_ratio": budget.keep_ratio, "every_n_epochs": budget.epochs // budget.stages}
        arguments = {**arguments, **stages, "num_stages": budget.stages}
    weights = str(DATA / "weights" / "resnet56-cifar10.pt")
    return [kind("resnet56", teacher_weights=weights, cache=cache, **arguments)]


def run(setting: str, seed: int, budget: argparse.Namespace, cache: str) -> dict[str, float]:
    """Accuracy in percent, and seconds of the fit."""
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
        lr_scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=budget.epochs),
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=budget.epochs, callbacks=teacher(setting, budget, cache), limit_val_batches=0,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            accelerator="cpu", default_root_dir=folder,
        )  # fmt: skip
        begin = time.perf_counter()
        trainer.fit(module, train)
        seconds = time.perf_counter() - begin
        (result,) = trainer.test(module, test, verbose=False)
    return {"accuracy": 100 * result["test/acc"], "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--keep-ratio", type=float, default=0.7)
    parser.add_argument("--stages", type=int, default=6)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="*", default=["no teacher", "KD", "KCD"], choices=list(SETTINGS))
    parser.add_argument("--results", type=Path)
    budget = parser.parse_args()
    print(f"{machine()}; {budget.images} images, {budget.epochs} epochs of batches of {budget.batch}, lr {budget.lr}")
    setup = {k: v for k, v in vars(budget).items() if k not in ("seeds", "settings", "results")}
    noted: dict[str, dict[str, float]] = {}
    if budget.results and budget.results.exists():
        noted = json.loads(budget.results.read_text())
    keys = {
        (s, seed): json.dumps({"setting": s, "seed": seed, **setup})
        for s in budget.settings
        for seed in range(budget.seeds)
    }
    with tempfile.TemporaryDirectory() as cache:
        for seed in range(budget.seeds):
            for setting in budget.settings:
                key = keys[setting, seed]
                if key not in noted:
                    noted[key] = run(setting, seed, budget, cache)
                    if budget.results:
                        budget.results.write_text(json.dumps(noted, indent=1))
                print(
                    f"seed {seed}  {setting:>20}  {noted[key]['accuracy']:.1f} %  {noted[key]['seconds']:.0f} s",
                    flush=True,
                )
    for setting in budget.settings:
        runs = [noted[keys[setting, seed]] for seed in range(budget.seeds)]
        seen = [r["accuracy"] for r in runs]
        spread = statistics.stdev(seen) if len(seen) > 1 else 0.0
        seconds = statistics.mean(r["seconds"] for r in runs)
        each = ", ".join(f"{a:.1f}" for a in seen)
        print(f"{setting:>20}  {statistics.mean(seen):.1f} ± {spread:.1f} %  ({each})  {seconds:.0f} s each")


if __name__ == "__main__":
    main()
