"""What generators and discriminators are trained by: verdicts on a map of logits p, means over all its entries.

| mode              | of D, real       | of D, fake       | of G         |
|-------------------|------------------|------------------|--------------|
| lsgan             | (p - 1)^2        | p^2              | (p - 1)^2    |
| vanilla           | -log s(p)        | -log(1 - s(p))   | -log s(p)    |
| hinge             | max(0, 1 - p)    | max(0, 1 + p)    | -p           |
| wgan, wgangp      | -p               | p                | -p           |

Mao et al., "Least Squares Generative Adversarial Networks", arXiv:1611.04076; Goodfellow et al., "Generative
Adversarial Networks", arXiv:1406.2661 (s is the sigmoid); Lim and Ye, "Geometric GAN", arXiv:1705.02894; Arjovsky,
Chintala, Bottou, "Wasserstein GAN", arXiv:1701.07875; Gulrajani et al., "Improved Training of Wasserstein GANs",
arXiv:1704.00028, which adds to the loss of D

    lambda_gp E[(|grad_x D(x)|_2 - 1)^2],   x drawn evenly between a real image and a fake.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.core.select import did_you_mean

GANMode = Literal["lsgan", "vanilla", "hinge", "wgan", "wgangp"]


def check_mode(mode: str) -> None:
    """Raise unless there is such a loss."""
    modes = get_args(GANMode)
    if mode not in modes:
        raise ValueError(f"gan_mode: expected one of {', '.join(modes)}, got {mode!r}.{did_you_mean(mode, modes)}")


def gan_loss(logits: Tensor, real: bool, mode: GANMode, *, for_discriminator: bool) -> Tensor:
    """How far logits are from what they should say; a mean over all of them, in float32 at least.

    Args:
        logits: of a discriminator, any shape.
        real: whether they should say that the images are real.
        mode: see the table above.
        for_discriminator: whether the discriminator is trained by it; else a generator, which always wants True.

    Raises:
        ValueError: an unknown mode, or a generator that wants to be told from real images.
    """
    check_mode(mode)
    if not (for_discriminator or real):
        raise ValueError("real=False is a target of the discriminator; a generator wants its images taken for real.")
    logits = full(logits)
    if mode == "lsgan":
        return (logits - float(real)).square().mean()
    if mode == "vanilla":
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))
    if mode == "hinge" and for_discriminator:
        return F.relu(1 - logits if real else 1 + logits).mean()
    return -logits.mean() if real else logits.mean()


def gradient_penalty(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """How far the slope of D between real images and fakes is from 1: (|grad_x D(x)|_2 - 1)^2, a mean over images.

    Args:
        discriminator: D, trained through this.
        real: what D sees with a real image, (N, C, H, W).
        fake: what it sees with a fake, likewise.
    """
    share = torch.rand(len(real), 1, 1, 1, device=real.device)
    between = torch.lerp(fake.detach(), real, share).requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(between).sum(), between, create_graph=True)
    return (torch.linalg.vector_norm(full(slope).flatten(1), dim=1) - 1).square().mean()


def full(values: Tensor) -> Tensor:
    """Float32 for what autocast made half as precise, everything else as it is."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
