"""What a network cost before and after compression: as a table, as metrics, as JSON, as pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lightning_compress._version import __version__
from lightning_compress.core import plots
from lightning_compress.core.measurement import LayerRow, Measurement
from lightning_compress.core.profile import Latency
from lightning_compress.core.units import TOTALS, human, span

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "compression.json"
CONVENTION = "MACs: multiply-accumulates of convolutions, linear layers and matrix products, for one image"
STYLE: dict[str, Any] = {
    "box": box.SIMPLE_HEAD,
    "padding": (0, 1, 0, 0),
    "title_style": "bold",
    "title_justify": "left",
    "caption_justify": "left",
}
Layer = tuple[LayerRow, LayerRow | None, LayerRow | None]


def _versions() -> dict[str, str]:
    return {
        "lightning_compress": __version__,
        "torch": torch.__version__,
        "lightning": version("lightning"),
    }


@dataclass
class Account:
    """A network before and after compression. ``rich.print(account)`` shows :meth:`table`.

    Attributes:
        before: the dense network.
        after: the compressed one.
        notes: what the methods have to say, one sentence each.
        left_alone: layers that were not compressed, and why: ``(name or glob, reason)``.
        versions: of this library, torch and lightning.
    """

    before: Measurement
    after: Measurement
    notes: list[str] = field(default_factory=list)
    left_alone: list[tuple[str, str]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=_versions)

    def layers(self) -> list[Layer]:
        """``(row, before, after)`` in the order of execution; one that came or went has None on one side."""
        before = {row.name: row for row in self.before.rows}
        after = {row.name: row for row in self.after.rows}
        order: dict[str, None] = {}
        waiting = list(before)
        for name in after:
            while name in waiting:  # what stood before it comes first, also if it is gone
                order[waiting.pop(0)] = None
            order[name] = None
        order.update(dict.fromkeys(waiting))
        return [(after.get(name) or before[name], before.get(name), after.get(name)) for name in order]

    def totals(self) -> dict[str, tuple[float, float]]:
        """``attribute of Measurement -> (before, after)`` of all that was counted and measured."""
        both = {name: (getattr(self.before, name), getattr(self.after, name)) for name in TOTALS}
        return {name: (b, a) for name, (b, a) in both.items() if b is not None and a is not None}

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger.

        ``compression/macs`` and so on for all of :meth:`totals` after compression, with
        ``compression/macs_cut``, the share of it that was saved; ``compression/sparsity``, the share of
        parameters that are zero; and ``compression/speedup``, latency before / after.
        """
        found: dict[str, float] = {}
        for name, (before, after) in self.totals().items():
            found[f"compression/{name}"] = float(after)
            found[f"compression/{name}_cut"] = 1 - after / before if before else 0.0
        found["compression/sparsity"] = 1 - self.after.nonzeros / max(self.after.params, 1)
        if "compression/latency_ms" in found:
            before, after = self.totals()["latency_ms"]
            found["compression/speedup"] = before / after
        return found

    def table(self, max_layers: int = 40) -> RenderableType:
        """For ``rich.print``: totals, layers (``max_layers`` at most; no norms, no ranges of quantisers), notes."""
        lines = [Text(f"• {note}") for note in self.notes]
        lines += [Text.assemble("• left alone: ", (name, "bold"), f": {why}") for name, why in self.left_alone]
        return Group(self._totals_table(), self._layers_table(max_layers), Padding(Group(*lines), (0, 1)))

    __rich__ = table

    def save(self, folder: str | Path) -> Path:
        """Write ``compression.json`` and, where matplotlib is installed, ``compression_*.png`` into a folder.

        Returns:
            The path of the JSON file.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        path.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for name, figure in self.figures().items():
            figure.savefig(folder / f"compression_{name}.png")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Account:
        """Read a ``compression.json``, or the one in a folder.

        Raises:
            ValueError: there is none, or it is not whole.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"path: there is no {FILE} at {str(path)!r}")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"path: {str(path)!r} is not a whole account ({reason})") from error

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON; :meth:`from_dict` reads it back."""
        return {
            "versions": self.versions,
            "device": self.after.latency.device_name if self.after.latency else None,
            "convention": CONVENTION,
            "before": _totals(self.before),
            "after": _totals(self.after),
            "metrics": self.metrics(),
            "rows": [
                {"name": row.name, "before": _cells(before), "after": _cells(after)}
                for row, before, after in self.layers()
            ],
            "notes": self.notes,
            "left_alone": [{"name": name, "reason": reason} for name, reason in self.left_alone],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Account:
        """The account that :meth:`to_dict` described."""
        sides = []
        for side in ("before", "after"):
            totals = data[side]
            rows = tuple(LayerRow(name=row["name"], **row[side]) for row in data["rows"] if row[side])
            latency = Latency(**totals["latency"]) if totals["latency"] else None
            sides.append(Measurement(rows, totals["disk_bytes"], latency))
        left_alone = [(entry["name"], entry["reason"]) for entry in data["left_alone"]]
        return cls(sides[0], sides[1], list(data["notes"]), left_alone, dict(data["versions"]))

    def figures(self) -> dict[str, Figure]:
        """``layers`` and ``summary`` as matplotlib figures; empty without matplotlib."""
        if not plots.available():
            return {}
        wide = [layer for layer in self.layers() if layer[0].width and layer[0].kind in ("conv", "linear")]
        return {
            "layers": plots.widths(
                [row.name.removeprefix(_shared_prefix(wide)) for row, _, _ in wide],
                [(before and before.width) or 0 for _, before, _ in wide],
                [(after and after.width) or 0 for _, _, after in wide],
            ),
            "summary": plots.summary([(*TOTALS[name], *values) for name, values in self._told()]),
        }

    def _told(self) -> list[tuple[str, tuple[float, float]]]:
        """The totals that say something: not the MACs of non-zero weights where no weight is zero."""
        totals = self.totals()
        pairs = zip(totals["effective_macs"], totals["macs"], strict=True)
        if all(effective > 0.999 * macs for effective, macs in pairs):  # a weight may be zero by chance
            del totals["effective_macs"]
        return list(totals.items())

    def _totals_table(self) -> Table:
        table = Table(title="before and after", **STYLE)
        table.add_column("")
        for heading in ("before", "after", "change", "ratio"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, (before, after) in self._told():
            label, unit = TOTALS[name]
            style = "green" if after < before else "red" if after > before else "dim"
            change = f"{100 * (after / before - 1):+.1f} %" if before else "n/a"
            ratio = f"{before / after:.2f}×" if after else "∞"
            table.add_row(label, human(before, unit), human(after, unit), Text(change, style), Text(ratio, style))
        if latency := self.after.latency:
            threads = f", {latency.threads} thread{'s' * (latency.threads > 1)}" if latency.threads else ""
            table.caption = f"latency: a batch of {latency.batch} on {latency.device_name}{threads}, median"
        return table

    def _layers_table(self, max_layers: int) -> Table:
        layers = [layer for layer in self.layers() if layer[0].kind not in ("batchnorm", "norm")]
        layers = [layer for layer in layers if layer[1] or layer[0].macs]  # not the ranges of quantisers
        sparse = any(row.nonzeros < 0.99 * row.params for row, _, _ in layers)  # a bias of zeros is not sparsity
        quantised = any(before and after and before.bits != after.bits for _, before, after in layers)
        columns = ["width", "macs", "params", *["zeros"] * sparse, *["bits"] * quantised]
        headings = {"width": "channels", "macs": "MACs", "zeros": "zeros %"}
        prefix = _shared_prefix(layers)
        table = Table(title=f"layers of {prefix[:-1]}" if prefix else "layers", **STYLE)
        table.add_column("", overflow="fold")
        for column in columns:
            table.add_column(headings.get(column, column), justify="right", no_wrap=True)
        table.add_column("left", no_wrap=True)
        hidden = max(0, len(layers) - max_layers)
        if hidden:
            start = max_layers // 2
            del layers[start : start + hidden]
            table.caption = f"{hidden} layers in the middle are left out; {FILE} has all"
        for row, before, after in layers:
            cells = [_zeros(row) if column == "zeros" else _change(before, after, column) for column in columns]
            table.add_row(row.name.removeprefix(prefix) or "(itself)", *cells, _bar(before, after))
        return table


def _shared_prefix(layers: list[Layer]) -> str:
    """What all names begin with, up to a dot: mostly the attribute that holds the network."""
    paths = zip(*(row.name.split(".")[:-1] for row, _, _ in layers), strict=False)
    shared = takewhile(lambda parts: len(set(parts)) == 1, paths)
    return "".join(f"{parts[0]}." for parts in shared)


def _totals(measurement: Measurement) -> dict[str, Any]:
    counted = {name: getattr(measurement, name) for name in TOTALS if name != "latency_ms"}
    return {**counted, "latency": asdict(measurement.latency) if measurement.latency else None}


def _cells(row: LayerRow | None) -> dict[str, Any] | None:
    return {key: value for key, value in asdict(row).items() if key != "name"} if row else None


def _change(before: LayerRow | None, after: LayerRow | None, attribute: str) -> str:
    """``16 → 8``, ``16`` if it stays, an en dash on the side where there is nothing."""
    old, new = (getattr(row, attribute, None) for row in (before, after))
    if attribute in ("macs", "params") and old is not None and new is not None:
        return span(old, new)
    old, new = ("–" if value is None else human(value) for value in (old, new))
    return old if old == new else f"{old} → {new}"


def _zeros(row: LayerRow) -> str:
    return f"{100 * (1 - row.nonzeros / row.params):.1f}" if row.params else ""


def _bar(before: LayerRow | None, after: LayerRow | None, cells: int = 8) -> Text:
    """The share of a layer's MACs that is left, zero weights not counted."""
    if not before or not after:
        return Text("removed" if before else "new", "dim")
    if not before.effective_macs:
        return Text()
    full = min(cells, round(cells * after.effective_macs / before.effective_macs))
    return Text.assemble(("█" * full, "green"), ("░" * (cells - full), "dim"))
