"""L1Norm keeps the filters whose absolute weights are largest in sum."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from foreign import Foreign, fit, made
from torch import Tensor, nn

from lightning_compress.callbacks import L1Norm
from lightning_compress.callbacks.pruning.l1_norm import filter_l1
from lightning_compress.core.surgery import attach_record


def kept(module: nn.Module, layer: str) -> list[int]:
    (step,) = attach_record(module).steps
    return next(c[3] for c in step["cuts"] if tuple(c[:2]) == (f"{layer}.weight", 0)).tolist()


def loop(weight: Tensor) -> list[float]:
    return [sum(abs(float(w)) for w in weight[j].detach().flatten()) for j in range(len(weight))]


def test_scores_are_sums_of_absolute_weights() -> None:
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    assert filter_l1(weight).tolist() == pytest.approx(loop(weight))
    assert filter_l1(weight.bfloat16()).dtype == torch.float32


def test_the_largest_filters_stay_with_their_values(tmp_path: Path) -> None:
    module = made()
    dense = {n: p.detach().clone() for n, p in module.named_parameters()}
    fit(module, tmp_path, L1Norm(0.25), limit_train_batches=0, max_epochs=1)
    scores = loop(dense["net.blocks.0.conv1.weight"])
    best = sorted(sorted(range(12), key=scores.__getitem__)[3:])
    assert kept(module, "net.blocks.0.conv1") == best
    assert torch.equal(module.net.blocks[0].bn1.weight, dense["net.blocks.0.bn1.weight"][best])


def test_layers_that_are_added_share_the_choice_of_their_mean(tmp_path: Path) -> None:
    module = made()
    layers = ["net.stem", "net.blocks.0.conv2", "net.blocks.1.conv2"]
    scores = torch.tensor([loop(module.get_submodule(n).weight) for n in layers]).mean(0)
    fit(module, tmp_path, L1Norm(0.5), max_epochs=1)
    expected = scores.argsort()[4:].sort().values.tolist()
    assert [kept(module, n) for n in layers] == [expected] * 3


class Deconvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.ConvTranspose2d(1, 4, 3), nn.Conv2d(4, 10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(x).relu()).mean((2, 3))


def test_a_transposed_convolution_is_scored_by_its_outputs(tmp_path: Path) -> None:
    module: Foreign = made(Deconvolution)
    with torch.no_grad():
        module.net.up.weight[:, 2] *= 100
    fit(module, tmp_path, L1Norm(0.75), max_epochs=1)
    (step,) = attach_record(module).steps
    assert next(c for c in step["cuts"] if c[0] == "net.up.weight")[1:] == (1, 4, torch.tensor([2]))
    assert module.net.up.weight.shape == (1, 1, 3, 3)
