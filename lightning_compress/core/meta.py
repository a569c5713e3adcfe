"""Run a network once without computing anything: on meta tensors, in eval mode, leaving it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Observer = TypeVar("Observer")


def as_inputs(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, a shape of ints, a tuple of arguments or a dict of keyword arguments -> (args, kwargs)."""
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    if isinstance(example_input, (tuple, list)):
        if example_input and all(isinstance(size, int) for size in example_input):
            return (torch.zeros(*example_input),), {}
        return tuple(example_input), {}
    return (example_input,), {}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no compilation; every submodule's own mode is put back."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for m, mode in modes:
            m.training = mode


def dry_run(
    module: nn.Module,
    example_input: Any,
    observe: Callable[[dict[str, Tensor]], AbstractContextManager[Observer]],
) -> tuple[Observer, Any]:
    """Run `module` under `observe(tensors)`, where `tensors` are the named parameters and buffers that it will use.

    They are meta tensors: no memory, no arithmetic. A module that holds plain tensors, which a meta run cannot mix
    with, runs on its own tensors instead.

    Returns:
        What `observe` yielded, and the output.
    """
    args, kwargs = as_inputs(example_input)
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    device = next((t.device for t in own.values()), torch.device("cpu"))
    for target in ("meta", device):
        tensors = {k: t.detach().to("meta") for k, t in own.items()} if target == "meta" else own
        a, k = tree_map_only(Tensor, lambda t: t.to(target), (args, kwargs))  # noqa: B023
        try:
            with evaluating(module), observe(tensors) as observer:
                return observer, torch.func.functional_call(module, tensors, a, k)
        except Exception:
            if target != "meta":
                raise
    raise AssertionError("unreachable")
