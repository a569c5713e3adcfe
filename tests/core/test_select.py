from __future__ import annotations

import pytest

from lightning_compress.core.select import did_you_mean, match, nearest

NAMES = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "linear"]


def test_nearest_ignores_case_and_puts_the_best_first() -> None:
    assert nearest("FILTERSKETCH", ["HRank", "FilterSketch"]) == ["FilterSketch"]
    assert nearest("layer1.0.conv", NAMES)[0] in ("layer1.0.conv1", "layer1.0.conv2")
    assert nearest("conv", NAMES, n=1) == ["conv1"]
    assert nearest("quux", NAMES) == []


def test_nearest_keeps_the_first_of_names_that_differ_in_case_alone() -> None:
    assert nearest("relu", ["ReLU", "relu"]) == ["ReLU"]


def test_did_you_mean_reads_as_the_end_of_a_sentence() -> None:
    assert did_you_mean("liner", NAMES) == " Did you mean 'linear'?"
    assert did_you_mean("cubik", ["cubic", "cubicle"]) == " Did you mean 'cubic' or 'cubicle'?"
    assert did_you_mean("quux", NAMES) == ""


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*"], NAMES),
        (["linear", "conv1"], ["conv1", "linear"]),  # the order of the names
        (["layer1.*", "*.conv1"], NAMES[1:4]),  # a star crosses dots; a name matched twice comes once
        (["layer[12].0.conv?"], NAMES[1:4]),
        ("layer2.*", ["layer2.0.conv1"]),  # one string is one pattern, not its letters
        ([], []),
    ],
)
def test_match(patterns: list[str], expected: list[str]) -> None:
    assert match(iter(NAMES), patterns, "include") == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layer1.0.cnv1", r"exclude: 'layer1.0.cnv1' matches no name. Did you mean 'layer1.0.conv1'"),
        ("Conv1", "exclude: 'Conv1' matches no name. Did you mean 'conv1'"),  # case counts
        ("zzz*", "exclude: 'zzz\\*' matches no name. There is: conv1, layer1.0.conv1, .*, linear."),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match(NAMES, ["*", pattern], "exclude")


def test_nothing_to_match() -> None:
    with pytest.raises(ValueError, match="There is nothing to match"):
        match([], ["*"], "include")


def test_long_lists_are_cut_short() -> None:
    with pytest.raises(ValueError, match=r"b0, b1, b2, b3, b4, b5 and 14 more\.$"):
        match([f"b{i}" for i in range(20)], ["?"], "include")
