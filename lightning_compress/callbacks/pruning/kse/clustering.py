"""k-means on many small sets at once."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Init = Literal["k-means++", "random"]

# Coordinates that are worked on at once: few enough for a processor's cache, enough to keep an accelerator busy.
CHUNK = 1 << 18
ACCELERATOR_CHUNK = 1 << 22


def kmeans(
    points: Tensor,
    clusters: int,
    *,
    init: Init = "k-means++",
    restarts: int = 10,
    iterations: int = 300,
    tolerance: float = 1e-4,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Cluster every set of points on its own: (B, N, D) -> number of each point's cluster, (B, N) int64.

    All sets and all restarts advance together. A set of no more than `clusters` different points is split exactly.

    Args:
        points: B sets of N points.
        clusters: of each set; from 1 to N.
        init: how the first centres are drawn: one after the other, with probability proportional to the squared
            distance to the nearest so far (Arthur and Vassilvitskii, SODA 2007), or N at random.
        restarts: runs with other first centres; the one with the smallest sum of squared distances counts.
        iterations: at most so many Lloyd steps.
        tolerance: a run ends when its centres moved less, squared and summed, than this times the points' variance.
        generator: on the CPU, whatever the device of `points`.
    """
    chunk = CHUNK if points.device.type == "cpu" else ACCELERATOR_CHUNK
    per_chunk = max(1, chunk // (restarts * points[0].numel()))
    return torch.cat(
        [
            _best_run(part, clusters, init, restarts, iterations, tolerance, generator)
            for part in points.float().split(per_chunk)
        ]
    )


def _best_run(
    points: Tensor,
    clusters: int,
    init: Init,
    restarts: int,
    iterations: int,
    tolerance: float,
    generator: torch.Generator | None,
) -> Tensor:
    on_line = points.shape[2] == 1
    points = points - points.mean(1, keepdim=True)
    if on_line:  # sorted, so that a cluster is an interval
        points, order = points.sort(1)
    runs = points.repeat_interleave(restarts, 0)
    seed = seed_random if init == "random" else seed_on_line if on_line else seed_plus_plus
    labels, inertia = lloyd(runs, seed(runs, clusters, generator), iterations, tolerance)
    best = inertia.view(-1, restarts).argmin(1)
    labels = labels.view(-1, restarts, points.shape[1])[torch.arange(len(best), device=best.device), best]
    return torch.empty_like(labels).scatter_(1, order.squeeze(2), labels) if on_line else labels


def seed_plus_plus(points: Tensor, clusters: int, generator: torch.Generator | None = None) -> Tensor:
    """Greedy k-means++: (B, N, D) -> (B, clusters, D), points that are all different as long as there are such.

    Each centre is the best of 2 + ln(clusters) draws, as in scikit-learn: the one that leaves the smallest sum.
    """
    b, n, d = points.shape
    draws = _draws(points, clusters, generator)
    columns, squares = points.mT.contiguous(), points.square().sum(2)

    def squared_distances(chosen: Tensor) -> Tensor:  # (B, L) -> (B, L, N)
        centers = points.gather(1, chosen[..., None].expand(b, -1, d))
        apart = torch.baddbmm(squares[:, None], centers, columns, alpha=-2)
        return apart.add_(squares.gather(1, chosen)[..., None]).clamp_(min=0)

    chosen = (draws[0, :, :1] * n).long().clamp_(max=n - 1)
    nearest = squared_distances(chosen).squeeze(1)
    picks = [chosen]
    for draw in draws[1:]:
        tried = _sample(nearest.cumsum(1), draw)
        left = torch.minimum(squared_distances(tried), nearest[:, None])
        best = left.sum(2).argmin(1, keepdim=True)
        nearest = left.gather(1, best[..., None].expand(b, 1, n)).squeeze(1)
        picks.append(tried.gather(1, best))
    return points.gather(1, torch.cat(picks, 1)[..., None].expand(b, -1, d))


def seed_on_line(points: Tensor, clusters: int, generator: torch.Generator | None = None) -> Tensor:
    """:func:`seed_plus_plus` for sorted numbers, (B, N, 1) -> (B, clusters, 1).

    A new centre takes over the points between the middles to its neighbours, so what a draw would save follows from
    running sums, without a look at every point.
    """
    line = points.squeeze(2).contiguous()
    b, n = line.shape
    draws = _draws(points, clusters, generator)
    sums, squares = (pad(x.cumsum(1), (1, 0)) for x in (line.double(), line.double().square()))
    center = line.gather(1, (draws[0, :, :1] * n).long().clamp_(max=n - 1))
    nearest = (line - center).square_()
    centers = line.new_full((b, clusters + 2), torch.inf)  # sorted, between -inf and the inf that are still free
    centers[:, 0], centers[:, 1:2] = -torch.inf, center
    place = torch.arange(clusters + 2, device=line.device)
    for draw in draws[1:]:
        mass = nearest.cumsum(1)
        value = line.gather(1, _sample(mass, draw))
        slot = torch.searchsorted(centers, value)
        low = torch.searchsorted(line, (centers.gather(1, slot - 1) + value) / 2)
        high = torch.searchsorted(line, (centers.gather(1, slot) + value) / 2)
        was, total, square = (x.gather(1, high) - x.gather(1, low) for x in (pad(mass, (1, 0)), sums, squares))
        saved = was - (square - 2 * value * total + (high - low) * value.square())
        best = saved.argmax(1, keepdim=True)
        center, slot = value.gather(1, best), slot.gather(1, best)
        nearest = torch.minimum(nearest, (line - center).square_())
        centers = torch.where(place < slot, centers, centers.roll(1, 1)).scatter_(1, slot, center)
    return centers[:, 1:-1, None]


def _draws(points: Tensor, clusters: int, generator: torch.Generator | None) -> Tensor:
    trials = 2 + int(math.log(clusters))
    return torch.rand(clusters, len(points), trials, generator=generator).to(points)


def _sample(mass: Tensor, draw: Tensor) -> Tensor:
    """Draw points in proportion to distances of which `mass` are the running sums: (B, N), (B, L) -> (B, L)."""
    return torch.searchsorted(mass, draw * mass[:, -1:], right=True).clamp_(max=mass.shape[1] - 1)


def seed_random(points: Tensor, clusters: int, generator: torch.Generator | None = None) -> Tensor:
    """(B, N, D) -> (B, clusters, D), that many of the points."""
    keys = torch.rand(points.shape[:2], generator=generator).to(points.device)
    return points.gather(1, keys.topk(clusters, 1).indices[..., None].expand(-1, -1, points.shape[2]))


def lloyd(points: Tensor, centers: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Move the centres to the means of the points that are nearest to them, until they stay.

    A centre without points goes to the point that is farthest from its own.

    Returns:
        Labels (B, N), and the sum of squared distances (B,).
    """
    on_line = points.shape[2] == 1
    threshold = tolerance * points.var(1, correction=0).mean(1)
    centers = centers.sort(1).values if on_line else centers.clone()
    moving = torch.arange(len(points), device=points.device)
    for _ in range(iterations):
        own, old = points[moving], centers[moving]
        labels, distance = assign(own, old)
        new, count = means(own, labels, old.shape[1])
        empty = count == 0
        if empty.any():
            rank = (empty.cumsum(1) - 1).clamp_(min=0)
            far = distance.topk(int(empty.sum(1).max()), 1).indices
            stray = far.gather(1, rank.clamp(max=far.shape[1] - 1))[..., None].expand_as(new)
            new = torch.where(empty[..., None], own.gather(1, stray), new)
        if on_line:
            new = new.sort(1).values
        centers[moving] = new
        moving = moving[(new - old).square_().sum((1, 2)) > threshold[moving]]
        if not len(moving):
            break
    labels, distance = assign(points, centers)
    return labels, distance.sum(1)


def assign(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centre of every point: (B, N, D), (B, q, D) -> number and squared distance, both (B, N).

    On a line (D = 1) the centres come sorted, and the nearest is found by bisection.
    """
    if points.shape[2] == 1:
        line = centers.squeeze(2)
        labels = torch.searchsorted((line[:, 1:] + line[:, :-1]) / 2, points.squeeze(2))
        return labels, (points.squeeze(2) - line.gather(1, labels)).square_()
    squares = centers.square().sum(2)[:, None]
    distance, labels = torch.baddbmm(squares, points, centers.mT, alpha=-2).min(2)
    return labels, (distance + points.square().sum(2)).clamp_(min=0)


def means(points: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Mean and size of every cluster: (B, N, D), (B, N) -> (B, clusters, D), (B, clusters); zeros where it is empty."""
    b, _, d = points.shape
    count = points.new_zeros(b, clusters).scatter_add_(1, labels, torch.ones_like(points[..., 0]))
    total = points.new_zeros(b, clusters, d).scatter_add_(1, labels[..., None].expand_as(points), points)
    return total / count.clamp(min=1)[..., None], count
