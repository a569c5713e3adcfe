"""What a network costs: counted per layer and in total, and measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.example_input import inputs_for
from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.core.profile import Latency, measure_latency, profile
from lightning_compress.core.select import match


@dataclass(frozen=True)
class LayerRow:
    """The cost of one layer.

    Attributes:
        name: its name in ``named_modules()``; ``""`` is the network itself.
        kind: ``conv``, ``linear``, ``attention``, ``matmul``, ``batchnorm``, ``norm`` or ``other``.
        width: output channels or features; None where the layer has no such number.
        macs: multiply-accumulates for one image.
        effective_macs: those of convolution and linear weights that are not zero; else equal to ``macs``.
        params: parameters; one that layers share counts in the first.
        nonzeros: parameters that are not zero.
        bits: bits of one weight (tensors of two dimensions and more; of any parameter, if there is no such
            tensor).
        bytes: all its parameters, the weights at ``bits`` and the others as they are stored.
    """

    name: str
    kind: str
    width: int | None
    macs: int
    effective_macs: int
    params: int
    nonzeros: int
    bits: int
    bytes: int


@dataclass(frozen=True)
class LayerCost:
    """What a layer really costs where its plain form does not tell: shared kernels, filters that are skipped.

    Attributes:
        macs: multiply-accumulates for one image, on average.
        params: numbers that are stored.
        nonzeros: those that are not zero; all of them if only `params` is given.
        bytes: all that is stored, indices too.
    """

    macs: int | None = None
    params: int | None = None
    nonzeros: int | None = None
    bytes: int | None = None

    def correct(self, row: LayerRow) -> LayerRow:
        """The row with these numbers in place of those counted."""
        given: dict[str, Any] = {
            "macs": self.macs,
            "effective_macs": self.macs,
            "params": self.params,
            "nonzeros": self.params if self.nonzeros is None else self.nonzeros,
            "bytes": self.bytes,
        }
        return replace(row, **{key: value for key, value in given.items() if value is not None})


@dataclass(frozen=True)
class Measurement:
    """The cost of a network.

    Attributes:
        rows: its layers in the order of execution.
        disk_bytes: size of its ``state_dict`` as ``torch.save`` writes it.
        latency: median time of a forward pass; None if it was not measured.
    """

    rows: tuple[LayerRow, ...]
    disk_bytes: int
    latency: Latency | None = None

    @property
    def macs(self) -> int:
        return sum(row.macs for row in self.rows)

    @property
    def effective_macs(self) -> int:
        return sum(row.effective_macs for row in self.rows)

    @property
    def params(self) -> int:
        return sum(row.params for row in self.rows)

    @property
    def nonzeros(self) -> int:
        return sum(row.nonzeros for row in self.rows)

    @property
    def bytes(self) -> int:
        """All parameters, at their bits; ``disk_bytes`` is what a file takes today."""
        return sum(row.bytes for row in self.rows)

    @property
    def bits(self) -> float:
        """Bits of a parameter, on average."""
        return 8 * self.bytes / max(self.params, 1)

    @property
    def latency_ms(self) -> float | None:
        return None if self.latency is None else self.latency.median_ms


def measure(
    module: nn.Module, example_input: Any, *, latency: bool = True, bits: Mapping[str, int] | None = None
) -> Measurement:
    """Measure a network or LightningModule as it would be deployed (:func:`inference_copy` says how).

    Args:
        module: what to measure, where it is; it is not changed.
        example_input: a tensor, a shape, a tuple of arguments or a dict of keyword arguments.
        latency: also time the forward pass, which takes about a second.
        bits: bits of the weights by layer, name or glob → bits; later globs win. Layers not named have the
            bits of their dtype.

    Raises:
        ValueError: a glob of ``bits`` matches no layer.

    >>> conv = nn.Conv2d(3, 8, 3, bias=False)
    >>> m = measure(conv, (1, 3, 10, 10), latency=False, bits={"*": 4})
    >>> m.macs, m.params, m.bytes
    (13824, 216, 108)
    """
    clone = inference_copy(module)
    counted = count(clone, example_input, bits=bits)
    return replace(counted, latency=time_in_turns([clone], example_input)[0]) if latency else counted


def count(
    clone: nn.Module,
    example_input: Any,
    *,
    bits: Mapping[str, int] | None = None,
    costs: Mapping[str, LayerCost] | None = None,
) -> Measurement:
    """:func:`measure` without latency, for a module that already is an :func:`inference_copy`.

    Args:
        costs: layer name -> what it costs, where its plain form does not tell.
    """
    args, kwargs = inputs_for(clone, example_input)
    layers = profile(clone, args or kwargs).layers
    tensors: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    for name, parameter in clone.named_parameters():
        while name and (name := name.rpartition(".")[0]) not in tensors:
            pass  # attention counts the layers inside as its own
        tensors[name].append(parameter)
    names = list(tensors)
    chosen = {name: b for glob, b in (bits or {}).items() for name in match(names, [glob], "bits")}
    rows = []
    for layer in layers:
        own = tensors[layer.name]
        weights = [t for t in own if t.ndim > 1] or own
        width = chosen.get(layer.name) or (8 * weights[0].element_size() if weights else 0)
        stored = sum(t.numel() * (width if any(t is w for w in weights) else 8 * t.element_size()) for t in own)
        dense = layer.kind in ("conv", "linear") and weights
        kept = _nonzeros(weights) / sum(t.numel() for t in weights) if dense else 1.0
        row = LayerRow(
            name=layer.name,
            kind=layer.kind,
            width=_width(clone.get_submodule(layer.name)),
            macs=layer.macs,
            effective_macs=round(layer.macs * kept),
            params=layer.params,
            nonzeros=_nonzeros(own),
            bits=width,
            bytes=math.ceil(stored / 8),
        )
        rows.append(costs[layer.name].correct(row) if costs and layer.name in costs else row)
    return Measurement(tuple(rows), disk_bytes(clone))


def time_in_turns(
    modules: list[nn.Module], example_input: Any, *, rounds: int = 5, seconds: float = 0.2
) -> list[Latency]:
    """Time the modules alternately, so that a machine that slows down or speeds up does so for all of them.

    Args:
        modules: what to time, each on its own device.
        example_input: the input of all.
        rounds: turns of each module; the median over them is reported.
        seconds: about how long a turn lasts; at least one pass, at most twenty.
    """
    inputs = [args or kwargs for args, kwargs in (inputs_for(module, example_input) for module in modules)]
    first = [measure_latency(m, x, repeats=1, warmup=2).median_ms for m, x in zip(modules, inputs, strict=True)]
    repeats = [max(1, min(20, round(1e3 * seconds / ms))) for ms in first]
    rounds = max(1, min(rounds, round(1e4 / max(first))))  # a network of seconds is not worth a minute
    turns = [
        [measure_latency(m, x, repeats=n, warmup=1) for m, x, n in zip(modules, inputs, repeats, strict=True)]
        for _ in range(rounds)
    ]
    return [
        replace(of_one[0], median_ms=statistics.median(turn.median_ms for turn in of_one))
        for of_one in zip(*turns, strict=True)
    ]


def disk_bytes(module: nn.Module) -> int:
    """Size of the file that ``torch.save(module.state_dict(), path)`` would write."""
    sink = _Sink()
    torch.save(module.state_dict(), sink)  # type: ignore[arg-type]
    return sink.size


class _Sink:
    """A file that keeps only its size."""

    size = 0

    def write(self, data: Any) -> int:
        written = memoryview(data).nbytes
        self.size += written
        return written

    def flush(self) -> None:
        pass


def _nonzeros(tensors: list[Tensor]) -> int:
    return sum(int(torch.count_nonzero(t)) for t in tensors)


def _width(module: nn.Module) -> int | None:
    """Output channels; convolutions, linear layers and norms each have a name for them."""
    names = ("out_channels", "out_features", "num_features", "embed_dim")
    return next((width for name in names if isinstance(width := getattr(module, name, None), int)), None)
