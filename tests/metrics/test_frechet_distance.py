from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.models import Inception3

from lightning_compress.core.images import as_bytes
from lightning_compress.metrics import FrechetDistance, InceptionFeatures, RandomFeatures
from lightning_compress.metrics.frechet_distance import _InceptionA, _LastInceptionE, frechet_distance


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Flat(nn.Module):
    """The images themselves, (N, 3, 2, 2), are the features."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def images(count: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return (scale * randn(count, 3, 2, 2, seed=seed) + shift).float()


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.mean(0), features.T.cov()


@pytest.mark.parametrize(("d", "s"), [(3, 1.0), (16, 2.5), (40, 0.1)])
def test_two_gaussians_of_known_distance(d: int, s: float) -> None:
    m = randn(d)
    found = frechet_distance(torch.zeros(d), torch.eye(d), m, s**2 * torch.eye(d, dtype=torch.float64))
    assert found.item() == pytest.approx((m.square().sum() + d * (s - 1) ** 2).item(), rel=1e-9)


def test_it_is_that_of_the_matrix_root() -> None:
    one, other = gaussian(randn(60, 12)), gaussian(randn(50, 12, seed=1) @ randn(12, 12, seed=2))
    root = scipy.linalg.sqrtm((one[1] @ other[1]).numpy()).real
    expected = (one[0] - other[0]).square().sum() + one[1].trace() + other[1].trace() - 2 * np.trace(root)
    assert frechet_distance(*one, *other).item() == pytest.approx(expected.item(), rel=1e-8)
    assert frechet_distance(*other, *one).item() == pytest.approx(expected.item(), rel=1e-8)


@pytest.mark.parametrize("count", [200, 64, 10, 2])
def test_a_set_is_at_no_distance_from_itself_also_with_fewer_images_than_dimensions(count: int) -> None:
    mean, covariance = gaussian(1 + 3 * randn(count, 64))
    assert abs(frechet_distance(mean, covariance, mean, covariance).item()) < 1e-3 * covariance.trace()
    assert abs(frechet_distance(mean, covariance, mean, covariance).item()) < 1e-5 * covariance.trace()


def test_the_metric_is_that_of_the_features_whatever_the_batches() -> None:
    fakes, reals = images(31, 0, 2.0, 0.5), images(40, 1)
    metric = FrechetDistance(Flat())
    for chunk in fakes.split(7):
        metric.update(chunk)
    for chunk in reals.split(40):
        metric.update(None, chunk)
    expected = frechet_distance(*gaussian(fakes.flatten(1).double()), *gaussian(reals.flatten(1).double()))
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-6)


def test_it_agrees_with_torchmetrics() -> None:
    fakes, reals = images(31, 0, 2.0, 0.5), images(40, 1)
    ours, theirs = FrechetDistance(Flat()), FrechetInceptionDistance(feature=Flat(), normalize=True)
    ours.update(fakes, reals)
    theirs.update(fakes, real=False)
    theirs.update(reals, real=True)
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-5)


def test_sums_survive_a_large_mean() -> None:
    fakes, reals = images(50, 0, 1.0, 1000.0), images(50, 1, 2.0, 1000.0)
    metric = FrechetDistance(Flat())
    metric.update(fakes, reals)
    expected = frechet_distance(*gaussian(fakes.flatten(1).double()), *gaussian(reals.flatten(1).double()))
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-5)


def test_sums_of_processes_add_up() -> None:
    """What torchmetrics does with the states of two processes."""
    fakes, reals = images(30, 0), images(20, 1)
    whole, one, other = (FrechetDistance(Flat()) for _ in range(3))
    whole.update(fakes, reals)
    one.update(fakes[:10], reals[:15])
    other.update(fakes[10:], reals[15:])
    assert {f.__name__ for f in one._reductions.values()} == {"dim_zero_sum"}  # type: ignore[union-attr]
    for name in one._defaults:
        setattr(one, name, getattr(one, name) + getattr(other, name))
    assert one.compute().item() == pytest.approx(whole.compute().item(), rel=1e-6)


def test_statistics_of_real_images_are_kept_in_a_file(tmp_path: Path) -> None:
    fakes, reals = images(31, 0, 2.0), images(40, 1)
    metric = FrechetDistance(Flat())
    metric.update(fakes, reals)
    metric.save_statistics(tmp_path / "real.npz")
    with np.load(tmp_path / "real.npz", allow_pickle=False) as file:
        assert {key: file[key].shape for key in file} == {"mu": (12,), "sigma": (12, 12)}
    again = FrechetDistance(Flat(), statistics=tmp_path / "real.npz")
    assert metric.needs_real
    assert not again.needs_real
    again.update(fakes, images(5, 7, 100.0))
    assert int(again.real_count) == 0
    assert torch.equal(again.compute(), metric.compute())


def test_bad_statistics(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"statistics: '.*absent.npz' is no npz file with mu and sigma"):
        FrechetDistance(Flat(), statistics=tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("nothing")
    with pytest.raises(ValueError, match=r"text.npz' is no npz file"):
        FrechetDistance(Flat(), statistics=tmp_path / "text.npz")
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match=r"pickled.npz' is no npz file"):
        FrechetDistance(Flat(), statistics=tmp_path / "pickled.npz")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"is of features with \(3,\) means .*; these features have 12 dimensions"):
        FrechetDistance(Flat(), statistics=tmp_path / "other.npz")
    with pytest.raises(ValueError, match="there are 0 real images so far"):
        FrechetDistance(Flat()).save_statistics(tmp_path / "none.npz")


def test_too_few_images_are_no_distance() -> None:
    metric = FrechetDistance(Flat())
    metric.update(images(1, 0), images(9, 1))
    assert metric.compute().isnan()
    metric.update(images(1, 2))
    assert metric.compute().isfinite()


def test_the_network_is_frozen_and_outside() -> None:
    features = RandomFeatures()
    metric = FrechetDistance(nn.Sequential(features, nn.Dropout()))
    assert not list(metric.parameters())
    assert not metric.state_dict()
    assert features.training  # the user's own is left alone
    assert features.stages[0].weight.requires_grad
    x = torch.rand(6, 3, 16, 16)
    metric.update(x, x)
    assert metric.compute().abs() < 1e-4  # no dropout
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert torch.equal(other.compute(), metric.compute())


def test_half_precision_around_it_and_inference_mode_change_nothing() -> None:
    x, y = (torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(2))
    plain, other = FrechetDistance(), FrechetDistance()
    plain.update(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other.update(x, y)
    assert torch.equal(other.compute(), plain.compute())
    with torch.inference_mode():
        other.reset()
        other.update(x, y)
    other.update(x, y)
    plain.update(x, y)
    assert torch.equal(other.compute(), plain.compute())


def test_random_features_tell_images_apart() -> None:
    first, again, other = RandomFeatures(), RandomFeatures(), RandomFeatures(seed=1)
    x = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert first(x).shape == (20, first.num_features) == (20, 352)
    assert torch.equal(first(x), again(x))
    assert not torch.equal(first(x), other(x))

    def to(images: Tensor) -> float:
        metric = FrechetDistance(first)
        metric.update(images, x)
        return metric.compute().item()

    blurred = nn.functional.avg_pool2d(x, 3, 1, 1)
    assert 0 <= to(x + 0.01) + 1e-5 < to(x + 0.1) < to(x + 0.5)
    assert to((x + blurred) / 2) < to(blurred)


def test_names() -> None:
    assert FrechetDistance().name == "frechet_distance"
    assert FrechetDistance(Flat()).name == "frechet_distance"


def test_inception_is_that_of_2015(tmp_path: Path) -> None:
    with torch.device("meta"):
        published = Inception3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    torch.save(
        {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in published.items()}, tmp_path / "w.pth"
    )
    features = InceptionFeatures(str(tmp_path / "w.pth")).eval()
    assert FrechetDistance(features).name == "fid"
    assert sum(p.numel() for p in features.parameters()) == 23_850_960 - 2049 * 1008
    blocks = [type(block).__name__ for name, block in features.network.named_children() if name.startswith("Mixed")]
    own = ["_InceptionA"] * 3 + ["InceptionB"] + ["_InceptionC"] * 4 + ["InceptionD", "_InceptionE", "_LastInceptionE"]
    assert blocks == own
    seen: list[Tensor] = []
    features.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    noise = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert features(noise).shape == (1, features.num_features) == (1, 2048)
    resized = nn.functional.interpolate(as_bytes(noise) / 255, (299, 299), mode="bilinear")
    torch.testing.assert_close(seen[0], 2 * resized - 1)
    with pytest.raises(ValueError, match=r"absent.pth"):
        InceptionFeatures(str(tmp_path / "absent.pth"))


def test_inceptions_averages_leave_the_padding_out() -> None:
    block = _InceptionA(4, pool_features=3).eval()
    last = _LastInceptionE(4).eval()
    seen: list[Tensor] = []
    for module in (block, last):
        module.branch_pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = randn(1, 4, 5, 5).float()
    with torch.no_grad():
        block(torch.ones(1, 4, 5, 5))
        last(x)
    assert torch.equal(seen[1], torch.ones(1, 4, 5, 5))
    assert torch.equal(seen[3], nn.functional.max_pool2d(x, 3, 1, 1))
