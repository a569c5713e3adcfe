"""`lc methods`: the table of all methods, from the catalog."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from lightning_compress.catalog import CARDS, PLANNED, READY, Card, Row, card, markdown_table
from lightning_compress.cli.text import columns
from lightning_compress.core.select import did_you_mean

# What tells how good a result is, and the head of its column.
QUALITIES = {"top1": "top-1", "psnr": "PSNR", "rank1": "rank-1"}


def main(args: Sequence[str]) -> None:
    """List the methods, or show one with its published results."""
    parser = argparse.ArgumentParser("lc methods", description=__doc__)
    parser.add_argument("name", nargs="?", help="a method (hrank, HRank) or a family (pruning)")
    parser.add_argument("--status", choices=(READY, PLANNED), help="only methods of this status")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help="print the table of the README")
    given = parser.parse_args(args)
    if given.markdown:
        print(markdown_table())
        return
    chosen = [c for c in CARDS if given.status in (None, c.status)]
    if given.name:
        try:
            chosen = [card(given.name)]
        except KeyError:
            chosen = [c for c in chosen if c.family == given.name.lower()]
    if not chosen:
        known = [*(c.slug for c in CARDS), *(c.name for c in CARDS), *dict.fromkeys(c.family for c in CARDS)]
        parser.error(f"there is no method or family {given.name!r}.{did_you_mean(given.name, known)}")
    if given.json:
        print(json.dumps([_to_dict(c) for c in chosen], indent=1))
    elif len(chosen) == 1 and given.name:
        _show(chosen[0])
    else:
        _list(chosen)


def _to_dict(c: Card) -> dict[str, object]:
    return {**vars(c), "published": [vars(row) for row in c.published], "configs": c.configs}


def _list(chosen: list[Card]) -> None:
    rows = [(c.name, c.slug, c.family, c.status, c.venue, c.title) for c in chosen]
    print(columns([("class", "name", "family", "status", "venue", "paper"), *rows]))


def _show(c: Card) -> None:
    print(f"{c.name} ({c.family}, {c.status})")
    print(f"{c.authors}, “{c.title}”, {c.venue}" + (f", arXiv:{c.arxiv}" if c.arxiv else ""))
    print(c.class_path)
    if c.configs:
        print("\nconfigs", *(f"  {name}" for name in c.configs), sep="\n")
    if c.published:
        print("\npublished")
        quality = next((name for key, name in QUALITIES.items() if key in c.published[0].result), "top-1")
        print(columns([("network", "data", quality, "MACs", "params", "setting"), *map(_published, c.published)]))


def _published(row: Row) -> tuple[str, ...]:
    quality = next((f"{row.result[key]:.2f}" for key in QUALITIES if key in row.result), "-")
    cost = tuple(f"{row.result[key] / 1e6:.2f}M" if key in row.result else "-" for key in ("macs", "params"))
    return row.network, row.data, quality, *cost, row.setting
