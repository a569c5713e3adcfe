r"""LTS: freeze the weights that have settled on their quantisation level, one by one, while the network trains.

Zhong et al., "Exploiting the Partly Scratch-off Lottery Ticket for Quantization-Aware Training", 2022,
arXiv:2211.08544.

Many weights reach their level after a few epochs; what follows makes them swing around it. With v_t where a weight lies
in the range of its quantiser (not clipped), q_t its level, both from 0 to 1, and levels 1/(L-1) apart:

    d_t = |v_t - q_t|
    D_t = (1 - m) d_t + m D_(t-1),    or 1/(L-1), where q_t is another level than q_(t-1)

After a warm-up, a weight with D_t <= rho(t) / (L-1) is frozen for good: it has no gradient, no step moves it. rho grows
from 0 to 1 until training ends. Frozen is the real value: the range goes on learning, and may change the level.

The distance begins at the second step: the first only notes levels, beginning from level 0.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

import rich
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.text import Text
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_compress.callbacks.quantization.qat import QAT
from lightning_compress.core.quant.attach import real_weight, weight_quantizer
from lightning_compress.core.quant.live_conv import rest_filters, wake_filters
from lightning_compress.core.report import close_account
from lightning_compress.core.sparse.bit_packing import pack_mask, unpack_mask
from lightning_compress.core.surgery import attach_record, check_epoch

TIMED = 16  # steps of an epoch whose backward pass is timed
MODES = ("linear-growth", "sine-growth", "fixing")


def growth(mode: str, progress: float, fixed_rate: float = 0.1) -> float:
    """rho, the threshold in units of the distance of two levels.

    Args:
        mode: "linear-growth", "sine-growth" or "fixing".
        progress: from 0 at the end of the warm-up to 1 at the end of training.
        fixed_rate: rho of "fixing".

    >>> growth("linear-growth", 0.5), round(growth("sine-growth", 0.5), 4), growth("fixing", 0.5)
    (0.5, 0.7071, 0.1)
    """
    if mode == "fixing":
        return fixed_rate
    return progress if mode == "linear-growth" else math.sin(math.pi / 2 * progress)


def next_distance(distance: Tensor, d: Tensor, changed: Tensor, step: int, ema: float, bin: float) -> Tensor:
    """D_t from D_(t-1).

    Args:
        distance: D_(t-1), any shape.
        d: |v_t - q_t|.
        changed: whether the level is another one than before.
        step: t, counted from -1: at 0 the average begins with d, whatever has changed.
        ema: m.
        bin: the distance of two levels, 1/(L-1).
    """
    if step == 0:
        return d.clone()
    return torch.lerp(d, distance, ema).masked_fill_(changed, bin)


@dataclass
class Ticket:
    """What LTS knows of one weight tensor.

    Attributes:
        distance: D, float32, of the weight's shape.
        codes: levels of the last step, uint8.
        frozen: bool.
        resting: bool (C_out,), filters whose gradient is not computed.
        step: of the last update; -1 before the first.
    """

    distance: Tensor
    codes: Tensor
    frozen: Tensor
    resting: Tensor
    step: int = -1

    @classmethod
    def of(cls, weight: Tensor) -> Ticket:
        """The state of a weight before training."""
        zeros = torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
        return cls(zeros, zeros.to(torch.uint8), zeros.bool(), torch.zeros(len(weight), dtype=torch.bool))

    @torch.no_grad()
    def update(self, quantizer: Any, weight: Tensor, threshold: float | None, ema: float) -> None:
        """One step of training has used `weight`: average its distance, and freeze what is near.

        Args:
            quantizer: of the weight: ``place(weight)`` gives v and the codes, 0 ... L-1.
            threshold: rho; None during the warm-up.
        """
        place, codes = quantizer.place(weight.detach())
        bin = 1 / (2**quantizer.bits - 1)
        d = place.sub_(codes, alpha=bin).abs_()
        codes = codes.to(torch.uint8)
        self.distance = next_distance(self.distance, d, codes != self.codes, self.step, ema, bin)
        self.codes = codes
        self.step += 1
        if threshold is not None:
            self.frozen |= self.distance <= bin * threshold

    def complete(self, min_group: float) -> None:
        """Freeze the rest of filters of which at least `min_group` is frozen."""
        share = self.frozen.flatten(1).float().mean(1)
        self.frozen |= (share >= min_group).view(-1, *[1] * (self.frozen.ndim - 1))

    def state_dict(self) -> dict[str, Any]:
        return {
            "distance": self.distance,
            "codes": self.codes,
            "frozen": pack_mask(self.frozen),
            "resting": self.resting,
            "step": self.step,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], weight: Tensor) -> Ticket:
        frozen = unpack_mask(state["frozen"], list(weight.shape))
        distance, codes = (state[key].to(weight.device) for key in ("distance", "codes"))
        return cls(distance, codes, frozen.to(weight.device), state["resting"].cpu(), state["step"])


@dataclass
class _Ledger:
    """What the run did: the paper's account, and the clock.

    Attributes:
        skipped: sum over steps of frozen / all trainable parameters.
        steps: how many.
        milliseconds: median time of the backward pass, of the first and the last epoch.
    """

    skipped: float = 0.0
    steps: int = 0
    milliseconds: list[float] = field(default_factory=list)


class LTS(Callback):
    """Freeze settled weights in quantisation-aware training; needs a :class:`QAT` in the same Trainer.

    Args:
        mode: how the threshold grows after the warm-up: "linear-growth", "sine-growth", or "fixing", where it is
            `fixed_rate` throughout.
        warmup_epochs: before anything is frozen. The paper: 80 of 400 on CIFAR, 20 of 100 on ImageNet.
        ema: m of the average. The paper: 0.99 on CIFAR, 0.9999 on ImageNet.
        fixed_rate: threshold of "fixing", in units of the distance of two levels.
        granularity: "weight" is the paper's; it saves updates, but no time, since weight gradients are made whole.
            "channel" also freezes the rest of a filter of which `min_group` is frozen, and from the next epoch on its
            weight gradient is not computed (convolutions without groups). Ranges then learn from the other filters.
        min_group: share of a filter that must be frozen.

    What is stored, in the callback's state: step, levels, distances and what is frozen. Weights of the module are what
    the network computes with, so a file of them alone is whole, but trained further it begins with nothing frozen.

    With several processes all decide alike, from equal weights; nothing is sent.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, a Trainer without QAT, a
            fit without an end, a warm-up as long as the fit.

    Example::

        from lightning_compress.callbacks import LTS, QAT
        trainer = Trainer(max_epochs=400, callbacks=[QAT(weight_bits=2, activation_bits=2), LTS(warmup_epochs=80)])
        trainer.fit(module, datamodule)

    Packaged config: ``method/lts``.
    """

    def __init__(
        self,
        mode: Literal["linear-growth", "sine-growth", "fixing"] = "linear-growth",
        warmup_epochs: int = 80,
        ema: float = 0.99,
        *,
        fixed_rate: float = 0.1,
        granularity: Literal["weight", "channel"] = "weight",
        min_group: float = 0.95,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"LTS(mode={mode!r}): choose one of {', '.join(map(repr, MODES))}.")
        if granularity not in ("weight", "channel"):
            raise ValueError(f"LTS(granularity={granularity!r}): choose 'weight' or 'channel'.")
        if warmup_epochs < 0:
            raise ValueError(f"LTS(warmup_epochs={warmup_epochs}): give 0 or more.")
        if not 0 <= ema < 1:
            raise ValueError(f"LTS(ema={ema}): give a number from 0 to below 1.")
        if fixed_rate <= 0:
            raise ValueError(f"LTS(fixed_rate={fixed_rate}): give a positive number.")
        if not 0 < min_group <= 1:
            raise ValueError(f"LTS(min_group={min_group}): give a number above 0, up to 1.")
        self.mode, self.warmup_epochs, self.ema, self.fixed_rate = mode, warmup_epochs, ema, fixed_rate
        self.granularity, self.min_group = granularity, min_group
        self.tickets: dict[str, Ticket] = {}
        self._steps: tuple[int, int] | None = None  # of the warm-up, of the fit; as they were when it began
        self._ledger = _Ledger()
        self._layers: dict[str, nn.Module] = {}
        self._kept: dict[str, Tensor] = {}  # values that the optimiser's step must not change
        self._handles: list[RemovableHandle] = []
        self._loaded: Mapping[str, Any] = {}
        self._frozen: list[Tensor] = []  # counts of the steps since the ledger was written, on the device
        self._times: list[float] = []
        self._begin = 0.0
        self._trainable = 1

    @property
    def state_key(self) -> str:
        return self._generate_state_key(
            mode=self.mode, warmup_epochs=self.warmup_epochs, ema=self.ema, granularity=self.granularity
        )

    def state_dict(self) -> dict[str, Any]:
        self._write_ledger()
        tickets = {name: ticket.state_dict() for name, ticket in self.tickets.items()} or self._loaded
        return {"tickets": tickets, "steps": self._steps, "ledger": vars(self._ledger).copy()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded, self._steps = state_dict["tickets"], state_dict["steps"]
        self._ledger = _Ledger(**state_dict["ledger"])
        self.tickets = {}

    @property
    def frozen_share(self) -> float:
        """Share of the quantised weights that is frozen."""
        frozen = sum(int(ticket.frozen.count_nonzero()) for ticket in self.tickets.values())
        return frozen / max(1, sum(ticket.frozen.numel() for ticket in self.tickets.values()))

    # ---- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        attach_record(pl_module)
        if stage != "fit":
            return
        if not any(isinstance(callback, QAT) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "LTS freezes weights that QAT quantises, and this Trainer has no QAT. Add one: [QAT(), LTS()]."
            )
        check_epoch(trainer, "LTS", "warmup_epochs", self.warmup_epochs)
        if not trainer.current_epoch:  # a Trainer that fits again goes on
            self.tickets, self._steps, self._ledger = {}, None, _Ledger()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        quantised = [c.layers(pl_module) for c in trainer.callbacks if isinstance(c, QAT)]  # type: ignore[attr-defined]
        self._layers = {
            name: layer for layers in quantised for name, layer in layers.items() if weight_quantizer(layer) is not None
        }
        if not self.tickets:
            weights = {name: _parameter(layer) for name, layer in self._layers.items()}
            known = self._loaded
            self.tickets = {
                name: Ticket.from_state(known[name], weight) if name in known else Ticket.of(weight)
                for name, weight in weights.items()
            }
        self._rest()
        self._handles = [optimizer.register_step_post_hook(self._put_back) for optimizer in trainer.optimizers]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._steps is None:
            self._steps = _count_steps(trainer, self.warmup_epochs)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.granularity == "channel":
            for ticket in self.tickets.values():
                ticket.resting = ticket.frozen.flatten(1).all(1).cpu()
            self._rest()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._begin = self._now(pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(self._times) < TIMED:
            self._times.append(1e3 * (self._now(pl_module) - self._begin))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The weights are still those of the forward pass: decide, take gradients away, and note what must stay."""
        assert self._steps is not None
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        warmup, total = self._steps
        for name, layer in self._layers.items():
            ticket, parameter = self.tickets[name], _parameter(layer)
            if id(parameter) not in held:
                continue
            step = ticket.step + 1
            progress = min(1.0, (step - warmup) / max(1, total - warmup))
            threshold = growth(self.mode, progress, self.fixed_rate) if step > warmup else None
            ticket.update(weight_quantizer(layer), real_weight(layer), threshold, self.ema)
            if threshold is None:
                continue
            if self.granularity == "channel":
                ticket.complete(self.min_group)
            if parameter.grad is not None:
                parameter.grad.masked_fill_(ticket.frozen, 0)
            self._kept[name] = parameter.detach().clone()
        self._frozen.append(torch.stack([ticket.frozen.count_nonzero() for ticket in self.tickets.values()]).sum())
        self._trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_ledger()
        pl_module.log("lts/frozen", self.frozen_share, prog_bar=True, rank_zero_only=True)
        pl_module.log("lts/updates", 1 - self._ledger.skipped / max(1, self._ledger.steps), rank_zero_only=True)
        if self._times:
            pl_module.log("lts/backward_ms", median(self._times), rank_zero_only=True)
            self._ledger.milliseconds = [*self._ledger.milliseconds[:1], median(self._times)]
            self._times.clear()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        skipped = self._ledger.skipped / max(1, self._ledger.steps)
        notes = [
            f"LTS: {self.frozen_share:.1%} of the quantised weights are frozen at the end. Of all updates of trainable "
            f"parameters {skipped:.1%} were skipped, and as the paper counts {skipped / 2:.1%} of the backward pass."
        ]
        if len(self._ledger.milliseconds) > 1:
            first, last = self._ledger.milliseconds
            notes.append(f"LTS: a backward pass took {first:.1f} ms in the first epoch, {last:.1f} ms in the last.")
        if close_account(trainer, pl_module, notes=notes) is not None:
            rich.get_console().print(Text("\n".join(notes)))  # QAT has printed the account before, if it stands before

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    # ---- the work

    def _write_ledger(self) -> None:
        if self._frozen:
            self._ledger.skipped += int(torch.stack(self._frozen).sum()) / self._trainable
            self._ledger.steps += len(self._frozen)
            self._frozen.clear()

    def _now(self, pl_module: LightningModule) -> float:
        if pl_module.device.type == "cuda" and len(self._times) < TIMED:
            torch.cuda.synchronize(pl_module.device)
        return time.perf_counter()

    def _rest(self) -> None:
        for name, layer in self._layers.items():
            rest_filters(layer, self.tickets[name].resting)

    @torch.no_grad()
    def _put_back(self, optimizer: Optimizer, *_: Any) -> None:
        """Momentum and weight decay have moved frozen weights."""
        for name, value in self._kept.items():
            parameter = _parameter(self._layers[name])
            parameter.copy_(torch.where(self.tickets[name].frozen, value, parameter))
        self._kept.clear()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self._layers.values():
            wake_filters(layer)
        self._layers.clear()
        self._kept.clear()


def _parameter(layer: nn.Module) -> Tensor:
    """The weight that is trained."""
    return layer.parametrizations["weight"].original  # type: ignore[index, union-attr]


def _count_steps(trainer: Trainer, warmup_epochs: int) -> tuple[int, int]:
    """Steps of the optimiser in the warm-up, and in the whole fit.

    Raises:
        MisconfigurationException: one of them is unknown.
    """
    total = trainer.estimated_stepping_batches
    epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
    if math.isinf(total) or math.isinf(epoch):
        raise MisconfigurationException(
            f"LTS(warmup_epochs={warmup_epochs}) must know how many steps an epoch and the fit have, as its threshold "
            f"grows with them. Give the Trainer max_epochs, and limit_train_batches where the data have no length."
        )
    return math.ceil(epoch) * warmup_epochs, int(total)
