"""The mathematics of HRank: ranks of feature maps, their averages over images, and whom they keep.

Lin, Ji, Wang, Zhang, Zhang, Tian, Shao, "HRank: Filter Pruning using High-Rank Feature Map", CVPR 2020,
arXiv:2002.10179.

    r_j = (1/g) sum_{t=1..g} rank(O[t, j])     score of filter j, from its maps O[t, j] of g images

The channels with the smallest r_j go. A rank is numerical, by the rule of `torch.linalg.matrix_rank`: the
number of singular values above sigma_max * max(h, w) * eps(float32).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_compress.core.select import did_you_mean
from lightning_compress.core.surgery import keep_highest

EPS = torch.finfo(torch.float32).eps
# Elements that are worked on at once: 1 MB in float64, which stays in the cache of one core; 1 GB on CUDA.
CHUNK, CUDA_CHUNK = 2**17, 2**27


def feature_map_rank(features: Tensor) -> Tensor:
    """Rank of every feature map, what `torch.linalg.matrix_rank` says of it in float32, several times faster.

    On the CPU hardly any map needs an SVD. By Sylvester's law of inertia one factorisation L D L^T of A A^T - t^2 I
    tells how many singular values are above t, and a Cholesky factorisation whether all of them are. In float64 the
    product of float32 maps resolves ratios of 1e-8, far below the threshold of max(h, w) * 1.2e-7, so the count is
    right unless a singular value lies near the threshold. Counts a little above and below it tell: where they differ,
    and only there, the map gets its SVD.

    Args:
        features: activations, (N, C, H, W), of any floating-point dtype; half precision changes ranks, so
            compute them in float32.

    Returns:
        Ranks, (N, C), int64. A map of zeros has rank 0.

    Raises:
        ValueError: ``features`` is not of four dimensions, its maps are empty or not finite.

    >>> maps = torch.stack([torch.eye(8), torch.ones(8, 8), torch.zeros(8, 8)])
    >>> feature_map_rank(maps[None])
    tensor([[8, 1, 0]])
    """
    if features.dim() != 4 or 0 in features.shape[2:]:
        raise ValueError(f"features must be of shape (N, C, H, W), got {tuple(features.shape)}.")
    device, (height, width) = features.device, features.shape[2:]
    features = features.detach() if features.is_cuda else features.detach().cpu()
    # On CUDA one launch does a batch of SVDs. Up to 3x3 nothing is cheaper, and eps is too near the threshold.
    rank = torch.linalg.matrix_rank if features.is_cuda or max(height, width) <= 3 else _rank_by_inertia
    step = max(1, (CUDA_CHUNK if features.is_cuda else CHUNK) // (height * width))
    groups = features.split(-(-step // max(1, features.shape[1])))

    def rank_group(group: Tensor) -> list[Tensor]:
        if not group.sum(dtype=torch.float64).isfinite():  # an eighth of the cost of isfinite().all()
            raise ValueError("features must be finite, got NaN or infinity: the network's weights are broken.")
        return [rank(maps) for maps in group.float().flatten(0, 1).split(step)]  # contiguous while in the cache

    with _workers(1 if features.is_cuda else len(groups)) as run:
        ranks = [maps for group in run(rank_group, groups) for maps in group]
    return torch.cat(ranks).view(features.shape[:2]).to(device)


@contextmanager
def _workers(tasks: int) -> Iterator[Callable[..., Iterable]]:
    """A `map` over as many threads as torch has, each computing alone: LAPACK goes through a batch in one thread, and
    operators this small, when threads share one, wait longer than they work."""
    # Freed at once: from then on glibc keeps so much memory for the next chunk, instead of giving it back to the
    # system after each operator. Without it a third of the speed is left, or not, as the process's history has it.
    torch.empty(2**24, dtype=torch.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if min(tasks, threads) < 2:
            yield map
        else:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield pool.map
    finally:
        torch.set_num_threads(threads)


def _rank_by_inertia(maps: Tensor) -> Tensor:
    """(K, h, w) float32 -> (K,), see `feature_map_rank`."""
    if maps.shape[1] > maps.shape[2]:
        maps = maps.mT
    size = maps.shape[2]
    # An SVD in float32 misses by less than this times eps * sigma_max; seen: 2.2.
    slack = max(min(4, size - 0.5), size / 8)
    wide = maps.double()
    gram = wide @ wide.mT
    energy = gram.diagonal(dim1=-2, dim2=-1)  # squared norm of every row
    total = energy.sum(-1)  # sigma_max^2 at most
    high = ((size + slack) * EPS) ** 2 * total

    # Most often all rows that are not zero are independent: on them A A^T - high I is positive definite.
    zero = energy == 0
    rank = (~zero).sum(-1)
    shifted = _minus(gram, high)
    shifted.diagonal(dim1=-2, dim2=-1).masked_fill_(zero, 1)
    left = torch.linalg.cholesky_ex(shifted, upper=True).info.nonzero().squeeze(1)
    if left.numel():
        gram = gram[left]
        low = ((size - slack) * EPS) ** 2 * gram.square().sum((1, 2)) / total[left]  # |G|_F^2 / tr(G) <= sigma_max^2
        rank[left] = _count_above(gram, high[left])
        # One map at a time: in a batch, LAPACK's rounding depends on the alignment of the matrix.
        for i in left[_count_above(gram, low) != rank[left]]:
            rank[i] = torch.linalg.matrix_rank(maps[i])
    return rank


def _count_above(gram: Tensor, level: Tensor) -> Tensor:
    """Eigenvalues above `level`: symmetric (K, n, n) and (K,) -> (K,) counts."""
    factors, pivots, _ = torch.linalg.ldl_factor_ex(_minus(gram, level))
    positive = (factors.diagonal(dim1=-2, dim2=-1) > 0) & (pivots > 0)
    # Negative pivots mark the two rows of a 2x2 block, which has one eigenvalue of either sign.
    return positive.sum(-1) + (pivots < 0).sum(-1) // 2


def _minus(gram: Tensor, level: Tensor) -> Tensor:
    """gram - level * identity."""
    shifted = gram.clone()
    shifted.diagonal(dim1=-2, dim2=-1).sub_(level[:, None])
    return shifted


def select_channels(ranks: Tensor, pruning_ratio: float, rounding: Literal["keep", "prune"] = "keep") -> Tensor:
    """Channels to keep: those of highest rank; among equals the lower index goes first.

    Args:
        ranks: mean rank of every channel, (C,).
        pruning_ratio: share p of channels to remove, in [0, 1).
        rounding: what is cut to an integer: ``"keep"`` keeps int(C * (1 - p)), the rule of the authors'
            second code (HRankPlus); ``"prune"`` removes int(p * C), that of the first. Both in plain
            float64, as the published widths are: 320 channels at 0.9 keep 31.

    Returns:
        Indices of the kept channels, ascending, int64; one at least.

    Raises:
        ValueError: ``ranks`` is not a vector, or another argument is none of the above.

    >>> select_channels(torch.tensor([5.0, 0, 3, 3, 9, 0, 7, 1]), 0.5)
    tensor([0, 3, 4, 6])
    """
    if ranks.dim() != 1 or not len(ranks):
        raise ValueError(f"ranks must be a vector with one entry per channel, got shape {tuple(ranks.shape)}.")
    return keep_highest(ranks, kept_width(len(ranks), pruning_ratio, rounding))


def kept_width(channels: int, pruning_ratio: float, rounding: Literal["keep", "prune"] = "keep") -> int:
    """Number of channels that `select_channels` keeps, by the same arguments.

    >>> [kept_width(c, 0.6, "keep") for c in (16, 32, 64)], [kept_width(c, 0.6, "prune") for c in (16, 32, 64)]
    ([6, 12, 25], [7, 13, 26])
    """
    if not 0 <= pruning_ratio < 1:
        raise ValueError(f"pruning_ratio must be in [0, 1), got {pruning_ratio}.")
    if rounding == "keep":
        return max(1, int(channels * (1 - pruning_ratio)))
    if rounding == "prune":
        return channels - int(pruning_ratio * channels)
    raise ValueError(f"rounding must be 'keep' or 'prune', got {rounding!r}.")


class FeatureRanks:
    """Average rank per channel of several layers, kept as exact sums and counts, so that shards can be added.

    Attributes:
        sums: layer -> sum of ranks over images, (C,), float64.
        counts: layer -> number of images, scalar, int64.

    >>> ranks = FeatureRanks()
    >>> ranks.update("conv1", torch.tensor([[8, 1, 0], [4, 0, 1]]))
    >>> ranks.mean("conv1")
    tensor([6.0000, 0.5000, 0.5000], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def update(self, layer: str, ranks: Tensor) -> None:
        """Add the ranks of a batch, (N, C), as `feature_map_rank` gives them.

        Raises:
            ValueError: ``ranks`` is not of two dimensions, or of another C than before.
        """
        if ranks.dim() != 2:
            raise ValueError(f"ranks of layer {layer!r} must be of shape (N, C), got {tuple(ranks.shape)}.")
        self._add(layer, ranks.sum(0, dtype=torch.float64), torch.tensor(len(ranks)))

    def merge(self, other: FeatureRanks) -> None:
        """Add what another accumulator saw: another shard of the images, or other layers."""
        for layer, total in other.sums.items():
            self._add(layer, total, other.counts[layer])

    def mean(self, layer: str) -> Tensor:
        """Mean rank of every channel, (C,), float64.

        Raises:
            ValueError: nothing is known of the layer.
        """
        if layer not in self.sums:
            raise ValueError(f"There are no ranks of layer {layer!r}.{did_you_mean(layer, self.sums)}")
        return self.sums[layer] / self.counts[layer]

    def check(self, widths: Mapping[str, int]) -> None:
        """Make sure that there are ranks of every layer in ``widths``, one for each of its channels.

        Raises:
            ValueError: naming the layer and both widths.
        """
        for layer, width in widths.items():
            if len(self.mean(layer)) != width:
                raise ValueError(
                    f"The ranks of layer {layer!r} are of {len(self.sums[layer])} channels, but the layer has "
                    f"{width}: they were measured on another network."
                )

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Plain tensors: ``{"sums": {layer: (C,)}, "counts": {layer: ()}}``."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Mapping[str, Tensor]]) -> FeatureRanks:
        """The inverse of `state_dict`."""
        ranks = cls()
        for layer, total in state["sums"].items():
            ranks._add(layer, total, state["counts"][layer])
        return ranks

    def save(self, path: str | os.PathLike) -> None:
        """Write one ``.pt`` file that `load` reads."""
        torch.save(self.state_dict(), path)

    @classmethod
    def load(cls, path: str | os.PathLike, arrays: Mapping[str, str] | Iterable[str] = ()) -> FeatureRanks:
        """Read a file of `save`, or a folder of the authors' format, an array of mean ranks per layer.

        Args:
            path: the file, or the folder.
            arrays: for a folder: layer -> stem of its file, see `published.rank_arrays`; or the layers alone,
                of which the k-th, from 1, has ``rank_conv<k>.npy``.

        Raises:
            ValueError: the path or an array is absent or cannot be read.
        """
        path = Path(path)
        if path.is_dir():
            if not isinstance(arrays, Mapping):
                arrays = {layer: f"rank_conv{k}" for k, layer in enumerate(arrays, 1)}
            ranks = cls()
            for layer, stem in arrays.items():
                # A mean counts as one image: how many it was taken over is not written.
                ranks.update(layer, _read_array(path / f"{stem}.npy", layer)[None])
            return ranks
        if not path.exists():
            raise ValueError(f"Rank file {os.fspath(path)!r} does not exist.")
        try:
            return cls.from_state_dict(torch.load(path, weights_only=True))
        except Exception as error:  # a damaged file fails in whatever way
            raise ValueError(
                f"Rank file {os.fspath(path)!r} is damaged or was not written by FeatureRanks.save, nor is it a "
                "folder of rank_conv<k>.npy."
            ) from error

    def _add(self, layer: str, total: Tensor, count: Tensor) -> None:
        if layer not in self.sums:
            self.sums[layer] = torch.zeros_like(total)
            self.counts[layer] = torch.zeros_like(count)
        known = self.sums[layer]
        if total.shape != known.shape:
            raise ValueError(f"Layer {layer!r} had ranks of {len(known)} channels so far, now there are {len(total)}.")
        self.sums[layer] = known + total.to(known.device)
        self.counts[layer] = self.counts[layer] + count.to(known.device)


def _read_array(path: Path, layer: str) -> Tensor:
    if not path.exists():
        there = sorted(p.stem for p in path.parent.glob("*.npy"))
        raise ValueError(
            f"{path.parent} has no {path.name}, the ranks of layer {layer!r}.{did_you_mean(path.stem, there)}"
        )
    try:
        array = np.load(path, allow_pickle=False)
        return torch.from_numpy(array.astype(np.float64)).reshape(-1)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no array of numbers: {error}") from error
