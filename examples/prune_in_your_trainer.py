"""Add pruning to a LightningModule and Trainer that you already have: one more callback, and a file at the end.

python examples/prune_in_your_trainer.py
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torchvision.models import resnet18

from lightning_compress.callbacks import ExportCompressed, L1Norm
from lightning_compress.datamodules import Digits


class YourModule(LightningModule):
    """Nothing here knows of compression."""

    def __init__(self) -> None:
        super().__init__()
        self.network = resnet18(num_classes=10)
        self.example_input_array = torch.zeros(1, 3, 16, 16)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val/acc", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    seed_everything(0)
    prune = L1Norm(pruning_ratio=0.5, start_epoch=2, round_to=8)  # train 2 epochs, halve all widths, train on
    trainer = Trainer(max_epochs=5, callbacks=[prune, ExportCompressed()], logger=False)
    trainer.fit(YourModule(), Digits(size=16, channels=3))
