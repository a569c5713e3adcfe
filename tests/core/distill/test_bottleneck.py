"""The bottleneck's layers, and dropout that a checkpoint can take up again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_compress.core.distill.bottleneck import CountedDropout, InformationBottleneck


@pytest.mark.parametrize(
    ("classes", "parameters"),
    [pytest.param(395, 3_042_367, id="SYSU-MM01"), pytest.param(206, 3_042_367 - 189 * 257, id="RegDB")],
)
def test_parameters_are_the_papers(classes: int, parameters: int) -> None:
    with torch.device("meta"):
        head = InformationBottleneck(2048, classes)
    assert sum(p.numel() for p in head.encoder.parameters()) == 2_809_012
    assert sum(p.numel() for p in head.parameters()) == parameters
    kinds = [type(layer).__name__ for layer in head.encoder]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]  # z itself is not normalised


def test_starts_as_the_paper_does() -> None:
    torch.manual_seed(0)
    head = InformationBottleneck(256, 10, hidden=(400, 300))
    assert [tuple(out.shape) for out in head(torch.randn(8, 256))] == [(8, 10), (8, 512)]
    linear = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
    for layer in linear[:-1]:
        assert layer.weight.std().item() == pytest.approx((2 / layer.out_features) ** 0.5, rel=0.02)
    assert linear[-1].weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert not any(layer.bias.any() for layer in linear)
    norm = head.encoder[1]
    assert (norm.weight.mean().item(), norm.weight.std().item()) == pytest.approx((1, 0.02), rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"z_dim": 0}, "z_dim: expected at least 1 feature, got 0"),
        ({"hidden": (8, 0)}, "hidden: expected at least 1 feature, got 0"),
        ({"classifier_dim": -1}, "classifier_dim: .* got -1"),
        ({"dropout": 1.0}, r"dropout: expected a share in \[0, 1\), got 1.0"),
    ],
)
def test_sizes_that_cannot_be(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InformationBottleneck(4, 2, **arguments)


def test_dropout_keeps_the_mean() -> None:
    dropout, x = CountedDropout(0.25), torch.ones(4000)
    dropped = dropout(x)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert not torch.equal(dropout(x), dropped)
    assert dropout.eval()(x) is x


def test_dropout_goes_on_where_a_checkpoint_left_it() -> None:
    torch.manual_seed(1)
    one, x = CountedDropout(0.5), torch.ones(100)
    one(x)
    other = CountedDropout(0.5)
    other.load_state_dict(one.state_dict())
    copies = [other, copy.deepcopy(one), pickle.loads(pickle.dumps(one))]
    torch.manual_seed(2)  # whatever else draws
    expected = one(x)
    for copied in copies:
        assert torch.equal(copied(x), expected)


def test_dropout_follows_the_seed() -> None:
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(CountedDropout(0.5)(torch.ones(100)))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
