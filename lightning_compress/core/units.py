"""What an account counts, and numbers as people read them: three digits and a unit."""

from __future__ import annotations

TOTALS = {  # attribute of Measurement -> (label, unit), in the order of a table
    "macs": ("MACs", ""),
    "effective_macs": ("MACs of non-zero weights", ""),
    "params": ("parameters", ""),
    "nonzeros": ("non-zero parameters", ""),
    "bits": ("bits per parameter", ""),
    "bytes": ("parameters at these bits", "B"),
    "disk_bytes": ("state_dict on disk", "B"),
    "latency_ms": ("latency", "ms"),
}
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def human(value: float, unit: str = "") -> str:
    """Three significant digits with a decimal prefix.

    >>> human(4_089_284_608), human(853_018, "B"), human(12), human(0.0347, "ms")
    ('4.09 G', '853 kB', '12', '0.0347 ms')
    """
    scale, prefix = _scale(value)
    return f"{_digits(value / scale)} {prefix}{unit}".rstrip()


def span(before: float, after: float, unit: str = "") -> str:
    """``human`` for a change, with one unit for both values; a value that stays is written once.

    >>> span(37_748_736, 18_874_368), span(16, 16), span(2_000, 999, "B")
    ('37.7 → 18.9 M', '16', '2 → 0.999 kB')
    """
    if before == after:
        return human(before, unit)
    scale, prefix = _scale(max(before, after))
    return f"{_digits(before / scale)} → {_digits(after / scale)} {prefix}{unit}".rstrip()


def _scale(value: float) -> tuple[float, str]:
    # 0.9995 of a prefix already rounds up to it
    return next(((size, prefix) for size, prefix in _PREFIXES if abs(value) >= 0.9995 * size), (1.0, ""))


def _digits(value: float) -> str:
    """Three significant digits, without an exponent down to 1e-4."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"
