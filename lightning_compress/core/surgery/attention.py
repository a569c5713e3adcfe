"""Modules that fix sizes in their attributes: what they say about the channels inside them.

A module of your own can do the same with a method `trace_channels(trace, args, out)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_compress.core.surgery.rules import along, tensors_in

if TYPE_CHECKING:
    from lightning_compress.core.surgery.rules import Ids
    from lightning_compress.core.surgery.trace import ChannelTrace

ModuleRule = Callable[["ChannelTrace", nn.Module, tuple, Any], None]


def module_rule(module: Any) -> ModuleRule | None:
    """The rule of a module: its own `trace_channels(trace, args, out)`, or one for a known attention class."""
    if hasattr(module, "trace_channels"):
        return _own_rule
    if isinstance(module, nn.MultiheadAttention):
        return _opaque_attention
    if is_prunable_attention(module):
        return _attention
    return None


def _own_rule(trace: ChannelTrace, module: Any, args: tuple, out: Any) -> None:
    module.trace_channels(trace, args, out)


def is_prunable_attention(module: Any) -> bool:
    """timm's ViT attention: `qkv` and `proj` linear, (3, heads, head_dim) rows, and `attn_dim` that frees the width
    inside from the width outside."""
    return (
        type(module).__module__.startswith("timm.")
        and type(module).__name__ == "Attention"
        and all(hasattr(module, a) for a in ("qkv", "proj", "num_heads", "head_dim", "attn_dim"))
        and getattr(module, "gate", None) is None
        and isinstance(module.norm, nn.Identity)
        and module.qkv.out_features == 3 * module.proj.in_features
    )


def _attention(trace: ChannelTrace, module: Any, args: tuple, out: Tensor) -> None:
    """Heads are cut whole: the q, k and v rows of a head and its columns of the projection are one channel."""
    shape = (3, module.num_heads, module.head_dim)
    qkv, proj = (_names(trace, m) for m in (module.qkv, module.proj))
    trace.tie(trace.axis(args[0], -1), qkv["weight", 1])
    heads = qkv["weight", 0].reshape(shape)
    if "bias" in dict(module.qkv.named_parameters()):
        trace.tie(qkv["weight", 0], qkv["bias", 0])
    if module.num_heads == 1:
        trace.freeze(heads, "is the only head")
    else:
        trace.tie(heads, heads[:1, :, :1])
        trace.tie(proj["weight", 1].reshape(shape[1:]), heads[0, :, :1])
    for m in (module.q_norm, module.k_norm):
        for parameter in m.parameters():
            trace.freeze_tensor(parameter, "is shared by all heads")
    if ("bias", 0) in proj:
        trace.tie(proj["weight", 0], proj["bias", 0])
    trace.producers.append(trace.where + ".qkv" if trace.where else "qkv")
    trace.put(out, [along(proj["weight", 0], out.ndim - 1, out.ndim)])


def _opaque_attention(trace: ChannelTrace, module: Any, args: tuple, out: Any) -> None:
    """torch's own attention insists on heads * head_dim = width: all of it stays."""
    for tensor in [*tensors_in(args), *module.parameters()]:
        trace.freeze_tensor(tensor, "torch's MultiheadAttention cannot be narrowed")
    first = next(iter(tensors_in(out)))
    ids = trace.axis(module.out_proj.weight, 0)
    trace.put(first, [] if ids is None else [along(ids, first.ndim - 1, first.ndim)])


def _names(trace: ChannelTrace, linear: nn.Linear) -> dict[tuple[str, int], Ids]:
    found = {}
    for name, tensor in (("weight", linear.weight), ("bias", linear.bias)):
        for dim in range(tensor.ndim if tensor is not None else 0):
            ids = trace.axis(tensor, dim)
            if ids is not None:
                found[name, dim] = ids
    return found
