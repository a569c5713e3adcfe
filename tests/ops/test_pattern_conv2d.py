"""The compiled convolution equals the dense one, whatever the shape; where it cannot be compiled, nothing breaks."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.ops import native
from lightning_compress.ops.pattern_conv2d import (
    NonZeros,
    PatternConv2d,
    dense_weight,
    layer,
    non_zeros,
    operator,
    to_pattern_layers,
)

SHAPES = ["4578", "0134", "3467", "1245", "3678", "0123", "0125", "5678"]  # the taps of PCONV's "natural" patterns


def sparse_weight(filters: int, channels: int, block: int, keep: float, seed: int = 0) -> Tensor:
    """Blocks of filters share the kernels they keep and the patterns of these; some channels stay empty."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-filters // block)
    patterns = torch.zeros(len(SHAPES), 9)
    for row, taps in zip(patterns, SHAPES, strict=True):
        row[[int(t) for t in taps]] = 1
    mask = patterns[torch.randint(len(SHAPES), (blocks, channels), generator=generator)]
    mask *= (torch.rand(blocks, channels, 1, generator=generator) < keep).float()
    mask = mask.repeat_interleave(block, 0)[:filters].view(filters, channels, 3, 3)
    return torch.randn(filters, channels, 3, 3, generator=generator) * mask


def agree(y: Tensor, expected: Tensor) -> None:
    assert y.shape == expected.shape
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("target", ["native", "avx2", "portable"])
@pytest.mark.parametrize("block", [1, 2, 4, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_equals_the_dense_convolution(target: str, block: int, stride: int) -> None:
    """Odd and even sizes, one line, one column, batches, bias, ReLU, filters that do not fill the last block."""
    code = operator.compiled_code(target)
    if code is None:
        pytest.skip("no compiler here")
    generator = torch.Generator().manual_seed(1)
    for filters, channels, height, width, images in [
        (16, 20, 14, 14, 1),
        (13, 5, 7, 9, 3),
        (8, 70, 5, 31, 2),
        (3, 2, 1, 6, 1),
        (9, 3, 8, 1, 2),
        (8, 8, 33, 64, 1),
    ]:
        weight = sparse_weight(filters, channels, block, 0.6)
        x = torch.randn(images, channels, height, width, generator=generator)
        bias = torch.randn(filters, generator=generator)
        for b, relu in ((None, False), (bias, True)):
            expected = F.conv2d(x, weight, b, stride, 1)
            y = operator.run_compiled(code, x, non_zeros(weight, block), b, filters, stride, relu)
            agree(y, expected.relu() if relu else expected)


@pytest.mark.parametrize(("block", "by_rows"), [(1, 0), (1, 1), (2, 0), (2, 1), (4, 0), (8, 0)])
def test_every_loop_gives_the_same(block: int, by_rows: int) -> None:
    """All numbers of vectors that a processor has kernels for, channels in many blocks, two threads."""
    code = operator.compiled_code()
    if code is None:
        pytest.skip("no compiler here")
    weight = sparse_weight(16, 37, block, 0.3)
    x = torch.randn(2, 37, 20, 18, generator=torch.Generator().manual_seed(0))
    expected = F.conv2d(x, weight, None, 1, 1)
    tried = 0
    for vectors in range(1, 25):
        try:
            y = operator.run_compiled(
                code, x, non_zeros(weight, block), None, 16, 1, False,
                vectors=vectors, channel_block=5, by_rows=by_rows,
            )  # fmt: skip
        except ValueError:  # too many sums for the registers
            continue
        agree(y, expected)
        tried += 1
    assert tried >= (3 if block < 8 else 1)


def test_threads_share_the_work() -> None:
    weight = sparse_weight(24, 16, 4, 0.4)
    conv = PatternConv2d(non_zeros(weight, 4), None, 16, 24, mode="sparse")
    x = torch.randn(1, 16, 12, 12, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = conv(x)
        torch.set_num_threads(2)
        agree(conv(x), alone)
    finally:
        torch.set_num_threads(before)


def test_what_is_stored() -> None:
    weight = sparse_weight(10, 6, 4, 0.5)
    stored = non_zeros(weight, 4)
    assert stored.weight.shape == (len(stored.taps), 4)
    assert stored.filters.tolist() == [*range(10), -1, -1]
    assert int((stored.weight != 0).sum()) == int((weight != 0).sum())
    assert torch.equal(dense_weight(*stored, 6, 10), weight)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))  # filters in another order
    moved = stored._replace(filters=torch.cat([order, torch.tensor([-1, -1])]).to(torch.int32))
    assert torch.equal(dense_weight(*moved, 6, 10)[order], weight)
    agree(PatternConv2d(moved, None, 6, 10, mode="sparse")(torch.ones(1, 6, 4, 4))[:, order],
          F.conv2d(torch.ones(1, 6, 4, 4), weight, None, 1, 1))  # fmt: skip


def test_nothing_left_is_zero_or_the_bias() -> None:
    conv = PatternConv2d(non_zeros(torch.zeros(3, 2, 3, 3)), torch.tensor([1.0, -1.0, 0.0]), 2, 3, relu=True)
    conv.mode = "sparse"
    assert conv(torch.rand(1, 2, 5, 5))[0, :, 0, 0].tolist() == [1, 0, 0]


def test_one_operator_for_torch() -> None:
    stored = non_zeros(sparse_weight(8, 4, 2, 0.7), 2)
    x = torch.randn(2, 4, 6, 7)
    torch.library.opcheck(torch.ops.lightning_compress.pattern_conv2d.default, (x, *stored, torch.randn(8), 8, 2, True))
    conv = PatternConv2d(stored, None, 4, 8)
    program = torch.export.export(conv, (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert "lightning_compress.pattern_conv2d.default" in targets
    assert not any("conv2d" in t and "pattern" not in t for t in targets)
    agree(program.module()(x), conv(x))


def test_other_dtypes_are_computed_densely() -> None:
    weight = sparse_weight(8, 4, 1, 0.7)
    x = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    conv = PatternConv2d(non_zeros(weight), torch.ones(8), 4, 8, mode="sparse")
    y = conv(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), F.conv2d(x, weight, torch.ones(8), 1, 1), atol=0.1, rtol=0.05)


def test_one_weight_in_two_orders() -> None:
    stored = non_zeros(sparse_weight(4, 4, 1, 1.0))
    moved = stored._replace(filters=stored.filters.flip(0))
    x = torch.rand(1, 4, 6, 6)
    y = [PatternConv2d(weights, None, 4, 4, mode="sparse")(x) for weights in (stored, moved)]
    agree(y[1].flip(1), y[0])


def test_weights_that_change_are_seen() -> None:
    conv = PatternConv2d(non_zeros(sparse_weight(4, 4, 1, 1.0)), None, 4, 4, mode="sparse")
    x = torch.rand(1, 4, 6, 6)
    before = conv(x)
    conv.weight.mul_(2)
    agree(conv(x), 2 * before)


@pytest.mark.parametrize("sparse_is_faster", [True, False])
def test_one_measurement_per_shape_decides(sparse_is_faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = PatternConv2d(non_zeros(sparse_weight(4, 4, 1, 1.0)), None, 4, 4)
    clock = iter(range(10**6))
    slow = "dense" if sparse_is_faster else "sparse"
    ways: list[str] = []
    for name in ("sparse", "dense"):
        way = getattr(conv, f"_forward_{name}")

        def timed(x: Tensor, name: str = name, way: Any = way) -> Tensor:
            ways.append(name)
            [next(clock) for _ in range(5 if name == slow else 1)]
            return way(x)

        monkeypatch.setattr(conv, f"_forward_{name}", timed)
    monkeypatch.setattr(layer.time, "perf_counter", lambda: next(clock))
    x = torch.rand(1, 4, 6, 6)
    y = conv(x)
    measured = len(ways)
    assert {*ways} == {"sparse", "dense"}
    agree(conv(x), y)
    assert ways[measured:] == [ways[-1]] != [slow]
    assert conv.sparse_pays == {(torch.get_num_threads(), 1, 4, 6, 6): sparse_is_faster}
    conv(torch.rand(1, 4, 8, 8))
    assert len(conv.sparse_pays) == 2


def test_a_network_with_zeros() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 4, 3),
    )  # fmt: skip
    with torch.no_grad():
        net[2].weight.copy_(sparse_weight(16, 8, 1, 0.3))
        net[5].weight.copy_(sparse_weight(16, 16, 4, 0.3))
    small = to_pattern_layers(net, 4, mode="sparse")
    assert [type(m).__name__ for m in small if not isinstance(m, nn.ReLU)] == [
        "Conv2d", "PatternConv2d", "Conv2d", "PatternConv2d", "Conv2d",
    ]  # fmt: skip
    assert isinstance(net[2], nn.Conv2d)
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        agree(small(x), net(x))
        for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), inference_copy(small)):
            agree(other(x), net(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: non_zeros(torch.zeros(2, 2, 5, 5)), r"weight: expected \(C_out, C_in, 3, 3\)"),
        (lambda: non_zeros(torch.zeros(2, 2, 3, 3), 3), "block=3"),
        (lambda: PatternConv2d.from_conv(nn.Conv2d(4, 4, 3, padding=1, groups=2)), "conv: expected 3x3"),
        (lambda: PatternConv2d(NonZeros(*[torch.zeros(1)] * 4), None, 1, 1, stride=3), "stride=3"),
        (lambda: PatternConv2d(NonZeros(*[torch.zeros(1)] * 4), None, 1, 1, mode="fast"), "mode='fast'"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "change",
    [
        {"taps": torch.tensor([36], dtype=torch.int32)},
        {"taps": torch.tensor([-1], dtype=torch.int32)},
        {"bounds": torch.tensor([0, 2], dtype=torch.int32)},
        {"filters": torch.tensor([4], dtype=torch.int32)},
        {"filters": torch.tensor([0, 1], dtype=torch.int32)},
    ],
)
def test_compiled_code_never_reads_elsewhere(change: dict[str, Tensor]) -> None:
    if operator.compiled_code() is None:
        pytest.skip("no compiler here")
    good = NonZeros(*(torch.tensor(v, dtype=torch.int32) for v in ([3], [0, 1])), torch.ones(1, 1),
                    torch.tensor([0], dtype=torch.int32))  # fmt: skip
    x = torch.ones(1, 4, 3, 3)
    PatternConv2d(good, None, 4, 4, mode="sparse")(x)
    with pytest.raises(ValueError, match="do not fit 4 input channels and 4 filters"):
        PatternConv2d(good._replace(**change), None, 4, 4, mode="sparse")(x)


# ---- the compiler


def test_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "answer" / "kernel.cpp"
    source.parent.mkdir()
    source.write_text('extern "C" int answer() { return 42; }')
    try:
        first = native.compile_source(source)
    except native.NoCompiler:
        pytest.skip("no compiler here")
    made = first.stat().st_mtime_ns
    assert native.compile_source(source) == first
    assert first.stat().st_mtime_ns == made
    assert [p.name for p in (tmp_path / "lightning_compress").iterdir()] == [first.name]
    code = native.library(source)
    assert code is not None
    assert code.answer() == 42
    source.write_text('extern "C" int answer() { return 43; }')
    assert native.compile_source(source) != first


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    operator.compiled_code.cache_clear()
    try:
        conv = PatternConv2d(non_zeros(sparse_weight(4, 4, 1, 1.0)), None, 4, 4, mode="sparse")
        x = torch.rand(1, 4, 6, 6)
        with pytest.warns(UserWarning, match="no C\\+\\+ compiler. Install one"):
            y = conv(x)
        agree(y, F.conv2d(x, dense_weight(*conv.weights, 4, 4), None, 1, 1))
    finally:
        native.library.cache_clear()
        operator.compiled_code.cache_clear()


def test_a_source_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.cpp"
    source.write_text("this is no C++")
    with pytest.raises(native.NoCompiler):
        native.compile_source(source)


@pytest.mark.slow
def test_faster_than_dense_where_it_should_be() -> None:
    weight = sparse_weight(128, 128, 8, 1 / 3.6)
    x = torch.randn(1, 128, 28, 28)
    conv = PatternConv2d(non_zeros(weight, 8), None, 128, 128, mode="sparse")

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
from torch.nn import functional as F
from lightning_compress.ops.pattern_conv2d import non_zeros
from lightning_compress.ops.pattern_conv2d.gpu import run_triton
from test_pattern_conv2d import agree, sparse_weight

device = {device!r}
x = torch.randn(2, 4, 9, 11, device=device)
for filters, block, stride, relu in ((3, 2, 1, False), (3, 1, 2, True), (20, 16, 1, True), (20, 16, 2, False)):
    weight = sparse_weight(filters, 4, block, 0.5).to(device)
    bias = torch.randn(filters, device=device) if relu else None
    expected = F.conv2d(x, weight, bias, stride, 1)
    y = run_triton(x, *non_zeros(weight, block), bias, filters, stride, relu)
    agree(y, expected.relu() if relu else expected)
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
