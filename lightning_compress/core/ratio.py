"""Ratios per layer: one number, a list, a mapping by glob, or the notation of the papers' scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Real

from lightning_compress.core.select import match

_TERM = re.compile(r"\s*\[(?P<entries>[^\[\]]*)\]\s*(?:\*\s*(?P<times>[1-9]\d*)\s*)?")


def parse_ratio(text_or_value: str | float | Sequence[float], argument: str = "pruning_ratio") -> float | list[float]:
    """Read a ratio, or a list of ratios, one per layer.

    Args:
        text_or_value: a number, a list of numbers, or text: a number, or lists that are joined by ``+``
            and repeated by ``*``, as the scripts of HRank, FilterSketch and others write them.
        argument: the argument's name, for error messages.

    Returns:
        A float for a number, a list of floats for lists.

    Raises:
        ValueError: the text cannot be read (with the position), or an entry is outside [0, 1): a layer
            cannot lose everything.

    >>> parse_ratio("[0.1] + [0.6, 0.2]*2")
    [0.1, 0.6, 0.2, 0.6, 0.2]
    >>> len(parse_ratio("[0.1]+[0.6]*35"))
    36
    >>> parse_ratio("0.5")
    0.5
    """
    if isinstance(text_or_value, str):
        return _parse_text(text_or_value, argument)
    if isinstance(text_or_value, Sequence):
        return [_checked(v, f"{argument}: entry {i}") for i, v in enumerate(text_or_value, start=1)]
    return _checked(text_or_value, argument)


def ratio_by_layer(
    ratio: float | Sequence[float] | Mapping[str, float] | str,
    names: Sequence[str],
    argument: str = "pruning_ratio",
) -> dict[str, float]:
    """Give every layer its ratio.

    Args:
        ratio: a number for all layers; a list (or its text, see `parse_ratio`) with one entry per layer
            in the order of ``names``; or a mapping from globs to numbers, where a later glob wins and
            layers that no glob matches get 0.
        names: the layers, in forward order.
        argument: the argument's name, for error messages.

    Returns:
        One ratio in [0, 1) for each name, in the order of ``names``.

    Raises:
        ValueError: wrong length, a glob that matches no layer, or what `parse_ratio` refuses.

    >>> ratio_by_layer({"*": 0.5, "stem": 0.0}, ["stem", "conv1", "conv2"])
    {'stem': 0.0, 'conv1': 0.5, 'conv2': 0.5}
    """
    if isinstance(ratio, Mapping):
        by_layer = dict.fromkeys(names, 0.0)
        for pattern, value in ratio.items():
            by_layer |= dict.fromkeys(match(names, [pattern], argument), _checked(value, f"{argument}[{pattern!r}]"))
        return by_layer
    parsed = parse_ratio(ratio, argument)
    if isinstance(parsed, float):
        return dict.fromkeys(names, parsed)
    if len(parsed) != len(names):
        first = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise ValueError(f"{argument}: {len(parsed)} entries for {len(names)} layers ({first}); give one per layer.")
    return dict(zip(names, parsed, strict=True))


def _parse_text(text: str, argument: str) -> float | list[float]:
    if "[" not in text:
        return _number(text, f"{argument} {text!r}")
    ratios: list[float] = []
    position = 0
    while True:
        term = _TERM.match(text, position)
        if term is None:
            raise _unreadable(text, position, "a list such as [0.6] or [0.6]*35", argument)
        entries = [
            _number(entry, f"{argument} {text!r}: entry {i}")
            for i, entry in enumerate(term["entries"].split(","), start=len(ratios) + 1)
        ]
        ratios += entries * int(term["times"] or 1)
        position = term.end()
        if position == len(text):
            return ratios
        if text[position] != "+":
            raise _unreadable(text, position, "'+', '*' and a whole number, or the end", argument)
        position += 1


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{what}: {text.strip()!r} is not a number.") from None
    return _checked(value, what)


def _checked(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{what}: expected a number, got {value!r}.")
    ratio = float(value)
    if not 0 <= ratio < 1:
        raise ValueError(f"{what}: {value} is outside [0, 1).")
    return ratio


def _unreadable(text: str, position: int, expected: str, argument: str) -> ValueError:
    found = repr(text[position : position + 12]) if text[position:].strip() else "the end"
    return ValueError(f"{argument} {text!r}: expected {expected} at character {position + 1}, found {found}.")
