"""Carry out cuts: slice parameters and buffers, keep modules' attributes and the optimisers' state in step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.core.surgery.attention import is_prunable_attention
from lightning_compress.core.surgery.plan import Cut


@dataclass(frozen=True)
class Swap:
    """One tensor that was replaced, and the cuts that lead from the old one to the new one."""

    name: str
    old: Tensor
    new: Tensor
    cuts: tuple[Cut, ...]


def apply_cuts(module: nn.Module, cuts: Iterable[Cut], *, pretend: bool = False) -> list[Swap]:
    """Narrow `module` in place. Works on any device; needs no trace and no example input.

    Args:
        pretend: put meta tensors of the new shapes there instead; :func:`undo` brings the real ones back.

    Raises:
        ValueError: a cut does not fit its tensor.
    """
    by_tensor: dict[str, list[Cut]] = {}
    for cut in cuts:
        by_tensor.setdefault(cut.tensor, []).append(cut)
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    swaps = []
    for name, group in by_tensor.items():
        if name not in own:
            raise ValueError(f"The recorded surgery cuts tensor {name!r}, which {type(module).__name__} does not have.")
        old = own[name]
        for cut in group:
            if cut.dim >= old.ndim or old.shape[cut.dim] != cut.size:
                raise ValueError(
                    f"The recorded surgery cuts {name!r} from size {cut.size} along dim {cut.dim}, "
                    f"but its shape is {tuple(old.shape)}."
                )
        value = old.detach().to("meta") if pretend else old.detach()
        swaps.append(Swap(name, old, _like(old, slice_tensor(value, group)), tuple(group)))
    _replace(module, {id(s.old): s.new for s in swaps})
    return swaps


def undo(module: nn.Module, swaps: Sequence[Swap]) -> None:
    """Put the old tensors back."""
    _replace(module, {id(s.new): s.old for s in swaps})


def reshape_tensors(module: nn.Module, shapes: Mapping[str, Sequence[int]], values: Mapping[str, Tensor]) -> None:
    """Give tensors other shapes: those of `values` where named there, else zeros, room for what will be loaded."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    room = {n: values[n].to(own[n].device) if n in values else own[n].detach().new_zeros(s) for n, s in shapes.items()}
    _replace(module, {id(own[n]): _like(own[n], value) for n, value in room.items()})


def slice_tensor(tensor: Tensor, cuts: Iterable[Cut]) -> Tensor:
    """The kept part of a tensor."""
    for cut in cuts:
        tensor = tensor.index_select(cut.dim, cut.kept.to(tensor.device))
    return tensor


def _like(old: Tensor, value: Tensor) -> Tensor:
    if old.ndim == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous():
        value = value.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value


def _replace(module: nn.Module, new: dict[int, Tensor]) -> None:
    """Swap tensors wherever they are registered (tied ones everywhere), then bring attributes up to date."""
    for owner in module.modules():
        registries: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        for registry in registries:
            for key, tensor in registry.items():
                if tensor is not None and id(tensor) in new:
                    registry[key] = new[id(tensor)]
    for owner in module.modules():
        sync_attributes(owner)


def sync_attributes(module: Any) -> None:
    """Let a module's width attributes follow the shapes of its tensors. One of yours can define `after_surgery()`."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd):
        first, second = weight.shape[:2]
        if module.transposed:
            module.in_channels, module.out_channels = first, second * module.groups
        elif second == 1 and module.groups > 1 and module.groups == module.in_channels:  # depthwise
            multiplier = module.out_channels // module.in_channels
            module.groups = module.in_channels = first // multiplier
            module.out_channels = first
        else:
            module.in_channels, module.out_channels = second * module.groups, first
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        tensor = module.running_mean if module.running_mean is not None else weight
        if tensor is not None:
            module.num_features = len(tensor)
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        module.num_channels = len(weight)
    elif hasattr(module, "normalized_shape") and weight is not None:  # LayerNorm, RMSNorm and relatives
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    elif is_prunable_attention(module):
        module.attn_dim = module.qkv.weight.shape[0] // 3
        module.num_heads = module.attn_dim // module.head_dim
    after: Callable[[], None] | None = getattr(module, "after_surgery", None)
    if after is not None:
        after()


def carry_optimizer(optimizer: Optimizer, swaps: Iterable[Swap]) -> None:
    """Put the new parameters where the old ones were in the optimiser's groups, with their state sliced alike.

    State tensors of the parameter's shape (momentum, Adam's moments) are sliced by the same indices, factored ones
    along the dims that they have; scalars (step) are kept.
    """
    swapped = {id(s.old): s for s in swaps}
    for group in optimizer.param_groups:
        group["params"] = [swapped[id(p)].new if id(p) in swapped else p for p in group["params"]]
    for old in [p for p in optimizer.state if id(p) in swapped]:
        swap = swapped[id(old)]
        optimizer.state[swap.new] = {k: _carry(v, swap) for k, v in optimizer.state.pop(old).items()}


def _carry(value: Any, swap: Swap) -> Any:
    if not isinstance(value, Tensor) or value.ndim != swap.old.ndim:
        return value
    return slice_tensor(value, [c for c in swap.cuts if value.shape[c.dim] == c.size])
