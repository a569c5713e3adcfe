from __future__ import annotations

import copy
import pickle
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.core.profile import profile
from lightning_compress.core.quant.points import QuantizationPoint
from lightning_compress.networks import EDSR, build, edsr_baseline, edsr_large, load_weights
from lightning_compress.networks.edsr import DIV2K_MEAN
from lightning_compress.networks.upsampler import MeanShift


def quantizable(network: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions that the network names for quantisation."""
    convs = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    return {name: m for name, m in convs.items() if any(fnmatchcase(name, glob) for glob in network.quantizable)}


def points(network: nn.Module, *when: str) -> list[str]:
    modules = network.named_modules()
    return [name for name, m in modules if isinstance(m, QuantizationPoint) and m.when in ("always", *when)]


def share(params: int, quantised: int, bits: int) -> float:
    """How many times smaller the weights get, counted as PAMS does."""
    return 32 * params / (32 * (params - quantised) + bits * quantised)


@pytest.mark.parametrize(
    ("scale", "params", "compression8", "compression4", "gmacs", "quantised_gmacs"),
    [
        pytest.param(4, 1_517_571, 2.398, 3.127, 114.23, 67.95, id="pams-edsr-x4"),
        pytest.param(2, 1_369_859, 2.824, 4.057, 316.25, 271.79, id="pams-edsr-x2"),
    ],
)
def test_what_the_papers_count(
    scale: int, params: int, compression8: float, compression4: float, gmacs: float, quantised_gmacs: float
) -> None:
    with torch.device("meta"):
        network = edsr_baseline(scale)
    layers = quantizable(network)
    weights = sum(layer.weight.numel() for layer in layers.values())
    cost = profile(network, (1, 3, 720 // scale, 1280 // scale))
    assert cost.params == params
    assert (len(layers), weights) == (32, 1_179_648)
    assert share(params, weights, 8) == pytest.approx(compression8, abs=5e-4)
    assert share(params, weights, 4) == pytest.approx(compression4, abs=5e-4)
    assert cost.macs / 1e9 == pytest.approx(gmacs, abs=5e-3)
    assert sum(cost.layer(name).macs for name in layers) / 1e9 == pytest.approx(quantised_gmacs, abs=5e-3)
    assert len(points(network, "default")) == len(points(network, "integer")) == 48


@pytest.mark.parametrize(
    ("scale", "params"),
    [(2, 40_729_603), (3, 43_680_003), (4, 43_089_923)],  # 43M in the paper
    ids=["edsr-large-x2", "edsr-large-x3", "edsr-large-x4"],
)
def test_the_large_network(scale: int, params: int) -> None:
    with torch.device("meta"):
        network = edsr_large(scale)
    assert sum(p.numel() for p in network.parameters()) == params
    assert network.body[0].res_scale == 0.1


def as_published(state: dict[str, Tensor], images: Tensor, blocks: int, res_scale: float) -> Tensor:
    """EDSR for x4 from a state dict with the authors' names, one operation after the other."""

    def conv(name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    mean = torch.tensor(DIV2K_MEAN).view(1, 3, 1, 1) * 255
    head = x = conv("head.0", images - mean)
    for i in range(blocks):
        x = x + res_scale * conv(f"body.{i}.body.2", F.relu(conv(f"body.{i}.body.0", x)))
    x = conv(f"body.{blocks}", x) + head
    for i in (0, 2):
        x = F.pixel_shuffle(conv(f"tail.0.{i}", x), 2)
    return conv("tail.1", x) + mean


@pytest.mark.parametrize("res_scale", [1.0, 0.1])
def test_the_forward_is_the_papers(res_scale: float) -> None:
    torch.manual_seed(0)
    network = EDSR(4, blocks=2, features=8, res_scale=res_scale)
    images = 255 * torch.rand(2, 3, 6, 7)
    torch.testing.assert_close(network(images), as_published(network.state_dict(), images, 2, res_scale))


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_it_enlarges_by_its_scale(scale: int) -> None:
    network = EDSR(scale, blocks=1, features=4)
    assert network.scale == scale
    assert network(torch.zeros(2, 3, 5, 7)).shape == (2, 3, 5 * scale, 7 * scale)


def test_without_weights_it_paints_the_mean_colour() -> None:
    network = EDSR(2, blocks=1, features=4)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    expected = 255 * torch.tensor(DIV2K_MEAN).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    torch.testing.assert_close(network(255 * torch.rand(1, 3, 4, 4)), expected)


def test_files_of_the_authors_load(tmp_path: Path) -> None:
    names = ["sub_mean.weight", "sub_mean.bias", "head.0.weight", "head.0.bias"]
    names += [f"body.{i}.body.{j}.{what}" for i in range(16) for j in (0, 2) for what in ("weight", "bias")]
    names += [
        f"{layer}.{what}" for layer in ("body.16", "tail.0.0", "tail.0.2", "tail.1") for what in ("weight", "bias")
    ]
    names += ["add_mean.weight", "add_mean.bias"]
    network = edsr_baseline(4)
    state = network.state_dict()
    assert list(state) == names
    assert state["sub_mean.weight"].shape == (3, 3, 1, 1)  # theirs is a 1x1 convolution
    torch.save({name: value + 1 for name, value in state.items()}, tmp_path / "edsr.pt")
    load_weights(network, tmp_path / "edsr.pt")
    assert torch.equal(network.state_dict()["tail.0.2.bias"], state["tail.0.2.bias"])


def test_the_shift_by_the_mean_is_theirs() -> None:
    shift = MeanShift([-3.0, 0.5, 2.0])
    shift.weight.mul_(torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1))  # their std
    images = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(shift(images), F.conv2d(images, shift.weight, shift.bias))
    assert not list(shift.parameters())


class Negative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


@pytest.mark.parametrize(
    ("point", "signs"),
    # of the shortcut, of the input of the first convolution, of that of the second, of the residual
    [
        ("shortcut", (-1, 1, 1, 1)),
        ("block_input", (-1, -1, 1, 1)),
        ("hidden", (1, 1, -1, 1)),
        ("residual", (1, 1, 1, -1)),
    ],
)
def test_where_the_points_of_a_block_act(point: str, signs: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    block = EDSR(2, blocks=1, features=4).body[0]
    x = torch.randn(1, 4, 5, 5)
    setattr(block, point, Negative())
    shortcut, first, second, residual = signs
    expected = shortcut * x + residual * block.body[2](second * F.relu(block.body[0](first * x)))
    torch.testing.assert_close(block(x), expected)


def test_the_feature_layer_reads_the_sum_of_body_and_head() -> None:
    network = EDSR(2, blocks=1, features=4)
    seen: list[Tensor] = []
    network.get_submodule(network.feature_layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = torch.rand(1, 3, 5, 5)
    network(images)
    head = network.head(network.sub_mean(images))
    assert torch.equal(seen[0], network.body(head) + head)


def test_copies_pickles_and_exports() -> None:
    network = EDSR(2, blocks=1, features=4).eval()
    images = 255 * torch.rand(2, 3, 6, 6)
    expected = network(images)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(images), expected)
    assert torch.allclose(torch.export.export(network, (images,)).module()(images), expected, atol=1e-4)


def test_it_is_found_by_name() -> None:
    with torch.device("meta"):
        assert build("edsr_baseline", scale=3).scale == 3
    with pytest.raises(ValueError, match=r"'edsr_basline'.*Did you mean 'edsr_baseline'"):
        build("edsr_basline")


@pytest.mark.parametrize("scale", [1, 5, 16])
def test_impossible_scales(scale: int) -> None:
    with pytest.raises(ValueError, match=f"scale: expected one of 2, 3, 4, 8, got {scale}"):
        EDSR(scale)
