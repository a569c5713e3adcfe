"""Rules of the operators that only rearrange: joining, splitting, slicing, permuting, reshaping."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lightning_compress.core.surgery.rules import along, rule

if TYPE_CHECKING:
    from lightning_compress.core.surgery.trace import ChannelTrace


@rule("cat")
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
            for i, (part, tensor) in enumerate(zip(parts, tensors, strict=True)):
                if part is None:  # a piece that cannot shrink
                    parts[i] = trace.new(tensor.shape[d])
                    trace.freeze(parts[i], "is a concatenated piece of fixed size")
            arrays.append(along(np.concatenate(parts), d, out.ndim))  # type: ignore[arg-type]
    trace.put(out, arrays)


@rule("stack")
def _stack(trace: ChannelTrace, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> None:
    for t in tensors[1:]:
        for d in range(t.ndim):
            trace.tie(trace.axis(tensors[0], d), trace.axis(t, d))
    trace.put(out, [np.expand_dims(a, dim % out.ndim) for a in trace.get(tensors[0])])


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk")
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


@rule("slice")
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


@rule("select")
def _select(trace: ChannelTrace, out: Tensor, x: Tensor, dim: int, index: int) -> None:
    _unbind(trace, [out], x, dim, [index])


@rule("unbind")
def _unbind(
    trace: ChannelTrace, out: Sequence[Tensor], x: Tensor, dim: int = 0, indices: Sequence[int] | None = None
) -> None:
    for array in trace.get(x):
        if array.shape[dim % x.ndim] > 1:
            trace.freeze(array, "is read one index at a time")
    for i, tensor in enumerate(out):
        at = indices[i] if indices else i
        trace.put(tensor, [np.take(a, at if a.shape[dim] > 1 else 0, dim) for a in trace.get(x)])


@rule("permute")
def _permute(trace: ChannelTrace, out: Tensor, x: Tensor, dims: Sequence[int]) -> None:
    trace.put(out, [a.transpose([d % x.ndim for d in dims]) for a in trace.get(x)])


@rule("transpose", "swapaxes")
def _transpose(trace: ChannelTrace, out: Tensor, x: Tensor, first: int, second: int) -> None:
    trace.put(out, [a.swapaxes(first, second) for a in trace.get(x)])


@rule("t")
def _t(trace: ChannelTrace, out: Tensor, x: Tensor) -> None:
    trace.put(out, [a.T for a in trace.get(x)])


@rule("unsqueeze")
def _unsqueeze(trace: ChannelTrace, out: Tensor, x: Tensor, dim: int) -> None:
    trace.put(out, [np.expand_dims(a, dim % out.ndim) for a in trace.get(x)])


@rule("squeeze")
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


@rule("expand")
def _expand(trace: ChannelTrace, out: Tensor, x: Tensor, size: Sequence[int], **kwargs: Any) -> None:
    trace.put(out, [a.reshape((1,) * (out.ndim - x.ndim) + a.shape) for a in trace.get(x)])


@rule("repeat")
def _repeat(trace: ChannelTrace, out: Tensor, x: Tensor, repeats: Sequence[int]) -> None:
    lead = len(repeats) - x.ndim
    for array in trace.get(x):
        if any(array.shape[d] > 1 and repeats[lead + d] > 1 for d in range(x.ndim)):
            trace.freeze(array, "is repeated")
    trace.put(out, [a.reshape((1,) * lead + a.shape) for a in trace.get(x) if all(r == 1 for r in repeats[lead:])])


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
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
