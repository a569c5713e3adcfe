"""`lc schema`: a JSON schema of the configs, with which editors complete and check them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import DocstringStyle, parse
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_compress.cli import lightning_cli  # noqa: F401  (its imports are the classes that there are)
from lightning_compress.cli.errors import known_classes

GOOGLE = DocstringStyle.GOOGLE
PLAIN = {bool: "boolean", int: "integer", float: "number", str: "string", NoneType: "null", dict: "object"}
PLAIN |= dict.fromkeys((list, tuple, set), "array")
KINDS = {"callback": Callback, "model": LightningModule, "data": LightningDataModule}
KINDS |= {"optimizer": Optimizer, "lr_scheduler": LRScheduler}


def main(args: Sequence[str]) -> None:
    """Print the schema. In a YAML file, `# yaml-language-server: $schema=lc.json` on top makes editors use it."""
    argparse.ArgumentParser("lc schema", description=__doc__, epilog=main.__doc__).parse_args(args)
    print(json.dumps(config_schema(), indent=1))


def config_schema() -> dict[str, Any]:
    """The schema of what `lc fit --config` reads, for the classes that are imported."""
    callbacks = {"anyOf": [_ref("callback"), {"type": "array", "items": _ref("callback")}, {"type": "null"}]}
    trainer = _arguments(Trainer) | {"callbacks": callbacks, "callbacks+": callbacks}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "lightning-compress config",
        "type": "object",
        "properties": {
            "seed_everything": {"type": ["boolean", "integer"]},
            "trainer": {"type": "object", "properties": trainer, "additionalProperties": False},
            **{kind: {"anyOf": [_ref(kind), {"type": "null"}]} for kind in KINDS if kind != "callback"},
            "ckpt_path": {"type": ["string", "null"]},
            "weights_only": {"type": ["boolean", "null"]},
        },
        "additionalProperties": False,
        "definitions": {kind: _class(base) for kind, base in KINDS.items()},
    }


def _ref(kind: str) -> dict[str, Any]:
    return {"$ref": f"#/definitions/{kind}"}


def _class(base: type) -> dict[str, Any]:
    """A class and its arguments: a bare name, or `class_path` with `init_args` that fit it."""
    classes = {cls.__name__: cls for cls in known_classes() if issubclass(cls, base) and cls is not base}
    fitting = [
        {
            "if": {"properties": {"class_path": {"pattern": rf"(^|\.){name}$"}}},
            "then": {"properties": {"init_args": {"properties": _arguments(cls), "additionalProperties": False}}},
        }
        for name, cls in sorted(classes.items())
    ]
    choices = {"anyOf": [{"enum": sorted(classes)}, {"type": "string"}]}
    settings = {"class_path": choices, "init_args": {"type": "object"}, "dict_kwargs": {"type": "object"}}
    whole = {"type": "object", "properties": settings, "required": ["class_path"], "allOf": fitting}
    return {"anyOf": [choices, whole]}


def _arguments(cls: type) -> dict[str, Any]:
    """Argument → its schema, for those of `cls` and of the bases that it hands the rest on to."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        if init is None:
            continue
        parameters = signature(init).parameters.values()
        texts = {
            p.arg_name: p.description for text in (base.__doc__, init.__doc__) for p in parse(text or "", GOOGLE).params
        }
        for p in parameters:
            if p.name != "self" and p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
                text = {"description": texts[p.name]} if texts.get(p.name) else {}
                found.setdefault(p.name, _type(_hints(init).get(p.name)) | text)
        if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
            break
    return found


def _hints(init: Any) -> Mapping[str, Any]:
    try:
        return get_type_hints(init)
    except (NameError, TypeError):  # names that are imported for type checkers alone
        return {}


def _type(hint: Any) -> dict[str, Any]:
    """The schema of a type; empty, so that everything fits, for those that YAML writes in ways of their own."""
    if hint in (OptimizerCallable, LRSchedulerCallable):
        return _ref("optimizer" if hint is OptimizerCallable else "lr_scheduler")
    origin = get_origin(hint) or hint
    if origin in (Union, UnionType):
        options = [_type(option) for option in get_args(hint)]
        return {"anyOf": options} if all(options) else {}
    if origin is Literal:
        return {"enum": list(get_args(hint))}
    if origin is Sequence:
        return {"type": ["array", "string"]}
    return {"type": PLAIN[origin]} if isinstance(origin, type) and origin in PLAIN else {}
