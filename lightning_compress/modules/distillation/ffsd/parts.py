"""The modules that train beside the networks, and are not deployed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Fusion(nn.Module):
    """Make one map, and logits, of the deepest maps of all students.

    Args:
        in_channels: of these maps together, M c.
        channels: of the map that it makes, c.
        num_classes: of the logits.
    """

    training_only = True

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.layers = separable(in_channels, channels)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M c, h, w) -> maps (B, c, h, w) and logits (B, num_classes)."""
        fused = self.layers(maps)
        return fused, self.classifier(fused.mean((2, 3)))


class TransFusion(nn.Module):
    """Make of the leader's deepest map one as wide as those of all students together, (B, c, h, w) -> (B, M c, h, w).

    Args:
        channels: c.
        out_channels: M c.
    """

    training_only = True

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.layers = separable(channels, out_channels)

    def forward(self, maps: Tensor) -> Tensor:
        return self.layers(maps)


class SelfDistillation(nn.Module):
    """Make shallower maps of the deepest one: each stage doubles height and width.

    Args:
        channels: of a network's maps, deep to shallow; 64, 32, 16 for ResNet-20.
    """

    training_only = True

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(deep, shallow, 3, stride=2, padding=1, output_padding=1, bias=False),
                nn.BatchNorm2d(shallow),
                nn.ReLU(),
            )
            for deep, shallow in pairwise(channels)
        )

    def forward(self, deepest: Tensor) -> list[Tensor]:
        """(B, channels[0], h, w) -> (B, channels[1], 2 h, 2 w), (B, channels[2], 4 h, 4 w), ..."""
        made = []
        for stage in self.stages:
            deepest = stage(deepest)
            made.append(deepest)
        return made

    @torch.no_grad()
    def judge(self, deepest: Tensor) -> list[Tensor]:
        """The same in eval mode and without gradients; modes are as before."""
        mode = self.training
        self.eval()
        made = self(deepest)
        self.train(mode)
        return made


class TrainingOnly(nn.ModuleList):
    """Modules that copies for inference leave out."""

    training_only = True


def separable(in_channels: int, out_channels: int) -> nn.Sequential:
    """A depthwise 3x3 and a 1x1 convolution, each with batch norm and ReLU."""
    layers = nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels),
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )
    initialise(layers)
    return layers


@torch.no_grad()
def initialise(network: nn.Module) -> None:
    """The authors' weights: convolutions N(0, 2 / (k k C_out)), C_out of all groups together; torch's linear layers."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
        if isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            nn.init.normal_(module.weight, std=(2 / (height * width * module.out_channels)) ** 0.5)
