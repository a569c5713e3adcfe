"""Masks that learn: where they stand among parametrisations, and that they leave no trace."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from foreign import made
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils import parametrize

from lightning_compress.core.sparse.layers import choose_layers, weight_layers
from lightning_compress.core.sparse.learnt_mask import (
    insert_mask,
    keep_off_the_wire,
    masks_in,
    remove_mask,
    weight_name,
)


class Half(nn.Module):
    """A mask with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.score = nn.Parameter(torch.full((), 0.5))

    def forward(self, weight):
        return weight * self.score


class PlusOne(nn.Module):
    def forward(self, weight):
        return weight + 1


def test_comes_first_and_goes_without_a_trace():
    layer = nn.Linear(4, 3)
    weight, names = layer.weight, [n for n, _ in layer.named_parameters()]
    insert_mask(layer, Half())
    assert torch.equal(layer.weight, weight / 2)
    assert weight_name(layer, "head") == "head.parametrizations.weight.original"
    remove_mask(layer, Half)
    assert type(layer) is nn.Linear
    assert layer.weight is weight
    assert [n for n, _ in layer.named_parameters()] == names == ["weight", "bias"]
    assert weight_name(layer, "head") == "head.weight"


@pytest.mark.parametrize("also_bias", [False, True])
def test_others_stay(also_bias):
    layer = nn.Linear(4, 3)
    weight = layer.weight.detach().clone()
    if also_bias:
        parametrize.register_parametrization(layer, "bias", PlusOne())
    parametrize.register_parametrization(layer, "weight", PlusOne())
    insert_mask(layer, Half())
    assert torch.equal(layer.weight, weight / 2 + 1)
    remove_mask(layer, Half)
    assert torch.equal(layer.weight, weight + 1)
    assert masks_in(layer, Half) == {}


def test_only_the_bias_stays_parametrised():
    layer = nn.Linear(4, 3)
    weight = layer.weight
    parametrize.register_parametrization(layer, "bias", PlusOne())
    insert_mask(layer, Half())
    remove_mask(layer, Half)
    assert layer.weight is weight
    assert parametrize.is_parametrized(layer, "bias")


def test_a_copy_keeps_the_mask_when_the_original_loses_it():
    network = nn.Sequential(nn.Linear(4, 3))
    insert_mask(network[0], Half())
    copied = copy.deepcopy(network)
    remove_mask(network[0], Half)
    assert torch.equal(copied[0].weight, network[0].weight / 2)
    assert list(masks_in(copied, Half)) == ["0"]


def test_a_masked_network_pickles():
    network = nn.Sequential(nn.Conv2d(4, 3, 1))
    insert_mask(network[0], Half())
    again = pickle.loads(pickle.dumps(network))
    x = torch.rand(1, 4, 2, 2)
    assert isinstance(again[0], nn.Conv2d)
    assert torch.equal(again(x), network(x))
    assert torch.equal(pickle.loads(pickle.dumps(again))(x), network(x))
    remove_mask(again[0], Half)
    assert type(again[0]) is nn.Conv2d


def test_a_weight_of_several_tensors_is_refused():
    with pytest.raises(MisconfigurationException, match="Half masks one tensor"):
        insert_mask(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), Half())


def test_buffers_off_the_wire_add_up():
    module = made()
    keep_off_the_wire(module, ["net.bn.running_mean"])
    keep_off_the_wire(module, ["net.bn.running_var", "net.bn.running_mean"])
    assert module._ddp_params_and_buffers_to_ignore == ["net.bn.running_mean", "net.bn.running_var"]


def test_choosing_layers():
    layers = weight_layers(made())
    chosen, reasons = choose_layers(layers, ["*conv*", "*head"], ["*.0.*"], m=4)
    assert chosen == ["net.blocks.1.conv1", "net.blocks.1.conv2", "net.head"]
    assert set(reasons.values()) == {"is not in `include`", "is left out by `exclude`"}
    old = nn.utils.weight_norm(nn.Linear(4, 4)) if hasattr(nn.utils, "weight_norm") else None
    if old is not None:
        assert "put together from several" in choose_layers({"old": old}, ["*"], [])[1]["old"]
