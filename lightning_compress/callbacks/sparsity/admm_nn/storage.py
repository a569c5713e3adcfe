"""What non-structured pruning costs in indices, and what structured pruning must reach to be as good.

Storage of weights that are pruned P times (1/P is left, at random places), with values of b bits and gaps of k bits,
in bits per original weight; a dummy entry is needed after 2^k zeros:

    (1 / P) (b + k) / (1 - (1 - 1/P)^(2^k))          against b / P_s when whole structures are pruned P_s times

Computation: hardware for non-structured sparsity speeds up by P / PPR, with a pruning-to-performance ratio PPR that is
2.7 at best in published accelerators (Ma et al., arXiv:1907.02124); structured pruning by P_s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_compress.core.sparse.gaps import MAX_INDEX_BITS

PPR = 2.7


def dummy_factor(rate: float, index_bits: int) -> float:
    """How many times more entries there are with dummies.

    >>> [round(dummy_factor(10, k), 3) for k in (3, 4, 5, 6)]
    [1.756, 1.227, 1.036, 1.001]
    """
    return 1 / (1 - (1 - 1 / rate) ** 2**index_bits)


def bits_per_weight(rate: float, bits: float, index_bits: int) -> float:
    """Of the original weights, with gaps of so many bits.

    >>> [round(bits_per_weight(10, 4, k), 3) for k in (3, 4, 5, 6)]
    [1.229, 0.982, 0.932, 1.001]
    """
    return (bits + index_bits) / rate * dummy_factor(rate, index_bits)


def best_index_bits(rate: float, bits: float) -> int:
    """k with the smallest storage; 0 where nothing is pruned.

    >>> best_index_bits(10, 4)
    5
    """
    if rate <= 1:
        return 0
    return min(range(1, MAX_INDEX_BITS + 1), key=lambda k: bits_per_weight(rate, bits, k))


def break_even(rate: float, bits: float) -> float:
    """P_s, the structured pruning rate that takes as little storage at the same bits.

    >>> round(break_even(10, 4), 2)
    4.29
    """
    return bits / bits_per_weight(rate, bits, best_index_bits(rate, bits)) if rate > 1 else 1.0


@dataclass(frozen=True)
class Stored:
    """One layer as it is.

    Attributes:
        weights: of the dense layer.
        kept: those that are not zero.
        bits: of a value.
        nbytes: as stored, indices too.
        conv: whether it is a convolution.
    """

    weights: int
    kept: int
    bits: int
    nbytes: int
    conv: bool


def compression_report(layers: Mapping[str, Stored], ppr: float = PPR) -> dict[str, dict[str, Any]]:
    """The comparison, layer by layer, for ``"all convolutions"`` and for ``"all layers"``.

    Returns:
        name -> ``weights``, ``kept``, ``rate`` P; ``bits`` of a value, on average; ``index_bits``, the best k by the
        formula; ``bits_per_weight`` by the formula, ``stored_bits_per_weight`` as the file is; ``compression`` of the
        file against 32 bits, ``without_index`` that of its values alone; ``break_even``: the structured rate of equal
        storage; ``speedup``: P / PPR, what structured pruning reaches at that rate.
    """
    convolutions = [layer for layer in layers.values() if layer.conv]
    groups = {name: [layer] for name, layer in layers.items()}
    groups |= {"all convolutions": convolutions} if convolutions else {}
    groups["all layers"] = list(layers.values())
    report = {}
    for name, group in groups.items():
        weights, kept = sum(layer.weights for layer in group), sum(layer.kept for layer in group)
        nbytes, value_bits = sum(layer.nbytes for layer in group), sum(layer.kept * layer.bits for layer in group)
        rate, bits = weights / max(kept, 1), value_bits / max(kept, 1)
        index_bits = best_index_bits(rate, bits)
        report[name] = {
            "weights": weights,
            "kept": kept,
            "rate": rate,
            "bits": bits,
            "index_bits": index_bits,
            "bits_per_weight": bits_per_weight(rate, bits, index_bits) if index_bits else bits,
            "stored_bits_per_weight": 8 * nbytes / weights,
            "compression": 4 * weights / max(nbytes, 1),
            "without_index": 32 * weights / max(value_bits, 1),
            "break_even": break_even(rate, bits),
            "speedup": max(1.0, rate / ppr),
        }
    return report


def sentence(report: Mapping[str, Mapping[str, Any]], name: str, structured: bool) -> str:
    """One group of the report in words."""
    row = report[name]
    said = (
        f"{name[0].upper()}{name[1:]}: {row['weights']:,} → {row['kept']:,} weights ({row['rate']:.2f}×) of "
        f"{row['bits']:.1f} bits, {row['compression']:.2f}× smaller with indices, {row['without_index']:.2f}× without"
    )
    if structured or row["rate"] <= 1:
        return f"{said}."
    return (
        f"{said}; structured pruning stores as little at {row['break_even']:.2f}×, and computes as fast as "
        f"accelerators for single zeros at {row['speedup']:.2f}×."
    )
