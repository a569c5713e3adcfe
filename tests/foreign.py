"""A LightningModule that knows nothing of this package, its data, and the shortest Trainer that trains it.

The network has what methods stumble over: a residual sum, functional activations, batch norms, a biased
convolution, a linear head. The data are a few of scikit-learn's digits, always in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

# As where matplotlib is not installed: drawing the account takes longer than such a fit.
no_pictures = patch("lightning_compress.core.plots.available", return_value=False)


class Block(nn.Module):
    """Two convolutions that are added to what they read."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Network(nn.Module):
    """(N, 1, 8, 8) -> (N, 10). The stem and the conv2 of both blocks are coupled, their conv1 are free."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8, 12), Block(8, 12))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.bn(self.stem(x)))).mean((2, 3)))


class Foreign(LightningModule):
    """What a user might write: two groups of parameters, momentum, a schedule, metrics of its own."""

    def __init__(self, network: nn.Module | None = None, lr: float = 0.1) -> None:
        super().__init__()
        self.net = Network() if network is None else network
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]), sync_dist=True)
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean(), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": 1e-3},
            {"params": [p for p in self.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def made(build: Callable[[], nn.Module] = Network, **kwargs: Any) -> Foreign:
    """The module, with the same weights at every call."""
    torch.manual_seed(0)
    return Foreign(build(), **kwargs)


def digits(samples: int = 64, start: int = 0, batch_size: int = 16) -> DataLoader:
    """Images (N, 1, 8, 8) in [0, 1] with their labels."""
    images, labels = load_digits(return_X_y=True)
    chosen = slice(start, start + samples)
    x = torch.from_numpy(images[chosen]).float().view(-1, 1, 8, 8) / 16
    return DataLoader(TensorDataset(x, torch.from_numpy(labels[chosen])), batch_size)


def make_trainer(root: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    """A Trainer that writes into `root` and shows nothing."""
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=list(callbacks), default_root_dir=root, **{**defaults, **kwargs})


def fit(module: LightningModule, root: Path, *callbacks: Callback, ckpt_path: Any = None, **kwargs: Any) -> Trainer:
    """Train on 64 digits, 4 steps an epoch; validate on 32 others."""
    trainer = make_trainer(root, *callbacks, **kwargs)
    with no_pictures:
        trainer.fit(module, digits(), digits(32, 64), ckpt_path=ckpt_path)
    return trainer


def widths(module: nn.Module) -> dict[str, int]:
    """Output channels of every convolution and linear layer."""
    layers = {n: m for n, m in module.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    return {n: m.weight.shape[0] for n, m in layers.items()}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Equal parameters and buffers, bit for bit."""
    left, right = ({k: v for k, v in m.state_dict().items() if isinstance(v, Tensor)} for m in (one, other))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
