"""Parametrised modules pickle."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.core.parametrisation import parametrise


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_it_pickles_and_stays_what_it_was():
    conv = nn.Conv2d(2, 3, 1)
    parametrise(conv, "weight", Doubled())
    again = pickle.loads(pickle.dumps(conv))
    assert isinstance(again, nn.Conv2d)
    assert parametrize.type_before_parametrizations(again) is nn.Conv2d
    assert torch.equal(again.weight, conv.weight)
    assert torch.equal(again.parametrizations.weight.original, conv.parametrizations.weight.original)
    twice = pickle.loads(pickle.dumps(copy.deepcopy(again)))
    assert torch.equal(twice.weight, conv.weight)


def test_each_has_a_class_of_its_own():
    """To take the parametrisation off one must not touch the other."""
    conv = nn.Conv2d(2, 3, 1)
    parametrise(conv, "weight", Doubled())
    again = pickle.loads(pickle.dumps(conv))
    parametrize.remove_parametrizations(again, "weight")
    assert type(again) is nn.Conv2d
    assert torch.equal(again.weight, conv.weight)


def test_further_ones_stack_and_pickle_too():
    conv = nn.Conv2d(2, 3, 1)
    dense = conv.weight.detach().clone()
    parametrise(conv, "weight", Doubled())
    parametrise(conv, "weight", Doubled())
    parametrise(conv, "bias", Doubled())
    again = pickle.loads(pickle.dumps(conv))
    torch.testing.assert_close(again.weight, 4 * dense)
    assert torch.equal(again.bias, conv.bias)
    assert not parametrize.is_parametrized(inference_copy(again))


def test_torch_alone_refuses():
    """Once it does not, this file and its module can go."""
    conv = nn.Conv2d(2, 3, 1)
    parametrize.register_parametrization(conv, "weight", Doubled())
    with pytest.raises(Exception, match=r"Serialization|pickle"):
        pickle.dumps(conv)
