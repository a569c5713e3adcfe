"""Choosing modules by name: glob patterns that must match something, and answers to mistyped names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def nearest(name: str, choices: Iterable[str], n: int = 3) -> list[str]:
    """Return up to ``n`` of ``choices`` that are spelt most like ``name``, best first; case is ignored.

    >>> nearest("hrnak", ["HRank", "L1Norm", "FilterSketch"])
    ['HRank']
    """
    spelling: dict[str, str] = {}
    for choice in choices:
        spelling.setdefault(choice.lower(), choice)
    # 0.5 (difflib's own default is 0.6) still finds "layer1.0.conv1" for "layer1.conv"
    close = difflib.get_close_matches(name.lower(), list(spelling), n=n, cutoff=0.5)
    return [spelling[lowered] for lowered in close]


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """End an error message: the nearest of ``choices`` as a question, or nothing when none is near.

    >>> did_you_mean("hrnak", ["HRank", "L1Norm"])
    " Did you mean 'HRank'?"
    >>> did_you_mean("quux", ["HRank", "L1Norm"])
    ''
    """
    close = nearest(name, choices)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def match(names: Iterable[str], patterns: Sequence[str], argument: str) -> list[str]:
    """Return the names that any pattern matches, in the order of ``names``.

    Args:
        names: what there is, usually dotted module names.
        patterns: globs (``*``, ``?``, ``[...]``; ``*`` also crosses dots), upper and lower case apart.
            A single string counts as one pattern.
        argument: the argument the patterns came from, for the error message.

    Raises:
        ValueError: a pattern matches nothing.

    >>> match(["conv1", "layer1.conv", "layer2.conv"], ["layer?.*"], "include")
    ['layer1.conv', 'layer2.conv']
    """
    names = list(names)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            hint = did_you_mean(pattern.replace("*", ""), names)
            raise ValueError(f"{argument}: {pattern!r} matches no name.{hint or _there_is(names)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _there_is(names: Sequence[str], show: int = 6) -> str:
    """Name the first few names there are."""
    if not names:
        return " There is nothing to match."
    more = f" and {len(names) - show} more" if len(names) > show else ""
    return f" There is: {', '.join(names[:show])}{more}."
