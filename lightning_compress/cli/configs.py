"""`lc configs`: list the packaged configs, or print one. Also finds a config by its short name."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from lightning_compress.catalog import CARDS, CONFIGS, card, config_names
from lightning_compress.cli.text import columns
from lightning_compress.core.select import did_you_mean


def find_config(name: str) -> Path:
    """The file of a config: `name` as a path where that exists, else the packaged config of this short name.

    Args:
        name: "my.yaml", "quickstart", "data/digits", "recipes/hrank/quick", ...

    Raises:
        ValueError: neither a file nor a packaged config; the message gives the nearest names.
    """
    path = Path(name)
    if path.is_file():
        return path
    packaged = CONFIGS / f"{name.removesuffix('.yaml')}.yaml"
    if packaged.is_file():
        return packaged
    known = config_names()
    # A mistyped last part ("hrnk") is near no full name ("method/hrank"), so both are compared.
    hint = did_you_mean(name, known) or did_you_mean(
        name, [full for full in known if did_you_mean(name.rpartition("/")[2], [full.rpartition("/")[2]])]
    )
    raise ValueError(f"there is no config {name!r}, neither as a file nor packaged.{hint} See lc configs.")


def summary(name: str) -> str:
    """First sentence of the comment at the top of a packaged config."""
    first = find_config(name).read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()


def main(args: Sequence[str]) -> None:
    """List configs: all, those of one method, or those whose name contains a word; print one with --show."""
    parser = argparse.ArgumentParser("lc configs", description=__doc__)
    parser.add_argument("name", nargs="?", help="a method (hrank), a part of a name (data), or a whole name")
    parser.add_argument("--show", action="store_true", help="print the config of this name")
    parser.add_argument("--path", action="store_true", help="print the path of its file")
    given = parser.parse_args(args)
    if given.show or given.path:
        try:
            path = find_config(given.name or "")
        except ValueError as error:
            parser.error(str(error))
        print(path if given.path else path.read_text(encoding="utf-8"), end="" if given.show else "\n")
        return
    names = _select(given.name)
    if not names:
        everything = [*(c.slug for c in CARDS), *(c.name for c in CARDS), *config_names()]
        parser.error(f"there is no config for {given.name!r}.{did_you_mean(given.name, everything)}")
    print(columns((name, summary(name)) for name in names))


def _select(word: str | None) -> list[str]:
    names = config_names()
    if word is None:
        return names
    try:
        return list(card(word).configs)
    except KeyError:
        return [name for name in names if re.search(re.escape(word), name, re.IGNORECASE)]
