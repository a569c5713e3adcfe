"""The public networks on real photographs: what goes is what the student is sure of, and right about."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from foreign import make_trainer
from real_data import real_data
from torch.utils.data import DataLoader, Subset

from lightning_compress.callbacks import KCD
from lightning_compress.datamodules import CIFAR10
from lightning_compress.modules import ImageClassifier


@pytest.mark.real_data
def test_the_public_student_keeps_what_it_is_unsure_of(tmp_path: Path) -> None:
    root = real_data("cifar10.npz", "weights/resnet20-cifar10.pt")
    images = CIFAR10(
        str(root), val_size=0, augment=False, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ).splits.test  # fmt: skip
    weights = str(root / "weights/resnet20-cifar10.pt")
    module = ImageClassifier("resnet20", weights=weights, optimizer=partial(torch.optim.SGD, lr=0.0))
    kcd = KCD("resnet20", teacher_weights=weights, keep_ratio=0.5, every_n_epochs=1)
    part = Subset(images, range(256))
    with patch("lightning_compress.callbacks.distillation.knowledge_distillation.callback.open_account"):
        make_trainer(tmp_path, kcd, max_epochs=1).fit(module, DataLoader(part, 128))
    assert kcd.knowledge is not None
    lost = torch.ones(256, dtype=torch.bool)
    lost[kcd.knowledge.kept] = False
    x, y = next(iter(DataLoader(part, 256)))
    with torch.no_grad():
        right = module.eval()(x).argmax(1) == y
    assert right[lost].float().mean() == 1 > right[~lost].float().mean() > 0.75
    assert kcd.knowledge.total[lost].max() <= kcd.knowledge.total[~lost].min()
