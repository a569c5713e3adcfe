"""The table itself: every ready method is in it, and one that is a module is built from its recipe."""

from __future__ import annotations

from dataclasses import replace

from method_table import ARGUMENTS, CASES, METHODS, Case

from lightning_compress.callbacks import HRank
from lightning_compress.catalog import READY, card, cards
from lightning_compress.datamodules import Digits
from lightning_compress.modules import ImageClassifier


def test_every_ready_method_is_checked() -> None:
    assert [case.card for case in METHODS] == list(cards(READY))
    assert {key.partition(" ")[0] for key in ARGUMENTS} <= {case.card.slug for case in METHODS}
    assert len({str(case) for case in CASES}) == len(CASES)


def test_a_method_that_is_a_module_comes_as_in_its_recipe() -> None:
    classifier = replace(card("hrank"), class_path="lightning_compress.modules.ImageClassifier")
    parts = Case(classifier, "", {"label_smoothing": 0.25}).parts()
    assert isinstance(parts.module, ImageClassifier)
    assert parts.module.label_smoothing == 0.25
    assert isinstance(parts.data["datamodule"], Digits)
    assert any(isinstance(callback, HRank) for callback in parts.callbacks)
