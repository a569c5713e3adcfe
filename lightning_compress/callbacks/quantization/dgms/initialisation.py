"""Where a mixture starts: from the weights of a trained layer, by k-means, or by k-means and EM."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.callbacks.quantization.dgms.mixture import SIGMA_FLOOR, Components, chunks, log_densities

Init = Literal["kmeans", "empirical", "em"]
# k-means ends when the centres moved less than this, summed and squared; the authors' number.
TOLERANCE = 1e-11
# EM looks at about so many weights.
EM_SAMPLE = 1 << 17


class Start(NamedTuple):
    """First values of the parameters: mu (K - 1,), pi (K,), sigma (K,), on the weight's device, float32."""

    mu: Tensor
    pi: Tensor
    sigma: Tensor


@torch.no_grad()
def kmeans_1d(values: Tensor, clusters: int, *, iterations: int = 300, seed: int | None = None) -> Tensor:
    """Cluster numbers: the centres, ascending.

    On a line a cluster is an interval, and its mean follows from running sums. So after one sort an iteration costs a
    bisection per centre. A centre without members moves to the number that is farthest from its own. Where there are
    no more different numbers than clusters they are the centres, the last one repeated.

    Args:
        values: (n,).
        clusters: K.
        iterations: at most so many.
        seed: None starts from K quantiles, which finds good optima and is the same every time; a number draws K of the
            values, as the paper does.

    Returns:
        (K,), float64.
    """
    line = values.detach().double().sort().values
    distinct = line.unique_consecutive()
    if len(distinct) <= clusters:
        return F.pad(distinct[None], (0, clusters - len(distinct)), mode="replicate")[0]
    sums = F.pad(line.cumsum(0), (1, 0))
    centers = _seeds(line, clusters, seed)
    for _ in range(iterations):
        inner = torch.searchsorted(line, (centers[1:] + centers[:-1]) / 2, right=True)
        ends = F.pad(F.pad(inner, (1, 0)), (0, 1), value=len(line))
        count = ends.diff()
        moved = torch.where(count > 0, sums[ends].diff() / count.clamp(min=1), centers)
        if (count == 0).any():
            moved = _refill(line, moved, ends, count)
        moved = moved.sort().values
        shift = (moved - centers).abs().sum()
        centers = moved
        if shift.square() < TOLERANCE:
            break
    return centers


def _seeds(line: Tensor, clusters: int, seed: int | None) -> Tensor:
    if seed is None:
        places = (torch.arange(clusters, device=line.device) + 0.5) / clusters * len(line)
        return line[places.long()]
    generator = torch.Generator().manual_seed(seed)
    return line[torch.randperm(len(line), generator=generator)[:clusters].to(line.device)].sort().values


def _refill(line: Tensor, centers: Tensor, ends: Tensor, count: Tensor) -> Tensor:
    """Send centres without members to the ends of intervals that are farthest from their centres."""
    full = count > 0
    edges = torch.cat([line[ends[:-1][full]], line[ends[1:][full] - 1]])
    apart = (edges - centers[full].repeat(2)).abs()
    empty = (~full).nonzero()[:, 0][: len(edges)]
    return centers.index_put((empty,), edges[apart.topk(len(empty)).indices])


@torch.no_grad()
def mixture_of_clusters(values: Tensor, centers: Tensor) -> Start:
    """The mixture whose components are the clusters of these centres.

        pi_j = n_j / n,   sigma_j = sqrt(sum_{i in j} (w_i - c_j)^2 / (n_j - 1)),   c of the smallest |c| taken as 0

    Args:
        values: (n,).
        centers: (K,), ascending.
    """
    labels = torch.bucketize(values.double(), (centers[1:] + centers[:-1]) / 2)
    number = torch.arange(len(centers), device=centers.device)
    zero = centers.abs().argmin()
    level = torch.where(number == zero, 0, centers)
    count = torch.bincount(labels, minlength=len(centers))
    squares = torch.bincount(labels, (values.double() - level[labels]).square(), minlength=len(centers))
    sigma = (squares / (count - 1).clamp(min=1)).sqrt().clamp(min=SIGMA_FLOOR)
    order = torch.cat([zero[None], number[number != zero]])
    mu, pi, sigma = (x[order].float() for x in (level, count / len(values), sigma))
    return Start(mu[1:], pi, sigma)


@torch.no_grad()
def fit_em(values: Tensor, start: Start, *, iterations: int = 300, tolerance: float = 1e-6) -> Start:
    """Let expectation maximisation go on from there; the mean of component 0 stays 0.

    It ends when the log-likelihood of a weight grows by less than `tolerance` on average. Of many weights a sample is
    looked at, evenly spaced among the sorted ones.
    """
    if len(values) > EM_SAMPLE:
        values = values.sort().values[:: -(-len(values) // EM_SAMPLE)]
    best = -torch.inf
    for _ in range(iterations):
        components = Components.of(*start)
        total = torch.zeros(3, len(start.pi), dtype=torch.float64, device=values.device)
        likelihood = 0.0
        for (part,) in chunks(values):
            z, log_density = log_densities(part, components)
            r = log_density.softmax(0)
            total += torch.stack([r.sum(1), torch.linalg.vecdot(r, z), torch.linalg.vecdot(r, z.square())])
            likelihood += float(log_density.logsumexp(0).double().mean()) * len(part) / len(values)
        share, first, second = total
        members = share.clamp(min=1e-12)
        level, width = components.level[:, 0].double(), components.width[:, 0].double()
        step = width * first / members
        step[0] = 0
        variance = width.square() * second / members - step.square()
        sigma = variance.clamp(min=SIGMA_FLOOR**2).sqrt()
        start = Start((level + step)[1:].float(), (share / len(values)).float(), sigma.float())
        if likelihood - best < tolerance:
            break
        best = likelihood
    return start


def initial_mixture(
    weight: Tensor, components: int, init: Init = "kmeans", *,
    sigma_empirical: float = 0.01, iterations: int = 300, seed: int | None = None,
) -> Start:  # fmt: skip
    """Fit a mixture of so many components to the weights of a layer.

    Args:
        weight: of any shape.
        components: K.
        init: ``"kmeans"``: shares and widths of the clusters; ``"empirical"``: their shares, all of one width;
            ``"em"``: a maximum-likelihood fit that starts from the clusters.
        sigma_empirical: that width.
        iterations: at most so many of k-means, and of EM.
        seed: see :func:`kmeans_1d`.
    """
    values = weight.detach().flatten().float()
    start = mixture_of_clusters(values, kmeans_1d(values, components, iterations=iterations, seed=seed))
    if init == "empirical":
        return start._replace(sigma=torch.full_like(start.sigma, sigma_empirical))
    return fit_em(values, start, iterations=iterations) if init == "em" else start
