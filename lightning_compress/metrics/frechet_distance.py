r"""How far generated images are from real ones as sets: the Fréchet distance of two Gaussians fitted to features.

Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local
Nash Equilibrium", NeurIPS 2017, arXiv:1706.08500:

    d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))

It is called FID when the features are those of one certain Inception network, and only then.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchvision.models.inception import (
    BasicConv2d,
    Inception3,
    InceptionA,
    InceptionAux,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
)

from lightning_compress.core.distill.teacher import Teacher
from lightning_compress.core.images import as_bytes
from lightning_compress.core.weights import load_weights


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    """Squared distance of two Gaussians over D dimensions: means (D,), covariances (D, D), in float64.

    tr (S_1 S_2)^(1/2) is the sum of the roots of the eigenvalues of L^T S_2 L with S_1 = L L^T, which is symmetric and
    has no negative ones but by rounding: also where covariances are singular, from fewer samples than dimensions.

    >>> one, mean = torch.eye(4), torch.ones(4)
    >>> round(frechet_distance(0 * mean, one, mean, 9 * one).item(), 6)  # |mean|^2 + 4 (3 - 1)^2
    20.0
    """
    mean, covariance, other_mean, other_covariance = (
        x.double() for x in (mean, covariance, other_mean, other_covariance)
    )
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    root = vectors * eigenvalues.clamp(min=0).sqrt()
    cross = torch.linalg.eigvalsh(root.T @ other_covariance @ root).clamp(min=0).sqrt().sum()
    return (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * cross


# ---- features


class RandomFeatures(nn.Module):
    """Features of a small convolutional network with fixed random weights: (N, 3, H, W) in [-1, 1] to (N, 352).

    Where no trained network is at hand. Colours, contrasts and textures show in it, objects do not: distances compare
    runs with each other, and with nothing in the literature. Four stages of a convolution with stride 2 and a ReLU;
    each gives the mean over positions of its channels.

    Args:
        seed: of the weights.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        self.num_features = sum(widths[1:])
        generator = torch.Generator().manual_seed(seed)
        self.stages = nn.ModuleList(nn.Conv2d(c_in, c_out, 3, stride=2, padding=1) for c_in, c_out in pairwise(widths))
        for stage in self.stages:
            nn.init.kaiming_normal_(stage.weight, generator=generator)  # type: ignore[arg-type]
            nn.init.zeros_(stage.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        features, x = [], images
        for stage in self.stages:
            x = F.relu(stage(x))
            features.append(x.mean((2, 3)))
        return torch.cat(features, 1)


class _InceptionA(InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [*super()._forward(x)[:-1], self.branch_pool(_inside_average(x))]


class _InceptionC(InceptionC):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [*super()._forward(x)[:-1], self.branch_pool(_inside_average(x))]


class _InceptionE(InceptionE):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [*super()._forward(x)[:-1], self.branch_pool(_inside_average(x))]


class _LastInceptionE(InceptionE):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [*super()._forward(x)[:-1], self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))]


def _inside_average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionFeatures(nn.Module):
    """What FID looks at: (N, 3, H, W) in [-1, 1] to the 2048 pooled features of the Inception network of 2015.

    Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception Architecture for Computer Vision", CVPR 2016,
    arXiv:1512.00567, as TensorFlow had it: averages leave the padding out, and the last block pools by the maximum.
    Images become bytes first, as a file would hold them, and are then resized to 299x299, bilinear without
    antialiasing.

    Args:
        weights: file of the network's weights as its public PyTorch ports distribute them, with 1008 classes
            (``pt_inception-2015-12-05-6726825d.pth``); nothing is downloaded.

    Raises:
        ValueError: the file is absent or does not fit.
    """

    num_features = 2048

    def __init__(self, weights: str) -> None:
        super().__init__()
        blocks = [BasicConv2d, _InceptionA, InceptionB, _InceptionC, InceptionD, _InceptionE, InceptionAux]
        network = Inception3(num_classes=1008, aux_logits=False, inception_blocks=blocks, init_weights=False)
        network.Mixed_7c = _LastInceptionE(2048)
        load_weights(network, weights)
        network.fc = nn.Identity()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        stored = as_bytes(images).float() / 255
        return self.network(2 * F.interpolate(stored, (299, 299), mode="bilinear", align_corners=False) - 1)


# ---- the metric


class FrechetDistance(Metric):
    """Fréchet distance between the features of generated and of real images.

    Features are summed in float64 (the sum, the sum of outer products, the count), and the sums over processes: no
    image is kept or sent. (torchmetrics' class of that purpose gathers the same sums; it always needs the real images,
    takes the roots of an unsymmetric product and calls the result FID whatever the network.)

    Args:
        features: network from images (N, 3, H, W) to features (N, D); a copy in eval mode is kept, which is in no
            ``state_dict`` and no optimiser. Its attribute ``num_features`` says D; without it, it is asked about a
            black image of 64x64. None takes `RandomFeatures`.
        statistics: npz file with ``mu``, (D,), and ``sigma``, (D, D), of the real images, as :meth:`save_statistics`
            and the public tools write it; real images are then ignored.
        kwargs: see `torchmetrics.Metric`.

    Attributes:
        name: "fid" with `InceptionFeatures`, else "frechet_distance".
        needs_real: whether real images have to be shown.

    Raises:
        ValueError: the statistics are absent, broken or of other features.

    >>> metric = FrechetDistance()
    >>> images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    >>> metric.update(images, images)
    >>> bool(metric.compute().abs() < 1e-5)
    True
    """

    higher_is_better = False
    full_state_update = False
    real_sum: Tensor
    real_outer: Tensor
    real_count: Tensor
    fake_sum: Tensor
    fake_outer: Tensor
    fake_count: Tensor

    def __init__(self, features: nn.Module | None = None, statistics: str | Path | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        features = RandomFeatures() if features is None else features
        self.name = "fid" if isinstance(features, InceptionFeatures) else "frechet_distance"
        self._features = Teacher(features)  # no nn.Module
        size = getattr(features, "num_features", None) or self._features(torch.zeros(1, 3, 64, 64))[0].numel()
        for kind in ("real", "fake"):
            self.add_state(f"{kind}_sum", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{kind}_outer", torch.zeros(size, size, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{kind}_count", torch.tensor(0), dist_reduce_fx="sum")
        self._known = None if statistics is None else _read_statistics(Path(statistics), size)

    @property
    def needs_real(self) -> bool:
        return self._known is None

    def update(self, fakes: Tensor | None, reals: Tensor | None = None) -> None:
        """Add generated and real images, (N, 3, H, W) in [-1, 1], as many of either as there are."""
        self._add("fake", fakes)
        if self.needs_real:
            self._add("real", reals)

    def _add(self, kind: str, images: Tensor | None) -> None:
        if images is None:
            return
        with torch.autocast(images.device.type, enabled=False):
            features = self._features.to(images.device)(images.float()).flatten(1).double()
        total, outer, count = (getattr(self, f"{kind}_{state}") for state in ("sum", "outer", "count"))
        # not in place: after a standalone validation these are inference tensors
        setattr(self, f"{kind}_sum", total + features.sum(0))
        setattr(self, f"{kind}_outer", torch.addmm(outer, features.T, features))
        setattr(self, f"{kind}_count", count + len(features))

    def compute(self) -> Tensor:
        """The squared distance; nan as long as there are fewer than two images of either kind."""
        real = self._known or _gaussian(self.real_sum, self.real_outer, self.real_count)
        fake = _gaussian(self.fake_sum, self.fake_outer, self.fake_count)
        if not all(x.isfinite().all() for x in (*real, *fake)):
            return self.fake_sum.new_tensor(torch.nan, dtype=torch.float32)
        return frechet_distance(*(x.to(self.fake_sum.device) for x in (*real, *fake))).float()

    def save_statistics(self, path: str | Path) -> None:
        """Write mean and covariance of the real images seen so far, by this process, for ``statistics``."""
        if self.real_count < 2:
            raise ValueError(f"save_statistics: there are {int(self.real_count)} real images so far, 2 are needed.")
        mean, covariance = _gaussian(self.real_sum, self.real_outer, self.real_count)
        np.savez(path, mu=mean.cpu().numpy(), sigma=covariance.cpu().numpy())


def _gaussian(total: Tensor, outer: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance, with n - 1, of the sums over n features; not finite for n < 2."""
    mean = total / count
    return mean, (outer - count * mean.outer(mean)) / (count - 1)


def _read_statistics(path: Path, size: int) -> tuple[Tensor, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (torch.from_numpy(file[key]).double() for key in ("mu", "sigma"))
    except (OSError, KeyError, ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"statistics: {str(path)!r} is no npz file with mu and sigma: {error}") from error
    if mean.shape != (size,) or covariance.shape != (size, size):
        raise ValueError(
            f"statistics: {str(path)!r} is of features with {tuple(mean.shape)} means and {tuple(covariance.shape)} "
            f"covariances; these features have {size} dimensions."
        )
    return mean, covariance
