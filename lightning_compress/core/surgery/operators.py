"""Rules of the operators that compute: arithmetic, convolutions, products, norms, reductions, pooling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_compress.core.surgery.rules import along, rule, tensors_in

if TYPE_CHECKING:
    from lightning_compress.core.surgery.rules import Ids
    from lightning_compress.core.surgery.trace import ChannelTrace

aten = torch.ops.aten

# torch works these out on meta tensors in dozens of Python calls, most of the time of a run on them.
SAME_SHAPE: dict[Any, Callable[[Tensor], Any]] = {
    aten.native_batch_norm: lambda x: (torch.empty_like(x), x.new_empty(0), x.new_empty(0)),
    **dict.fromkeys((aten.relu, aten.silu, aten.gelu, aten.hardswish, aten.sigmoid), torch.empty_like),
    **dict.fromkeys((aten.relu_, aten.silu_, aten.hardswish_, aten.sigmoid_, aten.hardtanh_), lambda x: x),
}


def run_fast(func: Any, args: Any, kwargs: Any) -> Any:
    """`func(*args, **kwargs)`; on meta tensors by the shape alone where that is known. Widths must still agree."""
    shortcut = SAME_SHAPE.get(func.overloadpacket)
    if shortcut is None or not args[0].is_meta or any(len(t) != args[0].shape[1] for t in tensors_in(args[1:])):
        return func(*args, **kwargs)
    return shortcut(args[0])


def pointwise(trace: ChannelTrace, out: Any, *args: Any, **kwargs: Any) -> None:
    """Broadcast and tie. A dim longer than 1 that only some inputs track has a fixed size: freeze it."""
    if not isinstance(out, Tensor):
        return
    kept: dict[tuple[int, ...], Ids] = {}
    inputs = [t for t in tensors_in((args, kwargs)) if t.ndim]
    for tensor in inputs:
        pad = out.ndim - tensor.ndim
        for array in trace.get(tensor):
            array = array.reshape((1,) * pad + array.shape)
            support = tuple(d for d in range(out.ndim) if array.shape[d] > 1)
            for other in inputs:
                shift = out.ndim - other.ndim
                tracked = {d + shift for a in trace.get(other) for d in range(a.ndim) if a.shape[d] > 1}
                if any(d >= shift and other.shape[d - shift] > 1 and d not in tracked for d in support):
                    trace.freeze(array, "meets a tensor of fixed size")
            for known, first in list(kept.items()):
                if set(known) & set(support):
                    trace.tie(first, array)
            kept.setdefault(support, array)
    trace.put(out, list(kept.values()))


@rule(
    "clone",
    "detach",
    "alias",
    "_to_copy",
    "contiguous",
    "lift_fresh",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "rand_like",
    "randn_like",
    "_softmax",
    "_log_softmax",
    "_safe_softmax",
    "bernoulli",
    "native_dropout",
    "cumsum",
    "dropout",
    "fake_quantize_per_tensor_affine",
    "fake_quantize_per_tensor_affine_cachemask",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "masked_fill",
    "masked_fill_",
    "as_strided_",
)
def _same(trace: ChannelTrace, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:
    """One input, the same shape."""
    for tensor in tensors_in(out):
        if tensor.shape == x.shape:
            trace.put(tensor, trace.get(x))


# Activations that torch (which ones depends on its version) does not tag as pointwise.
UNTAGGED = ("celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "rrelu_with_noise",
            "silu", "threshold")  # fmt: skip
rule(*UNTAGGED, *(f"{name}_" for name in UNTAGGED), "log_sigmoid_forward")(_same)


@rule("_prelu_kernel")
def _prelu(trace: ChannelTrace, out: Tensor, x: Tensor, weight: Tensor) -> None:
    pointwise(trace, out, x, weight)


@rule("glu")
def _glu(trace: ChannelTrace, out: Tensor, x: Tensor, dim: int = -1) -> None:
    """Value and gate keep the same positions."""
    ids = trace.axis(x, dim)
    if ids is None:
        trace.put(out, trace.get(x))
    else:
        trace.tie(ids.reshape(2, -1), ids.reshape(2, -1)[:1])
        trace.put(out, [along(ids[: ids.size // 2], dim % x.ndim, x.ndim)])


@rule("fake_quantize_per_channel_affine", "fake_quantize_per_channel_affine_cachemask")
def _fake_quantize_per_channel(
    trace: ChannelTrace, out: Any, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, *args: Any
) -> None:
    for tensor in (scale, zero_point):
        trace.tie(trace.axis(x, axis), trace.axis(tensor, 0))
    _same(trace, out, x)


@rule("copy_")
def _copy(trace: ChannelTrace, out: Tensor, x: Tensor, source: Tensor, *args: Any) -> None:
    pointwise(trace, out, x, source)


@rule(
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "scalar_tensor",
    "rand",
    "randn",
    "fill_",
    "zero_",
    "linspace",
    "eye",
)
def _fresh(trace: ChannelTrace, out: Any, *args: Any, **kwargs: Any) -> None:
    """A tensor made here tracks nothing."""


@rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution")
def _convolution(
    trace: ChannelTrace,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
    **kwargs: Any,
) -> None:
    transposed, groups = (rest[3], rest[5]) if len(rest) > 5 else (False, 1)
    channels = trace.axis(x, 1)
    for array in trace.get(x):
        if array.shape[1] == 1:
            trace.freeze(array, "is convolved along its channels")
    inner, outer = trace.axis(weight, 1), trace.axis(weight, 0)
    if transposed:
        inner, outer = outer, inner
    produced = outer
    if groups == 1:
        trace.tie(channels, inner)
    elif x.shape[1] == groups and not transposed:  # depthwise: a filter belongs to the channel it reads
        if outer is None:
            trace.freeze(channels, "meets a filter of fixed size")
        elif channels is None:
            trace.freeze(outer, "reads an input of fixed size")
        else:
            trace.tie(channels[:, None], outer.reshape(groups, -1))
    else:
        produced = _grouped(trace, channels, inner, outer, groups, transposed)
    if bias is not None and produced is not None and produced.size == out.shape[1]:
        trace.tie(produced, trace.axis(bias, 0))
    trace.put(out, [] if produced is None else [along(produced, 1, out.ndim)])


def _grouped(
    trace: ChannelTrace,
    channels: Ids | None,
    inner: Ids | None,
    outer: Ids | None,
    groups: int,
    transposed: bool,
) -> Ids | None:
    """All groups keep the same positions, so that the number of groups stays."""
    if transposed or channels is None or outer is None:
        for ids in (channels, inner, outer):
            trace.freeze(ids, "belongs to a grouped convolution")
        return None
    channels = channels.reshape(groups, -1)
    trace.tie(channels, channels[:1])
    trace.tie(channels[0], inner)
    if outer.size > groups:
        trace.tie(outer.reshape(groups, -1), outer.reshape(groups, -1)[:1])
    else:
        trace.freeze(outer, "is the only filter of its group")
    return outer


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "batch_norm",
)
def _batch_norm(trace: ChannelTrace, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:
    ids = trace.axis(x, 1)
    for tensor in tensors_in(args[:4]):
        trace.tie(ids, trace.axis(tensor, 0))
    trace.put(next(iter(tensors_in(out))), trace.get(x))


@rule("native_layer_norm")
def _layer_norm(trace: ChannelTrace, out: Any, x: Tensor, shape: Sequence[int], *args: Any) -> None:
    for back in range(1, len(shape) + 1):
        for tensor in tensors_in(args):
            trace.tie(trace.axis(x, -back), trace.axis(tensor, -back))
    trace.put(out[0], trace.get(x))


@rule("_fused_rms_norm", "rms_norm")
def _rms_norm(trace: ChannelTrace, out: Any, x: Tensor, shape: Sequence[int], *args: Any) -> None:
    _layer_norm(trace, [next(iter(tensors_in(out)))], x, shape, *args)


@rule("native_group_norm")
def _group_norm(
    trace: ChannelTrace,
    out: Any,
    x: Tensor,
    weight: Any,
    bias: Any,
    n: int,
    c: int,
    hw: int,
    group: int,
    *args: Any,
) -> None:
    ids = trace.axis(x, 1)
    for tensor in tensors_in((weight, bias)):
        trace.tie(ids, trace.axis(tensor, 0))
    if ids is not None and 1 < group < ids.size:
        trace.tie(ids.reshape(group, -1), ids.reshape(group, -1)[:1])
    elif ids is not None and group == ids.size:
        trace.freeze(ids, "is normalised one by one by a group norm with as many groups as channels")
    trace.put(out[0], trace.get(x))


@rule("mm")
def _mm(trace: ChannelTrace, out: Tensor, a: Tensor, b: Tensor) -> None:
    trace.tie(trace.axis(a, 1), trace.axis(b, 0))
    trace.put(out, [x for x in trace.get(a) if x.shape[1] == 1] + [x for x in trace.get(b) if x.shape[0] == 1])


@rule("addmm")
def _addmm(trace: ChannelTrace, out: Tensor, bias: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> None:
    _mm(trace, out, a, b)
    ids = trace.axis(out, -1)
    if bias.shape[-1] > 1:
        trace.tie(ids, trace.axis(bias, -1))


@rule("linear")
def _linear(trace: ChannelTrace, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    trace.tie(trace.axis(x, -1), trace.axis(weight, 1))
    ids = trace.axis(weight, 0)
    if bias is not None:
        trace.tie(ids, trace.axis(bias, 0))
    trace.put(
        out,
        [a for a in trace.get(x) if a.shape[-1] == 1]
        + ([along(ids, out.ndim - 1, out.ndim)] if ids is not None else []),
    )


@rule("bmm")
def _bmm(trace: ChannelTrace, out: Tensor, a: Tensor, b: Tensor) -> None:
    for array in [x for x in trace.get(a) + trace.get(b) if x.shape[0] > 1]:
        trace.freeze(array, "is a batch of a matrix product")
    trace.tie(trace.axis(a, 2), trace.axis(b, 1))
    free = [x for x in trace.get(a) if x.shape[0] == x.shape[2] == 1]
    trace.put(out, free + [x for x in trace.get(b) if x.shape[0] == x.shape[1] == 1])


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "prod",
    "var",
    "std",
    "logsumexp",
    "linalg_vector_norm",
    "var_mean",
    "any",
    "all",
)
def _reduce(trace: ChannelTrace, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:
    """A reduced dim is gone; removing channels from a sum over channels is the pruning that was asked for."""
    for tensor in tensors_in(out):
        dims = next((a for a in args if isinstance(a, (list, tuple))), None) or range(x.ndim)
        gone = {d % x.ndim for d in dims}
        arrays = [a for a in trace.get(x) if all(a.shape[d] == 1 for d in gone)]
        if tensor.ndim != x.ndim:
            arrays = [a.reshape([s for d, s in enumerate(a.shape) if d not in gone]) for a in arrays]
        trace.put(tensor, arrays if tensor.ndim else [])


@rule(
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "avg_pool2d",
    "avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_max_pool2d",
    "avg_pool1d",
    "adaptive_avg_pool1d",
    "max_pool2d",
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "_upsample_bilinear2d_aa",
    "upsample_nearest1d",
    "upsample_linear1d",
    "upsample_trilinear3d",
    "upsample_nearest3d",
    "reflection_pad2d",
    "replication_pad2d",
    "reflection_pad1d",
    "replication_pad1d",
    "grid_sampler_2d",
    "im2col",
)
def _spatial(trace: ChannelTrace, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:
    """Works on the last dims and leaves the channels alone."""
    for tensor in tensors_in(out):
        untouched = {d for d in range(x.ndim) if d < 2 and tensor.ndim == x.ndim}
        for array in trace.get(x):
            if any(s > 1 and d not in untouched for d, s in enumerate(array.shape)):
                trace.freeze(array, "is pooled or resized along its channels")
        trace.put(tensor, [a for a in trace.get(x) if all(s == 1 or d in untouched for d, s in enumerate(a.shape))])


@rule("constant_pad_nd")
def _pad(trace: ChannelTrace, out: Tensor, x: Tensor, pad: Sequence[int], value: float = 0.0) -> None:
    padded = {x.ndim - 1 - i // 2 for i, p in enumerate(pad) if p}
    for array in trace.get(x):
        if any(array.shape[d] > 1 for d in padded):
            trace.freeze(array, "is padded along its channels by a fixed number")
    trace.put(out, [a for a in trace.get(x) if all(a.shape[d] == 1 for d in padded)])


@rule("roll", "flip")
def _roll(trace: ChannelTrace, out: Tensor, x: Tensor, shifts: Any, dims: Any = None) -> None:
    moved = {d % x.ndim for d in (shifts if dims is None else dims)}
    for array in trace.get(x):
        if any(array.shape[d] > 1 for d in moved):
            trace.freeze(array, "is reordered along its channels")
    trace.put(out, [a for a in trace.get(x) if all(a.shape[d] == 1 for d in moved)])


@rule("embedding")
def _embedding(trace: ChannelTrace, out: Tensor, weight: Tensor, index: Tensor, *args: Any) -> None:
    trace.freeze(trace.axis(weight, 0), "is a vocabulary")
    ids = trace.axis(weight, 1)
    trace.put(out, [] if ids is None else [along(ids, out.ndim - 1, out.ndim)])
