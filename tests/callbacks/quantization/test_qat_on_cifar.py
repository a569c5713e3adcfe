"""QAT on real data: ranges that start well, and a few steps."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from foreign import make_trainer, no_pictures
from real_data import real_data

from lightning_compress.callbacks import LTS, QAT
from lightning_compress.datamodules import CIFAR10
from lightning_compress.modules import ImageClassifier


def accuracy(module, data, images=512):
    data.setup("test")
    x, y = next(iter(torch.utils.data.DataLoader(data.test_dataloader().dataset, images)))
    with torch.no_grad():
        return (module.eval()(x).argmax(1) == y).float().mean().item()


@pytest.mark.real_data
def test_resnet20_keeps_its_accuracy_with_eight_bits(tmp_path):
    root = real_data("weights/resnet20-cifar10.pt", "cifar10.npz")
    torch.manual_seed(0)
    module = ImageClassifier(
        "resnet20",
        weights=str(root / "weights" / "resnet20-cifar10.pt"),
        optimizer=partial(torch.optim.SGD, lr=1e-4, momentum=0.9),
    )
    data = CIFAR10(str(root), batch_size=64, val_size=0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    dense = accuracy(module, data)
    callbacks = [QAT(8, 8, quantizer="lsq", per_channel=True), LTS(warmup_epochs=0, ema=0.0)]
    trainer = make_trainer(tmp_path, *callbacks, max_epochs=1, limit_train_batches=4, limit_val_batches=0)
    module.train()
    with no_pictures:
        trainer.fit(module, data)
    quantised = accuracy(module, data)
    assert dense > 0.9
    assert quantised > dense - 0.02
    assert 0 < callbacks[1].frozen_share < 1
