"""Parametrised modules that can be pickled."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize


def parametrise(module: nn.Module, name: str, parametrisation: nn.Module) -> None:
    """`torch.nn.utils.parametrize.register_parametrization`, after which `module` still pickles.

    torch gives a parametrised module a class made at run time, which pickle cannot find, and so forbids pickling. Here
    the class says how it is made again.
    """
    parametrize.register_parametrization(module, name, parametrisation)
    _let_pickle(module)


def _let_pickle(module: nn.Module) -> None:
    setattr(type(module), "__reduce_ex__", _reduce)  # noqa: B010 (the class is this module's own)


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    assert isinstance(module.parametrizations, nn.ModuleDict)
    base = parametrize.type_before_parametrizations(module)
    return _rebuild, (base, list(module.parametrizations)), vars(module)


def _rebuild(base: type[nn.Module], names: list[str]) -> nn.Module:
    module = base.__new__(base)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    _let_pickle(module)
    return module
