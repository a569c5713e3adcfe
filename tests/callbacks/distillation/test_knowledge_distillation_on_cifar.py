"""The public networks on real photographs: what ResNet-56 says about images that ResNet-20 has trouble with."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from foreign import make_trainer
from lightning.pytorch import Trainer
from real_data import real_data
from torch.utils.data import DataLoader, Subset

from lightning_compress.callbacks import KnowledgeDistillation
from lightning_compress.datamodules import CIFAR10
from lightning_compress.modules import ImageClassifier


@pytest.mark.real_data
def test_the_public_teacher_agrees_with_the_public_student(tmp_path: Path) -> None:
    root = real_data("cifar10.npz", "weights/resnet20-cifar10.pt", "weights/resnet56-cifar10.pt")
    images = CIFAR10(
        str(root), val_size=0, augment=False, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ).splits.test  # fmt: skip
    module = ImageClassifier(
        "resnet20", weights=str(root / "weights/resnet20-cifar10.pt"), optimizer=partial(torch.optim.SGD, lr=0.0)
    )
    kd = KnowledgeDistillation(
        "resnet56", teacher_weights=str(root / "weights/resnet56-cifar10.pt"), cache=str(tmp_path / "cache")
    )
    trainer: Trainer = make_trainer(tmp_path, kd, max_epochs=2)
    trainer.fit(module, DataLoader(Subset(images, range(256)), 128))
    assert 0.85 < float(trainer.callback_metrics["kd/agreement"]) < 1
    assert kd._teachers is not None
    x, y = next(iter(DataLoader(Subset(images, range(256)), 256)))
    (logits,) = kd._teachers.ask((x,), {})
    assert (logits.argmax(1) == y).float().mean() > 0.91  # 94.4 % on all test images
