"""What is minimised over a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.distill.variational import cross_modal_rank
from lightning_compress.modules.reid.cross_modal_reid.branches import LOOKS, Look, Looks


class Weights(NamedTuple):
    """Of the six losses in the sum."""

    ce: float
    rank: float
    cml: float
    vsd: float
    vcd: float
    vml: float


def classification_loss(looks: Looks, labels: Tensor, label_smoothing: float) -> Tensor:
    """L_ce: cross-entropy of all eight classifiers, in their shares."""
    ce = partial(F.cross_entropy, target=labels, label_smoothing=label_smoothing)
    return sum_of_looks(looks, lambda look: ce(look.v_logits) + ce(look.z_logits))


def ranking_loss(looks: Looks, labels: Tensor, infrared: Tensor, margins: Sequence[float]) -> Tensor:
    """L_rank: `cross_modal_rank` of all eight vectors, in their shares; margins are its m1, m2, a1, a2."""

    def rank(vectors: Tensor) -> Tensor:
        return cross_modal_rank(vectors, labels, infrared, *margins)

    return sum_of_looks(looks, lambda look: rank(look.v) + rank(look.z))


def sum_of_looks(looks: Looks, loss: Callable[[Look], Any]) -> Tensor:
    """1/2 I + 1/2 V + 1/4 S(x) + 1/4 S(grey)."""
    shares = (share for _, _, share in LOOKS.values())
    return torch.stack([share * loss(look) for share, look in zip(shares, looks, strict=True)]).sum()
