"""ADMM for weights that shall lie in sets: train freely, pulled towards projections, then prune hard and retrain.

    min f(W)  subject to  W_l in S_1, W_l in S_2, ...       (pattern sets, numbers of kernels, levels, ...)

    loss = f(W) + sum_l sum_i rho/2 ||W_l - Z_li + U_li||_F^2,    gradient  rho (W_l - Z_li + U_li)  per constraint
    start    Z = P(W), U = 0
    update   rho <- growth * rho;  Z <- P(W + U);  U <- U + W - Z    after every period; U is not rescaled
    prune    W <- P(W) by a mask that then stays

Boyd, Parikh, Chu, Peleato, Eckstein, "Distributed Optimization and Statistical Learning via the Alternating Direction
Method of Multipliers", 2011; for pruning: Zhang, Ye, Zhang, Tang, Wen, Fardad, Wang, ECCV 2018, arXiv:1804.03294.

:class:`ADMM` owns all of this: the splitting variables (:class:`Splits`), when they change, the penalty, the residuals
in the log, the masks afterwards, checkpoints, the account. A method subclasses it and says:

* `timeline()`: the phases of the fit. A :class:`Phase` with ``admm=True`` pulls, one without holds masks. Several of
  either may follow each other (a library that shrinks, progressive rounds, pruning and then quantising).
* `find_layers(trainer, pl_module)`: names of the layers whose weights are constrained, in forward order. Called in
  `setup`, so that wrong globs are refused there; it fills `left_alone`.
* `problem(pl_module, phase)`: layer -> constraint's name -> projection, a function of the weight that works for any
  shape it may meet. One (Z, U) pair is kept for each.
* `hard_masks(pl_module, phase)`: layer -> bool mask, for a phase that holds masks. Made from W alone, not from W + U;
  rank 0's is taken everywhere.
* `enter(trainer, pl_module, phase)`, if a phase begins with more than that. As it stands it lifts all masks and starts
  Z and U at an ADMM phase, and prunes at any other. Distil a library on the present weights and call it (PCNN); call
  `start(...)` alone, without `lift(...)`, to go on with the zeros of earlier rounds (ADMM-NN: progressive rounds, and
  quantisation, whose projection is then one that keeps zeros); change U of some kernels first (pattern pruning).
* `update(pl_module, phase)`, if an update does more than that.
* `own_state()`, `load_own_state(state)`: further plain data for the checkpoint (libraries, scales, frozen values).
* `follow_cuts(cuts)`, if it keeps more that has the shape of a weight; `weight_widths()`, if it quantises.
* `artefact(trainer, pl_module)`: what is written beside the account: costs of layers and sentences for the reader.

Whatever a phase changes happens at `on_train_epoch_start`: at the end of an epoch a checkpoint would pair pruned
weights with a score that they never had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from lightning_compress.core.measurement import LayerCost
from lightning_compress.core.optimizers import check_optimizers
from lightning_compress.core.report import close_account, open_account, run_folder
from lightning_compress.core.sparse.fixed_masks import FixedMasks
from lightning_compress.core.surgery import Cut, attach_record, check_trainer
from lightning_compress.core.surgery.shrink import slice_tensor

Projection = Callable[[Tensor], Tensor]
Problem = Mapping[str, Mapping[str, Projection]]
Artefact = tuple[dict[str, LayerCost], list[str]]


@dataclass(frozen=True)
class Phase:
    """A stretch of the fit that begins at epoch `start` and lasts until the next one, or the end.

    Attributes:
        name: for the method, and in the checkpoint; no two phases share one.
        start: its first epoch.
        admm: whether weights are pulled towards projections; else masks hold.
        argument: of the method, which says when it starts, for messages: ``"end_epoch=200"``.
        warmup: epochs at its beginning that project anew each time and leave U at zero.
    """

    name: str
    start: int
    admm: bool
    argument: str
    warmup: int = 0


class Splits:
    """Z and the scaled dual U of every constrained weight, by layer and constraint, in the weight's shape and dtype."""

    def __init__(self) -> None:
        self.rho = 0.0
        self.z: dict[str, dict[str, Tensor]] = {}
        self.u: dict[str, dict[str, Tensor]] = {}
        self._pull: dict[str, Tensor] = {}  # sum over constraints of Z - U

    def __bool__(self) -> bool:
        return bool(self.z)

    @torch.no_grad()
    def start(self, weights: Mapping[str, Tensor], problem: Problem, rho: float) -> None:
        """Z = P(W), U = 0."""
        self.clear()
        self.rho = rho
        for layer, constraints in problem.items():
            weight = weights[layer].detach()
            self.z[layer] = {name: project(weight) for name, project in constraints.items()}
            self.u[layer] = {name: torch.zeros_like(weight) for name in constraints}

    @torch.no_grad()
    def refresh(self, weights: Mapping[str, Tensor], problem: Problem) -> None:
        """Z = P(W + U), and U stays: in a warm-up, where U is zero, or when a set has changed."""
        self._pull.clear()
        for layer, constraints in problem.items():
            for name, project in constraints.items():
                self.z[layer][name] = project(weights[layer].detach() + self.u[layer][name])

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], problem: Problem, growth: float = 1.0) -> None:
        """rho grows, Z = P(W + U), then U += W - Z; U is not rescaled to the new rho."""
        self.rho *= growth
        self.refresh(weights, problem)
        for layer, duals in self.u.items():
            for name, dual in duals.items():
                dual.add_(weights[layer].detach()).sub_(self.z[layer][name])

    def clear(self) -> None:
        """Forget all, and free the memory."""
        self.z, self.u, self._pull = {}, {}, {}

    @torch.no_grad()
    def add_gradient(self, weights: Mapping[str, Tensor]) -> None:
        """Add the gradient of the penalty to ``.grad`` of the weights that have one: rho (n W - sum_i (Z_i - U_i))."""
        moved = {layer: weight for layer, weight in weights.items() if weight.grad is not None and layer in self.z}
        gradients = [weight.grad for weight in moved.values() if weight.grad is not None]
        if not moved:
            return
        for layer in moved.keys() - self._pull.keys():
            self._pull[layer] = torch.stack([z - self.u[layer][name] for name, z in self.z[layer].items()]).sum(0)
        counts = [float(len(self.z[layer])) for layer in moved]
        pull = torch._foreach_mul([weight.detach() for weight in moved.values()], counts)
        torch._foreach_sub_(pull, [self._pull[layer] for layer in moved])
        torch._foreach_add_(gradients, pull, alpha=self.rho)

    def penalty(self, weights: Mapping[str, Tensor]) -> Tensor:
        """sum_l sum_i rho/2 ||W_l - Z_li + U_li||^2, a scalar that can be differentiated."""
        terms = [
            (weights[layer] - z + self.u[layer][name]).square().sum()
            for layer, constraints in self.z.items()
            for name, z in constraints.items()
        ]
        return self.rho / 2 * torch.stack(terms).sum()

    @torch.no_grad()
    def residuals(self, weights: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
        """||W - Z|| / ||W|| by (layer, constraint); 0 once a weight lies in the set."""
        return {
            (layer, name): (weights[layer] - z).norm() / weights[layer].norm().clamp(min=1e-12)
            for layer, constraints in self.z.items()
            for name, z in constraints.items()
        }

    def cut(self, cuts: Mapping[str, Sequence[Cut]]) -> None:
        """Take out what surgery took out of the weights: layer -> cuts."""
        self._pull.clear()
        for layer in self.z.keys() & cuts.keys():
            for values in (self.z[layer], self.u[layer]):
                values.update({name: slice_tensor(tensor, cuts[layer]) for name, tensor in values.items()})

    def to(self, weights: Mapping[str, Tensor]) -> None:
        """Move everything to where the weights are."""
        self._pull.clear()
        for part in (self.z, self.u):
            for layer, values in part.items():
                values.update({name: tensor.to(weights[layer].device) for name, tensor in values.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"rho": self.rho, "z": self.z, "u": self.u}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rho = state["rho"]
        self.z, self.u = ({k: dict(v) for k, v in state[part].items()} for part in ("z", "u"))
        self._pull = {}


class ADMM(Callback):
    """What all ADMM methods share; see the top of this file for what a method adds.

    Args:
        rho: strength of the penalty at the start of every ADMM phase, of SQUARED norms. The pull contracts weights by
            exp(-n rho lr_eff s) in a period of s steps, with lr_eff = lr / (1 - momentum) and n constraints: this
            exponent must come to about 1 in the last periods, or ADMM does nothing; and n rho lr_eff must stay below 1.
        rho_growth: factor of rho at every update.
        every_n_epochs: period of the updates.
        include: globs of the names of layers that may be compressed.
        exclude: globs of the names of layers that stay as they are.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, names that match no
            layer, or a fit that ends before the method does.
    """

    NAME = "admm"  # in the log
    # The arguments that make two instances different: in a list of callbacks, and when a run is resumed.
    IDENTITY: tuple[str, ...] = ("rho", "rho_growth", "every_n_epochs", "include", "exclude")

    def __init__(
        self,
        *,
        rho: float = 1e-3,
        rho_growth: float = 1.3,
        every_n_epochs: int = 20,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not rho > 0:
            raise ValueError(f"{name}(rho={rho}): give a number above 0.")
        if not rho_growth >= 1:
            raise ValueError(f"{name}(rho_growth={rho_growth}): give a factor of at least 1.")
        if every_n_epochs < 1:
            raise ValueError(f"{name}(every_n_epochs={every_n_epochs}): give a whole number of at least 1.")
        self.rho = rho
        self.rho_growth = rho_growth
        self.every_n_epochs = every_n_epochs
        self.include = [include] if isinstance(include, str) else list(include)
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.layers: list[str] = []
        self.left_alone: dict[str, str] = {}
        self._forget()

    def _forget(self) -> None:
        self.splits = Splits()
        self.masks = FixedMasks()
        self.phase: Phase | None = None
        self._epoch = -1  # the last one whose start was acted upon
        self._cut_steps = 0  # so many cuts of the module's record are in the splits

    # ---- what a method defines

    def timeline(self) -> list[Phase]:
        """The phases, in order."""
        raise NotImplementedError

    def find_layers(self, trainer: Trainer, pl_module: LightningModule) -> Iterable[str]:
        """Names of the layers to compress."""
        raise NotImplementedError

    def problem(self, pl_module: LightningModule, phase: Phase) -> Problem:
        """Layer -> constraint -> projection."""
        raise NotImplementedError

    def hard_masks(self, pl_module: LightningModule, phase: Phase) -> Mapping[str, Tensor]:
        """Layer -> mask."""
        raise NotImplementedError

    def enter(self, trainer: Trainer, pl_module: LightningModule, phase: Phase) -> None:
        """Begin a phase."""
        if phase.admm:
            self.lift(trainer, pl_module)
            self.start(pl_module, phase)
        else:
            self.prune(trainer, pl_module, self.hard_masks(pl_module, phase))

    def update(self, pl_module: LightningModule, phase: Phase) -> None:
        """Begin a later period of an ADMM phase."""
        self.splits.update(self.weights(pl_module), self.problem(pl_module, phase), self.rho_growth)

    def own_state(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Take over the data of `own_state`."""

    def artefact(self, trainer: Trainer, pl_module: LightningModule) -> Artefact:
        """Write what the method makes of the network, on rank 0 at the end of the fit: (layer -> cost, notes)."""
        return {}, []

    def weight_widths(self) -> dict[str, int]:
        """Layer -> bits of a weight, from a method that quantises."""
        return {}

    # ---- what a method may use

    def weights(self, pl_module: LightningModule) -> dict[str, nn.Parameter]:
        """Layer -> its weight; where it is parametrised (fake quantisers, ...), what the optimiser holds of it."""
        return {layer: pl_module.get_parameter(self.parameter_name(pl_module, layer)) for layer in self.layers}

    @staticmethod
    def parameter_name(pl_module: LightningModule, layer: str) -> str:
        if parametrize.is_parametrized(pl_module.get_submodule(layer), "weight"):
            return f"{layer}.parametrizations.weight.original"
        return f"{layer}.weight"

    def start(self, pl_module: LightningModule, phase: Phase) -> None:
        """Z = P(W), U = 0, rho as at first."""
        self._cut_steps = len(_cuts_of(pl_module))
        self.splits.start(self.weights(pl_module), self.problem(pl_module, phase), self.rho)

    def prune(self, trainer: Trainer, pl_module: LightningModule, masks: Mapping[str, Tensor]) -> None:
        """End ADMM: zero what the masks (by layer) leave out and keep it zero, and clear its momentum."""
        self.splits.clear()
        if trainer.world_size > 1:
            masks = trainer.strategy.broadcast({layer: mask.cpu() for layer, mask in masks.items()})
        names = {self.parameter_name(pl_module, layer): mask for layer, mask in masks.items()}
        self.masks.set(pl_module, names)
        self.masks.clear_momentum(trainer, pl_module)

    def lift(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let all weights move again."""
        self.masks.detach()
        self.masks = FixedMasks()
        self.masks.attach(trainer, pl_module)

    def packed_path(self, trainer: Trainer, suffix: str) -> Path:
        """Where the packed form is written: beside the account, numbered where several of a method are at work."""
        same = [c for c in trainer.callbacks if type(c) is type(self)]  # type: ignore[attr-defined]
        number = same.index(self)
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{self.NAME}{f'_{number + 1}' if number else ''}{suffix}"

    @staticmethod
    def packed_cost(layer: nn.Module, packed_bytes: int) -> LayerCost:
        """What a layer costs whose weight is packed: these bytes, and its bias."""
        bias = layer.bias
        return LayerCost(bytes=packed_bytes + (bias.nbytes if isinstance(bias, Tensor) else 0))

    def follow_cuts(self, cuts: Mapping[str, Sequence[Cut]]) -> None:
        """Surgery has cut weights (by layer); cut all that has their shape, too."""
        self.splits.cut(cuts)

    # ---- hooks

    @property
    def state_key(self) -> str:
        return self._generate_state_key(**{name: getattr(self, name) for name in self.IDENTITY})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        attach_record(pl_module)
        if stage != "fit":
            return
        if trainer.current_epoch == 0:
            self._forget()  # whatever an earlier fit of another module has left; a resumed one loads its state later
        self._check_timeline(trainer)
        check_trainer(trainer, type(self).__name__, in_fit=True)
        open_account(trainer, pl_module)
        self.left_alone = {}
        self.layers = list(self.find_layers(trainer, pl_module))
        if not self.layers:
            raise MisconfigurationException(
                f"{type(self).__name__} finds no layer of {type(pl_module).__name__} that it could compress: "
                f"{dict(list(self.left_alone.items())[:4])}"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.splits:
            self.splits.to(self.weights(pl_module))
        self.masks.attach(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_optimizers(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if epoch <= self._epoch:  # resumed in the middle of an epoch
            return
        self._epoch = epoch
        phase = next((phase for phase in reversed(self.timeline()) if phase.start <= epoch), None)
        if phase is None:
            return
        self._follow(pl_module)
        if phase != self.phase:
            self.phase = phase
            self.enter(trainer, pl_module, phase)
        elif phase.admm:
            since = epoch - phase.start - phase.warmup
            if since <= 0:
                self.splits.refresh(self.weights(pl_module), self.problem(pl_module, phase))
            elif since % self.every_n_epochs == 0:
                self.update(pl_module, phase)
        self._check_ranks(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self.splits and not (self.masks and trainer.gradient_clip_val):
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = {layer: weight for layer, weight in self.weights(pl_module).items() if id(weight) in held}
        if self.splits:
            if any(layer in self.splits.z and self._shape(layer) != weight.shape for layer, weight in own.items()):
                self._follow(pl_module)
            self.splits.add_gradient(own)
        if self.masks and trainer.gradient_clip_val:  # else what is masked would count in the norm
            for layer, weight in own.items():
                mask = self.masks.get(self.parameter_name(pl_module, layer))
                if weight.grad is not None and mask is not None:
                    weight.grad.mul_(mask.to(weight.device))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.splits:
            return
        found = self.splits.residuals(self.weights(pl_module))
        pl_module.log_dict({f"train/{self.NAME}/{layer}/{name}": value for (layer, name), value in found.items()})
        pl_module.log(f"train/{self.NAME}/residual", torch.stack(list(found.values())).mean(), prog_bar=True)
        pl_module.log(f"train/{self.NAME}/rho", self.splits.rho)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        costs, notes = self.artefact(trainer, pl_module) if trainer.is_global_zero else ({}, [])
        left_alone = list(self.left_alone.items())
        close_account(trainer, pl_module, notes=notes, left_alone=left_alone, costs=costs, bits=self.weight_widths())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.masks.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.masks.detach()

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "phase": self.phase.name if self.phase else "",
            "splits": self.splits.state_dict(),
            "cut_steps": self._cut_steps,
            "masks": self.masks.state_dict(),
            "own": self.own_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._epoch = state_dict["epoch"]
        self.phase = next((phase for phase in self.timeline() if phase.name == state_dict["phase"]), None)
        self.splits.load_state_dict(state_dict["splits"])
        self._cut_steps = state_dict["cut_steps"]
        self.masks.load_state_dict(state_dict["masks"])
        self.load_own_state(state_dict["own"])

    # ---- the work

    def _check_timeline(self, trainer: Trainer) -> None:
        name, phases = type(self).__name__, self.timeline()
        endless = trainer.max_epochs in (None, -1) or trainer.fast_dev_run  # type: ignore[attr-defined]
        for phase in phases:
            if not endless and phase.start >= trainer.max_epochs:  # type: ignore[operator]
                raise MisconfigurationException(
                    f"{name}({phase.argument}): phase {phase.name!r} would begin at epoch {phase.start} and never "
                    f"happens, as the Trainer stops after max_epochs={trainer.max_epochs}."
                )
        for one, other in pairwise(phases):
            if other.start <= one.start + one.warmup:
                raise ValueError(
                    f"{name}({other.argument}) leaves no epoch between the start of {one.name!r} "
                    f"at {one.start}{f' with warmup_epochs={one.warmup}' if one.warmup else ''} and {other.name!r}."
                )

    def _shape(self, layer: str) -> torch.Size:
        return next(iter(self.splits.z[layer].values())).shape

    def _follow(self, pl_module: LightningModule) -> None:
        """Cut Z and U as the record of the module's surgery says its weights were."""
        steps = _cuts_of(pl_module)
        layers = {self.parameter_name(pl_module, layer): layer for layer in self.layers}
        for step in steps[self._cut_steps :]:
            cuts: dict[str, list[Cut]] = {}
            for cut in step:
                if cut.tensor in layers:
                    cuts.setdefault(layers[cut.tensor], []).append(cut)
            self.follow_cuts(cuts)
        self._cut_steps = len(steps)

    def _check_ranks(self, trainer: Trainer) -> None:
        """Equal weights give equal projections; where they do not, stop before the ranks drift apart."""
        if trainer.world_size == 1 or not self.splits:
            return
        projections = [z for constraints in self.splits.z.values() for z in constraints.values()]
        mine = [int(z.flatten().nonzero().sum()) for z in projections]
        if trainer.strategy.broadcast(mine) != mine:
            raise RuntimeError(f"{type(self).__name__}: rank {trainer.global_rank} has other projections than rank 0.")


def _cuts_of(pl_module: LightningModule) -> list[list[Cut]]:
    """What surgery has cut from the module so far, step by step."""
    return [[Cut(*cut) for cut in step["cuts"]] for step in attach_record(pl_module).steps if step["cuts"]]
