"""A LightningModule that knows nothing of this package, its data, and the shortest Trainer that trains it.

The network has what methods stumble over: a residual sum with functional activations, batch norms, a biased
convolution, a linear head. The data are a few of scikit-learn's digits in a fixed order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    """Two convolutions that are added to what they read."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Network(nn.Module):
    """(N, 1, 8, 8) -> (N, 10). Layers that can be narrowed: stem and conv2 of both blocks, coupled; conv1 of each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.bn(self.stem(x)))).mean((2, 3)))


class Foreign(LightningModule):
    """Trains a network by SGD with momentum, in two groups, with a scheduler: what a user might write."""

    def __init__(self, network: nn.Module | None = None, lr: float = 0.1) -> None:
        super().__init__()
        self.net = network or Network()
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]), sync_dist=True)
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean(), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        norms = [p for p in self.parameters() if p.ndim == 1]
        others = [p for p in self.parameters() if p.ndim > 1]
        groups = [{"params": others, "weight_decay": 1e-3}, {"params": norms, "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def made(network: nn.Module | None = None, **kwargs: Any) -> Foreign:
    """The module, with the same weights at every call."""
    torch.manual_seed(0)
    return Foreign(network, **kwargs)


def digits(samples: int = 64, start: int = 0, batch_size: int = 16) -> DataLoader:
    """Images (N, 1, 8, 8) in [0, 1] and labels."""
    images, labels = load_digits(return_X_y=True)
    chosen = slice(start, start + samples)
    x = torch.from_numpy(images[chosen]).float().view(-1, 1, 8, 8) / 16
    return DataLoader(TensorDataset(x, torch.from_numpy(labels[chosen])), batch_size)


def trainer(root: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    """A Trainer that writes into `root` and says nothing."""
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=list(callbacks), default_root_dir=root, **{**defaults, **kwargs})


def fit(module: LightningModule, root: Path, *callbacks: Callback, ckpt_path: Any = None, **kwargs: Any) -> Trainer:
    """Train on 64 digits, 4 steps per epoch; validate on 32 others."""
    runner = trainer(root, *callbacks, **kwargs)
    runner.fit(module, digits(), digits(32, 64), ckpt_path=ckpt_path)
    return runner
