"""A copy for inference computes the same and has left the training behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_compress.core.inference_copy import has_watchers, inference_copy


class Mask(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * (torch.arange(weight.shape[1]) % 2)


def prepared(kind: str) -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    if kind == "mask":
        parametrize.register_parametrization(net[0], "weight", Mask())
    elif kind == "two parametrisations":
        parametrizations.weight_norm(net[0])
        parametrize.register_parametrization(net[0], "weight", Mask())
    elif kind == "old weight_norm":
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(net[0])
    elif kind == "prune":
        prune.l1_unstructured(net[0], "weight", 0.5)
    elif kind == "compiled":
        net[0] = torch.compile(net[0])
        net.compile()
    return net


@pytest.mark.parametrize("kind", ["plain", "mask", "two parametrisations", "old weight_norm", "prune", "compiled"])
def test_same_function_and_original_untouched(kind):
    torch.manual_seed(0)
    net = prepared(kind)
    x = torch.randn(3, 4)
    if kind != "compiled":  # which would run the compiler
        net(x).sum().backward()
    names = list(net.state_dict())
    clone = inference_copy(net)
    assert net.training
    assert list(net.state_dict()) == names
    assert not clone.training
    assert not any(parametrize.is_parametrized(m) for m in clone.modules())
    assert {id(p) for p in clone.parameters()}.isdisjoint({id(p) for p in net.parameters()})
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(clone(x), net.eval()(x))


def test_parametrised_class_of_the_original_keeps_working():
    net = prepared("mask")
    inference_copy(net)
    assert net[0].weight[:, 0].count_nonzero() == 0
    inference_copy(net)


def test_watchers_stay_behind():
    class Watcher:
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

        def watch(self, *args):
            raise AssertionError("called")

    net = prepared("plain")
    assert not has_watchers(net)
    watcher = Watcher()
    handles = [net[0].register_forward_hook(watcher.watch), net[2].register_forward_pre_hook(watcher.watch)]
    net.register_full_backward_hook(watcher.watch)
    net.register_load_state_dict_post_hook(watcher.watch)
    assert has_watchers(net)
    clone = inference_copy(net)
    clone(torch.zeros(1, 4))
    assert not has_watchers(clone)
    for handle in handles:
        handle.remove()
    assert not has_watchers(net)
    assert not has_watchers(prepared("prune"))


class Gate:
    """A forward hook that is part of the function, and refers to another module of the network."""

    part_of_function = True

    def __init__(self, other: nn.Module) -> None:
        self.other = other

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out * self.other.weight.sum()


def test_a_hook_that_is_part_of_the_function_comes_along():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[0].register_forward_hook(Gate(net[1]))
    net[0].register_forward_hook(lambda *_: pytest.fail("watched"))
    clone = inference_copy(net)
    (gate,) = clone[0]._forward_hooks.values()
    assert gate.other is clone[1]
    x = torch.rand(2, 3)
    expected = net[1](torch.nn.functional.linear(x, net[0].weight, net[0].bias) * net[1].weight.sum())
    torch.testing.assert_close(clone(x), expected)
    assert has_watchers(net)
    assert not has_watchers(clone)


def test_what_only_training_needs_is_left_out():
    net = nn.Linear(3, 3)
    net.add_module("auxiliary", nn.Linear(3, 10))
    net.auxiliary.training_only = True
    copied = inference_copy(net)
    assert copied.auxiliary is None
    assert list(copied.state_dict()) == ["weight", "bias"]
    assert isinstance(net.auxiliary, nn.Linear)
