"""The discriminator, which sees nothing but logits, and the losses of both players."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Variant = Literal["official", "plain"]
Regularizer = Literal["adversarial", "l2", "l1"]
WIDTHS = (128, 256, 128)


class Discriminator(nn.Sequential):
    """Logits (N, num_classes) -> score (N, 1): high for those of the trained network.

    Args:
        num_classes: number of logits.
        variant: ``"official"`` is the authors' code: no activations between its layers, and a sigmoid at the end whose
            output the losses take for a logit. ``"plain"``: ReLU between the layers, and a logit at the end.
        generator: draws the weights, N(0, 0.01); biases are 0.
    """

    def __init__(
        self, num_classes: int, variant: Variant = "official", generator: torch.Generator | None = None
    ) -> None:
        widths = (num_classes, *WIDTHS, 1)
        layers: list[nn.Module] = []
        for width, following in pairwise(widths):
            layers.append(nn.utils.skip_init(nn.Linear, width, following))
            if variant == "plain":
                layers.append(nn.ReLU())
        super().__init__(*(layers if variant == "official" else layers[:-1]))
        if variant == "official":
            self.append(nn.Sigmoid())
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01, generator=generator)
                nn.init.zeros_(layer.bias)


def verdict(score: Tensor, real: bool) -> Tensor:
    """h(p, y): binary cross-entropy of scores (N, 1), taken for logits, in float32.

    Of a sigmoid's output it lies in [0.3133, 1.3133]; at 0.5 it is 0.474077 for y = 1 and 0.974077 for y = 0.
    """
    score = score.float()
    return F.binary_cross_entropy_with_logits(score, torch.full_like(score, float(real)))


def discriminator_loss(
    discriminator: nn.Module, trained: Tensor, masked: Tensor, regularizer: Regularizer = "adversarial"
) -> Tensor:
    """What D minimises: to know which logits are whose, and its regulariser R.

    Args:
        discriminator: D.
        trained: logits of the trained network, (N, num_classes).
        masked: logits of the masked network, without a graph, (N, num_classes).
        regularizer: ``"adversarial"``, E[log D(f_g)], which holds D back, the best and the authors' choice; or the
            ``"l2"`` or ``"l1"`` norm of its weights.
    """
    theirs, ours = discriminator(trained), discriminator(masked)
    loss = verdict(theirs, True) + verdict(ours, False)
    if regularizer == "adversarial":
        return loss + verdict(ours, True)
    power = 2 if regularizer == "l2" else 1
    return loss + sum(p.float().abs().pow(power).sum() for p in discriminator.parameters())


def frozen(discriminator: nn.Module, masked: Tensor) -> Tensor:
    """Score of logits with D held fixed: gradients reach the logits and stop before D's weights."""
    fixed = {name: p.detach() for name, p in discriminator.named_parameters()}
    return torch.func.functional_call(discriminator, fixed, (masked,))
