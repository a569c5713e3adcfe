"""KSE on ResNet-50 against a loop over channels.

Ours: indicator of all channels of a layer in one go, k-means of all channels with the same budget and of all restarts
in one go. Theirs: for each input channel scikit-learn's nearest neighbours, then its KMeans with the same first centres
(greedy k-means++), restarts, steps and tolerance; the authors' code calls the neighbours even once per kernel.

Ours runs on one layer of every shape and counts as often as the shape occurs. The loop runs on a few channels of the
same layers, of every budget, and counts for all of them: it would take half an hour. One thread for both.

Beside it: the latency of the form with fewer multiply-accumulates (`with_fewer_kernels`) against the dense network.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
import torchvision
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from lightning_compress.callbacks import KSE
from lightning_compress.callbacks.pruning.kse.indicator import kernel_entropy
from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.core.profile import profile
from lightning_compress.core.sparse.shared_kernels import (
    SharedKernels,
    set_kernels,
    share_kernels,
    shared_convolutions,
    with_fewer_kernels,
)
from lightning_compress.networks.find import build

CHANNELS = 4  # of a layer that the loop looks for neighbours in
CLUSTERED = 2  # of every budget that it clusters


def claims() -> Iterator[Claim]:
    torch.manual_seed(0)
    network = torchvision.models.resnet50()
    layers = [m.weight.detach() for m in network.modules() if isinstance(m, nn.Conv2d)][1:]
    counts = Counter(tuple(w.shape) for w in layers)
    one_of = {tuple(w.shape): w for w in layers}
    method = KSE(G=5, T=1)
    total = {"indicator": [0.0, 0.0], "clustering": [0.0, 0.0]}
    inertias = []
    with threads(1), threadpool_limits(1):
        for shape, count in counts.items():
            times, inertia = measure(one_of[shape], method)
            for part, (ours, theirs) in times.items():
                total[part][0] += count * ours
                total[part][1] += count * theirs
            inertias.append(inertia)
    ours, theirs = (sum(parts[i] for parts in total.values()) for i in (0, 1))
    yield Claim(
        "KSE's indicator and clustering of ResNet-50 against a loop over channels with scikit-learn",
        theirs / ours,
        10,
        detail=f"{ours:.0f} s against {theirs:.0f} s",
    )
    for part, (mine, loop) in total.items():
        yield Claim(f"the {part} alone", loop / mine, detail=f"{mine:.1f} s against {loop:.0f} s")
    ratio = np.array(inertias).sum(0)
    for name, size in (("resnet56", 32), ("resnet50", 224)):
        yield latency(name, size, method)
    yield Claim("sum of squared distances of ours over scikit-learn's", ratio[0] / ratio[1], 1.01, at_most=True)


def measure(weight: Tensor, method: KSE) -> tuple[dict[str, tuple[float, float]], tuple[float, float]]:
    """Seconds of (ours, the loop) for a layer, by part; and the sums of squared distances on the same channels."""
    start = time.perf_counter()
    levels, budgets = method.levels(weight)
    indicator = time.perf_counter() - start
    form = SharedKernels(levels, budgets)
    start = time.perf_counter()
    indices = method.indices(weight, form, torch.Generator().manual_seed(0))
    clustering = time.perf_counter() - start

    kernels = weight.flatten(2).transpose(0, 1).numpy()
    start = time.perf_counter()
    entropies = [entropy(points, method.k_neighbors) for points in kernels[:CHANNELS]]
    loop_indicator = (time.perf_counter() - start) / CHANNELS * len(kernels)
    torch.testing.assert_close(torch.tensor(entropies).double(), kernel_entropy(weight)[:CHANNELS], rtol=1e-4, atol=0)

    loop_clustering, inertia = 0.0, np.zeros(2)
    for (q, channels, _), index in zip(form.shared, indices, strict=True):
        few = channels[:CLUSTERED]
        start = time.perf_counter()
        runs = [cluster(kernels[c], q, method) for c in few]
        loop_clustering += (time.perf_counter() - start) / len(few) * len(channels)
        for i, (c, labels) in enumerate(zip(few, runs, strict=True)):
            inertia += [spread(kernels[c], index[:, i].numpy()), spread(kernels[c], labels)]
    times = {"indicator": (indicator, loop_indicator), "clustering": (clustering, loop_clustering)}
    return times, (inertia[0], inertia[1])


def latency(name: str, size: int, method: KSE) -> Claim:
    """Any indices do: they do not change the work."""
    network = build(name).eval()
    convs = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d)][1:]
    dense = {n: m.weight.detach().clone() for n, m in convs}
    forms = {n: dict(zip(("levels", "budgets"), method.levels(w), strict=True)) for n, w in dense.items()}
    share_kernels(network, forms)
    for n, conv, form in shared_convolutions(network):
        set_kernels(conv, [torch.randint(q, index.shape) for q, _, index in form.shared], dense[n])
    whole, fewer = inference_copy(network), with_fewer_kernels(network)
    x = torch.randn(1, 3, size, size)
    with torch.inference_mode(), threads(1):
        torch.testing.assert_close(fewer(x), whole(x), atol=1e-3, rtol=1e-3)
        times = best_times(5, lambda: whole(x), lambda: fewer(x))
    share = profile(fewer, x).macs / profile(whole, x).macs
    what = f"latency of dense {name} over that of its form with {share:.0%} of the MACs, one image"
    return Claim(what, times[0] / times[1], detail=milliseconds(*times))


def entropy(points: np.ndarray, k: int) -> float:
    distances, _ = NearestNeighbors(n_neighbors=k + 1).fit(points).kneighbors(points)
    density = distances.sum(1) / distances.sum()
    return float(-(density * np.log2(density)).sum())


def cluster(points: np.ndarray, q: int, method: KSE) -> np.ndarray:
    means = KMeans(q, n_init=method.kmeans_restarts, max_iter=method.kmeans_iters, tol=1e-4, random_state=0)
    return means.fit(points).labels_


def spread(points: np.ndarray, labels: np.ndarray) -> float:
    return sum(((own - own.mean(0)) ** 2).sum() for own in (points[labels == j] for j in np.unique(labels)))


if __name__ == "__main__":
    print(machine())
    report(claims())
