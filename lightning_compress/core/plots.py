"""Pictures of accounts and of what methods learn, sized for a README. Where matplotlib was left out, there are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_compress.core.units import human

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DENSE, KEPT, INK, GRID = "#d7dde5", "#0f8b8d", "#27313f", "#e8ecf1"


@cache  # says so once
def available() -> bool:
    """Whether matplotlib is installed; if not, says how to get it."""
    if find_spec("matplotlib") is None:
        rank_zero_info("No plots: matplotlib is not installed (pip install matplotlib).")
        return False
    return True


def widths(names: Sequence[str], before: Sequence[int], after: Sequence[int]) -> Figure:
    """Output channels per layer: what is kept, in front of what there was.

    Args:
        names: layers, in the order of execution.
        before: channels of each before.
        after: channels of each after.
    """
    figure, axes = _canvas(height=3.4)
    positions = range(len(names))
    axes.bar(positions, before, width=0.82, color=DENSE, label="before")
    axes.bar(positions, after, width=0.82, color=KEPT, label="after")
    axes.set_ylabel("channels")
    axes.set_xlim(-0.7, len(names) - 0.3)
    step = max(1, round(len(names) / 32))  # more names than that cannot be read
    axes.set_xticks(
        positions[::step],
        [_short(name) for name in names[::step]],
        rotation=60,
        ha="right",
        rotation_mode="anchor",
    )
    axes.tick_params(axis="x", labelsize=7)
    axes.yaxis.grid(True, color=GRID)
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    left = sum(after) / max(sum(before), 1)
    _title(axes, f"Channels per layer: {left:.0%} of {sum(before):,} left")
    return figure


def summary(totals: Sequence[tuple[str, str, float, float]]) -> Figure:
    """What is left of every total, in per cent of what there was.

    Args:
        totals: ``(label, unit, before, after)``.
    """
    figure, axes = _canvas(height=0.75 + 0.42 * len(totals))
    shares = [100 * after / before if before else 100.0 for _, _, before, after in totals]
    positions = range(len(totals))
    axes.barh(positions, [100] * len(totals), height=0.62, color=DENSE)
    axes.barh(positions, shares, height=0.62, color=KEPT)
    for y, (share, (_, unit, before, after)) in enumerate(zip(shares, totals, strict=True)):
        ratio = f"{before / after:.2f}×" if after else "∞"
        axes.text(max(share, 100) + 1.5, y, f"{human(before, unit)} → {human(after, unit)}", va="center", color=INK)
        axes.text(max(share, 100) + 40, y, ratio, va="center", ha="right", color=INK, weight="bold")
    axes.set_yticks(positions, [label for label, *_ in totals])
    axes.invert_yaxis()
    axes.set_xlim(0, max([100, *shares]) + 41)
    axes.set_xticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)])
    axes.tick_params(axis="y", length=0)
    _title(axes, "What is left")
    return figure


def heat_map(
    values: Tensor,
    *,
    title: str,
    row_label: str = "",
    column_label: str = "",
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> Figure:
    """A matrix as colours, with a scale.

    Args:
        values: (rows, columns); entries that are not finite stay white.
        title: above it.
        row_label, column_label: what the axes are.
        rows, columns: their names, where there are names; of many, only some are written.
    """
    height, width = values.shape
    figure, axes = _canvas(height=min(9.0, max(2.6, 1.4 + 0.16 * height)))
    matrix = values.detach().float().cpu()
    image = axes.imshow(matrix.numpy(), aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(image, ax=axes, fraction=0.025, pad=0.01).outline.set_visible(False)
    axes.set_xlabel(column_label, color=INK)
    axes.set_ylabel(row_label)
    for names, set_ticks, count, most in ((rows, axes.set_yticks, height, 40), (columns, axes.set_xticks, width, 24)):
        if names:
            step = max(1, -(-count // most))
            set_ticks(range(0, count, step), [_short(name) for name in names[::step]])
    axes.tick_params(labelsize=7)
    _title(axes, title)
    return figure


def lines(series: Mapping[str, Sequence[float]], *, title: str, x_label: str, y_label: str) -> Figure:
    """Curves over 0, 1, 2, ...

    Args:
        series: name -> values.
        title, x_label, y_label: what it shows.
    """
    figure, axes = _canvas(height=3.4)
    for name, values in series.items():
        axes.plot(range(len(values)), values, label=name)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label)
    axes.yaxis.grid(True, color=GRID)
    if len(series) > 1:
        axes.legend(frameon=False)
    _title(axes, title)
    return figure


def _canvas(height: float) -> tuple[Figure, Axes]:
    """A figure with no backend behind it (pyplot would keep it alive), and its only axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=INK, length=0)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", color=INK, weight="bold", pad=12)


def _short(name: str) -> str:
    """The last parts of a layer's name, which are the ones that tell it from its neighbours."""
    return name if len(name) <= 18 else "…" + name[-17:]
