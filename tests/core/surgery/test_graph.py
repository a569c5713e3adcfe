"""The channel graph: who is coupled to whom, in networks of every family."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.core.surgery import ChannelGraph, channel_graph


def coupled(graph: ChannelGraph) -> list[set[str]]:
    return [set(g.layers) for g in graph.groups if len(g.layers) > 1]


def test_residual_sums_couple_the_layers_that_write_them() -> None:
    graph = channel_graph(torchvision.models.resnet18(), (1, 3, 64, 64))
    assert {"conv1", "layer1.0.conv2", "layer1.1.conv2"} in coupled(graph)
    assert {"layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2"} in coupled(graph)
    assert graph.width("layer3.0.conv1") == 256
    assert graph.left_alone == {"fc": "is the network's output (in the network)"}


def test_depthwise_convolutions_follow_the_layer_they_read() -> None:
    graph = channel_graph(torchvision.models.mobilenet_v2(), (1, 3, 64, 64))
    assert {"features.2.conv.0.0", "features.2.conv.1.0"} in coupled(graph)


def test_concatenated_branches_stay_apart() -> None:
    graph = channel_graph(torchvision.models.densenet121(), (1, 3, 64, 64))
    assert len(graph.groups) == 120
    assert not coupled(graph)


def test_flatten_spreads_a_channel_over_many_columns() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10), nn.ReLU(), nn.Linear(10, 2))
    graph = channel_graph(network, (1, 3, 8, 8))
    columns = graph.axes["2.weight", 1]
    assert columns.reshape(4, 36).std(1).sum() == 0
    assert columns.reshape(4, 36)[:, 0].tolist() == graph.layers["0"].tolist()


def test_heads_of_a_vision_transformer_are_cut_whole() -> None:
    graph = channel_graph(timm.create_model("vit_tiny_patch16_224"), (1, 3, 224, 224))
    assert len(graph.group_of("blocks.0.attn.qkv").units) == 3
    assert len(graph.group_of("blocks.0.mlp.fc1").units) == 768
    rows = graph.layers["blocks.0.attn.qkv"].reshape(3, 3, 64)
    assert (rows == rows[:1, :, :1]).all()
    assert (graph.axes["blocks.0.attn.proj.weight", 1].reshape(3, 64) == rows[0]).all()


def test_torch_attention_is_left_alone_with_the_reason() -> None:
    graph = channel_graph(torchvision.models.vit_b_16(), (1, 3, 224, 224))
    assert set(graph.layers) == {f"encoder.layers.encoder_layer_{i}.mlp.0" for i in range(12)}
    assert "MultiheadAttention cannot be narrowed" in graph.left_alone["conv_proj"]


def test_widths_that_code_fixes_are_found_by_trying() -> None:
    graph = channel_graph(torchvision.models.swin_t(), (1, 3, 224, 224))
    assert "fixes in code" in graph.left_alone["features.0.0"]
    assert "features.1.0.mlp.0" in graph.layers


class PaddedShortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1)
        self.inner = nn.Conv2d(3, 5, 1)
        self.outer, self.head = nn.Conv2d(5, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = self.second(y) + nn.functional.pad(y, (0, 0, 0, 0, 2, 2))
        return self.head(y + self.outer(self.inner(x).relu()))


def test_a_fixed_padding_of_channels_is_left_alone() -> None:
    graph = channel_graph(PaddedShortcut(), (1, 3, 4, 4))
    assert "padded along its channels" in graph.left_alone["first"]
    assert list(graph.layers) == ["inner"]


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv(x).chunk(2, 1)
        return self.head(value * gate.sigmoid())


def test_halves_of_a_gated_unit_keep_the_same_positions() -> None:
    graph = channel_graph(Split(), (1, 3, 4, 4))
    halves = graph.layers["conv"].reshape(2, 4)
    assert (halves[0] == halves[1]).all()


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU6(True), nn.Hardswish(True), nn.Hardsigmoid(True), nn.LeakyReLU(0.1, True), nn.ELU(1.0, True), nn.GELU(),
     nn.Mish(True), nn.SiLU(True), nn.Threshold(0.1, 0.0, True), nn.CELU(1.0, True), nn.LogSigmoid(), nn.Softplus(),
     nn.PReLU(), nn.PReLU(8), nn.Dropout(), nn.Tanh(), nn.Sequential(nn.Conv2d(8, 16, 1), nn.GLU(1))],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_activations_let_channels_pass(activation: nn.Module) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), activation, nn.Conv2d(8, 2, 1))
    graph = channel_graph(network, (1, 3, 4, 4))
    assert list(graph.left_alone) == ["2"]
    assert len(graph.group_of("0").units) == 8


def test_fake_quantisers_let_channels_pass() -> None:
    class Quantised(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 8, 1)
            self.register_buffer("scale", torch.full((8,), 0.1))
            self.register_buffer("zero", torch.zeros(8, dtype=torch.int32))

        def forward(self, x: Tensor) -> Tensor:
            weight = torch.fake_quantize_per_channel_affine(self.weight, self.scale, self.zero, 0, -128, 127)
            x = torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 255)
            return nn.functional.conv2d(x, weight, self.bias)

    graph = channel_graph(nn.Sequential(Quantised(), nn.ReLU(), nn.Conv2d(8, 2, 1)), (1, 3, 4, 4))
    assert graph.axes["0.scale", 0].tolist() == graph.axes["0.zero", 0].tolist() == graph.layers["0"].tolist()


class Halve(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_parametrised_weights_are_followed_to_their_original() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    parametrize.register_parametrization(network[0], "weight", Halve())
    graph = channel_graph(network, (1, 3, 4, 4))
    assert graph.layers["0"].tolist() == graph.axes["0.parametrizations.weight.original", 0].tolist()


def test_include_and_exclude_choose_layers() -> None:
    network = torchvision.models.resnet18()
    graph = channel_graph(network, (1, 3, 64, 64), include=["layer*.conv1"], exclude=["layer4*"])
    assert list(graph.layers) == [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in (0, 1)]
    assert graph.left_alone["layer4.0.conv1"].startswith("is left out by `exclude`")
    with pytest.raises(ValueError, match=r"exclude: 'layer9\*' matches no name"):
        channel_graph(network, (1, 3, 64, 64), exclude=["layer9*"])


def test_a_network_that_cannot_be_traced_names_the_layer() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(5, 4, 1)))
    with pytest.raises(MisconfigurationException, match=r"fails in layer '1\.0'.*example_input.*\(1, 3, 4, 4\)"):
        channel_graph(network, torch.zeros(1, 3, 4, 4))


def test_tracing_leaves_the_network_as_it_was() -> None:
    network = torchvision.models.resnet18()
    network.layer1.eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    parameters = list(network.parameters())
    channel_graph(network, (1, 3, 64, 64))
    assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert network.training
    assert not network.layer1.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
