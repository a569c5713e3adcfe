"""The page: complete, self-contained, and right about what it reads."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_compress.cli.report_html import _ticks, render_report
from lightning_compress.core.profile import Latency
from lightning_compress.core.report import Account, LayerRow, Measurement

VOID = {"meta", "img", "line", "circle", "polyline", "i"}


class Checker(HTMLParser):
    """Fails on tags that do not match; gathers what a browser would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def layer(name: str, width: int, macs: int) -> LayerRow:
    return LayerRow(name, "conv", width, macs, macs, params=macs // 10, nonzeros=macs // 10, bits=32, bytes=macs)


def account(kept: int) -> Account:
    latency = Latency(2.0, "A <fast> Processor", 1, 2)
    before = Measurement((layer("net.a", 16, 3_000_000), layer("net.b", 16, 1_000_000)), 5000, latency)
    after = Measurement((layer("net.a", kept, 187_500 * kept), layer("net.b", 16, 1_000_000)), 4000, latency)
    return Account(before, after, ["Notes & <tags>"], [("net.b", "it is last")])


@pytest.fixture
def runs(tmp_path):
    """Three runs: CSV and account, TensorBoard and account, CSV alone."""
    for name, kept in [("logs/one", 8), ("logs/two", 4)]:
        account(kept).save(tmp_path / name)
    (tmp_path / "logs/one/metrics.csv").write_text(
        "epoch,step,train/loss,val/acc,compression/macs\n0,3,2.0,,\n0,3,,0.5,\n1,7,1.0,,\n1,7,,0.75,\n1,8,,,9\n"
    )
    (tmp_path / "logs/one/config.yaml").write_text("seed: 1 # <x>\n")
    with SummaryWriter(tmp_path / "logs/two") as writer:
        for step, value in enumerate([0.25, 0.875]):
            writer.add_scalar("val/acc", value, step)
    (tmp_path / "logs/three").mkdir()
    (tmp_path / "logs/three/metrics.csv").write_text("step,train/loss\n1,0.9\n2,nan\n3,0.7\n")
    return tmp_path / "logs"


def test_page_of_several_runs(runs):
    page = render_report([runs])
    checker = Checker(page)
    assert all(source.startswith("data:image/png;base64,") for source in checker.sources)
    assert len(checker.sources) == 4  # two pictures of each account
    assert not re.search(r"https?://|@import|url\(", page)
    headings = re.findall(r"<h2>([^<]*)</h2>", page)
    assert headings == ["Overview", "Charts", "one", "three", "two"]
    overview = page[page.index("Overview") : page.index("Charts")]
    assert "0.7500" in overview  # the last val/acc of each
    assert "0.8750" in overview
    assert "2.5 M" in overview
    assert "-37.5 %" in overview
    titles = re.findall(r'class="title"[^>]*>([^<]*)<', page)
    assert titles == ["val/acc against MACs", "train/loss", "val/acc"]
    assert "<b>net.b</b>: it is last" in page
    assert "Notes &amp; &lt;tags&gt;" in page
    assert "A &lt;fast&gt; Processor" in page
    assert "seed: 1 # &lt;x&gt;" in page
    assert "3 → 1.5 M" in page
    assert "2 layers" in page


def test_front_of_accuracy_against_cost(runs):
    """`two` costs less and is better than `one`: the front is `two` alone."""
    page = render_report([runs / "one", runs / "two"])
    (front,) = re.findall(r'<polyline points="([^"]*)" fill="none" class="front"', page)
    assert len(front.split()) == 1
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"[^>]*><title>(\w+): ([^<]*)', page)
    at = {name: (float(x), float(y)) for x, y, name, _ in circles}
    assert at["two"][0] < at["one"][0]
    assert at["two"][1] < at["one"][1]  # y grows downwards


def test_page_of_one_run(runs):
    page = render_report([str(runs / "two")])
    Checker(page)
    assert "<h1>Compression report: two</h1>" in page
    assert "against MACs" not in page


def test_run_without_account(runs):
    page = render_report([runs / "three"])
    Checker(page)
    assert "train/loss" in page
    assert "nan" not in page.lower().replace("background", "")


def test_folders_that_are_no_runs(runs, tmp_path):
    with pytest.raises(ValueError, match=r"runs: there is no folder '.*absent'"):
        render_report([tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"'.*empty' holds no run, that is none of compression.json, metrics.csv"):
        render_report([tmp_path / "empty"])
    (runs / "one" / "compression.json").write_text('{"before": {')
    with pytest.raises(ValueError, match=r"compression.json' is not a whole account"):
        render_report([runs])
    (runs / "one" / "compression.json").write_text('{"before": {}}')
    with pytest.raises(ValueError, match=r"it lacks after, convention, left_alone, metrics, notes, rows"):
        render_report([runs])


@pytest.mark.parametrize("values", [[0.31, 0.94], [5.0], [0.0], [-3e-6, 2e-6], [1e9, 4.2e9], [-7.0, -7.0]])
def test_ticks_enclose_the_values(values):
    ticks = _ticks(values)
    assert ticks[0] <= min(values)
    assert ticks[-1] >= max(values)
    assert 2 <= len(ticks) <= 8
    steps = {round((b - a) / (ticks[1] - ticks[0]), 6) for a, b in pairwise(ticks)}
    assert steps == {1.0}
