"""A checkpoint that describes itself.

A network that lost channels cannot load into a fresh copy of itself: the shapes differ. So the module carries a
:class:`Record` of its surgery in its own `state_dict`, and a hook that runs before any tensor is loaded replays it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
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
Step = dict[str, Any]  # {"by": who, "epoch": when, "cuts": [(tensor, dim, size, kept), ...]}
Module = TypeVar("Module", bound=LightningModule)


class Record(nn.Module):
    """What was cut from the module it is attached to, step by step. Made by :func:`attach_record`."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._unsaved: dict[str, Tensor] = {}  # dense values of cut buffers that no state dict brings back
        self.register_state_dict_post_hook(_leave_out_if_empty)

    def cut(self, module: nn.Module, cuts: Sequence[Cut], *, by: str, epoch: int) -> list[Swap]:
        """Cut `module` and note it: `by` whom, in which `epoch`."""
        swaps = self._cut(module, cuts)
        self.steps.append({"by": by, "epoch": epoch, "cuts": [tuple(c) for c in cuts]})
        return swaps

    def get_extra_state(self) -> dict[str, Any]:
        return {"version": __version__, "steps": self.steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]

    def replay(self, module: nn.Module, steps: Sequence[Step]) -> None:
        """Give `module`, dense or narrowed in whatever way, the structure that `steps` lead to.

        Tensors that had to change back hold zeros: their values are about to be loaded.
        """
        done = len(self.steps) if same_steps(self.steps, steps[: len(self.steps)]) else 0
        if self.steps and not done:
            reshape_tensors(module, self._dense_shapes(module), self._unsaved)
        for step in steps[done:]:
            self._cut(module, [Cut(*c) for c in step["cuts"]])
        self.steps = list(steps)

    def _cut(self, module: nn.Module, cuts: Sequence[Cut]) -> list[Swap]:
        swaps = apply_cuts(module, cuts)
        for swap in swaps:
            owner, _, key = swap.name.rpartition(".")
            if key in module.get_submodule(owner)._non_persistent_buffers_set:
                self._unsaved.setdefault(swap.name, swap.old)
        return swaps

    def _dense_shapes(self, module: nn.Module) -> dict[str, list[int]]:
        shapes = {n: list(t.shape) for n, t in [*module.named_parameters(), *module.named_buffers()]}
        cut = {c[0] for step in self.steps for c in step["cuts"]}
        for step in reversed(self.steps):
            for tensor, dim, size, _ in step["cuts"]:
                shapes[tensor][dim] = size
        return {n: s for n, s in shapes.items() if n in cut}


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
    """Whether two histories cut the same."""
    return len(left) == len(right) and all(
        len(a["cuts"]) == len(b["cuts"])
        and all(
            tuple(x[:3]) == tuple(y[:3]) and torch.equal(x[3], y[3]) for x, y in zip(a["cuts"], b["cuts"], strict=True)
        )
        for a, b in zip(left, right, strict=True)
    )
