"""Ranks and precisions against loops over probes, and the protocols of the two data sets."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.metrics import CrossCameraRetrieval
from lightning_compress.metrics.retrieval import SYSU_PLACES, draw, rank_gallery


def people(seed: int, images: int, cameras: tuple[int, ...], identities: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Features, identities and cameras; features say something about identities."""
    generator = torch.Generator().manual_seed(seed)
    who = torch.randint(identities, (images,), generator=generator)
    where = torch.tensor(cameras)[torch.randint(len(cameras), (images,), generator=generator)]
    centres = torch.randn(identities, 6, generator=torch.Generator().manual_seed(99))
    return centres[who] + 1.5 * torch.randn(images, 6, generator=generator), who, where


def by_loop(probes, gallery, ks, same_room=(), unique=False) -> dict[str, float]:
    """Probe by probe, in plain Python."""
    ranks, precisions, penalties = [], [], []
    features = F.normalize(gallery[0])
    for feature, who, where in zip(*probes, strict=True):
        similar = features @ F.normalize(feature, dim=0)
        order = sorted(range(len(similar)), key=lambda i: -similar[i])
        order = [i for i in order if (int(where), int(gallery[2][i])) not in same_room]
        seen = [int(gallery[1][i]) for i in order]
        places = [r for r, other in enumerate(seen, 1) if other == int(who)]
        if not places:
            continue
        precisions.append(sum(k / r for k, r in enumerate(places, 1)) / len(places))
        penalties.append(len(places) / places[-1])
        counted = list(dict.fromkeys(seen)) if unique else seen
        ranks.append(counted.index(int(who)) + 1)
    result = {f"rank{k}": sum(r <= k for r in ranks) / len(ranks) for k in ks}
    return {**result, "mAP": sum(precisions) / len(precisions), "mINP": sum(penalties) / len(penalties)}


def filled(metric: CrossCameraRetrieval, probes, gallery, batch: int = 13) -> CrossCameraRetrieval:
    for images, query in ((probes, True), (gallery, False)):
        for start in range(0, len(images[0]), batch):
            metric.update(*(part[start : start + batch] for part in images), query=query)
    return metric


def values(metric: CrossCameraRetrieval) -> dict[str, float]:
    return {name: float(value) for name, value in metric.compute().items()}


def test_a_probe_whose_person_comes_second() -> None:
    similarity, identities = torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([4, 4, 1])
    ranking = rank_gallery(similarity, identities[None] == 1, identities, unique_identities=True)
    assert ranking.first.tolist() == [2]  # third among images, second among people
    assert rank_gallery(similarity, identities[None] == 1, identities).first.tolist() == [3]


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("places", [None, {1: 1, 2: 2, 3: 2, 6: 6}])
def test_against_a_loop(places: dict[int, int] | None, unique: bool) -> None:
    probes, gallery = people(0, 30, (3, 6)), people(1, 50, (1, 2))
    metric = CrossCameraRetrieval((1, 2, 5), places=places, unique_identities=unique)
    expected = by_loop(probes, gallery, (1, 2, 5), {(3, 2)} if places else (), unique)
    assert values(filled(metric, probes, gallery)) == pytest.approx(expected, abs=1e-6)


def test_images_of_the_probes_own_room_do_not_count() -> None:
    metric = CrossCameraRetrieval((1,), places=SYSU_PLACES)
    metric.update(torch.eye(2), torch.tensor([0, 1]), torch.tensor([2, 1]), query=False)
    metric.update(torch.eye(2)[:1], torch.tensor([0]), torch.tensor([3]), query=True)  # its only match is in its room
    metric.update(torch.eye(2)[:1], torch.tensor([1]), torch.tensor([3]), query=True)  # best after what is left out
    assert values(metric) == {"rank1": 1.0, "mAP": 1.0, "mINP": 1.0}
    metric.update(torch.eye(2)[:1], torch.tensor([1]), torch.tensor([6]), query=True)  # from elsewhere it comes second
    assert values(metric) == {"rank1": 0.5, "mAP": 0.75, "mINP": 0.75}


def test_cameras_without_a_place_hang_apart() -> None:
    metric = CrossCameraRetrieval((1,), places={1: 1, 2: 1})
    metric.update(torch.eye(2), torch.tensor([0, 1]), torch.tensor([7, 8]), query=False)
    metric.update(torch.eye(2), torch.tensor([0, 1]), torch.tensor([8, 1]), query=True)
    assert values(metric)["rank1"] == 1.0


def test_collapsed_features_are_not_a_success() -> None:
    """Where all images are equally similar, the order of the gallery decides, not the best case."""
    identities = torch.arange(10)
    metric = CrossCameraRetrieval((1,), unique_identities=True)
    metric.update(torch.ones(10, 3), identities, torch.ones_like(identities), query=False)
    metric.update(torch.ones(10, 3), identities, torch.full_like(identities, 2), query=True)
    assert values(metric)["rank1"] == pytest.approx(0.1)


# ---- SYSU-MM01


def test_draws_so_many_of_each_person_and_camera() -> None:
    group = torch.tensor([3, 0, 3, 3, 0, 1, 3])
    for shots in (1, 2, 10):
        chosen = draw(group, shots, torch.Generator().manual_seed(0))
        counts = group[chosen].bincount(minlength=4).tolist()
        assert counts == [min(shots, n) for n in (2, 1, 0, 4)]
    generator = torch.Generator().manual_seed(0)
    assert len({tuple(draw(group, 1, generator).tolist()) for _ in range(20)}) > 1


def test_single_shot_search_is_the_mean_over_draws() -> None:
    probes, gallery = people(0, 40, (3, 6)), people(1, 90, (1, 2, 4, 5))
    metric = filled(CrossCameraRetrieval.sysu_mm01(trials=3, seed=5), probes, gallery)
    generator, groups = torch.Generator().manual_seed(5), gallery[1] * 10 + gallery[2]
    trials = []
    for _ in range(3):
        chosen = draw(groups.unique(return_inverse=True)[1], 1, generator)
        trials.append(by_loop(probes, [part[chosen] for part in gallery], (1, 10, 20), {(3, 2)}, True))
    mean = {name: sum(t[name] for t in trials) / 3 for name in trials[0]}
    assert values(metric) == pytest.approx(mean, abs=1e-6)
    assert len({t["mAP"] for t in trials}) == 3


def test_indoor_search_has_two_cameras() -> None:
    probes, gallery = people(0, 40, (3, 6)), people(1, 90, (1, 2, 4, 5))
    indoors = [part[torch.isin(gallery[2], torch.tensor([1, 2]))] for part in gallery]
    metric = filled(CrossCameraRetrieval.sysu_mm01("indoor"), probes, gallery)
    assert values(metric) == values(filled(CrossCameraRetrieval.sysu_mm01("indoor"), probes, indoors))
    assert values(metric) != values(filled(CrossCameraRetrieval.sysu_mm01(), probes, gallery))


def test_published_draws_may_be_given() -> None:
    probes, gallery = people(0, 40, (3, 6)), people(1, 90, (1, 2, 4, 5))
    metric = CrossCameraRetrieval.sysu_mm01(galleries=[range(0, 90, 2), range(0, 90, 3)])
    metric.update(*probes, query=True, index=torch.arange(40))
    metric.update(*gallery, query=False, index=torch.arange(90))
    trials = [by_loop(probes, [p[::step] for p in gallery], (1, 10, 20), {(3, 2)}, True) for step in (2, 3)]
    assert values(metric)["mAP"] == pytest.approx(sum(t["mAP"] for t in trials) / 2, abs=1e-6)


# ---- RegDB


def test_regdb_ranks_all_images_of_the_other_camera() -> None:
    probes, gallery = people(0, 40, (1,)), people(1, 60, (2,))
    assert values(filled(CrossCameraRetrieval.regdb(), probes, gallery)) == pytest.approx(
        by_loop(probes, gallery, (1, 10, 20)), abs=1e-6
    )


# ---- as a metric


def test_two_processes_find_what_one_finds() -> None:
    """Each has every second image; the last is repeated, as samplers do to make shares equal."""
    probes, gallery = people(0, 29, (3, 6)), people(1, 51, (1, 2, 4, 5))
    alone = CrossCameraRetrieval.sysu_mm01()
    for images, query in ((probes, True), (gallery, False)):
        alone.update(*images, query=query, index=torch.arange(len(images[0])))
    ranks = [
        CrossCameraRetrieval.sysu_mm01(
            dist_sync_fn=lambda state, group: gathered(state), distributed_available_fn=_true
        )
        for _ in range(2)
    ]
    for rank, metric in enumerate(ranks):
        for images, query in ((probes, True), (gallery, False)):
            share = torch.arange(rank, len(images[0]) + 1, 2) % len(images[0])
            metric.update(*(part[share] for part in images), query=query, index=share)
    states = [{name: torch.cat(getattr(m, name)) for name in m._defaults} for m in ranks]

    def gathered(state: Tensor) -> list[Tensor]:
        name = next(n for n, s in states[0].items() if s.shape == state.shape and torch.equal(s, state))
        return [s[name] for s in states]

    assert values(ranks[0]) == values(alone)


def _true() -> bool:
    return True


def test_order_and_repetition_do_not_matter_where_images_have_an_index() -> None:
    probes, gallery = people(0, 20, (3, 6)), people(1, 40, (1, 2))
    one, other = CrossCameraRetrieval.sysu_mm01(), CrossCameraRetrieval.sysu_mm01()
    for metric, shuffled in ((one, False), (other, True)):
        for images, query in ((probes, True), (gallery, False)):
            count = len(images[0])
            order = (
                torch.randperm(count, generator=torch.Generator().manual_seed(0)) if shuffled else torch.arange(count)
            )
            order = torch.cat([order, order[:3]]) if shuffled else order
            metric.update(*(part[order] for part in images), query=query, index=order)
    assert values(one) == values(other)


def test_half_precision_around_it_changes_nothing() -> None:
    probes, gallery = people(0, 20, (3, 6)), people(1, 40, (1, 2))
    expected = values(filled(CrossCameraRetrieval(), probes, gallery))
    with torch.autocast("cpu", torch.bfloat16):
        assert values(filled(CrossCameraRetrieval(), probes, gallery)) == expected


def test_nothing_yet_is_not_a_number() -> None:
    metric = CrossCameraRetrieval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert all(v.isnan() for v in metric.compute().values())
    metric.update(torch.eye(2), torch.tensor([1, 2]), torch.tensor([1, 1]), query=True)
    assert all(v.isnan() for v in metric.compute().values())
    metric.update(torch.eye(2), torch.tensor([3, 4]), torch.tensor([2, 2]), query=False)  # nobody who is looked for
    assert all(v.isnan() for v in metric.compute().values())
    metric.reset()
    assert not metric.features


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": ()}, r"ranks: expected numbers from 1, got \(\)"),
        ({"ranks": (0, 1)}, r"ranks: .* got \(0, 1\)"),
        ({"shots": -1}, r"shots: .* got \[-1\]"),
        ({"trials": 0}, r"trials: .* got \[0\]"),
        ({"galleries": []}, "galleries: expected one list"),
        ({"galleries": [[0]], "shots": 1}, "galleries: .* no shots=1"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossCameraRetrieval(**arguments)


def test_a_mode_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="mode: expected 'all' or 'indoor', got 'outdoor'"):
        CrossCameraRetrieval.sysu_mm01("outdoor")
