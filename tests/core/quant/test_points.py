from __future__ import annotations

import torch
from torch import nn

from lightning_compress.core.quant.points import QuantizationPoint


def test_a_point_passes_its_input_on_and_holds_nothing() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    network = nn.Sequential(nn.Linear(3, 4), QuantizationPoint("default"))
    assert QuantizationPoint()(x) is x
    assert list(network.state_dict()) == ["0.weight", "0.bias"]
    assert QuantizationPoint().when == "always"


def test_one_put_in_its_place_needs_no_other_keys() -> None:
    plain, quantised = nn.Sequential(nn.Linear(3, 4), QuantizationPoint()), nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    quantised.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3)
    assert torch.equal(quantised(x), plain(x).relu())
