"""The catalog: every ready method is complete, every entry is well-formed."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from lightning.pytorch import callbacks as lightning_callbacks

from lightning_compress import callbacks, datamodules, modules
from lightning_compress.catalog import CARDS, CONFIGS, PLANNED, READY, Card, card, cards, config_names

ROOT = Path(__file__).parents[1]
READY_CARDS = list(cards(READY))
# Not methods: they serve all of them.
HELPERS = {"ExportCompressed", "RestoreCompressed", "ImageClassifier", "SuperResolution"}


def by_slug(c: Card) -> str:
    return c.slug


def load(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_slugs_and_classes_are_unique():
    assert len({c.slug for c in CARDS}) == len({c.name for c in CARDS}) == len(CARDS) == 54


@pytest.mark.parametrize("c", CARDS, ids=by_slug)
def test_fields_are_well_formed(c: Card):
    assert re.fullmatch(r"[a-z][a-z0-9_]*", c.slug)
    assert re.fullmatch(r"\d{4}\.\d{4,5}", c.arxiv)
    assert re.search(r"(19|20)\d\d$", c.venue)
    assert c.class_path.startswith("lightning_compress.")
    assert c.status in (READY, PLANNED)
    assert not c.title.endswith(".")


@pytest.mark.parametrize("c", READY_CARDS, ids=by_slug)
def test_ready_methods_are_complete(c: Card):
    cls = load(c.class_path)
    assert getattr(callbacks, c.name, None) is cls or getattr(modules, c.name, None) is cls
    assert cls.__doc__
    source = importlib.import_module(c.class_path.rpartition(".")[0])
    assert f"arXiv:{c.arxiv}" in " ".join(source.__doc__.split()), "the module's docstring names the paper"
    assert f"recipes/{c.slug}/quick" in c.configs
    assert {f"method/{c.slug}", f"model/{c.slug}"} & set(c.configs)
    assert (ROOT / "docs" / "methods" / f"{c.slug}.md").is_file()


def test_every_public_class_has_a_card():
    named = {name for c in CARDS for name in (c.name, *c.also)}
    assert set(callbacks.__all__) | set(modules.__all__) <= named | HELPERS


def test_short_names_mean_one_class():
    ours = [*callbacks.__all__, *modules.__all__, *datamodules.__all__]
    assert len(ours) == len(set(ours))
    assert not set(ours) & set(lightning_callbacks.__all__)


@pytest.mark.parametrize("c", [c for c in CARDS if c.published], ids=by_slug)
def test_published_rows_have_configs_and_are_documented(c: Card):
    page = (ROOT / "docs" / "methods" / f"{c.slug}.md").read_text()
    for row in c.published:
        assert row.config in config_names()
        assert f"`{row.setting}`" in page
        costs = [f"{row.result[cost] / 1e6:.2f}M" for cost in ("macs", "params") if cost in row.result]
        assert f"| {' | '.join(costs)} |" in page
        if "top1" in row.result:
            assert f"| {row.result['top1']:.2f} % |" in page
            header = (CONFIGS / f"{row.config}.yaml").read_text()
            assert f"Published: {row.result['top1']:.2f} %" in header


def test_card_is_found_by_slug_and_class():
    assert card("filter_sketch") is card("FilterSketch")
    with pytest.raises(KeyError):
        card("nothing")
