"""Quantisers on layers: found again, kept by copies, pickles and exports, behind masks, and taken off again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils import parametrize

import lightning_compress
from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.core.quant.attach import (
    input_quantizer,
    quantize_input,
    quantize_weight,
    quantized_layers,
    real_weight,
    remove_quantizers,
    weight_quantizer,
)
from lightning_compress.core.quant.interval import IntervalInput, IntervalWeight
from lightning_compress.core.quant.layers import bits_by_layer, check_bits, choose_quantized, first_layer, last_layer
from lightning_compress.core.quant.lsq import LSQInput, LSQWeight
from lightning_compress.core.sparse.layers import weight_layers
from lightning_compress.core.sparse.learnt_mask import insert_mask


class Half(nn.Module):
    """A mask of the first half of the inputs."""

    def forward(self, weight):
        return weight * (torch.arange(weight.shape[1]) < weight.shape[1] // 2).view(-1, *[1] * (weight.ndim - 2))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(4, 3))


def quantised(kind="interval", bits=3):
    net = network()
    for layer in (net[0], net[2], net[4]):
        if kind == "interval":
            quantize_weight(layer, IntervalWeight(layer.weight, bits))
            quantize_input(layer, IntervalInput(bits))
        else:
            quantize_weight(layer, LSQWeight(layer.weight, bits, per_channel=True))
            quantize_input(layer, LSQInput(bits, signed=True))
    return net


X = torch.rand(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))


def test_layers_stay_what_they_are_and_tell_their_quantisers():
    net = quantised()
    assert isinstance(net[0], nn.Conv2d)
    assert list(quantized_layers(net)) == ["0", "2", "4"]
    assert isinstance(weight_quantizer(net[0]), IntervalWeight)
    assert isinstance(input_quantizer(net[0]), IntervalInput)
    assert weight_quantizer(nn.Linear(2, 2)) is None
    assert input_quantizer(nn.Linear(2, 2)) is None
    assert net[0].weight.unique().numel() <= 8
    assert torch.equal(real_weight(net[0]), network()[0].weight)
    codes = weight_quantizer(net[0]).integer(real_weight(net[0]))
    assert torch.equal(codes.codes * codes.scale, net[0].weight)


@pytest.mark.parametrize("kind", ["interval", "lsq"])
def test_copies_pickles_and_exports_keep_them(kind, tmp_path):
    net = quantised(kind)
    expected = net(X)
    assert not torch.equal(expected, network()(X))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), inference_copy(net)):
        assert torch.equal(twin(X), expected)
    twin = copy.deepcopy(net)
    twin[0].input_quantizer = nn.Identity()
    assert torch.equal(net(X), expected)
    twin = network()
    with pytest.raises(RuntimeError):
        twin.load_state_dict(net.state_dict())
    assert lightning_compress.export(net, tmp_path / "net", X, format="torch").dynamic_batch
    assert lightning_compress.export(net, tmp_path / "net", X, format="onnx").dynamic_batch


@pytest.mark.parametrize("mask_first", [True, False])
def test_masks_act_on_real_weights(mask_first):
    layer = network()[0]
    if mask_first:
        insert_mask(layer, Half())
    quantize_weight(layer, IntervalWeight(layer.weight, 3))
    if not mask_first:
        insert_mask(layer, Half())
    assert isinstance(layer.parametrizations.weight[-1], IntervalWeight)
    assert real_weight(layer)[:, 2:].count_nonzero() == 0
    assert torch.equal(layer.weight, weight_quantizer(layer)(real_weight(layer)))
    remove_quantizers(layer)
    assert weight_quantizer(layer) is None
    assert layer.weight[:, 2:].count_nonzero() == 0  # the mask stays


def test_without_them_the_layer_is_plain_again():
    net, plain = quantised(), network()
    for layer in (net[0], net[2], net[4], net[1]):
        remove_quantizers(layer)
    assert not quantized_layers(net)
    assert not any(parametrize.is_parametrized(m) or m._forward_pre_hooks for m in net.modules())
    assert list(net.state_dict()) == list(plain.state_dict())
    assert torch.equal(net(X), plain(X))


def test_a_layer_has_one_of_each():
    layer = quantised()[0]
    with pytest.raises(MisconfigurationException, match="weight of this layer is quantised by IntervalWeight already"):
        quantize_weight(layer, LSQWeight(torch.ones(1), 4))
    with pytest.raises(MisconfigurationException, match="input of this layer is quantised by IntervalInput already"):
        quantize_input(layer, IntervalInput(4))


def test_which_layers():
    net = nn.Sequential(
        nn.Linear(3, 3), nn.Conv1d(3, 3, 1), nn.ConvTranspose2d(3, 3, 1), nn.MultiheadAttention(4, 2),
        nn.Conv2d(3, 3, 1), nn.Linear(4, 4), nn.ReLU(),
    )  # fmt: skip
    layers = weight_layers(net)
    assert (first_layer(layers), last_layer(layers)) == ("1", "5")
    names, reasons = choose_quantized(net)
    assert names == ["0", "1", "4", "5"]
    assert reasons == {
        "2": "is a transposed convolution",
        "3.out_proj": "is computed inside MultiheadAttention, which passes its input by",
    }
    names, reasons = choose_quantized(net, exclude=["4"], exclude_first=True, exclude_last=True)
    assert names == ["0"]
    assert (reasons["1"], reasons["4"], reasons["5"]) == (
        "is the first layer", "is left out by `exclude`", "is the last layer"
    )  # fmt: skip
    assert choose_quantized(net, exclude_linear=True)[0] == ["1", "4"]
    convolutions = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    assert choose_quantized(convolutions, exclude_first=True, exclude_last=True)[0] == []
    assert first_layer({}) is None
    assert last_layer({}) is None
    with pytest.raises(ValueError, match=r"include.*'nowhere'"):
        choose_quantized(net, ["nowhere"])


def test_what_is_quantised_is_left_to_its_method():
    net = quantised()
    assert choose_quantized(net) == ([], dict.fromkeys(["0", "2", "4"], "is quantised by IntervalWeight already"))


def test_bits_by_layer():
    assert bits_by_layer(None, ["a", "b"], "bits") == {"a": None, "b": None}
    assert bits_by_layer({"a*": 2, "*2": 8}, ["a1", "a2", "b1"], "bits") == {"a1": 2, "a2": 8, "b1": None}
    with pytest.raises(ValueError, match="'c'"):
        bits_by_layer({"c": 2}, ["a"], "bits")
    check_bits(None, 1, 8, "X(bits")
    for wrong in (0, 9, 2.5, {"*": 9}):
        with pytest.raises(ValueError, match=r"X\(bits=.*from 1 to 8"):
            check_bits(wrong, 1, 8, "X(bits")
