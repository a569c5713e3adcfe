"""Small systems, data of noise, and the shortest Trainer that trains them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.modules import CycleGAN, Pix2Pix
from lightning_compress.modules.translation.online_teacher import OnlineTeacher
from lightning_compress.networks import PatchDiscriminator, ResNetGenerator, VGGFeatures

SIZE = 16


def noise(count: int, size: int = SIZE, batch_size: int = 2) -> DataLoader:
    """Two sets of images of noise, in [-1, 1]."""
    a, b = 2 * torch.rand(2, count, 3, size, size, generator=torch.Generator().manual_seed(0)) - 1
    return DataLoader(TensorDataset(a, b), batch_size)


def small_pix2pix(kind: type[Pix2Pix] = Pix2Pix, **arguments: Any) -> Pix2Pix:
    seed_everything(0, verbose=False)
    parts: dict[str, Any] = {
        "generator": ResNetGenerator(ngf=3, blocks=1),
        "discriminator": PatchDiscriminator(6, 3, layers=1),
        "input_shape": (3, SIZE, SIZE),
    }
    return kind(**{**parts, **arguments})


def small_cycle_gan(kind: type[CycleGAN] = CycleGAN, **arguments: Any) -> CycleGAN:
    seed_everything(0, verbose=False)
    parts: dict[str, Any] = {
        "generator_ab": ResNetGenerator(ngf=3, blocks=1),
        "discriminator_ab": PatchDiscriminator(3, 3, layers=1),
        "input_shape": (3, SIZE, SIZE),
        "pool_size": 3,
    }
    return kind(**{**parts, **arguments})


def rates(*lr: float) -> Callable[[Any], SGD]:
    """SGD with one rate after the other: for the generators, for the discriminators."""
    following = iter(lr)
    return lambda parameters: SGD(parameters, next(following))


def trainer(*callbacks: Callback, root: Path | None = None, **arguments: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0}
    return Trainer(
        default_root_dir=root,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**defaults, **arguments},
    )


class Remembering(Callback):
    """What a module logged in every training step."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.values: list[list[float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        log = pl_module.log

        def remember(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if name in self.names:
                self.step[name] = float(value)
            log(name, value, *args, **kwargs)

        pl_module.log = remember  # type: ignore[method-assign]

    def on_train_batch_start(self, *args: Any) -> None:
        self.step: dict[str, float] = {}

    def on_train_batch_end(self, *args: Any) -> None:
        self.values.append([self.step[name] for name in self.names])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        del pl_module.log


class Identity(nn.Module):
    """A generator that leaves images as they are; its one weight changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.idle


def small_online(kind: type[OnlineTeacher], **arguments: Any) -> Any:
    """A teacher and a student of half the width, on images of 32x32; without pairs, two epochs each in turns of one."""
    seed_everything(0, verbose=False)
    paired = issubclass(kind, Pix2Pix)
    names = ("generator", "discriminator") if paired else ("generator_ab", "discriminator_ab")
    networks = ResNetGenerator(ngf=4, blocks=2), PatchDiscriminator(6 if paired else 3, 4, layers=1)
    parts: dict[str, Any] = {
        **dict(zip(names, networks, strict=True)),
        "student": ResNetGenerator(ngf=2, blocks=2),
        "perceptual_net": VGGFeatures(width=2),
        "input_shape": (3, 32, 32),
    }
    parts |= {"layers": ["model.9", "model.11"]} if kind.__name__.startswith("DCD") else {"patch": 8}
    turns = {"n_epochs": 1, "n_epochs_decay": 1, "phase_epochs": 1, "student_ratio": 1, "pool_size": 3}
    return kind(**{**parts, **({} if paired else turns), **arguments})
