"""How channel ids pass through torch's operators: one short rule per kind of operator.

A rule gets the trace, the operator's output, and its arguments; it ties ids that are one channel, freezes those whose
number the operator fixes, and gives the output its ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_compress.core.surgery.trace import ChannelTrace, Ids

aten = torch.ops.aten

OpRule = Callable[..., None]
RULES: dict[Any, OpRule] = {}


def _rule(*names: str) -> Callable[[OpRule], OpRule]:
    def register(function: OpRule) -> OpRule:
        for name in names:
            if hasattr(aten, name):
                RULES[getattr(aten, name)] = function
        return function

    return register


def along(ids: Ids, dim: int, ndim: int) -> Ids:
    return ids.reshape([-1 if d == dim else 1 for d in range(ndim)])


def tensors_in(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        yield from tensors_in(list(tree.values()))


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


@_rule(
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
    "hardswish",
    "hardswish_",
    "masked_fill",
    "masked_fill_",
    "as_strided_",
)
def _same(trace: ChannelTrace, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:
    for tensor in tensors_in(out):
        if tensor.shape == x.shape:
            trace.put(tensor, trace.get(x))


@_rule("copy_")
def _copy(trace: ChannelTrace, out: Tensor, x: Tensor, source: Tensor, *args: Any) -> None:
    pointwise(trace, out, x, source)


@_rule(
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


@_rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution")
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


@_rule(
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


@_rule("native_layer_norm")
def _layer_norm(trace: ChannelTrace, out: Any, x: Tensor, shape: Sequence[int], *args: Any) -> None:
    for back in range(1, len(shape) + 1):
        for tensor in tensors_in(args):
            trace.tie(trace.axis(x, -back), trace.axis(tensor, -back))
    trace.put(out[0], trace.get(x))


@_rule("_fused_rms_norm", "rms_norm")
def _rms_norm(trace: ChannelTrace, out: Any, x: Tensor, shape: Sequence[int], *args: Any) -> None:
    _layer_norm(trace, [next(iter(tensors_in(out)))], x, shape, *args)


@_rule("native_group_norm")
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


@_rule("mm")
def _mm(trace: ChannelTrace, out: Tensor, a: Tensor, b: Tensor) -> None:
    trace.tie(trace.axis(a, 1), trace.axis(b, 0))
    trace.put(out, [x for x in trace.get(a) if x.shape[1] == 1] + [x for x in trace.get(b) if x.shape[0] == 1])


@_rule("addmm")
def _addmm(trace: ChannelTrace, out: Tensor, bias: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> None:
    _mm(trace, out, a, b)
    ids = trace.axis(out, -1)
    if bias.shape[-1] > 1:
        trace.tie(ids, trace.axis(bias, -1))


@_rule("linear")
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


@_rule("bmm")
def _bmm(trace: ChannelTrace, out: Tensor, a: Tensor, b: Tensor) -> None:
    for array in [x for x in trace.get(a) + trace.get(b) if x.shape[0] > 1]:
        trace.freeze(array, "is a batch of a matrix product")
    trace.tie(trace.axis(a, 2), trace.axis(b, 1))
    free = [x for x in trace.get(a) if x.shape[0] == x.shape[2] == 1]
    trace.put(out, free + [x for x in trace.get(b) if x.shape[0] == x.shape[1] == 1])


@_rule("cat")
def _cat(trace: ChannelTrace, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> None:
    dim %= out.ndim
    tensors = [t for t in tensors if t.numel()]
    arrays = []
    for d in range(out.ndim):
        parts = [trace.axis(t, d) for t in tensors]
        if d != dim:
            for part in parts[1:]:
                trace.tie(parts[0], part)
            if parts and parts[0] is not None:
                arrays.append(along(parts[0], d, out.ndim))
        elif any(p is not None for p in parts):
            for i, (part, tensor) in enumerate(zip(parts, tensors)):
                if part is None:  # a piece that cannot shrink
                    parts[i] = trace.new(tensor.shape[d])
                    trace.freeze(parts[i], "is a concatenated piece of fixed size")
            arrays.append(along(np.concatenate(parts), d, out.ndim))  # type: ignore[arg-type]
    trace.put(out, arrays)


@_rule("stack")
def _stack(trace: ChannelTrace, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> None:
    for t in tensors[1:]:
        for d in range(t.ndim):
            trace.tie(trace.axis(tensors[0], d), trace.axis(t, d))
    trace.put(out, [np.expand_dims(a, dim % out.ndim) for a in trace.get(tensors[0])])


@_rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk")
def _split(trace: ChannelTrace, out: Sequence[Tensor], x: Tensor, size: Any, dim: int = 0) -> None:
    """Equal pieces keep the same positions, so that the cut between them stays right; unequal pieces stay whole."""
    ids, start, dim = trace.axis(x, dim), 0, dim % x.ndim
    if ids is not None:
        if len({t.shape[dim] for t in out}) == 1 and out[0].shape[dim] > 1:
            pieces = ids.reshape(len(out), -1)
            trace.tie(pieces, pieces[:1])
        else:
            trace.freeze(ids, "is split into pieces of fixed size")
    for tensor in out:
        stop = start + tensor.shape[dim]
        trace.put(tensor, [np.take(a, range(start, stop), dim) if a.shape[dim] > 1 else a for a in trace.get(x)])
        start = stop


@_rule("slice")
def _slice(
    trace: ChannelTrace,
    out: Tensor,
    x: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> None:
    dim %= x.ndim
    arrays = trace.get(x)
    if out.shape[dim] != x.shape[dim]:
        for array in arrays:
            if array.shape[dim] > 1:
                trace.freeze(array, "is sliced at a fixed position")
        part = (slice(None),) * dim + (slice(start, end, step),)
        arrays = [a[part] if a.shape[dim] > 1 else a for a in arrays]
    trace.put(out, arrays)


@_rule("select")
def _select(trace: ChannelTrace, out: Tensor, x: Tensor, dim: int, index: int) -> None:
    _unbind(trace, [out], x, dim, [index])


@_rule("unbind")
def _unbind(
    trace: ChannelTrace, out: Sequence[Tensor], x: Tensor, dim: int = 0, indices: Sequence[int] | None = None
) -> None:
    for array in trace.get(x):
        if array.shape[dim % x.ndim] > 1:
            trace.freeze(array, "is read one index at a time")
    for i, tensor in enumerate(out):
        at = indices[i] if indices else i
        trace.put(tensor, [np.take(a, at if a.shape[dim] > 1 else 0, dim) for a in trace.get(x)])


@_rule("permute")
def _permute(trace: ChannelTrace, out: Tensor, x: Tensor, dims: Sequence[int]) -> None:
    trace.put(out, [a.transpose([d % x.ndim for d in dims]) for a in trace.get(x)])


@_rule("transpose", "swapaxes")
def _transpose(trace: ChannelTrace, out: Tensor, x: Tensor, first: int, second: int) -> None:
    trace.put(out, [a.swapaxes(first, second) for a in trace.get(x)])


@_rule("t")
def _t(trace: ChannelTrace, out: Tensor, x: Tensor) -> None:
    trace.put(out, [a.T for a in trace.get(x)])


@_rule("unsqueeze")
def _unsqueeze(trace: ChannelTrace, out: Tensor, x: Tensor, dim: int) -> None:
    trace.put(out, [np.expand_dims(a, dim % out.ndim) for a in trace.get(x)])


@_rule("squeeze")
def _squeeze(trace: ChannelTrace, out: Tensor, x: Tensor, *dim: Any) -> None:
    trace.put(
        out,
        [
            a.reshape([a.shape[d] for d in range(x.ndim) if x.shape[d] > 1] or [1])
            if not dim
            else a.reshape(_dropped(a.shape, x.shape, dim[0]))
            for a in trace.get(x)
        ],
    )


def _dropped(shape: Sequence[int], real: Sequence[int], dims: int | Sequence[int]) -> list[int]:
    gone = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)}
    return [s for d, s in enumerate(shape) if not (d in gone and real[d] == 1)]


@_rule("expand")
def _expand(trace: ChannelTrace, out: Tensor, x: Tensor, size: Sequence[int], **kwargs: Any) -> None:
    trace.put(out, [a.reshape((1,) * (out.ndim - x.ndim) + a.shape) for a in trace.get(x)])


@_rule("repeat")
def _repeat(trace: ChannelTrace, out: Tensor, x: Tensor, repeats: Sequence[int]) -> None:
    lead = len(repeats) - x.ndim
    for array in trace.get(x):
        if any(array.shape[d] > 1 and repeats[lead + d] > 1 for d in range(x.ndim)):
            trace.freeze(array, "is repeated")
    trace.put(out, [a.reshape((1,) * lead + a.shape) for a in trace.get(x) if all(r == 1 for r in repeats[lead:])])


@_rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def _view(trace: ChannelTrace, out: Tensor, x: Tensor, *args: Any) -> None:
    """Merging dims spreads ids over the merged one (flatten); splitting a tracked dim fixes its size."""
    arrays = []
    for array in trace.get(x):
        spread, shape = list(array.shape), []
        for old, new in _segments(x.shape, out.shape):
            wide = [d for d in old if x.shape[d] > 1]
            if all(array.shape[d] == 1 for d in old):
                shape += [1] * len(new)
            elif [x.shape[d] for d in wide] == [out.shape[d] for d in new if out.shape[d] > 1]:
                sizes = iter([array.shape[d] for d in wide])  # only dims of size 1 come or go
                shape += [next(sizes) if out.shape[d] > 1 else 1 for d in new]
            elif sum(out.shape[d] > 1 for d in new) == 1:
                for d in old:
                    spread[d] = x.shape[d]
                shape += [out.shape[d] for d in new]
            else:
                trace.freeze(array, "is reshaped into several dimensions")
                break
        else:
            arrays.append(np.broadcast_to(array, spread).reshape(shape))
    trace.put(out, arrays)


def _segments(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Cut both shapes into the shortest runs of dims with equal products."""
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [], []
        a = b = 1
        if i < len(old):
            left.append(i)
            a *= old[i]
            i += 1
        if j < len(new):
            right.append(j)
            b *= new[j]
            j += 1
        while a != b:
            if a < b:
                left.append(i)
                a *= old[i]
                i += 1
            else:
                right.append(j)
                b *= new[j]
                j += 1
        yield left, right


@_rule(
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


@_rule(
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


@_rule("constant_pad_nd")
def _pad(trace: ChannelTrace, out: Tensor, x: Tensor, pad: Sequence[int], value: float = 0.0) -> None:
    padded = {x.ndim - 1 - i // 2 for i, p in enumerate(pad) if p}
    for array in trace.get(x):
        if any(array.shape[d] > 1 for d in padded):
            trace.freeze(array, "is padded along its channels by a fixed number")
    trace.put(out, [a for a in trace.get(x) if all(a.shape[d] == 1 for d in padded)])


@_rule("roll", "flip")
def _roll(trace: ChannelTrace, out: Tensor, x: Tensor, shifts: Any, dims: Any = None) -> None:
    moved = {d % x.ndim for d in (shifts if dims is None else dims)}
    for array in trace.get(x):
        if any(array.shape[d] > 1 for d in moved):
            trace.freeze(array, "is reordered along its channels")
    trace.put(out, [a for a in trace.get(x) if all(a.shape[d] == 1 for d in moved)])


@_rule("embedding")
def _embedding(trace: ChannelTrace, out: Tensor, weight: Tensor, index: Tensor, *args: Any) -> None:
    trace.freeze(trace.axis(weight, 0), "is a vocabulary")
    ids = trace.axis(weight, 1)
    trace.put(out, [] if ids is None else [along(ids, out.ndim - 1, out.ndim)])
