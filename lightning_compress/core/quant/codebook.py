"""Weights as a codebook: few different values, and for each weight the number of its value, in a few bits.

The first value is 0, the others ascend. Indices of b bits lie one after the other, lowest bits first: with 4 bits two
per byte, low nibble first; with 3 bits eight in three bytes; with 2 bits four per byte. Where many weights are 0 a bit
per weight says which are not, and only these have an index: the smaller of both forms is taken.

    dense: n b bits,    sparse: n + nnz b bits,    and 32 bits for each of the K - 1 values that are not 0
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.core.quant.attach import quantized_layers, real_weight, weight_quantizer
from lightning_compress.core.sparse.bit_packing import pack_bits, pack_mask, unpack_bits, unpack_mask
from lightning_compress.core.surgery.record import KEY, NAME, attach_record

FORMAT, VERSION = "codebooks", 1


@dataclass(frozen=True)
class Codebook:
    """One weight, on the CPU.

    Attributes:
        shape: of the weight.
        bits: b, of an index.
        values: (K,) float32, the first is 0.
        packed: the indices as bytes.
        kept: a bit per weight, 1 where it has an index; no bytes where all have.
    """

    shape: tuple[int, ...]
    bits: int
    values: Tensor
    packed: Tensor
    kept: Tensor

    @property
    def index_bytes(self) -> int:
        return self.packed.nbytes + self.kept.nbytes

    @property
    def nbytes(self) -> int:
        """Indices and the values that are not 0 by definition."""
        return self.index_bytes + 4 * (len(self.values) - 1)

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def nonzeros(self) -> int:
        return int(self.indices().count_nonzero())

    def indices(self) -> Tensor:
        """The number of each weight's value, uint8 of the weight's shape."""
        if not len(self.kept):
            return unpack_bits(self.packed, self.bits, self.weights, low_first=True).to(torch.uint8).view(self.shape)
        kept = unpack_mask(self.kept, self.shape)
        found = torch.zeros(self.shape, dtype=torch.uint8)
        found[kept] = unpack_bits(self.packed, self.bits, int(kept.sum()), low_first=True).to(torch.uint8)
        return found

    def decode(self) -> Tensor:
        """The weight, float32."""
        return self.values[self.indices().long()]


@runtime_checkable
class HasCodebook(Protocol):
    """A weight's quantiser with few different values."""

    def codebook(self, weight: Tensor) -> Codebook:
        """The weight that this quantiser would get, quantised and packed."""
        ...


def encode_codebook(codes: Tensor, levels: Tensor, bits: int, *, sparse: bool | None = None) -> Codebook:
    """Pack a quantised weight.

    Args:
        codes: the number of each weight's level, of the weight's shape.
        levels: (K,), K <= 2^bits; the first is 0, the others in any order.
        bits: of an index.
        sparse: whether zeros have no index; None takes what is smaller.

    Raises:
        ValueError: the first level is not 0, or there are more than 2^bits.
    """
    codes, levels = codes.detach().cpu().long(), levels.detach().cpu().float()
    if len(levels) > 1 << bits or levels[0] != 0:
        raise ValueError(
            f"levels: give at most {1 << bits} for bits={bits}, the first of them 0, got {levels.tolist()}."
        )
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + levels[1:].argsort()])
    codes = order.argsort()[codes]
    kept = codes != 0
    if sparse is None:
        sparse = kept.numel() + bits * int(kept.sum()) < bits * kept.numel()
    return Codebook(
        shape=tuple(codes.shape),
        bits=bits,
        values=levels[order],
        packed=pack_bits(codes[kept] if sparse else codes, bits, low_first=True),
        kept=pack_mask(kept) if sparse else torch.empty(0, dtype=torch.uint8),
    )


def codebooks_of(module: nn.Module) -> dict[str, Codebook]:
    """The codebook of every layer whose weight's quantiser has one, by the layer's name."""
    found: dict[str, Codebook] = {}
    for name, layer in quantized_layers(module).items():
        quantizer = weight_quantizer(layer)
        if isinstance(quantizer, HasCodebook):
            found[name] = quantizer.codebook(real_weight(layer).detach())
    return found


def save_codebooks(module: nn.Module, path: str | Path) -> int:
    """Write all that defines a network in evaluation into one file, readable with `weights_only=True`.

    Layers with a codebook as indices and values, everything else (norms, biases, other layers) as it is.

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: no layer has a codebook.
    """
    layers = codebooks_of(module)
    if not layers:
        raise ValueError(f"module: no layer of {type(module).__name__} has a quantiser with a codebook.")
    weights = {_key(name) for name in layers}
    state = inference_copy(module).cpu().state_dict()
    others = {key: value for key, value in state.items() if isinstance(value, Tensor) and key not in weights}
    arrays = [array for layer in layers.values() for array in (layer.packed, layer.kept)]
    arrays += [value.contiguous().flatten().view(torch.uint8) for value in others.values()]
    content = {
        "format": FORMAT,
        "version": VERSION,
        "cuts": [step for step in getattr(getattr(module, NAME, None), "steps", []) if step["cuts"]],
        "layers": {
            name: (list(layer.shape), layer.bits, layer.values.tolist(), len(layer.packed), len(layer.kept))
            for name, layer in layers.items()
        },
        "others": [(key, value.dtype, list(value.shape)) for key, value in others.items()],
        "bytes": torch.cat(arrays),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path.stat().st_size


def read_codebooks(path: str | Path) -> tuple[dict[str, Codebook], dict[str, Tensor], list[Any]]:
    """The content of a file of :func:`save_codebooks`.

    Returns:
        The codebooks by layer; all other tensors of the network's `state_dict`; the cuts of its channels, if any.

    Raises:
        FileNotFoundError: no such file.
        MisconfigurationException: the file is none of these, or is cut short.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file at {str(path)!r}.")
    try:
        saved: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        if (saved["format"], saved["version"]) != (FORMAT, VERSION):
            raise ValueError(f"it holds {saved['format']!r}, version {saved['version']}")
        data, layers, others = saved["bytes"], {}, {}
        for name, (shape, bits, values, *sizes) in saved["layers"].items():
            packed, kept, data = data.split([*sizes, len(data) - sum(sizes)])
            layers[name] = Codebook(tuple(shape), bits, torch.tensor(values), packed, kept)
        for key, dtype, shape in saved["others"]:
            size = math.prod(shape) * dtype.itemsize
            others[key] = data[:size].clone().view(dtype).view(shape)
            data = data[size:]
        return layers, others, saved["cuts"]
    except Exception as error:
        raise MisconfigurationException(
            f"{str(path)!r} cannot be read as codebooks ({type(error).__name__}: {error})."
        ) from error


def load_codebooks(module: nn.Module, path: str | Path) -> None:
    """Give a plain network, freshly made, the values of a file of :func:`save_codebooks`; channels go, where they went.

    Raises:
        FileNotFoundError: no such file.
        MisconfigurationException: it is no such file, is cut short, or of another network.
    """
    layers, others, cuts = read_codebooks(path)
    state: dict[str, Any] = {**others, **{_key(name): layer.decode() for name, layer in layers.items()}}
    if cuts:
        attach_record(module)
        state[KEY] = {"steps": cuts}
    try:
        module.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise MisconfigurationException(f"{str(path)!r} does not fit {type(module).__name__}: {error}") from error


def _key(layer: str) -> str:
    return f"{layer}.weight".removeprefix(".")
