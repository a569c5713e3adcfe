from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_compress.core.ratio import parse_ratio, ratio_by_layer

NAMES = ["conv1", "layer1.conv", "layer2.conv", "linear"]


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        (0.5, 0.5),
        (0, 0.0),
        (np.float32(0.25), 0.25),
        ("0.5", 0.5),
        (" .5 ", 0.5),
        ("5e-1", 0.5),
        ([0.1, 0], [0.1, 0.0]),
        ((0.3,), [0.3]),
        ("[0.3]", [0.3]),
        ("[0.1,0.2]*2", [0.1, 0.2, 0.1, 0.2]),
        (" [ 0.1 ] * 2 + [0.9] ", [0.1, 0.1, 0.9]),
        ("[0.1]+[0.6]*35", [0.1] + [0.6] * 35),
        ("[0.1]+[0.6]*35+[0.0]*2+[0.6]*6", [0.1] + [0.6] * 35 + [0.0] * 2 + [0.6] * 6),
    ],
)
def test_parse(given_: object, expected: float | list[float]) -> None:
    parsed = parse_ratio(given_)  # type: ignore[arg-type]
    assert parsed == expected
    assert all(type(entry) is float for entry in (parsed if isinstance(parsed, list) else [parsed]))


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])  # busy machines
@given(st.lists(st.tuples(st.lists(st.floats(0, 1, exclude_max=True), min_size=1), st.integers(1, 5)), min_size=1))
def test_what_is_written_is_read(terms: list[tuple[list[float], int]]) -> None:
    text = "+".join(f"{entries}*{times}" for entries, times in terms)
    assert parse_ratio(text) == [entry for entries, times in terms for entry in entries * times]


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ("abc", "pruning_ratio 'abc': 'abc' is not a number"),
        ("", "'' is not a number"),
        ("1.0", r"pruning_ratio '1.0': 1.0 is outside \[0, 1\)"),
        (1, r"pruning_ratio: 1 is outside \[0, 1\)"),
        (-0.1, r"-0.1 is outside \[0, 1\)"),
        (float("nan"), r"nan is outside \[0, 1\)"),
        (True, "expected a number, got True"),
        ([0.1, "x"], "entry 2: expected a number, got 'x'"),
        ([0.1, 0.2, 1.5], r"entry 3: 1.5 is outside \[0, 1\)"),
        ("[0.1]+[2]", r"entry 2: 2.0 is outside \[0, 1\)"),
        ("[0.1]*3+[0.2, ]", "entry 5: '' is not a number"),
        ("[0.1]*3.5", "at character 8, found '.5'"),
        ("[0.1]*0", "at character 6, found '\\*0'"),
        ("[0.1]*", "at character 6, found '\\*'"),
        ("[0.1]+", r"expected a list such as \[0.6\] or \[0.6\]\*35 at character 7, found the end"),
        ("[0.1][0.2]", r"expected '\+', '\*' and a whole number, or the end at character 6"),
        ("[0.1", "at character 1, found"),
        ("0.1*[3]", "at character 1, found"),
        ("__import__('os').getcwd()+[0.1]", "at character 1, found"),
    ],
)
def test_parse_errors_say_where(given_: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_ratio(given_)  # type: ignore[arg-type]


def test_the_argument_is_named() -> None:
    with pytest.raises(ValueError, match=r"^keep_ratio: entry 1"):
        parse_ratio([2.0], "keep_ratio")


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.5, [0.5, 0.5, 0.5, 0.5]),
        ("0.5", [0.5, 0.5, 0.5, 0.5]),
        ([0.1, 0.2, 0.3, 0], [0.1, 0.2, 0.3, 0.0]),
        ("[0.1]+[0.2]*3", [0.1, 0.2, 0.2, 0.2]),
        ({"layer?.*": 0.5}, [0.0, 0.5, 0.5, 0.0]),
        ({"*": 0.5, "layer1.*": 0.1, "linear": 0}, [0.5, 0.1, 0.5, 0.0]),
        ({"linear": 0, "*": 0.5}, [0.5, 0.5, 0.5, 0.5]),  # the later glob wins
        ({}, [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_by_layer(ratio: object, expected: list[float]) -> None:
    assert ratio_by_layer(ratio, NAMES) == dict(zip(NAMES, expected, strict=True))  # type: ignore[arg-type]
    assert list(ratio_by_layer(ratio, NAMES)) == NAMES  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        ("[0.1]*3", "pruning_ratio: 3 entries for 4 layers \\(conv1, layer1.conv, layer2.conv, linear\\)"),
        ({"layer1.cnv": 0.5}, "pruning_ratio: 'layer1.cnv' matches no name. Did you mean 'layer1.conv'"),
        ({"linear": 1.0}, r"pruning_ratio\['linear'\]: 1.0 is outside \[0, 1\)"),
        ({"linear": [0.1]}, r"pruning_ratio\['linear'\]: expected a number, got \[0.1\]"),
    ],
)
def test_by_layer_errors(ratio: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ratio_by_layer(ratio, NAMES)  # type: ignore[arg-type]


def test_many_layers_are_not_all_listed() -> None:
    with pytest.raises(ValueError, match=r"2 entries for 9 layers \(0, 1, 2, 3, \.\.\.\)"):
        ratio_by_layer([0.1, 0.2], list("012345678"))
