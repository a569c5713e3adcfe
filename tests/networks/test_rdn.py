from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.core.profile import profile
from lightning_compress.core.quant.points import QuantizationPoint
from lightning_compress.networks import RDN, build, rdn_a, rdn_b


def quantised(network: nn.Module) -> dict[str, nn.Conv2d]:
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and name.startswith(tuple(glob.rstrip("*") for glob in network.quantizable))
    }


@pytest.mark.parametrize(
    ("scale", "params", "compression8", "compression4"),
    [
        pytest.param(4, 22_271_107, 3.822, 7.217, id="pams-rdn-x4"),
        pytest.param(2, 22_123_395, 3.896, 7.529, id="pams-rdn-x2"),
    ],
)
def test_what_the_papers_count(scale: int, params: int, compression8: float, compression4: float) -> None:
    with torch.device("meta"):
        network = rdn_b(scale)
    layers = quantised(network)
    weights = sum(layer.weight.numel() for layer in layers.values())
    assert sum(p.numel() for p in network.parameters()) == params
    assert (len(layers), weights) == (146, 21_925_888)
    for bits, compression in ((8, compression8), (4, compression4)):
        assert 32 * params / (32 * (params - weights) + bits * weights) == pytest.approx(compression, abs=5e-4)
    found = [m.when for m in network.modules() if isinstance(m, QuantizationPoint)]
    # of 16 * (8 + 2) + 1 in the authors' code, that of each block's first convolution is never used
    assert found.count("always") == 161 - 16 == 145
    assert found.count("integer") == 1


def test_the_smaller_configuration() -> None:
    with torch.device("meta"):
        network = rdn_a(2)
    assert (len(network.RDBs), len(network.RDBs[0].convs), network.RDBs[0].convs[0].conv[0].out_channels) == (20, 6, 32)
    assert profile(network, (1, 3, 8, 8)).params == 5_616_515


def as_published(state: dict[str, Tensor], images: Tensor, blocks: int, layers: int) -> Tensor:
    """RDN for x2 from a state dict with the authors' names, one operation after the other."""

    def conv(name: str, x: Tensor) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    shallow = conv("SFENet1", images)
    x = conv("SFENet2", shallow)
    outputs = []
    for block in range(blocks):
        dense = x
        for layer in range(layers):
            dense = torch.cat((dense, F.relu(conv(f"RDBs.{block}.convs.{layer}.conv.0", dense))), 1)
        x = conv(f"RDBs.{block}.LFF", dense) + x
        outputs.append(x)
    x = conv("GFF.1", conv("GFF.0", torch.cat(outputs, 1))) + shallow
    return conv("UPNet.2", F.pixel_shuffle(conv("UPNet.0", x), 2))


def test_the_forward_is_the_papers() -> None:
    torch.manual_seed(0)
    network = RDN(2, blocks=2, layers=3, growth=4, features=6)
    images = 255 * torch.rand(2, 3, 6, 7)
    torch.testing.assert_close(network(images), as_published(network.state_dict(), images, 2, 3))
    assert len(network.state_dict()) == 2 * (2 + 2 * (3 + 1) + 2 + 2)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_it_enlarges_by_its_scale(scale: int) -> None:
    network = RDN(scale, blocks=1, layers=2, growth=4, features=4, channels=1)
    assert network(torch.zeros(2, 1, 5, 7)).shape == (2, 1, 5 * scale, 7 * scale)


def test_the_points_see_what_their_layers_read() -> None:
    torch.manual_seed(0)
    network = RDN(2, blocks=2, layers=3, growth=4, features=6)
    seen: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda _, args: seen.update({name: args[0]}))

    for name, module in network.named_modules():
        if isinstance(module, (QuantizationPoint, nn.Conv2d)) or name == network.feature_layer:
            watch(name, module)
    network(torch.rand(1, 3, 5, 5))
    pairs = {
        "fusion_input": "GFF.0",
        "fused": "GFF.1",
        "RDBs.0.block_input": "RDBs.0.convs.0.conv.0",
        "RDBs.1.convs.1.dense_input": "RDBs.1.convs.1.conv.0",
        "RDBs.1.convs.2.dense_input": "RDBs.1.convs.2.conv.0",
        "RDBs.1.fusion_input": "RDBs.1.LFF",
    }
    for point, layer in pairs.items():
        assert torch.equal(seen[point], seen[layer]), point
    assert network.RDBs[0].convs[0].dense_input is None
    assert torch.equal(seen["UPNet"], network.GFF[1](seen["fused"]) + seen["SFENet2"])


def test_the_shortcut_of_a_block_adds_the_quantised_input() -> None:
    block = RDN(2, blocks=1, layers=1, growth=4, features=6).RDBs[0]
    block.block_input = nn.Hardtanh(0, 1)
    nn.init.zeros_(block.LFF.weight)
    nn.init.zeros_(block.LFF.bias)
    x = 3 * torch.randn(1, 6, 4, 4)
    assert torch.equal(block(x), x.clamp(0, 1))


def test_copies_pickles_and_exports() -> None:
    network = RDN(2, blocks=1, layers=2, growth=4, features=4).eval()
    images = torch.rand(2, 3, 6, 6)
    expected = network(images)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(images), expected)
    assert torch.allclose(torch.export.export(network, (images,)).module()(images), expected, atol=1e-5)


def test_it_is_found_by_name_and_refuses_impossible_scales() -> None:
    with torch.device("meta"):
        assert len(build("rdn_b", scale=2).RDBs) == 16
    with pytest.raises(ValueError, match="scale: expected one of 2, 3, 4, 8, got 6"):
        RDN(6)
