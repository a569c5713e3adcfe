"""A checkpoint that describes itself.

A network that lost channels cannot load into a fresh copy of itself: the shapes differ. So the module carries a
:class:`Record` of its surgery in its own `state_dict`, and a hook that runs before any tensor is loaded replays it.
What cannot be said as cuts (a block that goes, a controller that comes) is a *change*: the name of a function marked
:func:`replayable`, and its arguments as plain data.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule
from lightning.pytorch.core.saving import _load_state
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_compress._version import __version__
from lightning_compress.core.surgery.plan import Cut
from lightning_compress.core.surgery.shrink import Swap, apply_cuts, reshape_tensors

# Whoever loads such a checkpoint plainly reads this name in torch's "unexpected key" message.
NAME = "load_this_with_lightning_compress_load"
KEY = f"{NAME}._extra_state"
# {"by": who, "epoch": when, "cuts": [(tensor, dim, size, kept), ...]}, or instead of cuts
# {"change": import path of a replayable function, "arguments": {...}}
Step = dict[str, Any]
Undo = Callable[[nn.Module], None]
Change = Callable[..., Undo]  # (module, **arguments), changes the module in place
Module = TypeVar("Module", bound=LightningModule)
_PACKAGE = __name__.partition(".")[0]


def replayable(change: Change) -> Change:
    """Mark a function of this package as one that a checkpoint may name.

    ``change(module, **arguments)`` changes the structure of a module in place, makes room for every tensor that a
    state dict will fill, and returns ``undo(module)``, which takes it back. Its arguments are primitives, lists, dicts
    and tensors. The record is copied and pickled with its module, so ``undo`` is a function of a file or a
    `functools.partial` of one, no closure.
    """
    change.replayable = True  # type: ignore[attr-defined]
    return change


def _find_change(path: str) -> Change:
    """A checkpoint may name functions of this package that are meant for it, and no others."""
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name, None) if module.startswith(f"{_PACKAGE}.") else None
    if not getattr(found, "replayable", False):
        raise ValueError(f"The recorded surgery asks for {path!r}, which this version of {_PACKAGE} does not have.")
    return found  # type: ignore[return-value]


class Record(nn.Module):
    """What was cut from the module it is attached to, step by step. Made by :func:`attach_record`."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._undos: list[Undo] = []  # one per step
        self.register_state_dict_post_hook(_leave_out_if_empty)

    def cut(self, module: nn.Module, cuts: Sequence[Cut], *, by: str, epoch: int) -> list[Swap]:
        """Cut `module` and note it: `by` whom, in which `epoch`."""
        swaps = self._cut(module, cuts)
        self.steps.append({"by": by, "epoch": epoch, "cuts": [tuple(c) for c in cuts]})
        return swaps

    def change(self, module: nn.Module, change: Change, arguments: Mapping[str, Any], *, by: str, epoch: int) -> None:
        """Change `module` by a :func:`replayable` function and note it."""
        path = f"{change.__module__}.{change.__qualname__}"
        self._undos.append(_find_change(path)(module, **arguments))
        self.steps.append({"by": by, "epoch": epoch, "cuts": [], "change": path, "arguments": dict(arguments)})

    def undo_changes(self, module: nn.Module, *, by: str) -> None:
        """Take the changes of one method out of the module and of the record; its cuts stay.

        Meant for what lives as long as a search. Later steps must not build on it.
        """
        for index in reversed(range(len(self.steps))):
            if self.steps[index]["by"] == by and self.steps[index].get("change"):
                del self.steps[index]
                self._undos.pop(index)(module)

    def get_extra_state(self) -> dict[str, Any]:
        return {"version": __version__, "steps": list(self.steps)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.steps = list(state["steps"])

    def replay(self, module: nn.Module, steps: Sequence[Step]) -> None:
        """Give `module`, dense or changed in whatever way, the structure that `steps` lead to.

        Tensors that had to change back hold zeros: their values are about to be loaded.
        """
        if not same_steps(self.steps, steps[: len(self.steps)]):
            while self.steps:
                del self.steps[-1]
                self._undos.pop()(module)
        for step in steps[len(self.steps) :]:
            if step.get("change"):
                self._undos.append(_find_change(step["change"])(module, **step["arguments"]))
            else:
                self._cut(module, [Cut(*c) for c in step["cuts"]])
            self.steps.append(step)

    def _cut(self, module: nn.Module, cuts: Sequence[Cut]) -> list[Swap]:
        swaps = apply_cuts(module, cuts)
        shapes = {swap.name: swap.old.shape for swap in swaps}
        # buffers that no state dict brings back
        unsaved = {}
        for swap in swaps:
            owner, _, key = swap.name.rpartition(".")
            if key in module.get_submodule(owner)._non_persistent_buffers_set:
                unsaved[swap.name] = swap.old
        self._undos.append(partial(reshape_tensors, shapes=shapes, values=unsaved))
        return swaps


def attach_record(module: nn.Module) -> Record:
    """The record of a module; made at the first call, together with the hook that replays it before a load."""
    record = getattr(module, NAME, None)
    if record is None:
        record = Record()
        module.add_module(NAME, record)
        module.register_load_state_dict_pre_hook(_replay_before_load)
    return record


def read_steps(path: str | Path) -> list[Step]:
    """The surgery that a checkpoint records; empty for a dense one.

    Raises:
        MisconfigurationException: the file is not a checkpoint, or is cut short.
    """
    return read_checkpoint(path)["state_dict"].get(KEY, {}).get("steps", [])


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Lightning checkpoint, loaded with `weights_only=True`; local, or wherever fsspec reaches.

    Raises:
        FileNotFoundError: no such file.
        MisconfigurationException: the file is not a checkpoint, or is cut short.
    """
    files = get_filesystem(path)
    if not files.isfile(str(path)):
        raise FileNotFoundError(f"There is no checkpoint at {str(path)!r}.")
    try:
        with files.open(str(path), "rb") as file:
            checkpoint = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:
        raise MisconfigurationException(
            f"{str(path)!r} cannot be read as a checkpoint ({type(error).__name__}: {error}). "
            f"It may be cut short, or hold objects that are not safe to load."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise MisconfigurationException(f"{str(path)!r} is no Lightning checkpoint: it has no 'state_dict'.")
    return checkpoint


def load(cls: type[Module], path: str | Path, **init: Any) -> Module:
    """Load a checkpoint of a network whose structure was changed, as `cls.load_from_checkpoint` does for others.

    Args:
        cls: the LightningModule's class.
        path: the checkpoint; also a weights-only one.
        init: arguments for `cls`; they win over the saved hyper-parameters.

    Returns:
        The module in its narrow form, on the CPU, in eval mode off as after construction.

    Raises:
        FileNotFoundError: no such file.
        MisconfigurationException: not a checkpoint, cut short, or of another network.

    Example::

        module = lightning_compress.load(MyModule, "runs/last.ckpt")
    """
    checkpoint = read_checkpoint(path)
    weights = checkpoint["state_dict"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the keys that an empty state dict lacks
        module: Any = _load_state(cls, {**checkpoint, "state_dict": {}}, strict=False, **init)
    attach_record(module)
    try:
        module.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        raise MisconfigurationException(f"{str(path)!r} does not fit {cls.__name__}: {error}") from error
    return module


def _replay_before_load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    record: Record = getattr(module, NAME)
    state = state_dict.setdefault(prefix + KEY, {"version": __version__, "steps": []})
    record.replay(module, state["steps"])


def _leave_out_if_empty(record: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """A network that lost nothing keeps its plain state dict."""
    if not record.steps:
        state_dict.pop(f"{prefix}_extra_state", None)


def same_steps(left: Sequence[Step], right: Sequence[Step]) -> bool:
    """Whether two histories cut and change the same."""

    def deeds(steps: Sequence[Step]) -> list[Any]:
        return [(step["cuts"], step.get("change", ""), step.get("arguments", {})) for step in steps]

    return _same(deeds(left), deeds(right))


def _same(left: Any, right: Any) -> bool:
    """Equality of nested plain data that may hold tensors; a tuple may have become a list on the way."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return isinstance(left, Tensor) and isinstance(right, Tensor) and torch.equal(left.cpu(), right.cpu())
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_same(value, right[key]) for key, value in left.items())
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)
