"""Fixed masks: zeros that no optimiser moves, in whatever place and layout the weights are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from foreign import made
from torch import nn

from lightning_compress.core.sparse.fixed_masks import FixedMasks

NAME = "net.blocks.0.conv1.weight"


def masked(**kwargs):
    module, masks = made(**kwargs), FixedMasks()
    keep = torch.rand(12, 8, 3, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    masks.set(module, {NAME: keep})
    return module, masks, keep


def train(module, masks, optimizer, steps=3):
    masks.attach(SimpleNamespace(optimizers=[optimizer]), module)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.rand(4, 1, 8, 8)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    ],
    ids=["SGD", "AdamW"],
)
def test_masked_weights_stay_zero(make):
    module, masks, keep = masked()
    weight = module.get_parameter(NAME)
    before = weight.detach().clone()
    optimizer = make(module.parameters())
    train(module, masks, optimizer)
    assert (weight[~keep] == 0).all()
    assert (weight[keep] != before[keep]).all()
    masks.clear_momentum(SimpleNamespace(optimizers=[optimizer]), module)
    for value in optimizer.state[weight].values():
        if value.shape == weight.shape:
            assert (value[~keep] == 0).all()
            assert value[keep].count_nonzero() > 0
    masks.detach()
    assert not optimizer._optimizer_step_post_hooks


def test_masks_that_broadcast_and_in_channels_last():
    module, masks = made().to(memory_format=torch.channels_last), FixedMasks()
    filters = torch.arange(12).view(12, 1, 1, 1) % 2 == 0
    masks.set(module, {NAME: filters})
    assert masks[NAME].shape == (12, 8, 3, 3)
    train(module, masks, torch.optim.SGD(module.parameters(), lr=0.1))
    weight = module.get_parameter(NAME)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.flatten(1).any(1).tolist() == filters.flatten().tolist()
    assert masks.sparsity == 0.5


def test_another_mask_of_the_same_parameter_replaces_the_first():
    module, masks, keep = masked()
    train(module, masks, torch.optim.SGD(module.parameters(), lr=0.1), steps=1)
    masks.set(module, {NAME: ~keep})
    assert not module.get_parameter(NAME).any()
    assert len(masks) == 1
    masks.set(module, {"net.stem.weight": torch.zeros(())})
    assert len(masks) == 2
    assert not module.net.stem.weight.any()


def test_parameters_that_were_replaced_are_found_again():
    module, masks, keep = masked()
    layer = module.net.blocks[0].conv1
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    train(module, masks, optimizer, steps=1)
    layer.weight = nn.Parameter(torch.ones(12, 8, 3, 3))
    train(module, masks, torch.optim.SGD(module.parameters(), lr=0.1), steps=1)
    assert torch.equal(layer.weight != 0, keep)


def test_only_the_optimiser_that_stepped_is_followed():
    module, masks, keep = masked()
    weight = module.get_parameter(NAME)
    others = torch.optim.SGD(module.net.head.parameters(), lr=0.1)
    train(module, masks, others, steps=1)
    with torch.no_grad():
        weight.fill_(1.0)
    others.step()
    assert weight.all()
    masks.apply(module)
    assert torch.equal(weight != 0, keep)


def test_state_is_plain_and_whole():
    module, masks, keep = masked()
    masks.set(module, {"net.head.weight": torch.rand(10, 8) > 0.3})
    state = masks.state_dict()
    assert {name: entry["bits"].numel() for name, entry in state["masks"].items()} == {NAME: 108, "net.head.weight": 10}
    again = FixedMasks()
    assert not again
    again.load_state_dict(state)
    assert again
    assert torch.equal(again[NAME], keep)
    assert again.get("net.stem.weight") is None
    assert "net.head.weight" in again


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"net.nothing": torch.ones(1)}, "has no parameter 'net.nothing'"),
        ({NAME: torch.ones(5)}, r"has shape \(12, 8, 3, 3\), its mask \(5,\)"),
    ],
)
def test_bad_masks(masks, message):
    with pytest.raises(ValueError, match=message):
        FixedMasks().set(made(), masks)
