"""jsonargparse's reports, shortened."""

from __future__ import annotations

import pytest

from lightning_compress import callbacks  # noqa: F401  (known classes)
from lightning_compress.cli.errors import explain, known_classes

UNION = """Parser key "{key}":
  Does not validate against any of the Union subtypes
  Errors:
    - {error}
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: {value}"""


@pytest.mark.parametrize(
    ("message", "short"),
    [
        (
            UNION.format(key="trainer.callbacks", error="Expected a dot import path string: HRnk", value="HRnk"),
            "trainer.callbacks: there is no class 'HRnk'. Did you mean 'HRank' or 'RBNN'?",
        ),
        (
            UNION.format(
                key="trainer.callbacks",
                error="Problem with given class_path 'lightning_compress.callbacks.HRank':\n"
                "        Option 'prunning_ratio' is not accepted",
                value="",
            ),
            "HRank has no argument 'prunning_ratio'. Did you mean 'pruning_ratio'",
        ),
        (
            UNION.format(key="trainer.max_epochs", error="Expected a <class 'int'>", value="many"),
            "trainer.max_epochs: expected int, got 'many'.",
        ),
        (
            UNION.format(key="trainer.precision", error="Expected a typing.Literal['16-mixed', '32']", value="16-mix"),
            "trainer.precision: expected one of '16-mixed', '32', got '16-mix'. Did you mean '16-mixed'?",
        ),
        ("Subcommand 'fit' does not accept option 'trainer.max_epoch'", "there is no option 'trainer.max_epoch'."),
        ("unrecognized arguments: --traner.max_epochs 3", "Did you mean 'trainer.max_epochs'"),
        ("the following arguments are required: fit.model", "lc fit --config quickstart"),
        ("something new", "something new."),
    ],
)
def test_explain(message: str, short: str):
    assert short in explain(message)
    assert "\n" not in explain(message)


def test_known_classes_are_public_ones_of_the_five_kinds():
    names = {cls.__name__ for cls in known_classes()}
    assert {"HRank", "SGD", "MultiStepLR", "EarlyStopping"} <= names
    assert not any(name.startswith("_") for name in names)
