"""Griffe extension: turns doctests, literal blocks and roles of docstrings into Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?P=indent)\S.*)*", re.MULTILINE)
LITERAL = re.compile(r"^(?P<indent> *)(?P<lead>\S.*)?::\n\n(?P<block>(?:(?P=indent) {4}.*\n?|\n)+)", re.MULTILINE)
ROLE = re.compile(r":\w+:`(?:~[\w.\s]*\.)?([\w.\s]+)`")


class Fences(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = LITERAL.sub(_literal, obj.docstring.value)
            obj.docstring.value = ROLE.sub(r"`\1`", DOCTEST.sub(_doctest, text))


def _doctest(found: re.Match[str]) -> str:
    indent = found["indent"]
    return f"{indent}```pycon\n{found[0]}\n{indent}```"


def _literal(found: re.Match[str]) -> str:
    indent, lead = found["indent"], found["lead"] or ""
    code = found["block"].rstrip().replace(f"\n{indent}    ", f"\n{indent}").removeprefix("    ")
    return f"{indent}{lead}\n\n{indent}```python\n{code}\n{indent}```\n\n"
