"""Columns of text for the commands that must answer at once."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence


def columns(rows: Iterable[Sequence[str]]) -> str:
    """Rows as aligned columns; on a terminal the last column is cut at its edge.

    >>> print(columns([("class", "family"), ("HRank", "pruning")]))
    class  family
    HRank  pruning
    """
    rows = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
    edge = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return "\n".join(line[:edge] for line in lines)
