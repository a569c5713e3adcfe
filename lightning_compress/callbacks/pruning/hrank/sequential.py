"""HRank as in the paper: mask one layer, fine-tune, take the best weights, go on with the next layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_compress.core.fresh_start import FreshStart
from lightning_compress.core.select import did_you_mean
from lightning_compress.core.surgery import ChannelGraph
from lightning_compress.core.surgery.compact import norms_reading


class Stages:
    """The timeline of masks. Masks bite after every optimiser step: momentum and weight decay move masked weights.

    Args:
        epochs: epochs per stage.
        train_after: numbers (from 1) of the layers after which a stage of training follows; None for all.
        monitor: metric, higher is better, that chooses the weights a stage hands on.
    """

    def __init__(self, epochs: int, train_after: Sequence[int] | None, monitor: str) -> None:
        self.epochs = epochs
        self.train_after = train_after
        self.monitor = monitor
        self.layers: list[tuple[str, ...]] = []  # number -> layers that are masked together
        self.kept: dict[str, Tensor] = {}
        self.stage = -1
        self.best: float | None = None
        self.best_weights: dict[str, Tensor] = {}
        self.initial: FreshStart | None = None
        self._positions: dict[str, dict[str, Tensor]] = {}  # layer -> norm -> where its channels are
        self._handles: list[Any] = []
        self._masks: tuple[list[Tensor], list[Tensor]] = ([], [])

    # ---- before the fit

    def prepare(self, network: LightningModule, graph: ChannelGraph, layers: Sequence[tuple[str, ...]]) -> None:
        """Fix the order of the layers and find the norms behind each.

        Raises:
            ValueError: a number in `train_after` is no layer's.
        """
        self.layers = list(layers)
        self.stage, self.best, self.best_weights, self.initial = -1, None, {}, None
        last = len(self.layers)
        if self.train_after is None:
            self.train_after = range(1, last + 1)
        if not self.train_after or not all(1 <= n <= last for n in self.train_after):
            raise ValueError(f"HRank(stage_layers={list(self.train_after)}): give numbers from 1 to {last}.")
        self.train_after = sorted(set(self.train_after) | {last})
        names = [n for group in layers for n in group]
        self._positions = {n: norms_reading(network, graph, n) for n in names}

    def check_length(self, max_epochs: int | None) -> None:
        """The Trainer must run long enough for all stages.

        Raises:
            MisconfigurationException: it does not.
        """
        stages = len(self.train_after or ())
        needed = self.epochs * stages
        if max_epochs is not None and 0 <= max_epochs < needed:
            raise MisconfigurationException(
                f"HRank(mode='sequential') needs {needed} epochs: {self.epochs} for each of {stages} stages, but "
                f"the Trainer stops after max_epochs={max_epochs}. Raise it, lower epochs_per_layer, or train after "
                f"fewer layers with stage_layers."
            )

    # ---- during the fit

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mask after every optimiser step."""
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self.apply()))
        if self.stage >= 0:  # resumed, perhaps in the middle of an epoch
            self._masks = self._build(pl_module)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._masks = ([], [])

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At every epoch's start: go to the next stage when its time has come."""
        if self.initial is None:
            self.initial = FreshStart.of(trainer)
        assert self.train_after is not None
        stage = min(trainer.current_epoch // self.epochs, len(self.train_after) - 1)
        if stage != self.stage:
            if self.stage >= 0:
                self.take_best(pl_module)
                self.initial.restore(trainer)
            self.stage = stage
            self.best, self.best_weights = None, {}
        self._masks = self._build(pl_module)
        self.apply()

    def judge(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After every validation: remember the best weights of this stage.

        Raises:
            MisconfigurationException: the metric was not logged.
        """
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            hint = did_you_mean(self.monitor, metrics)
            raise MisconfigurationException(
                f"HRank(monitor={self.monitor!r}): the module logs no such metric.{hint} It logs {sorted(metrics)}."
            )
        value = trainer.strategy.broadcast(float(metrics[self.monitor]))
        if self.best is None or value > self.best:
            self.best = value
            self.best_weights = {
                k: v.detach().cpu().clone() if isinstance(v, Tensor) else v for k, v in pl_module.state_dict().items()
            }

    def take_best(self, pl_module: LightningModule) -> None:
        """Load the best weights of the stage that ends; without validation, keep the last."""
        if self.best_weights:
            pl_module.load_state_dict(self.best_weights)

    def apply(self) -> None:
        """Multiply by the masks of all layers so far."""
        if self._masks[0]:
            with torch.no_grad():
                torch._foreach_mul_(*self._masks)

    def _build(self, pl_module: LightningModule) -> tuple[list[Tensor], list[Tensor]]:
        assert self.train_after is not None
        tensors = dict(pl_module.named_parameters())
        masks: dict[str, Tensor] = {}

        def drop(name: str, gone: Tensor) -> None:
            tensor = tensors.get(name)
            if tensor is not None:
                if name not in masks:
                    masks[name] = tensor.new_ones([len(tensor)] + [1] * (tensor.ndim - 1)).detach()
                masks[name][gone.to(tensor.device)] = 0

        for group in self.layers[: self.train_after[self.stage]]:
            for layer in group:
                width = len(tensors[f"{layer}.weight"])
                gone = torch.ones(width, dtype=torch.bool)
                gone[self.kept[layer]] = False
                drop(f"{layer}.weight", gone)
                drop(f"{layer}.bias", gone)
                for norm, at in self._positions[layer].items():
                    drop(f"{norm}.weight", at[gone])
                    drop(f"{norm}.bias", at[gone])
        return [tensors[n] for n in masks], list(masks.values())

    # ---- resuming

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept, "stage": self.stage, "best": self.best, "best_weights": self.best_weights,
                "initial": self.initial.state_dict() if self.initial else None}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kept, self.stage = state["kept"], state["stage"]
        self.best, self.best_weights = state["best"], state["best_weights"]
        self.initial = FreshStart.from_state_dict(state["initial"]) if state["initial"] else None
