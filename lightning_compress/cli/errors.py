"""Turns jsonargparse's long reports into one line that names the nearest valid words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from inspect import Parameter, signature

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_compress.core.select import did_you_mean

_OPTIONS = ("config", "data", "model", "optimizer", "lr_scheduler", "ckpt_path", "seed_everything")


def explain(message: str) -> str:
    """Shorten a parser's message to what is wrong and what was probably meant; others stay as they are."""
    *_, inner = re.split(r'(?=Parser key ")', message)  # the last report is the deepest, and says the reason
    key = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    if option := re.search(r"(?:does not accept option '|unrecognized arguments: --)([\w.]+)", message):
        known = [*_OPTIONS, *(f"trainer.{name}" for name in signature(Trainer).parameters)]
        return f"there is no option {option[1]!r}.{did_you_mean(option[1], known)}"
    if argument := re.search(r"given class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted", inner):
        return _no_argument(*argument.groups())
    given = re.search(r"(?:Given|Got) value: (.*)", inner)
    if expected := _expected(inner):
        value = re.sub(r"NestedArg\(key='.*?', val='(.*)'\)", r"\1", given[1]) if given else ""
        names = re.findall(r"'([^']+)'", " ".join(expected))
        return f"{key}: expected {' or '.join(expected)}, got {value!r}.{did_you_mean(value, names)}"
    if cls := re.search(r"Expected a dot import path string: ([\w.]+)", inner):
        return _no_class(cls[1], key)
    if cls := re.search(r"given class_path '([\w.]+)':\s+(?:No module named|module .* has no attribute)", inner):
        return _no_class(cls[1], key)
    if re.search(r"arguments are required: (\w+\.)?model", message):
        return "there is no model: name a config, as in `lc fit --config quickstart`."
    return message.strip().removesuffix(".") + "."


def _expected(report: str) -> list[str]:
    """The plain types and choices that a value could have had."""
    types = re.findall(r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[(.*)\])", report)
    return [name or f"one of {choices}" for name, choices in types if name != "NoneType"]


def _no_argument(path: str, argument: str) -> str:
    cls = next((c for c in known_classes() if c.__name__ == path.rpartition(".")[2]), None)
    known = _arguments(cls) if cls else []
    return f"{path.rpartition('.')[2]} has no argument {argument!r}.{did_you_mean(argument, known)}"


def _no_class(path: str, key: str) -> str:
    names = sorted({c.__name__ for c in known_classes()})
    return f"{key}: there is no class {path!r}.{did_you_mean(path.rpartition('.')[2], names)}"


def _arguments(cls: type) -> list[str]:
    """Names of the arguments of `cls`, those it hands on to its bases included."""
    found: list[str] = []
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = signature(vars(base)["__init__"]).parameters.values()
            found += [p.name for p in parameters if p.kind is not Parameter.VAR_KEYWORD]
            if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
                break
    return [name for name in found if name != "self"]


def known_classes() -> Iterator[type]:
    """Classes that a config may name by a short name: those that are imported."""
    todo: list[type] = [Callback, LightningModule, LightningDataModule, Optimizer, LRScheduler]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if not cls.__name__.startswith("_"):
            yield cls
