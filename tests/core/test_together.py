"""Networks that run as one compute what they compute one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_compress.core.together import can_run_together, faster_together, run_together
from lightning_compress.networks import CheapResNet, CIFARResNet


class Mixed(nn.Module):
    """What has a rule and what has none: a pointwise convolution of the images, biases, groups, strides, a norm of
    vectors, and one without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(
            nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, bias=False, stride=2), nn.ReLU(),
            nn.Conv2d(8, 8, 1, groups=2, bias=False), nn.BatchNorm2d(8, track_running_stats=False),
            nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.vectors = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 5))

    def forward(self, x):
        maps = self.maps(x)
        return self.vectors(maps.mean((2, 3))), maps


class Logits(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x):
        logits = self.network(x)
        return logits, logits


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "mixed": Mixed,
    **{kind: lambda kind=kind: Logits(CheapResNet(8, kind=kind)) for kind in ("shift", "dw", "group")},
    "resnet": lambda: Logits(CIFARResNet(8, widths=(4, 4, 6, 8))),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BUILDERS)
def test_equals_calls_one_by_one(name: str, training: bool) -> None:
    torch.manual_seed(0)
    alone = [BUILDERS[name]().double().train(training) for _ in range(3)]
    together = copy.deepcopy(alone)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    expected = [network(x) for network in alone]
    found = run_together(together, x)
    for i, tensors in enumerate(zip(*expected, strict=True)):
        torch.testing.assert_close(found[i], torch.stack(tensors), rtol=1e-9, atol=1e-9)
    torch.stack([logits.square().sum() for logits, _ in expected]).sum().backward()
    found[0].square().sum().backward()
    for one, other in zip(alone, together, strict=True):
        for (key, tensor), (_, also) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
            torch.testing.assert_close(also, tensor, rtol=1e-9, atol=1e-12, msg=key)
        for (key, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), key
            if p.grad is not None:
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-7, atol=1e-9, msg=key)


def test_works_under_autocast() -> None:
    networks = [CheapResNet(8) for _ in range(2)]
    x = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.stack([network(x) for network in copy.deepcopy(networks)])
        found = run_together(networks, x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    found.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for n in networks for p in n.parameters())


def test_dropout_differs_between_networks() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(1, 1000)
    found = run_together([nn.Sequential(layer, nn.Dropout()) for _ in range(2)], torch.ones(1, 1))
    assert 400 < int((found[0] != found[1]).sum()) < 600


def test_says_when_it_cannot() -> None:
    assert can_run_together([CheapResNet(8), CheapResNet(8)])
    assert not can_run_together([CheapResNet(8), CheapResNet(14)])
    assert not can_run_together([nn.Linear(2, 3), nn.Linear(2, 4)])
    assert not can_run_together([nn.SyncBatchNorm(2), nn.SyncBatchNorm(2)])
    assert not can_run_together([nn.BatchNorm2d(2, momentum=None)] * 2)
    assert not can_run_together([parametrizations.orthogonal(nn.Linear(2, 2)) for _ in range(2)])
    watched = nn.Linear(2, 3)
    watched.register_forward_hook(lambda *_: None)
    assert not can_run_together([nn.Linear(2, 3), watched])


def test_pays_for_small_calls() -> None:
    assert faster_together(torch.empty(16, 3, 8, 8))
    assert not faster_together(torch.empty(1024, 3, 32, 32))
