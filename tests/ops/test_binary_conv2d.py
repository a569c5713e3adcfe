"""The compiled convolution of signs equals the one in floats, exactly, whatever the shape."""

from __future__ import annotations

import copy
import itertools
import math
import os
import pickle
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.networks.binary_resnet import binary_resnet18_cifar, binary_resnet20
from lightning_compress.ops import native
from lightning_compress.ops.binary_conv2d import BinaryConv2d, binary_conv2d, fuse, operator, pack_rows, unpack_rows

TARGETS = ("native", "avx2", "portable")


def random_bits(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.5


def inputs(*shape: int, seed: int = 1) -> Tensor:
    """Floats some of which are zero, and whose mean is not."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.3
    return x * (x.abs() > 0.05)


def in_floats(
    x: Tensor, weight: Tensor, stride: Any = 1, padding: Any = 0, groups: int = 1, center: bool = False
) -> Tensor:
    """What it is all about, by torch alone: sum w sign(x - mean), zeros around it."""
    if center:
        x = x - x.double().mean((1, 2, 3), keepdim=True).float()
    return F.conv2d((x >= 0).float() * 2 - 1, weight, None, stride, padding, 1, groups)


def compiled(target: str) -> Any:
    code = operator.compiled_code(target)
    if code is None:
        pytest.skip("no compiler here")
    return code


def run(code: Any, x: Tensor, bits: Tensor, stride: Any = 1, padding: Any = 0, groups: int = 1, center: bool = False,
        zero_one: bool = False) -> Tensor:  # fmt: skip
    """The sum alone, by compiled code; `bits` (C_out, C_in / groups, kh, kw)."""
    pair = [v if isinstance(v, tuple) else (v, v) for v in (stride, padding)]
    return operator.run_compiled(
        code, x, pack_rows(bits.flatten(1)), torch.ones(len(bits)), None, None, None, bits.shape[2:], *pair, groups,
        center, zero_one, False,
    )  # fmt: skip


# ---- the kernel


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("channels", [16, 32, 64, 96, 512])
def test_equals_floats_exactly(target: str, channels: int) -> None:
    """RBNN's check 7: stride 1 and 2, padding 0 and 1, batches; 3x3 and 1x1; both codes."""
    code = compiled(target)
    x = inputs(2, channels, 9, 13)
    for kernel, stride, padding, zero_one in itertools.product((1, 3), (1, 2), (0, 1), (False, True)):
        bits = random_bits(6, channels, kernel, kernel)
        weight = bits.float() if zero_one else bits.float() * 2 - 1
        y = run(code, x, bits, stride, padding, center=True, zero_one=zero_one)
        assert torch.equal(y, in_floats(x, weight, stride, padding, center=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("filters", "channels", "groups", "kernel", "stride", "padding", "height", "width"),
    [
        (10, 20, 2, (3, 3), 1, 1, 9, 33),
        (4, 4, 4, (3, 3), 1, 1, 6, 6),  # depthwise: seven kinds of zeros in one word
        (5, 3, 1, (5, 5), 1, 2, 8, 9),  # more kinds of borders than a table in registers holds
        (3, 130, 1, (1, 1), 1, 0, 5, 17),
        (4, 8, 1, (7, 7), 2, 3, 20, 21),
        (9, 40, 1, (3, 3), 1, 1, 1, 1),  # one tap of nine is inside
        (9, 64, 1, (3, 2), (2, 1), (1, 0), 10, 12),
        (2, 6, 2, (2, 3), (1, 3), (2, 1), 1, 50),
    ],
)
def test_shapes(
    target: str, filters: int, channels: int, groups: int, kernel: tuple[int, int], stride: Any, padding: Any,
    height: int, width: int,
) -> None:  # fmt: skip
    code = compiled(target)
    x = inputs(3, channels, height, width)
    bits = random_bits(filters, channels // groups, *kernel)
    for zero_one in (False, True):
        weight = bits.float() if zero_one else bits.float() * 2 - 1
        y = run(code, x, bits, stride, padding, groups, zero_one=zero_one)
        assert torch.equal(y, in_floats(x, weight, stride, padding, groups))


@pytest.mark.parametrize("target", TARGETS)
def test_borders_of_ones(target: str) -> None:
    """A corner of a 3x3 convolution of ones with ones has 4 taps, an edge 6."""
    y = run(compiled(target), torch.ones(1, 70, 5, 5), torch.ones(1, 70, 3, 3, dtype=torch.bool), padding=1)
    assert (y[0, 0] / 70).tolist() == [[4, 6, 6, 6, 4], *[[6, 9, 9, 9, 6]] * 3, [4, 6, 6, 6, 4]]


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.integers(1, 3), st.integers(1, 70), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(1, 19),
    st.integers(1, 3), st.booleans(),
)  # fmt: skip
def test_any_shape(
    groups: int, channels: int, kernel: int, stride: int, padding: int, size: int, filters: int, zero_one: bool
) -> None:
    if size + 2 * padding < kernel:
        return
    x = inputs(1, groups * channels, size, size + 1)
    bits = random_bits(groups * filters, channels, kernel, kernel)
    weight = bits.float() if zero_one else bits.float() * 2 - 1
    y = run(compiled("native"), x, bits, stride, padding, groups, zero_one=zero_one)
    assert torch.equal(y, in_floats(x, weight, stride, padding, groups))


@pytest.mark.parametrize("padding", [0, 1])
def test_the_two_codes(padding: int) -> None:
    """SiMaN's check 8: y_pm1 = 2 y_01 - S, y_01 = 2 conv(a+, B) - conv(1, B), with S the sum of the activations."""
    x = inputs(2, 40, 7, 8)
    bits = random_bits(6, 40, 3, 3)
    b = bits.float()
    pm1 = BinaryConv2d.from_signs(2 * b - 1, padding=padding)(x)
    zero_one = BinaryConv2d.from_signs(b, padding=padding, code="01")(x)
    signs = (x >= 0).float() * 2 - 1
    assert torch.equal(pm1, 2 * zero_one - F.conv2d(signs, torch.ones(1, 40, 3, 3), padding=padding))
    ones = F.conv2d(torch.ones_like(x), b, padding=padding)
    assert torch.equal(zero_one, 2 * F.conv2d((x >= 0).float(), b, padding=padding) - ones)


def test_zero_is_positive() -> None:
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-45]).view(1, 4, 1, 1)
    conv = BinaryConv2d.from_signs(torch.eye(4).view(4, 4, 1, 1), code="01")
    assert conv(x).flatten().tolist() == [1, 1, 1, -1]


@pytest.mark.parametrize("value", [0.1, -3.3333333, 1e-30])
def test_equal_inputs_are_positive(value: float) -> None:
    """Their mean is what they are, however many."""
    conv = BinaryConv2d.from_signs(torch.ones(1, 48, 1, 1), center=True)
    assert conv(torch.full((1, 48, 13, 11), value)).unique().tolist() == [48]


def test_scaled_samples_have_the_same_signs() -> None:
    """RBNN's check 6, of the inputs."""
    x = inputs(3, 32, 6, 6)
    conv = BinaryConv2d.from_signs(random_bits(4, 32, 3, 3) * 2.0 - 1, padding=1, center=True)
    assert torch.equal(conv(x * torch.tensor([0.125, 4, 64]).view(3, 1, 1, 1)), conv(x))
    assert not torch.equal(BinaryConv2d.from_signs(conv.weight, padding=1)(x), conv(x))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("activation", ["none", "hardtanh", "prelu"])
def test_what_follows_the_sum(target: str, activation: str) -> None:
    """Scale, shift, residual, activation, also at the end of a line of positions."""
    generator = torch.Generator().manual_seed(0)
    x = inputs(2, 24, 7, 9)
    bits = random_bits(10, 24, 3, 3)
    scale, shift, slope = (torch.randn(10, generator=generator) / 8 for _ in range(3))
    sums = in_floats(x, bits.float() * 2 - 1, padding=1)
    for shifted, residual in itertools.product((False, True), (None, torch.randn(sums.shape, generator=generator))):
        expected = sums * scale.view(-1, 1, 1) + (shift.view(-1, 1, 1) if shifted else 0)
        expected = expected if residual is None else expected + residual
        if activation == "prelu":
            expected = F.prelu(expected, slope)
        elif activation == "hardtanh":
            expected = F.hardtanh(expected)
        y = operator.run_compiled(
            compiled(target), x, pack_rows(bits.flatten(1)), scale, shift if shifted else None,
            slope if activation == "prelu" else None, residual, (3, 3), (1, 1), (1, 1), 1, False, False,
            activation == "hardtanh",
        )  # fmt: skip
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("images", [1, 5])
def test_threads_share_the_work(images: int) -> None:
    """One image is cut up, several are shared out; the numbers are the same."""
    x = inputs(images, 48, 20, 18)
    conv = BinaryConv2d.from_signs(random_bits(32, 24, 3, 3) * 2.0 - 1, padding=1, groups=2, center=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = conv(x)
        torch.set_num_threads(3)
        assert torch.equal(conv(x), alone)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, in_floats(x, conv.weight, 1, 1, 2, center=True))


def test_other_dtypes_and_layouts() -> None:
    x = inputs(2, 24, 7, 9)
    conv = BinaryConv2d.from_signs(random_bits(8, 24, 3, 3) * 2.0 - 1, torch.full((8,), 0.5), padding=1, center=True)
    expected = conv(x)
    assert torch.equal(conv(x.to(memory_format=torch.channels_last)), expected)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        y = conv(x.to(dtype))
        assert y.dtype == dtype
        assert torch.equal(y, conv(x.to(dtype).float()).to(dtype))
    assert conv(x[:0]).shape == (0, *expected.shape[1:])


# ---- packing


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 70))
def test_rows_come_back(rows: int, n: int) -> None:
    bits = random_bits(rows, n)
    packed = pack_rows(bits)
    assert packed.shape == (rows, math.ceil(n / 8))
    assert torch.equal(unpack_rows(packed, n), bits)
    # the lowest bit comes first, and what is left of a row is 0
    assert sum(int(byte) << 8 * i for i, byte in enumerate(packed[0])) == sum(1 << j for j in range(n) if bits[0, j])


@pytest.mark.parametrize(
    ("blocks", "expected"), [((2, 2, 2, 2), 1_373_184), ((3, 4, 6, 3), 2_635_776)], ids=["ResNet-18", "ResNet-34"]
)
def test_size_on_disk(blocks: tuple[int, ...], expected: int) -> None:
    """RBNN's check 9 and its bit layout: all binary weights, each filter in bytes of its own."""
    total, channels = 0, 64
    for count, width in zip(blocks, (64, 128, 256, 512), strict=True):
        for n in (channels, *[width] * (2 * count - 1)):
            total += pack_rows(torch.zeros(width, 9 * n, dtype=torch.bool)).numel()
        channels = width
    assert total == expected


def test_half_of_the_bits() -> None:
    """SiMaN's check 9: a median code has n / 2 ones per filter, in the packed bytes too."""
    magnitude = torch.rand(12, 16 * 9, generator=torch.Generator().manual_seed(0))
    packed = pack_rows(magnitude > magnitude.median(1, keepdim=True).values)
    assert {sum(int(byte).bit_count() for byte in row) for row in packed} == {72}


# ---- the layer


def test_the_layer_keeps_what_it_is_given() -> None:
    weight = random_bits(8, 12, 3, 3) * 2.0 - 1
    slope = torch.full((8,), 0.25)
    conv = BinaryConv2d.from_signs(
        weight, torch.rand(8), torch.rand(8), stride=2, padding=1, center=True, activation="prelu", slope=slope
    )
    assert torch.equal(conv.weight, weight)
    assert {k: tuple(v.shape) for k, v in conv.state_dict().items()} == {
        "packed": (8, 14), "scale": (8,), "shift": (8,), "slope": (8,)
    }  # fmt: skip
    assert not list(conv.parameters())
    assert "12, 8, kernel_size=(3, 3), stride=(2, 2)" in repr(conv)
    x = inputs(2, 12, 8, 8)
    y = conv(x)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv)), inference_copy(conv)):
        assert torch.equal(other(x), y)
    made = BinaryConv2d(
        conv.packed, conv.scale, conv.shift, 12, 8, (3, 3), 2, 1, center=True, activation="prelu", slope=slope
    )
    assert torch.equal(made(x), y)


def test_weights_that_change_are_seen() -> None:
    conv = BinaryConv2d.from_signs(random_bits(4, 16, 3, 3) * 2.0 - 1, padding=1)
    x = inputs(1, 16, 6, 6)
    before = conv(x)
    conv.packed.bitwise_not_()
    assert torch.equal(conv(x), -before)
    conv.load_state_dict({"packed": ~conv.packed, "scale": 2 * torch.ones(4)})
    assert torch.equal(conv(x), 2 * before)


def test_images_of_many_sizes() -> None:
    """Layouts are kept, but not all of them."""
    conv = BinaryConv2d.from_signs(random_bits(4, 8, 3, 3) * 2.0 - 1)
    compiled("native")
    for size in (*range(3, 25), 3):
        x = inputs(1, 8, size, size)
        assert torch.equal(conv(x), in_floats(x, conv.weight))
    assert len(operator._plans[conv.packed]) == operator.SIZES


def test_one_operator_for_torch() -> None:
    conv = BinaryConv2d.from_signs(random_bits(8, 12, 3, 3) * 2.0 - 1, torch.rand(8), padding=1, activation="hardtanh")
    x = inputs(2, 12, 6, 7)
    residual = torch.randn(2, 8, 6, 7)
    after, sizes = (conv.scale, None, torch.rand(8), residual), ((3, 3), (1, 1), (1, 1), 1)
    torch.library.opcheck(
        torch.ops.lightning_compress.binary_conv2d.default, (x, conv.packed, *after, *sizes, True, False, False)
    )
    program = torch.export.export(conv, (x, residual))
    targets = [str(node.target) for node in program.graph.nodes]
    assert "lightning_compress.binary_conv2d.default" in targets
    assert torch.equal(program.module()(x, residual), conv(x, residual))


def test_compiled_by_torch() -> None:
    torch.compiler.reset()
    net = nn.Sequential(BinaryConv2d.from_signs(random_bits(8, 12, 3, 3) * 2.0 - 1, center=True), nn.ReLU())
    x = inputs(2, 12, 6, 7)
    assert torch.equal(torch.compile(net, backend="aot_eager", fullgraph=True)(x), net(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: unpack_rows(torch.zeros(2, 2, dtype=torch.uint8), 17), "rows of 17 bits take 3 bytes"),
        (lambda: BinaryConv2d.from_signs(torch.zeros(2, 2, 3, 3)), "code='pm1' takes .* of -1 and 1"),
        (lambda: BinaryConv2d.from_signs(-torch.ones(2, 2, 3, 3), code="01"), "of 0 and 1"),
        (lambda: BinaryConv2d.from_signs(torch.ones(2, 2, 3, 3), code="pm"), "code='pm': .* Did you mean 'pm1'"),
        (lambda: BinaryConv2d.from_signs(torch.ones(2, 2, 3, 3), activation="relu"), "activation='relu': .*'prelu'"),
        (lambda: BinaryConv2d.from_signs(torch.ones(2, 2, 3, 3), activation="prelu"), "slope: .*'prelu' takes one"),
        (lambda: BinaryConv2d.from_signs(torch.ones(2, 2, 3, 3), slope=torch.ones(2)), "'none' takes none"),
        (lambda: BinaryConv2d.from_signs(torch.ones(2, 2, 3, 3), torch.ones(3)), r"scale: expected shape \(2,\)"),
        (lambda: BinaryConv2d.from_signs(torch.ones(3, 2, 3, 3), groups=2), "groups=2 must divide .*out_channels=3"),
        (lambda: BinaryConv2d.from_signs(torch.ones(2, 2, 3, 3), stride=0), "stride=0"),
        (lambda: BinaryConv2d.from_signs(torch.ones(2, 2, 3, 3), padding=(1, -1)), "padding="),
        (lambda: BinaryConv2d(torch.zeros(2, 2), torch.ones(2), None, 2, 2, 3), "packed: expected uint8"),
    ],
)  # fmt: skip
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("has_compiler", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(1, 5, 6, 6)}, "rows of 45 bits take 6 bytes"),
        ({"x": torch.ones(1, 4, 2, 6)}, "is smaller than"),
        ({"groups": 3}, "groups=3 must divide"),
        ({"packed": torch.zeros(4, 5)}, "take 5 bytes of uint8"),
        ({"scale": torch.ones(3)}, "scale: expected 4 numbers"),
        ({"shift": torch.ones(5)}, "shift: expected 4"),
        ({"slope": torch.ones(1)}, "slope: expected 4"),
        ({"residual": torch.ones(1, 4, 4, 3)}, r"residual: expected shape \(1, 4, 4, 4\)"),
    ],
)
def test_compiled_code_never_reads_elsewhere(
    change: dict[str, Any], message: str, has_compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_compiler:
        monkeypatch.setattr(operator, "compiled_code", lambda: None)
    good: dict[str, Any] = {
        "x": torch.ones(1, 4, 6, 6), "packed": torch.zeros(4, 5, dtype=torch.uint8), "scale": torch.ones(4),
        "shift": None, "slope": None, "residual": None, "kernel_size": (3, 3), "stride": (1, 1), "padding": (0, 0),
        "groups": 1, "center": False, "zero_one": False, "hardtanh": False,
    }  # fmt: skip
    assert binary_conv2d(**good).unique().tolist() == [-36]
    with pytest.raises(ValueError, match=message):
        binary_conv2d(**{**good, **change})


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = BinaryConv2d.from_signs(random_bits(4, 8, 3, 3) * 2.0 - 1, padding=1, center=True)
    x = inputs(2, 8, 6, 6)
    expected = conv(x)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    operator.compiled_code.cache_clear()
    try:
        with pytest.warns(UserWarning, match="binary_conv2d: There is no C\\+\\+ compiler. Install one"):
            y = conv(x)
    finally:
        native.library.cache_clear()
        operator.compiled_code.cache_clear()
    assert torch.equal(y, expected)


# ---- whole networks


class Block(nn.Module):
    """Two binary convolutions with shortcuts, as in Bi-Real networks."""

    def __init__(self, channels: int, act: nn.Module, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for i in (1, 2):
            weight = random_bits(channels, channels, 3, 3, seed=seed + i) * 2.0 - 1
            scale = torch.rand(channels, generator=generator) / 16
            setattr(self, f"conv{i}", BinaryConv2d.from_signs(weight, scale, padding=1, center=True))
            norm = nn.BatchNorm2d(channels)
            nn.init.uniform_(norm.weight, -1, 1)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_(generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
            setattr(self, f"bn{i}", norm)
        self.act, self.nothing = act, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)) + x)
        return self.act(x + self.nothing(self.bn2(self.conv2(x))))


class Net(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
        self.stem[1].running_mean.normal_()
        self.blocks = nn.Sequential(Block(16, act, 0), nn.Dropout(0.5), Block(16, act, 9))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize(
    "act", [nn.Hardtanh(), nn.PReLU(16, 0.1), nn.PReLU(), nn.ReLU()], ids=["hardtanh", "prelu", "one slope", "relu"]
)
def test_fused_network(act: nn.Module) -> None:
    net = Net(act).eval()
    keys = [*net.state_dict()]
    x = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net(x)
        small = fuse(net, x[:1])
        torch.testing.assert_close(small(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(small)(x[:, :, :16]), net(x[:, :, :16]), rtol=1e-5, atol=1e-5)
        assert torch.equal(net(x), expected)
    assert [*net.state_dict()] == keys
    left = [type(module).__name__ for module in small.modules() if not list(module.children())]
    assert left.count("BinaryConv2d") == 4
    assert not {"BatchNorm2d", "Dropout", "Identity", "Hardtanh", "PReLU"} & {*left}
    assert [*left].count("ReLU") == 1 + isinstance(act, nn.ReLU)
    additions = [node for node in small.graph.nodes if "add" in str(node.target)]
    assert not additions


@pytest.mark.parametrize(
    ("make", "binary"),
    [
        (partial(binary_resnet20, gamma=1), 18),
        (partial(binary_resnet20, bireal=True, activation="prelu", stem_activation="relu", gamma=1), 18),
        (binary_resnet18_cifar, 19),
    ],
    ids=["ResNet-20", "ResNet-20 bireal, PReLU", "ResNet-18 for CIFAR"],
)
def test_fused_networks_of_the_papers(make: Any, binary: int) -> None:
    """Nothing is left between the binary layers of RBNN's and SiMaN's networks."""
    torch.manual_seed(0)
    net = make().eval()
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Conv2d) and name != "conv1":
            signs = random_bits(*module.weight.shape) * 2.0 - 1
            scale = torch.rand(module.out_channels) / module.weight[0].numel() ** 0.5
            made = BinaryConv2d.from_signs(signs, scale, stride=module.stride, padding=module.padding, center=True)
            net.set_submodule(name, made)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = net(x)
        small = fuse(net, x)
        torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-4)
    kinds = [type(module).__name__ for module in small.modules()]
    assert kinds.count("BinaryConv2d") == binary
    assert not {"BatchNorm2d", "PReLU", "Identity"} & {*kinds}
    assert not [node for node in small.graph.nodes if "add" in str(node.target) and "pad" not in str(node.target)]


def test_what_is_not_fused() -> None:
    """A result that something else reads, a sum that broadcasts, a layer that is called twice, another clamp."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(
                BinaryConv2d.from_signs(random_bits(8, 8, 3, 3, seed=i) * 2.0 - 1, torch.rand(8), padding=1)
                for i in range(4)
            )
            self.norm, self.act = nn.BatchNorm2d(8), nn.Hardtanh(-2, 2)
            self.offset = nn.Parameter(torch.randn(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.convs[0](x)
            y = self.norm(y) + y
            y = self.convs[1](y) + self.offset
            y = self.act(self.convs[2](self.convs[2](y)))
            y = torch.add(self.convs[3](y), y, alpha=2)
            return y + y

    torch.manual_seed(0)
    net = Odd().eval()
    x = inputs(2, 8, 6, 6)
    with torch.no_grad():
        small = fuse(net, x)
        torch.testing.assert_close(small(x), net(x))
    assert len([node for node in small.graph.nodes if node.op == "call_module"]) == 7
    assert len([node for node in small.graph.nodes if "add" in str(node.target)]) == 4


def test_what_is_changed_in_place() -> None:
    """A convolution is not moved behind what overwrites its input; what is added to is not forgotten."""

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(
                BinaryConv2d.from_signs(random_bits(8, 8, 3, 3, seed=i) * 2.0 - 1, torch.rand(8), padding=1)
                for i in range(3)
            )
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            y = self.convs[0](x)
            y = y + self.relu(x)  # x is another one from here
            x.add_(self.convs[1](y))
            y += self.convs[2](x)
            return x + y

    torch.manual_seed(0)
    net = Overwrites().eval()
    x = inputs(2, 8, 6, 6) - 0.5
    with torch.no_grad():
        torch.testing.assert_close(fuse(net, {"x": x})(x), net(x))


def test_a_network_that_cannot_be_traced() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(MisconfigurationException, match=r"Branches cannot be traced by torch\.fx"):
        fuse(Branches(), torch.ones(1))


@pytest.mark.slow
def test_faster_than_floats() -> None:
    x = inputs(1, 128, 28, 28)
    weight = random_bits(128, 128, 3, 3) * 2.0 - 1
    conv = BinaryConv2d.from_signs(weight, padding=1, center=True)

    def seconds(run: Any) -> float:
        best = 1.0
        for _ in range(20):
            start = time.perf_counter()
            run(x)
            best = min(best, time.perf_counter() - start)
        return best

    with torch.inference_mode():
        assert seconds(conv) < seconds(lambda x: F.conv2d(x, weight, None, 1, 1)) / 2


# ---- the GPU

IN_TRITON = """
import torch
from lightning_compress.ops.binary_conv2d import operator
from lightning_compress.ops.binary_conv2d.gpu import run_triton
from test_binary_conv2d import inputs, random_bits

device = {device!r}
for filters, channels, groups, kernel, stride, padding, zero_one, center, activation in (
    (33, 36, 1, (3, 3), (1, 1), (1, 1), False, True, "none"),
    (5, 36, 1, (1, 1), (2, 2), (0, 0), True, False, "none"),
    (6, 10, 2, (3, 2), (2, 1), (0, 1), True, True, "hardtanh"),
    (6, 10, 2, (2, 2), (1, 1), (1, 1), False, False, "prelu"),
):
    x = inputs(2, channels, 3, 4).to(device)
    packed = operator.pack_rows(random_bits(filters, channels // groups * kernel[0] * kernel[1])).to(device)
    ones = torch.ones(filters, device=device)
    size = operator.output_size(x.shape[2:], kernel, stride, padding)
    after = (ones, None, None, None)
    if activation != "none":
        slope = ones / 4 if activation == "prelu" else None
        after = (ones / 8, ones / 3, slope, torch.randn(2, filters, *size, device=device))
    arguments = (x, packed, *after, kernel, stride, padding, groups, center, zero_one, activation == "hardtanh")
    y, expected = run_triton(*arguments), operator._reference(*arguments)
    torch.testing.assert_close(y, expected, rtol=0, atol=0 if activation == "none" else 1e-6)
"""


def in_triton(device: str, **environment: str) -> None:
    pytest.importorskip("triton")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", IN_TRITON.format(device=device)],
        env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of this Triton does not work with this NumPy")
    assert done.returncode == 0, done.stderr[-2000:]


def test_triton_interpreted() -> None:
    in_triton("cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_triton_on_the_gpu() -> None:
    in_triton("cuda")
