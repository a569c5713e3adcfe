"""Masks that stay as they are: zeros in plain weights, kept zero through a fit.

A mask that needs no gradient needs no place in the forward pass. Weights are multiplied by it once after every step of
the optimiser, which weight decay and momentum would otherwise use to move them: some per cent of the cost of a
parametrisation that multiplies in the forward and in the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_compress.core.sparse.bit_packing import pack_mask, unpack_mask
from lightning_compress.core.surgery.plan import Cut
from lightning_compress.core.surgery.record import attach_record
from lightning_compress.core.surgery.shrink import slice_tensor


class FixedMasks:
    """Bool masks by parameter name, True where a weight stays.

    They follow channels that are removed in the same fit, and their state is plain data for a callback's `state_dict`::

        masks = FixedMasks()
        masks.set(pl_module, {"net.conv.weight": keep})   # zeroes the others now
        masks.attach(trainer, pl_module)                  # in on_fit_start: keeps them zero after every step
        masks.detach()                                    # in teardown
    """

    def __init__(self) -> None:
        self._masks: dict[str, Tensor] = {}
        self._cut_steps = 0  # so many cuts of the module's record are in the masks
        self._handles: list[RemovableHandle] = []
        self._ready: dict[str, tuple[Tensor, Tensor]] = {}  # name -> (parameter, its mask of 0 and 1)

    def __bool__(self) -> bool:
        return bool(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __contains__(self, name: object) -> bool:
        return name in self._masks

    def __getitem__(self, name: str) -> Tensor:
        """The mask of a parameter, in its shape."""
        return self._masks[name]

    def get(self, name: str) -> Tensor | None:
        """The mask of a parameter; None if it has none."""
        return self._masks.get(name)

    @property
    def sparsity(self) -> float:
        """Share of the weights of all masked parameters that is zero; 0 without masks."""
        total = sum(mask.numel() for mask in self._masks.values())
        return 1 - sum(int(mask.count_nonzero()) for mask in self._masks.values()) / max(1, total)

    def set(self, pl_module: LightningModule, masks: Mapping[str, Tensor]) -> None:
        """Set or replace masks, by parameter name, and zero the weights. Masks of other parameters stay.

        Args:
            masks: True where a weight stays; bool of the parameter's shape, or of one that broadcasts to it.

        Raises:
            ValueError: no such parameter, or a shape that does not fit.
        """
        self._follow(pl_module)
        parameters = dict(pl_module.named_parameters())
        for name, mask in masks.items():
            if name not in parameters:
                raise ValueError(f"masks: {type(pl_module).__name__} has no parameter {name!r}.")
            shape = parameters[name].shape
            try:
                self._masks[name] = mask.detach().bool().broadcast_to(shape).clone()
            except RuntimeError:
                raise ValueError(f"masks: {name!r} has shape {tuple(shape)}, its mask {tuple(mask.shape)}.") from None
        self._ready.clear()
        self.apply(pl_module)

    def apply(self, pl_module: LightningModule) -> None:
        """Zero the masked weights now."""
        self._follow(pl_module)
        with torch.no_grad():
            for name, parameter in pl_module.named_parameters():
                if name in self._masks:
                    parameter.mul_(self._bring(name, parameter))

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Zero the masked weights after every step of the trainer's optimisers. For `on_fit_start`."""
        self.detach()

        def zero(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if self._masks:
                self._step(optimizer, pl_module)

        self._handles = [optimizer.register_step_post_hook(zero) for optimizer in trainer.optimizers]
        self.apply(pl_module)

    def detach(self) -> None:
        """Take the hooks off the optimisers. For `teardown` and `on_exception`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._ready.clear()

    def clear_momentum(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Zero the optimisers' state of masked weights: what pushed them while they were free. Once, at a switch."""
        self._follow(pl_module)
        named = {name: parameter for name, parameter in pl_module.named_parameters() if name in self._masks}
        for optimizer in trainer.optimizers:
            for name, parameter in named.items():
                for value in optimizer.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        value.mul_(self._masks[name].to(value.device))

    def state_dict(self) -> dict[str, Any]:
        """Plain data: bits and shape by parameter name."""
        return {
            "masks": {name: {"bits": pack_mask(mask), "shape": list(mask.shape)} for name, mask in self._masks.items()},
            "cut_steps": self._cut_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the masks of :meth:`state_dict`; the weights are not touched until :meth:`apply` or a step."""
        self._masks = {name: unpack_mask(m["bits"], m["shape"]) for name, m in state["masks"].items()}
        self._cut_steps = state["cut_steps"]
        self._ready.clear()

    def _step(self, optimizer: Optimizer, pl_module: LightningModule) -> None:
        if not self._is_current(pl_module):
            self._follow(pl_module)
            self._ready.clear()
            for name, parameter in pl_module.named_parameters():
                if name in self._masks:
                    self._bring(name, parameter)
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        pairs = [pair for pair in self._ready.values() if id(pair[0]) in own]
        if pairs:
            with torch.no_grad():
                torch._foreach_mul_(*map(list, zip(*pairs, strict=True)))

    def _is_current(self, pl_module: LightningModule) -> bool:
        """Whether the parameters are those of the last step: surgery and precision plugins put others there."""
        if len(self._ready) != len(self._masks):
            return False
        return all(
            pl_module.get_submodule(name.rpartition(".")[0])._parameters.get(name.rpartition(".")[2]) is parameter
            and mask.device == parameter.device
            for name, (parameter, mask) in self._ready.items()
        )

    def _bring(self, name: str, parameter: Tensor) -> Tensor:
        """The mask on the parameter's device, in its memory format, and in its dtype: bool takes twice the time."""
        mask = torch.empty_like(parameter.detach()).copy_(self._masks[name])
        self._ready[name] = (parameter, mask)
        return mask

    def _follow(self, pl_module: LightningModule) -> None:
        """Cut the masks as the record of the module's surgery says its tensors were, and call them as they are called.

        A weight that a quantiser was put on since, or taken off, has another name.
        """
        # other changes come and go, so they are not counted
        steps = [step["cuts"] for step in attach_record(pl_module).steps if step["cuts"]]
        for cuts in steps[self._cut_steps :]:
            for cut in (Cut(*c) for c in cuts):
                if cut.tensor in self._masks:
                    self._masks[cut.tensor] = slice_tensor(self._masks[cut.tensor], [cut])
        self._cut_steps = len(steps)
        own = {name for name, _ in pl_module.named_parameters()}
        for name in [name for name in self._masks if name not in own]:
            plain = name.replace(".parametrizations.weight.original", ".weight")
            below = f"{plain.removesuffix('.weight')}.parametrizations.weight.original"
            for now in own.intersection((plain, below)):
                self._masks[now] = self._masks.pop(name)
