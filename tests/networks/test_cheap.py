"""Shifts, cheap convolutions, and what they make of a network."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress.catalog import Row, card
from lightning_compress.cli.lightning_cli import CompressCLI
from lightning_compress.core.profile import profile
from lightning_compress.core.surgery import channel_graph
from lightning_compress.export import export
from lightning_compress.networks import CheapResNet, Shift, build, cheap_resnet56, convert_to_cheap, resnet56
from lightning_compress.networks.cheap import choose_convolutions, one_hot_kernel, shift, spatial

NUMBERS = torch.arange(9.0).view(3, 3)


# ---- the shift


@pytest.mark.parametrize(
    ("channel", "expected"),
    [
        (0, [[0, 0, 0], [0, 0, 1], [0, 3, 4]]),
        (1, [[0, 0, 0], [0, 1, 2], [3, 4, 5]]),
        (4, [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
        (8, [[4, 5, 0], [7, 8, 0], [0, 0, 0]]),
        (9, [[0, 0, 0], [0, 0, 1], [0, 3, 4]]),
    ],
)
def test_every_channel_moves_in_its_direction(channel, expected):
    moved = shift(NUMBERS.expand(1, 18, 3, 3))
    assert moved[0, channel].tolist() == expected


@pytest.mark.parametrize(
    ("channels", "kernel_size", "still"), [(16, 3, 7), (32, 3, 5), (64, 3, 1), (30, 5, 5), (3, 3, 3)]
)
def test_channels_that_make_no_whole_set_of_directions_stay(channels, kernel_size, still):
    x = torch.randn(2, channels, 6, 5)
    moved = shift(x, kernel_size)
    assert torch.equal(moved[:, -still:], x[:, -still:])
    elsewhere = [c for c in range(channels - still) if c % kernel_size**2 != kernel_size**2 // 2]
    assert all(not torch.equal(moved[:, c], x[:, c]) for c in elsewhere)


def test_five_by_five_has_twenty_five_directions():
    x = torch.randn(1, 25, 7, 7)
    for c in range(25):
        dy, dx = c // 5 - 2, c % 5 - 2
        padded = F.pad(x[0, c], (2, 2, 2, 2))
        assert torch.equal(shift(x, 5)[0, c], padded[2 + dy : 9 + dy, 2 + dx : 9 + dx])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("shape", "kernel_size"), [((2, 20, 5, 4), 3), ((2, 52, 3, 6), 5), ((1, 9, 1, 1), 3)])
def test_is_a_depthwise_convolution_with_one_hot_kernels(shape, kernel_size, memory_format):
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    kernel = one_hot_kernel(shape[1], kernel_size)
    assert kernel.sum((1, 2, 3)).tolist() == [1] * shape[1]
    expected = F.conv2d(x, kernel.double(), padding=kernel_size // 2, groups=shape[1])
    moved = shift(x, kernel_size)
    assert torch.equal(moved, expected)
    assert moved.is_contiguous(memory_format=memory_format)
    z = torch.randn_like(expected)
    assert torch.equal(*(torch.autograd.grad(y, x, z)[0] for y in (moved, expected)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_is_the_exact_adjoint(memory_format):
    # integers, so that no sum is rounded
    x, z = (torch.randint(-9, 9, (3, 29, 6, 7)).double().contiguous(memory_format=memory_format) for _ in range(2))
    x.requires_grad_()
    (back,) = torch.autograd.grad(shift(x), x, z)
    assert (shift(x) * z).sum() == (x * back).sum()
    assert torch.autograd.gradcheck(shift, torch.randn(1, 10, 3, 2, dtype=torch.float64, requires_grad=True))


def test_shifts_of_stacked_networks_are_shifts():
    x = torch.randn(4, 2, 20, 5, 5)
    for dim in (0, 2):
        moved = torch.vmap(shift, in_dims=dim)(x.movedim(0, dim))
        assert torch.equal(moved, torch.stack([shift(one) for one in x]))


def test_the_channels_that_a_shift_reads_are_not_pruned():
    network = nn.Sequential(nn.Conv2d(3, 16, 1), Shift(), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 4, 1))
    graph = channel_graph(network, torch.zeros(1, 3, 8, 8))
    assert "moves by its index" in graph.left_alone["0"]
    assert "2" not in graph.left_alone


def test_a_shift_costs_nothing():
    network = nn.Sequential(nn.Conv2d(3, 16, 1), Shift(), nn.Conv2d(16, 4, 1))
    for x in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8).to(memory_format=torch.channels_last)):
        cost = profile(network, x)
        assert (cost.macs, cost.params) == (8 * 8 * (3 * 16 + 16 * 4), 3 * 16 + 16 + 16 * 4 + 4)


# ---- cheap networks


@pytest.mark.parametrize("row", card("online_distillation").published, ids=lambda row: row.config)
def test_students_cost_what_is_published(row: Row):
    kind = row.config.rpartition("_")[2]
    cost = profile(cheap_resnet56(kind=kind, groups=4), (1, 3, 32, 32))
    assert (cost.params, cost.macs) == (row.result["params"], row.result["macs"])


@pytest.mark.parametrize(
    ("kind", "params", "macs"),
    [("shift", 99_354, 14_336_640), ("dw", 117_066, 19_092_096), ("group", 308_442, 46_187_136)],
)
def test_a_converted_resnet56_costs_what_its_shapes_say(kind, params, macs):
    dense = resnet56()
    cost = profile(convert_to_cheap(dense, kind), (1, 3, 32, 32))
    assert (cost.params, cost.macs) == (params, macs)
    cost = profile(dense, (1, 3, 32, 32))
    assert (cost.params, cost.macs) == (853_018, 125_485_696)


@pytest.mark.parametrize(("p", "q", "stride"), [(16, 16, 1), (16, 32, 2), (8, 24, 1)])
@pytest.mark.parametrize("kind", ["shift", "dw", "group"])
def test_blocks_cost_what_the_formula_says(kind, p, q, stride):
    from lightning_compress.networks.cheap_resnet import CheapBlock

    h, w = 8, 12
    spatial_macs = {"shift": 0, "dw": h * w * 9 * (p + q), "group": h * w * 9 * (p * p + q * q) // 4}[kind]
    after = h // stride * w // stride
    projection = after * p * q if stride > 1 or p != q else 0
    cost = profile(CheapBlock(p, q, stride, kind, groups=4), (1, p, h, w))
    assert cost.macs == spatial_macs + h * w * p * q + after * q * q + projection


def test_the_block_is_that_of_the_paper():
    block = CheapResNet(8, kind="dw").layer2[0].eval()
    nn.init.constant_(block.shortcut[1].bias, -100.0)  # a ReLU behind the sum would leave nothing of it
    x = torch.randn(2, 16, 8, 8)
    out = x
    for i in (1, 2):
        out = block.get_submodule(f"conv{i}")(block.get_submodule(f"spatial{i}")(out))
        out = F.relu(block.get_submodule(f"bn{i}")(out))
    assert out.shape == (2, 32, 4, 4)
    assert torch.equal(block(x), out + block.shortcut(x))
    assert (block(x) < -50).all()
    assert block.conv1.stride == (1, 1)
    assert block.conv2.stride == (2, 2)
    assert not any(m.bias is not None for m in block.modules() if isinstance(m, nn.Conv2d))


def test_weights_are_drawn_as_the_authors_do():
    torch.manual_seed(0)
    net = CheapResNet(20, kind="dw")
    depthwise = torch.cat([m.weight.flatten() for m in net.modules() if isinstance(m, nn.Conv2d) and m.groups > 1])
    assert depthwise.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.03)
    assert net.layer3[2].conv2.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.03)
    assert net.linear.weight.abs().max() <= 64**-0.5


def test_networks_are_built_by_name_and_take_what_they_can():
    assert build("cheap_resnet20", num_classes=100, in_channels=1, kind="group", groups=8)(
        torch.zeros(2, 1, 16, 16)
    ).shape == (2, 100)
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 2 .*, got 18"):
        CheapResNet(18)
    with pytest.raises(ValueError, match="kind: expected one of 'shift', 'dw', 'group', got 'shfit'"):
        CheapResNet(8, kind="shfit")
    with pytest.raises(ValueError, match="groups: 16 channels cannot be cut into 3 groups"):
        CheapResNet(8, kind="group", groups=3)
    with pytest.raises(ValueError, match="groups: expected 1 or more, got 0"):
        spatial("group", 16, groups=0)


# ---- any network made cheap


class Odd(nn.Module):
    """Everything that conversion has to look at."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.five = nn.Conv2d(6, 12, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm2d(12)
        self.bare = nn.Conv2d(12, 12, 3, padding=1)
        self.relu = nn.ReLU()
        self.point = nn.Conv2d(12, 12, 1)
        self.valid = nn.Conv2d(12, 12, 3)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.dilated = nn.Conv2d(12, 12, 3, padding=2, dilation=2)
        self.wide = nn.Conv2d(12, 4, 3, padding="same")

    def forward(self, x):
        x = self.relu(self.bare(self.norm(self.five(self.stem(x)))))
        return self.wide(self.dilated(self.depthwise(self.valid(self.point(x)))))


@pytest.mark.parametrize("kind", ["shift", "dw", "group"])
def test_any_network_is_converted_layer_by_layer(kind):
    odd = Odd()
    before = {name: tensor.clone() for name, tensor in odd.state_dict().items()}
    cheap = convert_to_cheap(odd, kind, groups=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in odd.state_dict().items())
    changed = {n for n, m in cheap.named_children() if isinstance(m, nn.Sequential)}
    assert changed == {"five", "bare", "wide"}
    x = torch.randn(2, 3, 20, 20)
    assert cheap(x).shape == odd(x).shape
    assert cheap.five.pointwise.stride == (2, 2)
    assert cheap.five.pointwise.bias is None, "the batch norm behind it has one"
    assert cheap.bare.pointwise.bias is not None
    assert torch.equal(cheap.point.weight, odd.point.weight)
    if kind == "shift":
        assert cheap.five.spatial.kernel_size == 5
    else:
        assert cheap.five.spatial.weight.shape == (6, 1 if kind == "dw" else 2, 5, 5)
        assert cheap.five.spatial.stride == (1, 1)


def test_what_is_left_alone_is_told_why():
    chosen, reasons = choose_convolutions(Odd())
    assert chosen == ["five", "bare", "wide"]
    assert reasons == {
        "stem": "is the first convolution",
        "point": "has a kernel of 1x1",
        "valid": "is not padded by 1",
        "depthwise": "has 12 groups",
        "dilated": "is dilated, or not padded by zeros",
    }
    chosen, reasons = choose_convolutions(Odd(), exclude=["b*", "wide"])
    assert chosen == ["stem", "five"]
    assert reasons["bare"] == "is left out by `exclude`"
    with pytest.raises(ValueError, match=r"exclude: 'fiv' matches no name. Did you mean 'five'"):
        convert_to_cheap(Odd(), exclude=["fiv"])
    with pytest.raises(ValueError, match="network: Sequential has no convolution to make cheap: 0 is the first"):
        convert_to_cheap(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1)))


def test_groups_that_do_not_divide_the_channels_fall_back():
    with pytest.warns(UserWarning, match="groups=4 does not divide the 6 channels of five: 3 do"):
        cheap = convert_to_cheap(Odd(), "group", groups=4)
    assert cheap.five.spatial.groups == 3
    assert cheap.bare.spatial.groups == 4


def test_the_command_line_converts_too():
    cheap = "{class_path: lightning_compress.networks.convert_to_cheap, init_args: {kind: dw, network: " + (
        "{class_path: lightning_compress.networks.CIFARResNet, init_args: {depth: 8, in_channels: 1}}}}"
    )
    quick = ["--config", "data/digits", "--config", "model/resnet20", "--trainer.logger", "false"]
    network = CompressCLI([*quick, f"--model.network={cheap}"], run=False).model.network
    assert isinstance(network.layer1[0].conv1, nn.Sequential)


@pytest.mark.parametrize("name", ["vgg16_cifar", "densenet40", "googlenet_cifar"])
def test_other_networks_of_the_paper_convert(name):
    with torch.device("meta"):
        dense = build(name)
        cheap = convert_to_cheap(dense, "shift")
    x = torch.zeros(1, 3, 32, 32)
    before, after = profile(dense, x), profile(cheap, x)
    assert after.params < before.params / 2
    assert after.macs < before.macs / 2


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_shift_is_exported_as_one_convolution(suffix, tmp_path):
    network = nn.Sequential(Shift(), nn.Conv2d(16, 4, 1), nn.ReLU(), Shift(5), nn.Conv2d(4, 2, 1))
    exported = export(network, tmp_path / f"shifts{suffix}", torch.zeros(1, 16, 8, 8))
    assert exported.max_abs_difference < 1e-5
    if suffix == ".pt2":
        calls = [str(n.target) for n in torch.export.load(exported.path).graph.nodes if n.op == "call_function"]
        assert sum("conv2d" in call for call in calls) == 4
        assert not any(name in call for call in calls for name in ("slice", "arange", "copy_"))
    else:
        onnx = pytest.importorskip("onnx")
        assert [n.op_type for n in onnx.load(exported.path).graph.node] == ["Conv", "Conv", "Relu", "Conv", "Conv"]
