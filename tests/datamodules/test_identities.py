from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_compress.datamodules._identities import IdentityModalitySampler, Tagged, draw_instances


def images(identities: int, visible: int, infrared: int) -> tuple[Tensor, Tensor]:
    """Identity and kind of every image, in an order of no use."""
    whose = torch.arange(identities).repeat_interleave(visible + infrared)
    kind = torch.tensor([False] * visible + [True] * infrared).repeat(identities)
    order = torch.randperm(len(whose), generator=torch.Generator().manual_seed(0))
    return whose[order], kind[order]


def sampler(identities: int, visible: int = 6, infrared: int = 5, **kwargs) -> IdentityModalitySampler:
    whose, kind = images(identities, visible, infrared)
    return IdentityModalitySampler(TensorDataset(whose), whose, kind, **{"batch_size": 16, **kwargs})


def batches(given: IdentityModalitySampler) -> Tensor:
    """(batches, identities, instances), indices of the first epoch."""
    drawn = torch.tensor(list(given)) % len(given.dataset)
    return drawn.view(-1, given.per_batch, given.num_instances)


def test_batches_hold_whole_identities_that_alternate_between_views() -> None:
    given = sampler(11)
    drawn = batches(given)
    assert len(given) == drawn.numel() == 5 * 16  # one identity of eleven is left over
    whose, kind = given.identities[drawn], given.infrared[drawn]
    assert (whose == whose[..., :1]).all()
    assert whose[..., 0].flatten().unique().numel() == 10
    assert torch.equal(kind, torch.tensor([False, True] * 4).expand_as(kind))
    assert all(len(set(row.tolist())) == 8 for row in drawn.flatten(0, 1))


@pytest.mark.parametrize(
    ("identities", "batch_size", "steps"),
    [pytest.param(395, 128, 24, id="SYSU-MM01, authors' code"), pytest.param(206, 64, 25, id="RegDB, authors' code")],
)
def test_the_papers_epochs(identities: int, batch_size: int, steps: int) -> None:
    assert len(sampler(identities, batch_size=batch_size)) == steps * batch_size


def test_every_image_gets_its_turn() -> None:
    given = sampler(4, batch_size=32)
    seen = []
    for epoch in range(12):
        given.set_epoch(epoch)
        seen += list(given)
    assert {index // len(given.dataset) for index in seen} == set(range(12))  # the epoch travels with the index
    counts = torch.tensor(seen).remainder(len(given.dataset)).bincount(minlength=len(given.dataset))
    assert counts.min() >= 3
    by_identity = [counts[given.identities == i].sum().item() for i in range(4)]
    assert by_identity == [12 * 8] * 4


def test_few_images_repeat() -> None:
    drawn = batches(sampler(2, visible=2, infrared=5, batch_size=8, num_instances=8))
    kinds = drawn.flatten(0, 1)
    assert all(len(set(row[::2].tolist())) <= 2 for row in kinds)
    assert all(len(set(row[1::2].tolist())) == 4 for row in kinds)


def test_processes_share_the_batches() -> None:
    """Together they draw what one alone draws, each of them whole batches, as many as the others."""
    alone = batches(sampler(11))
    parts = [batches(sampler(11, num_replicas=2, rank=rank)) for rank in range(2)]
    assert [len(part) for part in parts] == [2, 2]
    for step in range(2):
        for rank in range(2):
            assert torch.equal(parts[rank][step], alone[2 * step + rank])


def test_an_epoch_depends_on_seed_and_number_alone() -> None:
    one, other = sampler(11, seed=3), sampler(11, seed=3)
    one.set_epoch(4)
    other.set_epoch(3)
    list(other)
    other.set_epoch(4)
    assert list(one) == list(other)
    assert list(one) != list(sampler(11, seed=4))


def test_rounds() -> None:
    given = sampler(3, batch_size=16, rounds=4)
    whose = given.identities[batches(given)][..., 0]
    assert whose.shape == (4, 2)  # of three identities two make a batch
    assert all(len(set(row)) == 2 for row in whose.tolist())


def test_draws_are_uniform() -> None:
    whose, kind = images(1, 4, 4)
    rng = np.random.default_rng(0)
    first = torch.stack([draw_instances(whose, kind, 2, rng)[1][0] for _ in range(800)])
    counts = first.flatten().bincount(minlength=8)
    assert (counts - 200).abs().max() < 50  # sigma 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_instances": 3}, "num_instances: expected an even number, half for each view, got 3"),
        ({"batch_size": 12}, "batch_size: expected a multiple of num_instances=8, got 12"),
        ({"batch_size": 128}, "batch_size: 128 takes 16 identities with num_instances=8; 11 do not make a batch"),
        ({"batch_size": 64, "num_replicas": 2}, "for each of 2 processes"),
        ({"infrared": 0}, "Identity 0 has no infrared image"),
        ({"visible": 0}, "Identity 0 has no visible image"),
    ],
)
def test_impossible_batches(arguments: dict[str, int], message: str) -> None:
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        sampler(11, **arguments)


def test_tags_follow_their_images_into_later_epochs() -> None:
    whole = Tagged(TensorDataset(torch.arange(4), torch.arange(4) * 10), torch.tensor([True, False, False, True]))
    assert [tuple(map(int, item)) for item in whole.__getitems__([3, 1])] == [(3, 30, 1), (1, 10, 0)]
