"""The operator: how its weights are laid out, what it computes, and who computes it."""

from __future__ import annotations

import weakref
from ctypes import CDLL, c_int, c_int64, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from lightning_compress.ops.native import library

SOURCE = Path(__file__).with_name("kernel.cpp")
BLOCKS = (1, 2, 4, 8)  # filters that may share their non-zeros, in the code for the CPU


class NonZeros(NamedTuple):
    """The weights of a sparse 3x3 convolution, in blocks of K filters that share their non-zeros.

    Attributes:
        taps: int32 (n,), channel * 9 + 3 * dy + dx of each non-zero, ascending within a block.
        bounds: int32 (blocks + 1,), where each block begins.
        weight: float32 (n, K), one row per non-zero, one column per filter of its block.
        filters: int32 (blocks * K,), the output channel of every row of every block; -1 where a block is not full.
    """

    taps: Tensor
    bounds: Tensor
    weight: Tensor
    filters: Tensor


def non_zeros(weight: Tensor, block: int = 1) -> NonZeros:
    """What is not zero in a weight (C_out, C_in, 3, 3).

    Args:
        block: K; consecutive filters that are stored together. Where one of them has a weight and another has none,
            the other's zero is stored.

    Raises:
        ValueError: the weight is not of 3x3 kernels, or the block is no power of two.

    >>> w = torch.zeros(2, 1, 3, 3)
    >>> w[:, 0, 1, 1] = torch.tensor([2.0, 3.0])
    >>> n = non_zeros(w, block=2)
    >>> n.taps.tolist(), n.bounds.tolist(), n.weight.tolist()
    ([4], [0, 1], [[2.0, 3.0]])
    """
    if weight.ndim != 4 or tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(f"weight: expected (C_out, C_in, 3, 3), got {tuple(weight.shape)}.")
    if block < 1 or block.bit_count() != 1:
        raise ValueError(f"block={block}: choose a power of two; up to {BLOCKS[-1]} runs fast on CPUs.")
    filters = len(weight)
    blocks = -(-filters // block)
    flat = F.pad(weight.detach().float().flatten(1), (0, 0, 0, blocks * block - filters))
    rows = flat.reshape(blocks, block, -1)
    at = (rows != 0).any(1)
    which, taps = at.nonzero(as_tuple=True)
    ids = torch.arange(blocks * block, device=weight.device)
    return NonZeros(
        taps=taps.to(torch.int32),
        bounds=F.pad(at.sum(1).cumsum(0), (1, 0)).to(torch.int32),
        weight=rows[which, :, taps].contiguous(),
        filters=torch.where(ids < filters, ids, -1).to(torch.int32),
    )


def dense_weight(
    taps: Tensor, bounds: Tensor, weight: Tensor, filters: Tensor, in_channels: int, out_channels: int
) -> Tensor:
    """The inverse of `non_zeros`: (C_out, C_in, 3, 3), with zeros."""
    block = weight.shape[1]
    rows = torch.repeat_interleave(bounds.diff().long(), output_size=len(taps))
    dense = weight.new_zeros(len(bounds) - 1, block, in_channels * 9)
    dense[rows, :, taps.long()] = weight
    there = filters >= 0
    out = weight.new_zeros(out_channels, in_channels * 9)
    out[filters[there].long()] = dense.flatten(0, 1)[there]
    return out.view(out_channels, in_channels, 3, 3)


def pattern_conv2d(
    x: Tensor,
    taps: Tensor,
    bounds: Tensor,
    weight: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    out_channels: int,
    stride: int,
    relu: bool,
) -> Tensor:
    """Convolve with the weights that are there; kernel 3x3, padding 1. Without gradients.

    On the CPU, float32 runs compiled code, which is made at the first call, where there is a compiler; on CUDA it runs
    Triton, where that is installed. Everything else becomes a dense convolution. To `torch.compile` and
    `torch.export` it is one operator, ``lightning_compress::pattern_conv2d``.

    Args:
        x: (N, C_in, H, W).
        taps, bounds, weight, filters: see `NonZeros`.
        bias: (C_out,) or None.
        out_channels: C_out.
        stride: 1 or 2.
        relu: whether max(0, .) follows.

    Returns:
        (N, C_out, ceil(H / stride), ceil(W / stride)).
    """
    return _operator(x, taps, bounds, weight, filters, bias, out_channels, stride, relu)


def _reference(
    x: Tensor, taps: Tensor, bounds: Tensor, weight: Tensor, filters: Tensor, bias: Tensor | None,
    out_channels: int, stride: int, relu: bool,
) -> Tensor:  # fmt: skip
    dense = dense_weight(taps, bounds, weight, filters, x.shape[1], out_channels)
    y = F.conv2d(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype), stride, 1)
    return y.relu_() if relu else y


def _shape_only(
    x: Tensor, taps: Tensor, bounds: Tensor, weight: Tensor, filters: Tensor, bias: Tensor | None,
    out_channels: int, stride: int, relu: bool,
) -> Tensor:  # fmt: skip
    height, width = ((size - 1) // stride + 1 for size in x.shape[2:])
    return x.new_empty(x.shape[0], out_channels, height, width)


def _on_cpu(
    x: Tensor, taps: Tensor, bounds: Tensor, weight: Tensor, filters: Tensor, bias: Tensor | None,
    out_channels: int, stride: int, relu: bool,
) -> Tensor:  # fmt: skip
    plain = x.dtype == weight.dtype == torch.float32 and weight.shape[1] in BLOCKS and x.numel() > 0
    compiled = compiled_code() if plain else None
    if compiled is None:
        return _reference(x, taps, bounds, weight, filters, bias, out_channels, stride, relu)
    return run_compiled(compiled, x, NonZeros(taps, bounds, weight, filters), bias, out_channels, stride, relu)


def _on_cuda(
    x: Tensor, taps: Tensor, bounds: Tensor, weight: Tensor, filters: Tensor, bias: Tensor | None,
    out_channels: int, stride: int, relu: bool,
) -> Tensor:  # fmt: skip
    arguments = (x, taps, bounds, weight, filters, bias, out_channels, stride, relu)
    if x.dtype != torch.float32 or weight.shape[1].bit_count() != 1 or x.numel() == 0 or not find_spec("triton"):
        return _reference(*arguments)
    from lightning_compress.ops.pattern_conv2d.gpu import run_triton

    return run_triton(*arguments)


# Not by `torch.library.custom_op`, whose wrappers take longer than the rest of the way to the kernel.
_library = torch.library.Library("lightning_compress", "FRAGMENT")
_library.define(
    "pattern_conv2d(Tensor x, Tensor taps, Tensor bounds, Tensor weight, Tensor filters, Tensor? bias, "
    "SymInt out_channels, SymInt stride, bool relu) -> Tensor"
)
for _kernel, _device in ((_reference, "CompositeExplicitAutograd"), (_on_cpu, "CPU"), (_on_cuda, "CUDA")):
    _library.impl("pattern_conv2d", _kernel, _device)
torch.library.register_fake("lightning_compress::pattern_conv2d", _shape_only, lib=_library)
_operator = torch.ops.lightning_compress.pattern_conv2d.default


@cache
def compiled_code(target: str = "native") -> CDLL | None:
    """The compiled kernel; None where there is no compiler."""
    code = library(SOURCE, target)
    if code is not None:
        tensor, size, small = c_void_p, c_int64, c_int
        code.pattern_conv2d_plan.restype = c_void_p
        code.pattern_conv2d_plan.argtypes = [*[tensor] * 4, *[size] * 5, *[small] * 5]
        code.pattern_conv2d_run.argtypes = [*[tensor] * 4, size, small, small]
        code.pattern_conv2d_run.restype = None
        code.pattern_conv2d_free.argtypes = [tensor]
        code.pattern_conv2d_free.restype = None
    return code


class Plan:
    """The weights in the order in which they are used for images of one size; memory of the compiled code."""

    def __init__(self, code: CDLL, weights: NonZeros, shape: tuple[int, ...], filters: int, stride: int,
                 vectors: int = 0, channel_block: int = 0, by_rows: int = -1) -> None:  # fmt: skip
        taps, bounds, weight, rows = (t.contiguous() for t in weights)
        _, channels, height, width = shape
        _check(taps, bounds, weight, rows, channels, filters)
        self.handle = code.pattern_conv2d_plan(
            taps.data_ptr(), bounds.data_ptr(), weight.data_ptr(), rows.data_ptr(), channels, height, width, filters,
            len(bounds) - 1, weight.shape[1], stride, vectors, channel_block, by_rows,
        )  # fmt: skip
        if not self.handle:
            raise ValueError(f"vectors={vectors}, by_rows={by_rows}: there is no such kernel on this processor.")
        self.others = weights.taps, weights.bounds, weights.filters  # the weight itself must be free to go
        self.versions = [_version(t) for t in weights]
        self.output = filters, (height - 1) // stride + 1, (width - 1) // stride + 1
        self.run = code.pattern_conv2d_run
        weakref.finalize(self, code.pattern_conv2d_free, self.handle)

    def __call__(self, x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        """Convolve images of that size; `bias` is contiguous."""
        x = x.contiguous()
        y = x.new_empty(len(x), *self.output)
        at = None if bias is None else bias.data_ptr()
        self.run(self.handle, x.data_ptr(), at, y.data_ptr(), len(x), relu, torch.get_num_threads())
        return y

    def fits(self, weights: NonZeros) -> bool:
        """Whether these are the weights it was made of, as they were then."""
        others = weights.taps, weights.bounds, weights.filters
        same = all(one is other for one, other in zip(self.others, others, strict=True))
        return same and self.versions == [_version(t) for t in weights]


def _check(taps: Tensor, bounds: Tensor, weight: Tensor, rows: Tensor, channels: int, filters: int) -> None:
    """Compiled code reads and writes where these point, and they may come from a file."""
    ends = bounds.tolist()
    sizes = len(taps) == len(weight) and len(rows) == (len(ends) - 1) * weight.shape[1]
    inside = not len(taps) or (int(taps.min()) >= 0 and int(taps.max()) < 9 * channels)
    if not (
        sizes and inside and ends[0] == 0 and ends[-1] == len(taps) and ends == sorted(ends) and rows.max() < filters
        and {taps.dtype, bounds.dtype, rows.dtype} == {torch.int32}
    ):  # fmt: skip
        raise ValueError(
            f"The non-zeros of a pattern convolution do not fit {channels} input channels and {filters} filters."
        )


_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight -> what depends on it; gone with it


def run_compiled(
    code: CDLL, x: Tensor, weights: NonZeros, bias: Tensor | None, filters: int, stride: int, relu: bool, **tuning: int
) -> Tensor:
    """`pattern_conv2d` by the compiled code."""
    plans: dict[Any, Plan] = _plans.setdefault(weights.weight, {})
    key = (id(code), x.shape[1:], stride, *tuning.items())
    plan = plans.get(key)
    if plan is None or not plan.fits(weights):
        plan = plans[key] = Plan(code, weights, tuple(x.shape), filters, stride, **tuning)
    return plan(x, None if bias is None else bias.contiguous(), relu)


def _version(weight: Tensor) -> int:
    """Changes whenever the weight is written to; inference tensors cannot be."""
    return 0 if weight.is_inference() else weight._version
