"""`lc report`: one self-contained HTML page of finished runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(args: Sequence[str]) -> None:
    """Write the page and print its path."""
    parser = argparse.ArgumentParser("lc report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="lightning_logs/version_0, ...")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="file to write")
    given = parser.parse_args(args)
    if missing := [str(run) for run in given.runs if not run.is_dir()]:
        parser.error(f"there is no folder {', '.join(missing)}")
    from lightning_compress.cli.report_html import render_report

    given.output.write_text(render_report(given.runs), encoding="utf-8")
    print(given.output)
