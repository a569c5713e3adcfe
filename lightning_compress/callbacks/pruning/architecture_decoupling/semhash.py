"""Improved SemHash: binary masks in the forward pass, gradients of a saturating sigmoid in the backward pass.

Kaiser, Bengio, "Discrete Autoencoders for Sequence Models", 2018, arXiv:1801.09797.

    g  = y + eps,  eps ~ N(0, 1)
    v1 = clip(1.2 sigmoid(g) - 0.1, 0, 1)
    v2 = 1[g > 0]
    m  = v2 for a random half, v1 for the rest;   dL/dy = dL/dm * dv1/dy   for all of them
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

SemHash = Literal["sample", "element", "official"]


def saturating_sigmoid(g: Tensor) -> Tensor:
    """A sigmoid that reaches 0 and 1: clip(1.2 sigmoid(g) - 0.1, 0, 1), any shape.

    >>> saturating_sigmoid(torch.tensor([-2.5, -1.0, 0.0, 1.0, 2.4]))
    tensor([0.0000, 0.2227, 0.5000, 0.7773, 1.0000])
    """
    return (1.2 * torch.sigmoid(g) - 0.1).clamp(0, 1)


def semhash(logits: Tensor, noise: Tensor, binary: Tensor) -> Tensor:
    """The training mask.

    Args:
        logits: y, (B, N).
        noise: eps, (B, N).
        binary: bool, broadcastable to (B, N): where the mask is v2.

    Returns:
        (B, N) in [0, 1]; its gradient is that of the saturating sigmoid everywhere.
    """
    g = logits + noise
    soft = saturating_sigmoid(g)
    hard = (g > 0).to(soft.dtype) + (soft - soft.detach())  # the difference is exactly 0, its gradient is 1
    return torch.where(binary, hard, soft)


def draw_noise(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """eps of :func:`semhash`: standard normal, like `logits`."""
    return torch.randn(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)


def draw_binary(logits: Tensor, mode: SemHash = "sample", generator: torch.Generator | None = None) -> Tensor:
    """Which part of the masks is binary.

    Args:
        logits: (B, N), for their shape and device.
        mode: ``"sample"`` takes every sample of the batch with probability 1/2, ``"element"`` every entry. In
            ``"official"``, the authors' code, N // 2 indices below N are drawn with replacement and used along the
            batch, so that only the first N samples can be binary: about 0.4 N of them. Indices beyond the batch,
            which end that code with an error, are ignored.
        generator: of the logits' device.

    Returns:
        bool, (B, 1) or (B, N).
    """
    batch, width = logits.shape
    if mode == "official":
        index = torch.randint(width, (width // 2,), generator=generator, device=logits.device)
        chosen = torch.zeros(max(batch, width), 1, dtype=torch.bool, device=logits.device)
        return chosen.index_fill(0, index, True)[:batch]
    shape = (batch, 1) if mode == "sample" else (batch, width)
    return torch.rand(shape, generator=generator, device=logits.device) < 0.5
