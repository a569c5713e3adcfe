"""Convolutions whose input channels have fewer kernels than there are outputs, which share them.

Of the N kernels (kh, kw) that read input channel c of a convolution, q_c are different:

    q_c = N    all are kept as they are,
    q_c < N    W[n, c] = B_c[I_c[n]], with q_c kernels B_c and an index I_c in {0, ..., q_c - 1}^N,
    q_c = 0    the channel is not read.

:class:`SharedKernels` is the form for training, a parametrisation whose parameters are the kernels that are different;
:func:`save_packed` writes them with bit-packed indices; :class:`SharedKernelConv2d` computes with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.core.parametrisation import parametrise
from lightning_compress.core.sparse.bit_packing import bits_for, pack_bits, unpack_bits
from lightning_compress.core.surgery.record import KEY, Undo, attach_record, replayable

FORMAT = "lightning-compress packed kernels 1"


# ---- the form for training


class SharedKernels(nn.Module):
    """Parametrisation of a convolution's weight (N, C, kh, kw) by the kernels that are different.

    ``original0`` holds the kernels of the channels that keep all, (N, C_full, kh, kw); ``original1``, ... those of the
    channels with equal q, (q, C_q, kh, kw), in ascending order of q. The buffers ``index1``, ... are (N, C_q).

    Args:
        levels: level of every input channel, (C,).
        budgets: kernels that a channel may have, by level; N for the last one.
    """

    order: Tensor

    def __init__(self, levels: Sequence[int], budgets: Sequence[int]) -> None:
        super().__init__()
        self.levels = list(levels)
        self.budgets = list(budgets)
        own = torch.tensor([self.budgets[level] for level in self.levels])
        shared = sorted({q for q in own.tolist() if 0 < q < self.outputs})
        self.groups = {q: (own == q).nonzero().flatten() for q in (self.outputs, *shared)}
        self.register_buffer("order", torch.cat(list(self.groups.values())), persistent=False)
        for i, q in enumerate(shared, 1):
            index = torch.zeros(self.outputs, len(self.groups[q]), dtype=torch.uint8 if q <= 256 else torch.int16)
            self.register_buffer(f"index{i}", index)

    @property
    def outputs(self) -> int:
        """N, the output channels."""
        return self.budgets[-1]

    @property
    def shared(self) -> list[tuple[int, Tensor, Tensor]]:
        """(q, its input channels (C_q,), index (N, C_q)) in ascending order of q."""
        groups = [(q, channels) for q, channels in self.groups.items() if q < self.outputs]
        return [(q, channels, getattr(self, f"index{i}")) for i, (q, channels) in enumerate(groups, 1)]

    def forward(self, full: Tensor, *kernels: Tensor) -> Tensor:
        """The dense weight, input channels in their own order, zeros for those that are not read."""
        size = full.shape[2:]
        parts = [
            part.gather(0, index.long()[..., None, None].expand(*index.shape, *size))
            for part, (_, _, index) in zip(kernels, self.shared, strict=True)
        ]
        dense = full.new_zeros(self.outputs, len(self.levels), *size)
        return dense.index_copy(1, self.order, torch.cat([full, *parts], 1))

    def right_inverse(self, weight: Tensor) -> list[Tensor]:
        """The parameters whose weight is nearest: kernels that share an index become their mean."""
        channels = [group.to(weight.device) for group in self.groups.values()]
        means = [
            _mean_kernels(weight[:, own], index.long(), q)
            for own, (q, _, index) in zip(channels[1:], self.shared, strict=True)
        ]
        return [weight[:, channels[0]], *means]

    # ---- what it costs

    @property
    def kernels(self) -> int:
        """Kernels that are stored, and convolved with: the sum of q_c over the input channels."""
        return sum(self.budgets[level] for level in self.levels)

    @property
    def index_bits(self) -> int:
        """Bits of all indices: ceil(log2 q) for each."""
        return sum(self.outputs * len(channels) * bits_for(q) for q, channels, _ in self.shared)

    def compression(self, area: int) -> float:
        """Size of the dense weight over that of kernels and indices, at 32 bits a number and `area` = kh * kw."""
        dense = self.outputs * len(self.levels) * area
        return dense / (self.kernels * area + self.index_bits / 32)

    @property
    def acceleration(self) -> float:
        """Multiply-accumulates of the dense convolution over those with the kernels that are stored."""
        return self.outputs * len(self.levels) / self.kernels

    def extra_repr(self) -> str:
        kept = {q: len(channels) for q, channels in self.groups.items()}
        return f"outputs={self.outputs}, inputs={len(self.levels)}, channels_by_kernels={kept}"


@replayable
def share_kernels(module: nn.Module, layers: Mapping[str, Mapping[str, list[int]]]) -> Undo:
    """Give convolutions of `module` the form of :class:`SharedKernels`. Their values are still to come.

    Args:
        layers: name of a convolution -> the arguments of :class:`SharedKernels`.

    Returns:
        What makes them dense again.
    """
    for name, arguments in layers.items():
        conv: Any = module.get_submodule(name)
        parametrise(conv, "weight", SharedKernels(**arguments).to(conv.weight.device))
    _keep_from_ddp(module)
    return partial(_make_dense, names=list(layers))


def set_kernels(conv: nn.Module, indices: Sequence[Tensor], weight: Tensor) -> None:
    """Write indices (N, C_q), one per q in ascending order, and the kernels that come nearest to a dense weight."""
    for (_, _, buffer), index in zip(_parametrisation(conv).shared, indices, strict=True):
        buffer.copy_(index)
    conv.weight = weight  # goes through right_inverse


def shared_convolutions(module: nn.Module) -> Iterator[tuple[str, nn.Conv2d, SharedKernels]]:
    """The convolutions of `module` that share kernels, with their names and parametrisations."""
    for name, conv in module.named_modules():
        if isinstance(conv, nn.Conv2d) and parametrize.is_parametrized(conv, "weight"):
            parametrisation = _parametrisation(conv)
            if isinstance(parametrisation, SharedKernels):
                yield name, conv, parametrisation


def originals(conv: nn.Module) -> list[Tensor]:
    """The parameters of a convolution that shares kernels: of the full channels, then by ascending q."""
    return list(conv.parametrizations.weight.parameters(recurse=False))  # type: ignore[union-attr]


def _parametrisation(conv: nn.Module) -> Any:
    return conv.parametrizations.weight[0]  # type: ignore[union-attr, index]


def _make_dense(module: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        conv: Any = module.get_submodule(name)
        value = nn.Parameter(conv.weight.detach().clone(), originals(conv)[0].requires_grad)
        # Not by torch's `remove_parametrizations`, which changes the class, and a copy has its original's.
        conv.__class__ = parametrize.type_before_parametrizations(conv)
        del conv.parametrizations
        conv.weight = value
    _keep_from_ddp(module)


def _keep_from_ddp(module: nn.Module) -> None:
    """Have DDP leave the indices alone: they never change, and it would send them to all processes at every step."""
    before: list[str] = list(getattr(module, "_ddp_params_and_buffers_to_ignore", []))
    forms = ((f"{name}.parametrizations.weight.0", form) for name, _, form in shared_convolutions(module))
    own = [f"{name}.{key}" for name, form in forms for key, _ in form.named_buffers()]
    there = {key for key, _ in (*module.named_parameters(), *module.named_buffers())}
    module._ddp_params_and_buffers_to_ignore = [key for key in dict.fromkeys(before + own) if key in there]  # type: ignore


def _mean_kernels(kernels: Tensor, index: Tensor, q: int) -> Tensor:
    """Mean of the kernels with equal index: (N, C, kh, kw), (N, C) -> (q, C, kh, kw); zeros where there is none."""
    count = torch.zeros(q, index.shape[1], device=index.device).scatter_add_(0, index, torch.ones_like(index).float())
    target = index[..., None, None].expand_as(kernels)
    total = kernels.new_zeros(q, *kernels.shape[1:], dtype=torch.float64).scatter_add_(0, target, kernels.double())
    return (total / count.clamp(min=1)[..., None, None]).to(kernels.dtype)


# ---- the file


def save_packed(module: nn.Module, path: str | Path) -> Path:
    """Write everything that defines `module` into one file, with bit-packed indices.

    All other tensors of its state dict are there too, byte by byte: norms, biases, linear layers.

    Raises:
        ValueError: no convolution of `module` shares kernels.
    """
    shared = {name: parametrisation for name, _, parametrisation in shared_convolutions(module)}
    if not shared:
        raise ValueError(f"module: no convolution of {type(module).__name__} shares kernels.")
    bits = {
        f"{name}.parametrizations.weight.0.index{i}".removeprefix("."): bits_for(q)
        for name, parametrisation in shared.items()
        for i, (q, _, _) in enumerate(parametrisation.shared, 1)
    }
    state = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    content = {
        "format": FORMAT,
        "layers": {name: {"levels": p.levels, "budgets": p.budgets} for name, p in shared.items()},
        "record": module.state_dict().get(KEY),
        "tensors": [(key, value.dtype, list(value.shape), bits.get(key)) for key, value in state.items()],
        "bytes": torch.cat([_to_bytes(value.cpu(), bits.get(key)) for key, value in state.items()]),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def load_packed(module: nn.Module, path: str | Path) -> None:
    """Give `module`, dense and freshly made, the structure and the values of a file of :func:`save_packed`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such file, is cut short, or of another network.
    """
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
        state, start = {}, 0
        for key, dtype, shape, bits in content["tensors"]:
            count = math.prod(shape)
            size = count * dtype.itemsize if bits is None else -(-count * bits // 8)
            state[key] = _from_bytes(content["bytes"][start : start + size], dtype, bits, count).view(shape)
            start += size
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"path: {str(path)!r} is not a whole file of packed kernels ({error}).") from error
    try:
        if content["record"] is not None:
            attach_record(module)
            state[KEY] = content["record"]
        else:
            share_kernels(module, content["layers"])
        module.load_state_dict(state)
    except (AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"path: {str(path)!r} does not fit {type(module).__name__}: {error}") from error


def _to_bytes(tensor: Tensor, bits: int | None) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8) if bits is None else pack_bits(tensor, bits)


def _from_bytes(stored: Tensor, dtype: torch.dtype, bits: int | None, count: int) -> Tensor:
    return stored.clone().view(dtype) if bits is None else unpack_bits(stored, bits, count).to(dtype)


# ---- the form that computes with fewer kernels


class SharedKernelConv2d(nn.Module):
    """What a convolution with shared kernels computes, with H * W * kh * kw * sum q_c multiply-accumulates.

    Channels that keep all kernels are convolved as usual. Every other channel is convolved with its q_c kernels alone,
    and each output adds up the results that its indices point to. These are N * C more additions at every place, and
    memory for sum q_c results, so that it is seldom faster than the dense convolution.

    Args:
        conv: a convolution with :class:`SharedKernels`; its values are copied.
    """

    read: Tensor
    rows: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        form, (full, *parts) = _parametrisation(conv), originals(conv)
        like: dict[str, Any] = {"kernel_size": full.shape[2:], "device": full.device, "dtype": full.dtype}
        like |= {key: getattr(conv, key) for key in ("stride", "padding", "dilation", "padding_mode")}
        self.widths = [len(channels) for channels in form.groups.values()]  # input channels, by number of kernels
        self.full = nn.Conv2d(full.shape[1], len(full), bias=conv.bias is not None, **like)
        self.full.load_state_dict({"weight": full} | ({} if conv.bias is None else {"bias": conv.bias}))
        self.shared = nn.ModuleList()
        rows, start = [], 0
        for part, (q, channels, index) in zip(parts, form.shared, strict=True):
            count = len(channels)
            shared = nn.Conv2d(count, q * count, groups=count, bias=False, **like)
            shared.load_state_dict({"weight": part.transpose(0, 1).flatten(0, 1)[:, None]})
            self.shared.append(shared)
            rows.append(index.long() + q * torch.arange(count, device=full.device) + start)
            start += q * count
        self.register_buffer("read", form.order.clone())
        self.register_buffer("rows", torch.cat(rows, 1) if rows else None)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, H', W')."""
        full, *parts = x.index_select(1, self.read).split(self.widths, 1)
        out = self.full(full)
        if not parts:
            return out
        results = torch.cat([conv(part) for conv, part in zip(self.shared, parts, strict=True)], 1).transpose(0, 1)
        fused = F.embedding_bag(self.rows, results.flatten(1), mode="sum")  # (N, C') of (sum q, B * H' * W')
        return out + fused.view(-1, *results.shape[1:]).transpose(0, 1)


def with_fewer_kernels(module: nn.Module) -> nn.Module:
    """An inference copy of `module` in which every convolution that shares kernels is a :class:`SharedKernelConv2d`."""
    replacements = {name: SharedKernelConv2d(conv) for name, conv, _ in shared_convolutions(module)}
    if "" in replacements:
        return replacements[""]
    clone = inference_copy(module)
    for name, replacement in replacements.items():
        clone.set_submodule(name, replacement)
    return clone
