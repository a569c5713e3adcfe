"""Libraries of patterns, their projections and what stays: against hand-made and slow references."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.core.sparse.patterns import (
    NATURAL8,
    SCP4,
    all_patterns,
    best_patterns,
    count_votes,
    kept_count,
    kept_energy,
    kernel_mask,
    largest,
    library_of,
    most_frequent,
    pattern_energies,
    project_connectivity,
    project_patterns,
    strongest_kernels,
    taps_of,
)

SCP, NATURAL = library_of(SCP4), library_of(NATURAL8)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


# ---- libraries


def test_scp4_is_the_centre_and_three_of_its_neighbours() -> None:
    drawn = ["010111000", "010110010", "000111010", "010011010"]  # A, B, C, D of arXiv:1909.05073
    assert ["".join(map(str, row)) for row in SCP.int().tolist()] == drawn


@pytest.mark.parametrize("n", range(1, 10))
def test_all_patterns(n: int) -> None:
    free, centred = all_patterns(n), all_patterns(n, centre=True)
    assert (len(free), len(centred)) == (comb(9, n), comb(8, n - 1))
    assert (free.sum(1) == n).all()
    assert centred[:, 4].all()
    assert sorted(taps_of(free).tolist()) == taps_of(free).tolist()


def test_numbers_of_patterns_are_those_of_arxiv_2001_07710() -> None:
    taps = taps_of(all_patterns(4, centre=True)).tolist()
    assert taps[:3] + taps[-1:] == [[0, 1, 2, 4], [0, 1, 3, 4], [0, 1, 4, 5], [4, 6, 7, 8]]
    assert taps == [list(some) for some in combinations(range(9), 4) if 4 in some]


@pytest.mark.parametrize(
    ("taps", "message"),
    [([], "each keeps"), ([[]], "each keeps"), ([[1, 1]], "none twice"), ([[0, 9]], "0 to 8"),
     ([[0, 1], [2]], "equally many"), ([[0, 1], [1, 0]], "no two")],
)  # fmt: skip
def test_bad_libraries(taps: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        library_of(taps)
    with pytest.raises(ValueError, match="got 10"):
        all_patterns(10)


# ---- projections


def test_projection_keeps_as_much_as_the_best_of_all_shapes() -> None:
    kernels = normal(0, 100, 10, 3, 3)
    energy = project_patterns(kernels, NATURAL).square().flatten(2).sum(-1)
    for kernel, kept in zip(kernels.flatten(0, 1).tolist(), energy.flatten().tolist(), strict=True):
        flat = [w for row in kernel for w in row]
        assert kept == pytest.approx(max(sum(flat[t] ** 2 for t in taps) for taps in NATURAL8), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.booleans(), st.integers(1, 4))
def test_projection_is_idempotent_and_euclidean(seed: int, n: int, centre: bool, block: int) -> None:
    weight, library = normal(seed, 6, 3, 3, 3), all_patterns(n, centre=centre)
    projected = project_patterns(weight, library, block)
    assert torch.equal(project_patterns(projected, library, block), projected)
    lost = (weight - projected).square().sum()
    best = pattern_energies(weight, library, block).amax(0).sum()
    torch.testing.assert_close(lost, weight.square().sum() - best, atol=1e-4, rtol=1e-4)


def test_equals_go_to_the_lowest_number() -> None:
    assert best_patterns(torch.zeros(3, 2, 3, 3), NATURAL).max() == 0
    assert best_patterns(torch.ones(3, 2, 3, 3), SCP).max() == 0
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 0, 1] = 1  # tap 1: patterns A, B and D
    assert best_patterns(weight, SCP.flip(0)).item() == 0
    weight[0, 0, 2, 1] = 2  # and tap 7: B and D
    assert best_patterns(weight, SCP).item() == 1


def test_shared_energy_decides_for_a_block() -> None:
    weight = normal(1, 7, 5, 3, 3)  # blocks of 3, 3 and 1
    ids = best_patterns(weight, NATURAL, block=3)
    for rows in (slice(0, 3), slice(3, 6), slice(6, 7)):
        assert (ids[rows] == ids[rows][:1]).all()
        energy = torch.stack([(weight[rows].flatten(2) * m).square().sum((0, 2)) for m in NATURAL])
        assert torch.equal(ids[rows][0], energy.argmax(0))


@pytest.mark.parametrize(("name", "library", "ratio"), [("natural8", NATURAL, 0.721147), ("scp4", SCP, 0.496725)])
def test_kept_energy_of_small_noise(name: str, library: Tensor, ratio: float) -> None:
    assert kept_energy(normal(7, 16, 8, 3, 3), library) == pytest.approx(ratio, abs=1e-6)


def test_kept_energy_of_noise() -> None:
    kernels = normal(2, 2_000, 100, 3, 3)
    libraries = [all_patterns(4), all_patterns(4, centre=True), NATURAL, SCP]
    kept = [kept_energy(kernels, library) for library in libraries]
    assert kept == pytest.approx([0.866, 0.829, 0.728, 0.542], abs=0.002)
    for n, expected in enumerate([0.404, 0.629, 0.772], 1):  # arXiv:2002.04997
        assert kept_energy(kernels[:1_000], all_patterns(n)) == pytest.approx(expected, abs=0.002)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 125), min_size=2, max_size=20, unique=True), st.integers(1, 19))
def test_a_part_of_a_library_keeps_less(seed: int, ids: list[int], part: int) -> None:
    whole = all_patterns(4)[ids]
    weight = normal(seed, 20, 5, 3, 3)
    assert kept_energy(weight, whole[:part]) <= kept_energy(weight, whole) + 1e-9


# ---- connectivity


@pytest.mark.parametrize(("channels", "rate", "kept"), [(64, 3.6, 18), (8, 3.6, 3), (512, 3.6, 143), (108, 3.6, 30)])
def test_counts(channels: int, rate: float, kept: int) -> None:
    assert kept_count(channels, rate) == kept
    assert (strongest_kernels(normal(0, 4, channels, 3, 3), rate).sum(1) == kept).all()


def test_kernels_are_ranked_before_they_are_masked() -> None:
    weight = normal(7, 16, 8, 3, 3)
    whole = strongest_kernels(weight, 3.6, "layer")
    masked = strongest_kernels(project_patterns(weight, NATURAL), 3.6, "layer")
    assert (whole.sum(), masked.sum(), (whole & masked).sum()) == (36, 36, 29)
    assert kernel_mask(weight, NATURAL, 3.6, "layer").sum() == 144
    mask = kernel_mask(weight, NATURAL, 3.6)
    assert (mask.flatten(2).any(-1).sum(1) == 3).all()
    assert mask.sum() == 192
    assert torch.equal(kernel_mask(weight, None, 3.6, "layer").flatten(2).any(-1), whole)


def test_a_kept_kernel_may_be_zero_and_ties_go_to_the_first() -> None:
    mask = kernel_mask(torch.zeros(2, 6, 3, 3), NATURAL, 3.0)
    assert mask.flatten(2).any(-1).tolist() == [[True] * 2 + [False] * 4] * 2
    assert torch.equal(mask[0, 0].flatten(), NATURAL[0])


def test_connectivity_is_the_nearest_weight() -> None:
    weight = normal(3, 5, 4, 3, 3)
    projected = project_connectivity(weight, 2.0)
    norms = weight.square().sum((2, 3)).sort(1).values
    assert (weight - projected).square().sum().item() == pytest.approx(norms[:, :2].sum().item(), rel=1e-5)
    assert torch.equal(project_connectivity(projected, 2.0), projected)


@pytest.mark.parametrize("balance", ["filter", "layer"])
def test_blocks_keep_the_same_kernels(balance: str) -> None:
    weight = normal(4, 10, 9, 3, 3)
    kept = strongest_kernels(weight, 3.0, balance, block=4)  # type: ignore[arg-type]
    assert torch.equal(kept[:4], kept[:1].expand(4, -1))
    assert torch.equal(kept[8:], kept[8:9].expand(2, -1))
    assert kept[::4].sum() == 9
    energy = weight.square().sum((2, 3))
    blocks = torch.stack([part.sum(0) for part in energy.split(4)])
    order = (blocks if balance == "filter" else blocks.view(1, -1)).argsort(1, descending=True)
    chosen = torch.zeros_like(blocks if balance == "filter" else blocks.view(1, -1), dtype=torch.bool)
    chosen.scatter_(1, order[:, : 3 if balance == "filter" else 9], True)
    assert torch.equal(kept[::4], chosen.view_as(blocks))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(-2, 2), min_size=7, max_size=7), min_size=1, max_size=4), st.integers(1, 7))
def test_largest_is_a_stable_sort(rows: list[list[int]], k: int) -> None:
    values = torch.tensor(rows, dtype=torch.float32)
    order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
    assert torch.equal(largest(values, k), torch.zeros_like(values, dtype=torch.bool).scatter(1, order, True))


def test_half_precision_is_decided_in_float() -> None:
    weight = normal(5, 8, 8, 3, 3).bfloat16()
    assert project_patterns(weight, SCP).dtype == torch.bfloat16
    assert torch.equal(best_patterns(weight, SCP), best_patterns(weight.float(), SCP))


# ---- extraction


@pytest.mark.parametrize(
    ("centre", "used", "taps", "votes"),
    [(True, 56, [0, 3, 4, 6], [95, 91, 85, 84, 83, 82, 82, 81]), (False, 126, [0, 3, 6, 7], [50])],
)
def test_votes_of_noise(centre: bool, used: int, taps: list[int], votes: list[int]) -> None:
    candidates = all_patterns(4, centre=centre)
    counted = count_votes([normal(1, 64, 64, 3, 3)], candidates)
    assert int((counted > 0).sum()) == used
    assert counted.sum() == 4096
    assert counted.sort(descending=True).values[: len(votes)].tolist() == votes
    assert taps_of(most_frequent(candidates, counted, 1)).tolist() == [taps]


def test_planted_shapes_are_found() -> None:
    generator = np.random.default_rng(0)
    planted = NATURAL[torch.from_numpy(generator.integers(0, 8, 20_000))]
    kernels = normal(11, 20_000, 9) * planted + 0.01 * normal(12, 20_000, 9)
    weight = kernels.view(200, 100, 3, 3)

    def found(centre: bool) -> set[tuple[int, ...]]:
        candidates = all_patterns(4, centre=centre)
        return {tuple(t) for t in taps_of(most_frequent(candidates, count_votes([weight], candidates), 8)).tolist()}

    assert found(False) == set(NATURAL8)
    assert found(True) != set(NATURAL8)


def test_equal_votes_go_to_the_lower_number_and_order_stays() -> None:
    candidates = all_patterns(4)
    votes = torch.zeros(126, dtype=torch.long)
    votes[[100, 7, 50]] = torch.tensor([5, 5, 9])
    assert torch.equal(most_frequent(candidates, votes, 2), candidates[[7, 50]])
    assert torch.equal(most_frequent(candidates, votes, 500), candidates)
