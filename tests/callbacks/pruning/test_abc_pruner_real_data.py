"""ABCPruner on the public ResNet-56 and CIFAR-10: what its bees can see in a few batches."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from foreign import make_trainer, no_pictures
from lightning.pytorch import seed_everything
from real_data import real_data

from lightning_compress.callbacks import ABCPruner
from lightning_compress.callbacks.pruning.abc_pruner.search import PlanFile
from lightning_compress.datamodules import CIFAR10
from lightning_compress.modules import ImageClassifier

WEIGHTS = "weights/resnet56-cifar10.pt"

pytestmark = pytest.mark.real_data


def started(folder: Path, **arguments) -> float:
    """Accuracy on held-out images of what a fit starts with."""
    root = real_data("cifar10.npz", WEIGHTS)
    seed_everything(0, verbose=False)
    optimizer = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    module = ImageClassifier("resnet56", weights=str(root / WEIGHTS), optimizer=optimizer)
    data = CIFAR10(str(root), batch_size=64, eval_batch_size=250, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    trainer = make_trainer(folder, ABCPruner(**arguments), max_epochs=0, limit_train_batches=2, limit_val_batches=1)
    with no_pictures:
        trainer.fit(module, data)
    return trainer.validate(module, data, verbose=False)[0]["val/acc"]


def test_two_batches_tell_wide_from_narrow_and_the_best_is_kept(tmp_path):
    """The wider of two structures is found, and its accuracy is that of the start of the fit."""
    start = started(tmp_path, food_number=2, max_cycle=0, calfitness_epoch=1)
    (path,) = tmp_path.glob("abc_pruner-*.pt")
    plan = PlanFile.load(path)
    (one, first), (two, second) = plan.colony["history"]
    print(f"{sum(one)} tenths of 27 blocks {first:.3f}, {sum(two)} tenths {second:.3f}, start {start:.3f}")
    assert start == pytest.approx(max(first, second)) == pytest.approx(plan.found.fitness)
    assert start > 0.2
    assert started(tmp_path, fixed_code=[9] * 27) > started(tmp_path, fixed_code=[3] * 27)
