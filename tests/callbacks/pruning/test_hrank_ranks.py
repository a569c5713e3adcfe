"""Ranks of feature maps, their averages, and the channels that they keep."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from lightning_compress.callbacks.pruning.hrank import FeatureRanks, feature_map_rank, select_channels
from lightning_compress.callbacks.pruning.hrank.published import rank_arrays, rank_taps
from lightning_compress.callbacks.pruning.hrank.ranks import kept_width
from lightning_compress.networks import googlenet_cifar, resnet20

EPS = torch.finfo(torch.float32).eps
SHAPES = [(2, 2), (3, 3), (4, 4), (5, 5), (7, 7), (8, 8), (8, 12), (14, 14), (16, 16), (32, 32), (33, 9)]


def loop(features):
    """What the rank is by definition: torch's own, one map at a time."""
    return torch.tensor([[torch.linalg.matrix_rank(m).item() for m in image] for image in features])


# ---- feature_map_rank


def small_example():
    corner = torch.zeros(8, 8)
    corner[:4, :4] = torch.eye(4)
    outer = torch.outer(torch.ones(8), torch.arange(8.0))
    return torch.stack(
        [
            torch.stack([torch.eye(8), torch.ones(8, 8), torch.zeros(8, 8)]),
            torch.stack([corner, torch.zeros(8, 8), outer]),
        ]
    )


def test_ranks_by_hand():
    ranks = feature_map_rank(small_example())
    assert ranks.dtype == torch.int64
    assert ranks.tolist() == [[8, 1, 0], [4, 0, 1]]
    accumulated = FeatureRanks()
    accumulated.update("conv", ranks)
    assert accumulated.mean("conv").tolist() == [6.0, 0.5, 0.5]


def test_tolerance_is_that_of_float32():
    assert round(4 * EPS * 1e7, 3) == 4.768
    diagonal = torch.diag(torch.tensor([1, 1e-5, 1e-6, 1e-7]))
    assert feature_map_rank(diagonal[None, None]).item() == 3
    assert feature_map_rank(torch.block_diag(diagonal, torch.zeros(8, 8))[None, None]).item() == 2  # 12 * eps = 1.4e-6
    assert feature_map_rank(torch.diag(torch.tensor([1.0] * 8 + [1e-5, 1e-7]))[None, None].double()).item() == 9


def orthogonal(count, n, generator):
    return torch.linalg.qr(torch.randn(count, n, n, generator=generator, dtype=torch.float64)).Q


def with_singular_values(sigma, width, generator):
    """(K, h) -> (K, h, w) float32."""
    count, height = sigma.shape
    right = orthogonal(count, max(height, width), generator)[:, :height, :width]
    return (orthogonal(count, height, generator) * sigma[:, None]).matmul(right).float()


def cases(height, width):
    generator = torch.Generator().manual_seed(100 * height + width)
    count, rank = 60, max(1, min(height, width) // 2)

    def normal(*shape):
        return torch.randn(count, *shape, generator=generator)

    relu = normal(height, width).relu()
    dead = relu * (torch.rand(count, height, 1, generator=generator) < 0.5)
    if height == width:
        sigma = 10 ** (-9 * torch.rand(count, height, generator=generator).double())
        near = max(height, width) * EPS * 2 ** normal(height).double()
        sigma[:, 0] = near[:, 0] = 1
        yield "graded", with_singular_values(sigma, width, generator)
        yield "singular values around the threshold", with_singular_values(near, width, generator)
    yield "relu", relu
    yield "dead rows", dead
    yield "dead columns and scales", dead.flip(1) * 10 ** (6 * torch.rand(count, 1, width, generator=generator) - 3)
    yield "low rank", normal(height, rank).round() @ normal(rank, width).round()
    yield "constant", normal(1, 1).expand(count, height, width)
    yield "nearly constant", 1 + 1e-6 * normal(height, width)
    yield "tiny", 1e-30 * normal(height, width)
    yield "huge", 1e30 * normal(height, width)
    yield "zero", torch.zeros(count, height, width)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_double_loop(shape):
    for name, maps in cases(*shape):
        features = maps.reshape(4, 15, *shape)
        different = feature_map_rank(features) != loop(features)
        assert not different.any(), f"{name}: {int(different.sum())} of 60 differ"


def test_equals_the_double_loop_behind_a_network():
    torch.manual_seed(0)
    network = resnet20().train()
    images = torch.randn(4, 3, 32, 32)
    seen = {}
    for tap in rank_taps(network).values():
        module = network.get_submodule(tap.module)
        module.register_forward_hook(lambda m, args, out, key=tap.module: seen.update({key: out}))
    with torch.no_grad():
        network(images)
    assert len(seen) == 19
    for features in seen.values():
        assert torch.equal(feature_map_rank(features), loop(features))


def test_chunks_and_layout_of_memory_change_nothing():
    features = torch.randn(40, 8, 32, 32, generator=torch.Generator().manual_seed(0)).relu()  # 320 maps, chunks of 128
    features[::3, :, 5:] = 0
    ranks = feature_map_rank(features)
    assert torch.equal(ranks[7:9], feature_map_rank(features[7:9]))
    assert torch.equal(ranks, feature_map_rank(features.contiguous(memory_format=torch.channels_last)))
    assert feature_map_rank(features[:0]).shape == (0, 8)


def test_leaves_no_trace():
    threads = torch.get_num_threads()
    features = torch.ones(1, 2, 8, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        inside = feature_map_rank(features)
    assert inside.tolist() == feature_map_rank(features).tolist() == [[1, 1]]
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.ones(3, 8, 8), r"features must be of shape \(N, C, H, W\), got \(3, 8, 8\)"),
        (torch.ones(1, 3, 0, 8), r"features must be of shape"),
        (torch.full((1, 1, 8, 8), torch.nan), "features must be finite"),
        (torch.full((1, 1, 2, 2), torch.inf), "features must be finite"),
    ],
)
def test_bad_features(features, message):
    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match=message):
        feature_map_rank(features)
    assert torch.get_num_threads() == threads


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_where_no_singular_value_is_near_the_threshold():
    for shape in SHAPES:
        for name, maps in cases(*shape):
            if name in ("relu", "dead rows", "constant", "zero"):
                features = maps.reshape(4, 15, *shape)
                ranks = feature_map_rank(features.cuda())
                assert ranks.is_cuda
                assert torch.equal(ranks.cpu(), feature_map_rank(features)), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "faster"), [((512, 4, 4), 6), ((64, 8, 8), 6), ((32, 16, 16), 3), ((16, 32, 32), 1.5)]
)
def test_faster_than_the_double_loop(shape, faster):
    features = torch.randn(2048 // shape[0], *shape, generator=torch.Generator().manual_seed(0)).relu()
    ratios = []
    for _ in range(5):
        start = time.perf_counter()
        loop(features)
        middle = time.perf_counter()
        feature_map_rank(features)
        ratios.append((middle - start) / (time.perf_counter() - middle))
    assert max(ratios) > faster


# ---- select_channels


def test_the_tie_is_broken_towards_the_lower_index():
    ranks = torch.tensor([5.0, 0, 3, 3, 9, 0, 7, 1])
    assert ranks.argsort(stable=True).tolist() == [1, 5, 7, 2, 3, 0, 6, 4]
    for rounding in ("keep", "prune"):
        assert select_channels(ranks, 0.5, rounding).tolist() == [0, 3, 4, 6]


@pytest.mark.parametrize(
    ("channels", "ratio", "prune", "keep"),
    [(16, 0.6, 7, 6), (32, 0.6, 13, 12), (64, 0.6, 26, 25), (320, 0.9, 32, 31), (10, 0.0, 10, 10)],
)
def test_width_arithmetic(channels, ratio, prune, keep):
    assert kept_width(channels, ratio, "prune") == prune
    assert kept_width(channels, ratio, "keep") == keep
    for rounding, width in (("prune", prune), ("keep", keep)):
        kept = select_channels(torch.arange(channels), ratio, rounding)
        assert kept.tolist() == list(range(channels - width, channels))


def test_a_layer_keeps_one_channel_at_least():
    for rounding in ("keep", "prune"):
        assert select_channels(torch.tensor([0.0, 2, 1]), 0.99, rounding).tolist() == [1]


@pytest.mark.parametrize(
    ("ranks", "kwargs", "message"),
    [
        (torch.ones(4), {"pruning_ratio": 1.0}, r"pruning_ratio must be in \[0, 1\), got 1.0"),
        (torch.ones(4), {"pruning_ratio": -0.1}, "pruning_ratio must be in"),
        (torch.ones(4), {"pruning_ratio": 0.5, "rounding": "up"}, "rounding must be 'keep' or 'prune', got 'up'"),
        (torch.ones(2, 4), {"pruning_ratio": 0.5}, r"ranks must be a vector .* got shape \(2, 4\)"),
        (torch.ones(0), {"pruning_ratio": 0.5}, "ranks must be a vector"),
    ],
)
def test_bad_selections(ranks, kwargs, message):
    with pytest.raises(ValueError, match=message):
        select_channels(ranks, **kwargs)


# ---- FeatureRanks


def test_two_shards_make_one_pass():
    features = torch.randn(8, 5, 8, 8, generator=torch.Generator().manual_seed(0)).relu()
    features[2:, 1] = features[:, 3] = 0
    whole, three, five = FeatureRanks(), FeatureRanks(), FeatureRanks()
    whole.update("a", feature_map_rank(features))
    three.update("a", feature_map_rank(features[:3]))
    five.update("a", feature_map_rank(features[3:]))
    five.update("b", torch.ones(1, 2))
    three.merge(five)
    assert torch.equal(three.mean("a"), whole.mean("a"))
    assert (three.sums["a"].dtype, three.counts["a"].dtype) == (torch.float64, torch.int64)
    assert three.counts["a"].item() == 8
    assert three.mean("b").tolist() == [1, 1]
    assert five.counts["a"].item() == 5  # merging leaves the other alone


def test_running_mean_of_the_authors_is_the_same():
    ranks = torch.randint(0, 9, (10, 4), generator=torch.Generator().manual_seed(0))
    mean, total, accumulated = torch.zeros(4, dtype=torch.float64), 0, FeatureRanks()
    for batch in ranks.split(3):
        mean = (mean * total + batch.sum(0)) / (total + len(batch))
        total += len(batch)
        accumulated.update("conv", batch)
    torch.testing.assert_close(accumulated.mean("conv"), mean)


def test_save_and_load(tmp_path):
    ranks = FeatureRanks()
    ranks.update("conv1", torch.tensor([[3, 1], [4, 1]]))
    ranks.save(tmp_path / "ranks.pt")
    loaded = FeatureRanks.load(tmp_path / "ranks.pt")
    assert torch.equal(loaded.mean("conv1"), ranks.mean("conv1"))
    loaded.merge(ranks)
    assert loaded.counts["conv1"].item() == 4
    restored = FeatureRanks.from_state_dict(ranks.state_dict())
    restored.update("conv1", torch.ones(1, 2))
    assert ranks.counts["conv1"].item() == 2


def test_folder_of_arrays(tmp_path):
    np.save(tmp_path / "rank_conv1.npy", np.array([1.5, 2.0], dtype=np.float32))
    np.save(tmp_path / "rank_conv2.npy", np.array([3.0, 4.0, 5.0]))
    ranks = FeatureRanks.load(tmp_path, ["stem", "layer1.0.conv1"])
    assert ranks.mean("stem").tolist() == [1.5, 2.0]
    assert ranks.mean("layer1.0.conv1").tolist() == [3, 4, 5]
    with pytest.raises(ValueError, match=r"no rank_conv3.npy, the ranks of layer 'third'. Did you mean 'rank_conv"):
        FeatureRanks.load(tmp_path, ["first", "second", "third"])
    (tmp_path / "rank_conv2.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match=r"rank_conv2\.npy is no array of numbers"):
        FeatureRanks.load(tmp_path, ["stem", "second"])


def test_folder_of_a_branched_network(tmp_path):
    network = googlenet_cifar()
    arrays = rank_arrays(network)
    for name, stem in arrays.items():
        np.save(tmp_path / f"{stem}.npy", np.zeros(network.get_submodule(name).out_channels))
    ranks = FeatureRanks.load(tmp_path, arrays)
    ranks.check({name: network.get_submodule(name).out_channels for name in arrays})


def test_wrong_sizes_are_named():
    ranks = FeatureRanks()
    ranks.update("conv1", torch.ones(2, 16))
    with pytest.raises(ValueError, match="'conv1' had ranks of 16 channels so far, now there are 8"):
        ranks.update("conv1", torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"must be of shape \(N, C\), got \(16,\)"):
        ranks.update("conv1", torch.ones(16))
    with pytest.raises(ValueError, match="'conv1' are of 16 channels, but the layer has 32"):
        ranks.check({"conv1": 32})
    with pytest.raises(ValueError, match=r"no ranks of layer 'conv2'\. Did you mean 'conv1'"):
        ranks.mean("conv2")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_damaged_files(tmp_path, content):
    (tmp_path / "ranks.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"ranks.pt' is damaged or was not written by FeatureRanks.save"):
        FeatureRanks.load(tmp_path / "ranks.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt' is damaged or was not written"):
        FeatureRanks.load(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="does not exist"):
        FeatureRanks.load(tmp_path / "absent.pt")
