"""One self-contained HTML page about finished runs: accounts, curves, accuracy against cost, pictures."""

from __future__ import annotations

import base64
import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from lightning_compress._version import __version__
from lightning_compress.core.units import TOTALS, human, span

RUN_FILES = ("compression.json", "metrics.csv", "events.out.tfevents.*")
COLOURS = ("#0f8b8d", "#d9822b", "#7c5cbf", "#c2456b", "#3f7fca", "#7a8b2f", "#8a6d5b", "#51606f")
ACCURACIES = ("test/acc", "val/acc")  # the measures of quality to look for first, then any other *acc*
MAX_CHARTS = 12
SIDES = ("before", "after")

Points = list[tuple[float, float]]


@dataclass
class Run:
    """A run's folder, read."""

    name: str
    folder: Path
    colour: str
    account: dict[str, Any] | None
    history: dict[str, Points]


def render_report(runs: Sequence[str | Path]) -> str:
    """Render runs as one HTML page that loads nothing from anywhere.

    Args:
        runs: folders of runs, or folders that hold such folders. A run has a ``compression.json`` (see
            :class:`~lightning_compress.core.report.Account`), a ``metrics.csv`` or TensorBoard events.

    Returns:
        The page.

    Raises:
        ValueError: a folder is absent or holds no run, or a ``compression.json`` is not whole.
    """
    read = _read(_folders([Path(run) for run in runs]))
    return Template(files("lightning_compress.cli").joinpath("report.html").read_text("utf-8")).substitute(
        title="Compression report" if len(read) > 1 else f"Compression report: {escape(read[0].name)}",
        version=__version__,
        convention=escape(next((run.account["convention"] + "." for run in read if run.account), "")),
        overview=_overview(read),
        charts=_charts(read),
        runs="\n".join(map(_section, read)),
    )


# ---------------------------------------------------------------------------------------------------- reading


def _folders(paths: Sequence[Path]) -> list[Path]:
    """The folders of runs at or below the paths, each once, in order."""
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"runs: there is no folder {str(path)!r}")
        here = [path] if any(any(path.glob(pattern)) for pattern in RUN_FILES) else []
        below = sorted({file.parent for pattern in RUN_FILES for file in path.rglob(pattern)})
        if not below:
            raise ValueError(f"runs: {str(path)!r} holds no run, that is none of {', '.join(RUN_FILES)}")
        found.update(dict.fromkeys(here or below))
    return list(found)


def _read(folders: Sequence[Path]) -> list[Run]:
    parts = [folder.resolve().parts for folder in folders]
    shared = 0
    while len(parts) > 1 and len({part[: shared + 1] for part in parts}) == 1:
        shared += 1
    return [
        Run(
            name="/".join(part[shared:] if len(parts) > 1 else part[-1:]) or part[-1],
            folder=folder,
            colour=COLOURS[index % len(COLOURS)],
            account=_account(folder / "compression.json"),
            history=_history(folder),
        )
        for index, (folder, part) in enumerate(zip(folders, parts, strict=True))
    ]


def _account(path: Path) -> dict[str, Any] | None:
    """The account as plain data, since reading it into its class would import torch."""
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text("utf-8"))
        absent = {"before", "after", "metrics", "rows", "notes", "left_alone", "convention"} - data.keys()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"runs: {str(path)!r} is not a whole account ({error})") from error
    if absent:
        raise ValueError(f"runs: {str(path)!r} is not a whole account, it lacks {', '.join(sorted(absent))}")
    return data


def _history(folder: Path) -> dict[str, Points]:
    """Metric -> (step, value), from a CSVLogger's file or else from TensorBoard's."""
    history: dict[str, Points] = {}
    if (folder / "metrics.csv").is_file():
        with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                step = float(row.pop("step", None) or 0)
                for name, value in row.items():
                    if value:
                        history.setdefault(name, []).append((step, float(value)))
    elif any(folder.glob(RUN_FILES[2])):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            history[name] = [(event.step, event.value) for event in events.Scalars(name)]
    hidden = ("epoch", "hp_metric")
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in history.items()}
    return {
        name: points
        for name, points in finite.items()
        if points and name not in hidden and not name.startswith("compression/")
    }


# ---------------------------------------------------------------------------------------------------- tables


def _quality(runs: Sequence[Run]) -> str | None:
    """The metric that tells how good the networks are."""
    names = {name: None for run in runs for name in run.history if "acc" in name}
    return next((name for name in (*ACCURACIES, *names) if name in names), None)


def _overview(runs: Sequence[Run]) -> str:
    """A line per run: what it ended with, and how much of the dense network that saves."""
    quality = _quality(runs)
    head = ["run", *([quality] if quality else []), "MACs", "parameters", "on disk", "latency", "speedup"]
    rows = []
    for run in runs:
        cells = [f'<span style="color:{run.colour}">■</span> {escape(run.name)}']
        if quality:
            cells.append(f"{run.history[quality][-1][1]:.4f}" if quality in run.history else "–")
        metrics = run.account["metrics"] if run.account else {}
        for what in ("macs", "params", "disk_bytes", "latency_ms"):
            value = metrics.get(f"compression/{what}")
            if value is None:
                cells.append("–")
            else:
                cells.append(f"{human(value, TOTALS[what][1])} {_cut(metrics[f'compression/{what}_cut'])}")
        speedup = metrics.get("compression/speedup")
        cells.append(f"{speedup:.2f}×" if speedup else "–")
        rows.append(cells)
    return "<h2>Overview</h2>" + _table([escape(name) for name in head], rows)


def _section(run: Run) -> str:
    """All about one run."""
    parts = [f"<section><h2>{escape(run.name)}</h2>"]
    if run.account:
        parts += [_totals(run.account), _said(run.account), _layers(run.account)]
    for image in sorted(run.folder.glob("*.png")):
        data = base64.b64encode(image.read_bytes()).decode()
        name = escape(image.stem)
        parts.append(
            f'<figure><img alt="{name}" src="data:image/png;base64,{data}"><figcaption>{name}</figcaption></figure>'
        )
    config = run.folder / "config.yaml"
    if config.is_file():
        text = escape(config.read_text("utf-8"))
        parts.append(f"<details><summary>config.yaml</summary><pre>{text}</pre></details>")
    return "\n".join([*parts, "</section>"])


def _totals(account: dict[str, Any]) -> str:
    rows = []
    for name, (label, unit) in TOTALS.items():
        before, after = (_total(account[side], name) for side in SIDES)
        if before is None or after is None:
            continue
        sides = [account[side] for side in SIDES]
        if name == "effective_macs" and all(side[name] > 0.999 * side["macs"] for side in sides):
            continue  # nothing is sparse
        share = after / before if before else 1.0
        ratio = f"{before / after:.2f}×" if after else "∞"
        cells = [label, human(before, unit), human(after, unit), _cut(1 - share), ratio, _bar(share)]
        rows.append(cells)
    table = _table(["", "before", "after", "change", "ratio", "left"], rows)
    versions = ", ".join(f"{name} {number}" for name, number in account.get("versions", {}).items())
    device = account.get("device")
    where = f"Latency measured on {device}. " if device else ""
    return table + f'<p class="soft">{escape(where)}{escape(versions)}</p>'


def _total(totals: dict[str, Any], name: str) -> float | None:
    if name == "latency_ms":
        return totals["latency"] and totals["latency"]["median_ms"]
    return totals[name]


def _said(account: dict[str, Any]) -> str:
    lines = [escape(note) for note in account["notes"]]
    lines += [
        f"left alone: <b>{escape(entry['name'])}</b>: {escape(entry['reason'])}" for entry in account["left_alone"]
    ]
    return f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>" if lines else ""


def _layers(account: dict[str, Any]) -> str:
    rows = []
    for row in account["rows"]:
        sides = [row[side] or {} for side in SIDES]
        if (sides[1] or sides[0])["kind"] in ("batchnorm", "norm"):
            continue
        cells = [escape(row["name"] or "(itself)"), (sides[1] or sides[0])["kind"]]
        for what in ("width", "macs", "params", "nonzeros", "bits"):
            before, after = (side.get(what) for side in sides)
            if before is None or after is None:
                shown = ["–" if value is None else human(value) for value in (before, after)]
                cells.append(shown[0] if shown[0] == shown[1] else " → ".join(shown))
            elif what in ("width", "bits"):
                cells.append(f"{before} → {after}" if before != after else f"{before}")
            else:
                cells.append(span(before, after))
        before, after = (side.get("effective_macs", 0) for side in sides)
        rows.append([*cells, _bar(after / before) if before else ""])
    head = ["layer", "kind", "channels", "MACs", "parameters", "non-zero", "bits", "MACs left"]
    return f"<details><summary>{len(rows)} layers</summary>{_table(head, rows)}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _cut(cut: float) -> str:
    style = "good" if cut > 0 else "bad" if cut < 0 else "soft"
    return f'<span class="{style}">{0 - 100 * cut:+.1f} %</span>'


def _bar(share: float) -> str:
    return f'<div class="track"><div style="width:{100 * min(max(share, 0), 1):.1f}%"></div></div>'


# ---------------------------------------------------------------------------------------------------- charts


def _charts(runs: Sequence[Run]) -> str:
    """Accuracy against cost, then each metric's curves, all runs in one chart."""
    quality = _quality(runs)
    charts = []
    costed = [run for run in runs if run.account and quality in run.history]
    if len(costed) > 1 and quality:
        dots = [(run, [(run.account["after"]["macs"], run.history[quality][-1][1])]) for run in costed if run.account]
        charts.append(_chart(f"{quality} against MACs", dots, dots=True))
    names = {name: None for run in runs for name, points in run.history.items() if len(points) > 1}
    charts += [
        _chart(name, [(run, run.history[name]) for run in runs if name in run.history])
        for name in list(names)[:MAX_CHARTS]
    ]
    if not charts:
        return ""
    legend = "".join(f'<li><i style="background:{run.colour}"></i>{escape(run.name)}</li>' for run in runs)
    return f'<h2>Charts</h2><ul class="legend">{legend}</ul><div class="charts">{"".join(charts)}</div>'


def _chart(title: str, lines: Sequence[tuple[Run, Points]], *, dots: bool = False) -> str:
    """An SVG chart: a line per run, or a dot per run and a dashed line along those that no other beats."""
    width, height, left, right, top, bottom = 330, 220, 48, 20, 36, 26
    ticks_x = _ticks([x for _, points in lines for x, _ in points])
    ticks_y = _ticks([y for _, points in lines for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        along = (x - ticks_x[0]) / (ticks_x[-1] - ticks_x[0])
        up = (y - ticks_y[0]) / (ticks_y[-1] - ticks_y[0])
        return left + along * (width - left - right), height - bottom - up * (height - top - bottom)

    def polyline(points: Points, look: str) -> str:
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
        return f'<polyline points="{path}" fill="none" {look}'

    parts = [f'<text class="title" x="8" y="16">{escape(title)}</text>']
    for y in ticks_y:
        at = place(ticks_x[0], y)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{human(y)}</text>')
    for x in ticks_x:
        at = place(x, ticks_y[0])[0]
        parts.append(f'<text x="{at:.1f}" y="{height - 8}" text-anchor="middle">{human(x)}</text>')
    if dots:
        front: Points = []
        for point in sorted(points[0] for _, points in lines):  # cheapest first
            if not front or point[1] > front[-1][1]:
                front.append(point)
        parts.append(polyline(front, 'class="front" stroke-dasharray="4 4"/>'))
    for run, points in lines:
        tip = f"<title>{escape(run.name)}: {human(points[-1][1])}</title>"
        if dots:
            x, y = place(*points[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{run.colour}">{tip}</circle>')
        else:
            parts.append(polyline(points, f'stroke="{run.colour}" stroke-width="1.8">{tip}</polyline>'))
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<div class="chart"><svg {size} role="img">{"".join(parts)}</svg></div>'


def _ticks(values: Sequence[float], count: int = 4) -> list[float]:
    """Round numbers, evenly spaced, from below the least value to above the greatest.

    >>> _ticks([0.31, 0.94])
    [0.2, 0.4, 0.6, 0.8, 1.0]
    """
    low, high = min(values), max(values)
    if low == high:
        low, high = low - abs(low) / 2 - 0.5 * (low == 0), high + abs(high) / 2 + 0.5 * (high == 0)
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    return [round(step * i, 12) for i in range(math.floor(low / step), math.ceil(high / step - 1e-9) + 1)]
