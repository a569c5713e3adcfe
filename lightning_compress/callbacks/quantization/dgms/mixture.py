"""The mixture of Gaussians over the weights of a layer: soft weights, their gradients, hard weights.

Everywhere component 0 is the one whose mean is pinned at 0. What has an entry per component and weight, K x n numbers,
exists for one chunk of the weights at a time only, in the forward and in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, autograd
from torch.nn import functional as F

# Below it |sigma| has no influence: a density needs a width.
SIGMA_FLOOR = 1e-6
# Below it tau is set back to it after each step.
TAU_FLOOR = 1e-4
# What the authors' code adds to the sum of the densities, against a division by zero.
EPS = 1e-11
# Weights that are worked on at once: few enough for a processor's cache, enough to keep an accelerator busy.
CHUNK = 1 << 14
ACCELERATOR_CHUNK = 1 << 19


class Components(NamedTuple):
    """A mixture as the densities need it; each (K, 1).

    Attributes:
        level: the means, the first 0.
        width: max(|sigma|, 1e-6).
        offset: log of the share and of the density's factor, log(|pi| / sum |pi|) - log(width sqrt(2 Pi)).
    """

    level: Tensor
    width: Tensor
    offset: Tensor

    @classmethod
    def of(cls, mu: Tensor, pi: Tensor, sigma: Tensor) -> Components:
        """From the parameters: mu (K - 1,), pi (K,), sigma (K,). In float32, or in what is more precise."""
        mu, pi, sigma = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (mu, pi, sigma))
        level, share, width = F.pad(mu, (1, 0)), shares(pi), sigma.abs().clamp(min=SIGMA_FLOOR)
        return cls(level[:, None], width[:, None], (share.log() - width.log() - 0.5 * math.log(2 * math.pi))[:, None])


def shares(pi: Tensor) -> Tensor:
    """|pi| / sum |pi|: signs and scale do not count. An empty component has a share whose logarithm is finite."""
    return (pi.abs() / pi.abs().sum()).clamp(min=torch.finfo(pi.dtype).tiny)


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors (n,), so much of them at a time as their device likes best."""
    size = CHUNK if tensors[0].device.type == "cpu" else ACCELERATOR_CHUNK
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def log_densities(weight: Tensor, components: Components) -> tuple[Tensor, Tensor]:
    """Standardised distances and logarithms of the weighted densities.

        z_k = (w - mu_k) / sigma_k,    log g_k = log pi_k - log(sigma_k sqrt(2 Pi)) - z_k^2 / 2

    Args:
        weight: (n,).

    Returns:
        z and log g, both (K, n).
    """
    z = (weight - components.level).div_(components.width)
    return z, torch.addcmul(components.offset, z, z, value=-0.5)


def responsibilities(weight: Tensor, components: Components, official_eps: bool = False) -> tuple[Tensor, Tensor]:
    """What each component answers for: r_k = g_k / sum_j g_j, and z of :func:`log_densities`.

    Computed from logarithms, so that a weight far from all means still belongs to the best one. With `official_eps`
    the sum is 1e-11 larger, and such a weight belongs to none: r = 0. There 1e-11 is but a further component, of
    constant density, that is left out at the end.

    Args:
        weight: (n,).

    Returns:
        z and r, both (K, n).
    """
    z, log_density = log_densities(weight, components)
    if official_eps:
        log_density = F.pad(log_density, (0, 0, 0, 1), value=math.log(EPS))
    return z, log_density.softmax(0)[: len(z)]


class _SoftWeight(autograd.Function):
    """w_S = sum_k phi_k mu_k with phi = softmax(r / tau), over chunks; saves w and w_S alone, and computes r anew."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, mu: Tensor, pi: Tensor, sigma: Tensor, tau: Tensor, official_eps: bool
    ) -> Tensor:
        components = Components.of(mu, pi, sigma)
        flat = weight.flatten().to(components.level.dtype)
        soft = torch.empty_like(flat)
        for part, out in chunks(flat, soft):
            _, r = responsibilities(part, components, official_eps)
            torch.mv((r / tau).softmax(0).T, components.level[:, 0], out=out)
        ctx.official_eps = official_eps
        soft = soft.view(weight.shape)
        ctx.save_for_backward(weight, mu, pi, sigma, tau, soft)
        return soft

    @staticmethod
    @autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """By the chain rule through both softmaxes, with g = dL/dw_S:

        a_k = dL/dr_k = g phi_k (mu_k - w_S) / tau
        b_k = dL/d(log density)_k = r_k (a_k - sum_j r_j a_j)

        dL/dw = -sum_k b_k z_k / sigma_k        dL/dmu_k = sum_i phi_k g + b_k z_k / sigma_k
        dL/dsigma_k = sum_i b_k (z_k^2 - 1) / sigma_k      dL/dtau = -sum_i sum_k a_k r_k / tau
        dL/dlog(pi_k) = sum_i b_k - share_k sum_i sum_j b_j
        """
        weight, mu, pi, sigma, tau, soft = ctx.saved_tensors
        components = Components.of(mu, pi, sigma)
        flat = weight.flatten().to(components.level.dtype)
        level, width = components.level, components.width
        for_weight = torch.empty_like(flat)
        # by component: of phi g, b, b z, b z^2, a r; summed up in double precision
        total = torch.zeros(5, len(level), dtype=torch.float64, device=mu.device)
        for part, soft_part, grad, out in chunks(flat, soft.flatten(), grads[0].flatten().to(flat.dtype), for_weight):
            z, r = responsibilities(part, components, ctx.official_eps)
            phi_g = (r / tau).softmax(0).mul_(grad)
            a = (level - soft_part).mul_(phi_g).div_(tau)
            ar = a * r
            b = torch.addcmul(ar, r, ar.sum(0), value=-1)
            bz = b * z
            torch.mv(bz.T, -1 / width[:, 0], out=out)
            total += torch.stack([phi_g.sum(1), b.sum(1), bz.sum(1), torch.linalg.vecdot(bz, z), ar.sum(1)])
        phi_g, b, bz, bzz, ar = total.to(flat.dtype)
        width, size = width[:, 0], pi.abs()
        for_mu = (phi_g + bz / width)[1:]
        for_pi = torch.where(size > 0, (b / size - b.sum() / size.sum()) * pi.sign(), 0)
        for_sigma = torch.where(sigma.abs() > SIGMA_FLOOR, (bzz - b) / width * sigma.sign(), 0)
        for_tau = -(ar.sum() / tau).view(tau.shape)
        return for_weight.view(weight.shape).to(weight.dtype), for_mu, for_pi, for_sigma, for_tau, None


def soft_weight(
    weight: Tensor, mu: Tensor, pi: Tensor, sigma: Tensor, tau: Tensor, official_eps: bool = False
) -> Tensor:
    """What the layer computes with while it trains: the means, weighted by the sharpened responsibilities.

    Args:
        weight: of any shape.
        mu: (K - 1,), the free means.
        pi: (K,), shares up to signs and scale; of the zero component first.
        sigma: (K,), widths up to signs; of the zero component first.
        tau: (1,), the temperature.
        official_eps: divide as the authors' code does; see :func:`responsibilities`.

    Returns:
        Of the shape of the weight, in the precision of the mixture.
    """
    with torch.autocast(weight.device.type, enabled=False):
        return _SoftWeight.apply(weight, mu, pi, sigma, tau, official_eps)


@torch.no_grad()
def assign(weight: Tensor, mu: Tensor, pi: Tensor, sigma: Tensor, official_eps: bool = False) -> Tensor:
    """The component that answers most for each weight, uint8 of its shape; of equal ones the first. See `soft_weight`.

    The temperature has no say in it: phi grows with r.
    """
    with torch.autocast(weight.device.type, enabled=False):
        components = Components.of(mu, pi, sigma)
        flat = weight.flatten().to(components.level.dtype)
        codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
        for part, out in chunks(flat, codes):
            out.copy_(responsibilities(part, components, official_eps)[1].argmax(0))
        return codes.view(weight.shape)
