"""One input of a network, found without asking the user where possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_compress.core.meta import as_inputs

REMEDY = "Set `self.example_input_array = torch.zeros(1, ...)`, an input of forward, in the LightningModule."


def find_example_input(trainer: Trainer, pl_module: LightningModule) -> Any:
    """Find one sample of what ``pl_module.forward`` takes.

    Its ``example_input_array`` if it has one, else from the first training batch (of the datamodule, of the
    loaders given to ``fit``, or of the module itself), after the batch transfer hooks: the first tensor of
    the batch, that is ``x`` of ``(x, y)`` and the first value of a dict. The random state is left as it was.

    Returns:
        A tensor ``(1, ...)``; a tuple or dict of such tensors if that is what ``example_input_array`` holds.

    Raises:
        MisconfigurationException: there is neither, or the batch has no tensor.
    """
    given = pl_module.example_input_array
    if given is not None:
        return tree_map_only(Tensor, _first_sample, given)
    with isolate_rng(include_cuda=torch.cuda.is_available()):
        batch = _first_batch(first_loader(training_loaders(trainer, pl_module)))
        batch = pl_module._on_before_batch_transfer(batch)
        batch = pl_module._apply_batch_transfer_handler(batch, _device(pl_module))
    tensor = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), None)
    if tensor is None:
        raise MisconfigurationException(
            f"No example input: the first training batch, a {type(batch).__name__}, has no tensor. {REMEDY}"
        )
    return _first_sample(tensor)


def inputs_for(module: nn.Module, example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments ``(args, kwargs)`` for ``module``: on its device, floating point tensors in its dtype.

    >>> args, kwargs = inputs_for(nn.Linear(4, 2).bfloat16(), (1, 4))
    >>> args[0].dtype, kwargs
    (torch.bfloat16, {})
    """
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    device = _device(module)
    return tree_map_only(
        Tensor,
        lambda t: t.to(device, dtype if t.is_floating_point() else None),
        as_inputs(example_input),
    )


def _device(module: nn.Module) -> torch.device:
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _first_sample(tensor: Tensor) -> Tensor:
    return tensor[:1].detach() if tensor.ndim else tensor.detach()


def training_loaders(trainer: Trainer, pl_module: LightningModule) -> Any:
    """The training loaders that `fit` will use, also in a callback's `setup`, before Lightning asks for them.

    Raises:
        MisconfigurationException: there are none.
    """
    source = trainer.fit_loop._data_source
    if source.instance is None or not source.is_defined():
        raise MisconfigurationException(
            f"No training data: {type(pl_module).__name__} has no `example_input_array`, and there is no"
            f" training dataloader to take an input from. {REMEDY}"
        )
    return source.dataloader()


def first_loader(loaders: Any) -> Any:
    """The loader itself, or the first in a collection of them."""
    while isinstance(loaders, (Mapping, Sequence)):
        loaders = next(iter(loaders.values() if isinstance(loaders, Mapping) else loaders))
    return loaders


def _first_batch(loader: Any) -> Any:
    """The loader's first batch, with its generator left as it was."""
    generator = getattr(loader, "generator", None)
    if generator is None:
        return next(iter(loader))
    state = generator.get_state()
    try:
        return next(iter(loader))
    finally:
        generator.set_state(state)
