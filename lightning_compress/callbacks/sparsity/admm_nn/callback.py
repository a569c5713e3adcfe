"""When weights are pulled, pruned, quantised and held."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_compress.callbacks.sparsity.admm_nn.projections import (
    Kind,
    Levels,
    StepSearch,
    closest_to_levels,
    find_step,
    level_codes,
    level_count,
    project_levels,
    project_units,
    prune_mask,
    unit_norms,
)
from lightning_compress.callbacks.sparsity.admm_nn.storage import Stored, compression_report, sentence
from lightning_compress.core.example_input import find_example_input
from lightning_compress.core.ratio import parse_ratio, ratio_by_layer
from lightning_compress.core.select import match
from lightning_compress.core.sparse.admm import ADMM, Artefact, Phase, Problem
from lightning_compress.core.sparse.bit_packing import pack_mask, unpack_mask
from lightning_compress.core.sparse.gaps import Gaps, Unit, encode_gaps, save_gaps
from lightning_compress.core.sparse.layers import choose_layers, weight_layers
from lightning_compress.core.surgery import Cut, channel_graph
from lightning_compress.core.surgery.compact import own_norm
from lightning_compress.core.surgery.shrink import slice_tensor

Structure = Literal["irregular", "filter", "column", "kernel", "bn_filter", "structured"]
Rates = float | str | dict[str, float]

# What the rounds of a structure rank, and how its layers are stored.
KINDS: dict[str, tuple[Kind, ...]] = {
    "irregular": ("irregular",), "filter": ("filter",), "column": ("column",), "kernel": ("kernel",),
    "bn_filter": ("filter",), "structured": ("filter", "column"),
}  # fmt: skip
UNITS: dict[str, Unit] = {"irregular": "weight", "kernel": "kernel"}  # the others by columns
OWN_BITS = {"binary": 1, "ternary": 2}


class ADMMNN(ADMM):
    """Prune and then quantise by ADMM during the fit, and tell what indices cost.

    The fit is cut into stages, one after the other from `start_epoch` on:

    * for each entry of `sparsity`: ADMM for `prune_epochs`, then the cut and retraining for `retrain_epochs`;
    * with `weight_bits` (or binary or ternary `levels`): ADMM towards the levels for `quant_epochs`; `quant_rounds`
      times a `partial_fraction` of each level's weights is snapped and held while the others train for
      `partial_epochs`; then all are snapped, and what is not quantised (biases, norms) trains to the end of the fit.

    Args:
        sparsity: share of units that are removed: a number; text for a list with one number per layer, such as
            ``"[0.2]+[0.9]*3"``; a dict from globs of layer names to numbers, where later globs win and others stay
            dense. A list of these makes progressive rounds: each starts from the last one's zeros, and counts from the
            dense layer. None only quantises.
        structure: units: ``"irregular"``, single weights; ``"filter"``; ``"column"``, one tap of one input channel in
            all filters; ``"kernel"``; ``"bn_filter"``, filters by the scale of their batch norm; ``"structured"``, in
            each round first filters, then columns. All but the first are for convolutions. Filters go with their bias
            and norm, so that the export is physically smaller.
        weight_bits: b, for all layers that `include` names, or by glob (others are not quantised): 2^(b-1) levels on
            each side.
        levels: ``"uniform"``, ``"binary"`` (-a, a) or ``"ternary"`` (-a, 0, a).
        shared_zero: whether the zero of pruned weights takes one of the 2^b codes: 2^(b-1) - 1 levels on each side.
        step_search: how the distance of two levels is found; ``"scan"`` is the authors' released code, good for many
            levels only.
        start_epoch: first epoch of all this.
        prune_epochs: of ADMM in each round.
        retrain_epochs: of each round, with fixed zeros; those of the last one only matter if levels follow.
        quant_epochs: of ADMM towards levels.
        quant_rho: `rho` of this stage; the same if None.
        partial_fraction: share of a level's weights that is snapped in each partial round.
        quant_rounds: partial rounds.
        partial_epochs: of each.
        lr_restart: set learning rates here: in ADMM those at the start of the fit, with a tenth in the second and a
            hundredth in the last third of each period; in retraining a tenth in its last quarter; a tenth in the
            partial rounds and afterwards. Refused beside a scheduler.

    `shared` are the arguments of :class:`~lightning_compress.core.sparse.admm.ADMM`: rho, rho_growth (1 keeps rho
    constant), every_n_epochs, include, exclude.

    What is stored: zeros and quantised values in plain weights. At the end of the fit ``admm_nn.gaps`` (see
    `lightning_compress.core.sparse.gaps`) and ``admm_nn_storage.json``, which compares non-structured and structured
    storage and computation, are written beside the account.

    With several processes masks and steps are rank 0's; equal weights lead to equal projections, which is checked.

    Example::

        from lightning_compress.callbacks import ADMMNN
        trainer = Trainer(max_epochs=400, callbacks=[ADMMNN(sparsity=[0.8, 0.9], prune_epochs=100, retrain_epochs=100)])
        trainer.fit(module, datamodule)

    Packaged config: ``method/admm_nn``.
    """

    NAME = "admm_nn"
    IDENTITY = (
        *ADMM.IDENTITY, "sparsity", "structure", "weight_bits", "levels", "shared_zero", "step_search", "start_epoch",
        "prune_epochs", "retrain_epochs", "quant_epochs", "quant_rho", "partial_fraction", "quant_rounds",
        "partial_epochs", "lr_restart",
    )  # fmt: skip

    def __init__(
        self,
        sparsity: Rates | list[Rates] | None = 0.9,
        *,
        structure: Structure = "irregular",
        weight_bits: int | dict[str, int] | None = None,
        levels: Levels = "uniform",
        shared_zero: bool = False,
        step_search: StepSearch = "alternate",
        start_epoch: int = 0,
        prune_epochs: int = 200,
        retrain_epochs: int = 200,
        quant_epochs: int = 120,
        quant_rho: float | None = None,
        partial_fraction: float = 0.3,
        quant_rounds: int = 4,
        partial_epochs: int = 10,
        lr_restart: bool = False,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        for argument, value, kind in (
            ("structure", structure, Structure), ("levels", levels, Levels), ("step_search", step_search, StepSearch),
        ):  # fmt: skip
            if value not in get_args(kind):
                raise ValueError(f"ADMMNN({argument}={value!r}): give {', '.join(map(repr, get_args(kind)))}.")
        for argument, number, least in (
            ("start_epoch", start_epoch, 0), ("prune_epochs", prune_epochs, 1), ("retrain_epochs", retrain_epochs, 1),
            ("quant_epochs", quant_epochs, 1), ("quant_rounds", quant_rounds, 0), ("partial_epochs", partial_epochs, 1),
        ):  # fmt: skip
            if number < least:
                raise ValueError(f"ADMMNN({argument}={number}): give a whole number of at least {least}.")
        if not 0 < partial_fraction <= 1:
            raise ValueError(f"ADMMNN(partial_fraction={partial_fraction}): give a share above 0, at most 1.")
        if quant_rho is not None and not quant_rho > 0:
            raise ValueError(f"ADMMNN(quant_rho={quant_rho}): give a number above 0.")
        rounds = sparsity if isinstance(sparsity, list) else [] if sparsity is None else [sparsity]
        for rates in rounds:
            for rate in rates.values() if isinstance(rates, dict) else [rates]:
                parse_ratio(rate, "sparsity")
        if weight_bits is None and levels != "uniform":
            weight_bits = OWN_BITS[levels]
        for bits in weight_bits.values() if isinstance(weight_bits, dict) else [weight_bits]:
            least, most = (OWN_BITS[levels],) * 2 if levels != "uniform" else (2, 16)
            if bits is not None and not least <= bits <= most:
                allowed = f"{least} to {most}" if least < most else str(least)
                raise ValueError(f"ADMMNN(weight_bits={weight_bits}): levels={levels!r} take {allowed} bits.")
        if not rounds and weight_bits is None:
            raise ValueError("ADMMNN(sparsity=None, weight_bits=None): give one of them, else there is nothing to do.")
        self.sparsity, self.rounds = sparsity, rounds
        self.structure = structure
        self.weight_bits = weight_bits
        self.levels: Levels = levels
        self.shared_zero = shared_zero
        self.step_search: StepSearch = step_search
        self.start_epoch = start_epoch
        self.prune_epochs, self.retrain_epochs, self.quant_epochs = prune_epochs, retrain_epochs, quant_epochs
        self.quant_rho = quant_rho
        self.partial_fraction, self.quant_rounds, self.partial_epochs = partial_fraction, quant_rounds, partial_epochs
        self.lr_restart = lr_restart
        self._rates: list[dict[str, float]] = []  # of each round
        self._bits: dict[str, int] = {}
        self._norms: dict[str, str | None] = {}
        self._handles: list[RemovableHandle] = []

    def _forget(self) -> None:
        super()._forget()
        self.steps: dict[str, float] = {}  # layer -> distance of two levels
        self.held: dict[str, Tensor] = {}  # layer -> where a weight has its level and stays there
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}  # layer -> (1 where it is free, the values of the others)
        self._full_rates: list[list[float]] = []  # learning rates by optimiser and group

    # ---- stages

    @property
    def _stages(self) -> list[tuple[int, Kind]]:
        """(number of the round, what its units are), pruning stage by pruning stage."""
        return [(i, kind) for i in range(len(self.rounds)) for kind in KINDS[self.structure]]

    def timeline(self) -> list[Phase]:
        pieces = []
        for i in range(1, len(self._stages) + 1):
            pieces.append((f"pruning {i}", True, self.prune_epochs, "prune_epochs"))
            pieces.append((f"retraining {i}", False, self.retrain_epochs, "retrain_epochs"))
        if self.weight_bits is not None:
            pieces.append(("quantisation", True, self.quant_epochs, "quant_epochs"))
            partial_rounds = [f"partial {i}" for i in range(1, self.quant_rounds + 1)]
            pieces += [(name, False, self.partial_epochs, "partial_epochs") for name in partial_rounds]
            pieces.append(("final", False, 0, ""))
        phases, epoch, argument = [], self.start_epoch, f"start_epoch={self.start_epoch}"
        for name, admm, length, by in pieces:
            phases.append(Phase(name, epoch, admm, argument))
            epoch, argument = epoch + length, f"{by}={length}"
        return phases

    def find_layers(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        layers = weight_layers(pl_module)
        chosen, self.left_alone = choose_layers(layers, self.include, self.exclude)
        weights = {name: pl_module.get_parameter(self.parameter_name(pl_module, name)) for name in chosen}
        frozen = [name for name, weight in weights.items() if not weight.requires_grad]
        self.left_alone.update(dict.fromkeys(frozen, "its weight is frozen"))
        chosen = [name for name in chosen if name not in frozen]
        prunable = [name for name in chosen if self.structure == "irregular" or _is_conv(layers[name])]
        self._norms = {}
        if "filter" in KINDS[self.structure] and self.rounds:
            graph = channel_graph(pl_module, find_example_input(trainer, pl_module))
            self._norms = {name: own_norm(pl_module, graph, name) for name in prunable if name in graph.layers}
            if self.structure == "bn_filter":
                prunable = [name for name in prunable if self._norms.get(name)]
        self._rates = [ratio_by_layer(rates, prunable, "sparsity") for rates in self.rounds]
        for before, after in zip(self._rates, self._rates[1:], strict=False):
            falls = [name for name in before if after[name] < before[name]]
            if falls:
                raise ValueError(f"ADMMNN(sparsity={self.sparsity}): {falls[0]!r} would get weights back; let it rise.")
        self._bits = {}
        bits = self.weight_bits if isinstance(self.weight_bits, dict) else {"*": self.weight_bits}
        for glob, number in bits.items():
            if number is not None and chosen:
                self._bits.update(dict.fromkeys(match(chosen, [glob], "weight_bits"), number))
        pruned = {name for rates in self._rates for name, rate in rates.items() if rate > 0}
        for name in chosen:
            if name not in pruned and name not in self._bits:
                why = "sparsity leaves it" if name in prunable else f"structure={self.structure!r} is not for it"
                self.left_alone[name] = why
        return [name for name in chosen if name in pruned or name in self._bits]

    def enter(self, trainer: Trainer, pl_module: LightningModule, phase: Phase) -> None:
        kind = phase.name.split()[0]
        if kind == "pruning":
            self.start(pl_module, phase)  # earlier zeros stay
        elif kind == "retraining":
            self.prune(trainer, pl_module, self.hard_masks(pl_module, phase))
        elif kind == "quantisation":
            steps = {name: self._find_step(pl_module, name) for name in self._bits}
            self.steps = trainer.strategy.broadcast(steps)
            self.start(pl_module, phase)
        else:
            self.splits.clear()
            self.snap(pl_module, self.partial_fraction if kind == "partial" else 1.0)

    def start(self, pl_module: LightningModule, phase: Phase) -> None:
        super().start(pl_module, phase)
        if phase.name == "quantisation" and self.quant_rho is not None:
            self.splits.rho = self.quant_rho

    def problem(self, pl_module: LightningModule, phase: Phase) -> Problem:
        if phase.name == "quantisation":
            return {
                layer: {"levels": partial(project_levels, step=step, count=self._count(layer), levels=self.levels)}
                for layer, step in self.steps.items()
            }
        number, kind = self._stages[int(phase.name.split()[1]) - 1]
        return {
            layer: {"units": partial(project_units, kind=kind, rate=rate, norms=self._scales(pl_module, layer))}
            for layer, rate in self._rates[number].items()
            if rate > 0
        }

    # ---- pruning

    def hard_masks(self, pl_module: LightningModule, phase: Phase) -> dict[str, Tensor]:
        number, kind = self._stages[int(phase.name.split()[1]) - 1]
        weights, found = self.weights(pl_module), {}
        for layer, rate in self._rates[number].items():
            if rate > 0:
                weight = weights[layer]
                norms = self._scales(pl_module, layer)
                norms = unit_norms(weight, kind) if norms is None else norms
                old = self.masks.get(self.parameter_name(pl_module, layer))
                if old is not None and kind == "irregular":
                    norms = norms.masked_fill(~old.to(norms.device), -1)  # they go before those that are 0 by chance
                mask = prune_mask(weight, kind, rate, norms)
                found[layer] = mask if old is None else mask & old.to(mask.device)
        return found

    def prune(self, trainer: Trainer, pl_module: LightningModule, masks: Mapping[str, Tensor]) -> None:
        super().prune(trainer, pl_module, masks)
        if "filter" not in KINDS[self.structure]:
            return
        parameters, more = dict(pl_module.named_parameters()), {}
        for layer in masks:
            alive = self.masks[self.parameter_name(pl_module, layer)].flatten(1).any(1)
            norm = self._norms.get(layer)
            for name in (f"{layer}.bias", f"{norm}.weight", f"{norm}.bias"):
                if name in parameters:
                    more[name] = alive
        self.masks.set(pl_module, more)
        self.masks.clear_momentum(trainer, pl_module)

    def _scales(self, pl_module: LightningModule, layer: str) -> Tensor | None:
        """|gamma| of the layer's norm, (C_out, 1, ...), where filters are ranked by it."""
        if self.structure != "bn_filter":
            return None
        norm: Any = pl_module.get_submodule(str(self._norms[layer]))
        dims = pl_module.get_parameter(self.parameter_name(pl_module, layer)).ndim
        return norm.weight.detach().abs().float().view(-1, *[1] * (dims - 1))

    # ---- quantisation

    def _count(self, layer: str) -> int:
        return level_count(self._bits[layer], self.levels, self.shared_zero)

    def _find_step(self, pl_module: LightningModule, layer: str) -> float:
        weight = pl_module.get_parameter(self.parameter_name(pl_module, layer))
        return find_step(weight, self._count(layer), self.levels, self.step_search)

    @torch.no_grad()
    def snap(self, pl_module: LightningModule, share: float) -> None:
        """Give a share of the weights that are still free the level that is next, and hold them there."""
        for layer, weight in self.weights(pl_module).items():
            if layer in self.steps:
                held = self.held.get(layer, torch.zeros_like(weight, dtype=torch.bool)).to(weight.device)
                target = project_levels(weight, self.steps[layer], self._count(layer), self.levels)
                codes = level_codes(weight, self.steps[layer], self._count(layer), self.levels)
                free = ~held & (weight != 0)
                now = torch.zeros_like(held)
                now[free] = closest_to_levels(codes[free], (weight - target).abs()[free], share)
                weight.copy_(torch.where(now, target, weight))
                self.held[layer] = torch.ones_like(held) if share == 1 else held | now
        self._kept.clear()

    @property
    def is_quantised(self) -> bool:
        """Whether all weights have their levels."""
        return self.phase is not None and self.phase.name == "final"

    def _bring(self, pl_module: LightningModule) -> None:
        for layer, weight in self.weights(pl_module).items():
            if layer in self.held and layer not in self._kept:
                free = (~self.held[layer]).to(weight)
                self._kept[layer] = (free, weight.detach() * self.held[layer].to(weight.device))

    def _hold(self, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Undo what a step did to held weights: w <- w free + values."""
        weights = self.weights(pl_module)
        if any(weights[layer].shape != free.shape for layer, (free, _) in self._kept.items()):
            self._follow(pl_module)
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        mine = [layer for layer in self._kept if id(weights[layer]) in own]
        if mine:
            with torch.no_grad():
                moved: list[Tensor] = [weights[layer] for layer in mine]
                torch._foreach_mul_(moved, [self._kept[layer][0] for layer in mine])
                torch._foreach_add_(moved, [self._kept[layer][1] for layer in mine])

    def follow_cuts(self, cuts: Mapping[str, Sequence[Cut]]) -> None:
        super().follow_cuts(cuts)
        for layer in self.held.keys() & cuts.keys():
            self.held[layer] = slice_tensor(self.held[layer], cuts[layer])
            if layer in self._kept:
                free, values = self._kept[layer]
                self._kept[layer] = (slice_tensor(free, cuts[layer]), slice_tensor(values, cuts[layer]))

    # ---- hooks

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._detach()

        def hold(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if self._kept:
                self._hold(pl_module, optimizer)

        self._kept.clear()
        self._bring(pl_module)
        self._handles = [optimizer.register_step_post_hook(hold) for optimizer in trainer.optimizers]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.lr_restart and trainer.lr_scheduler_configs:
            raise MisconfigurationException(
                "ADMMNN(lr_restart=True) sets learning rates itself, and the module has a scheduler too: leave one out."
            )
        if not self._full_rates:
            self._full_rates = [[group["lr"] for group in o.param_groups] for o in trainer.optimizers]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._bring(pl_module)
        if self.lr_restart:
            factor = self.lr_factor(trainer.current_epoch)
            for optimizer, rates in zip(trainer.optimizers, self._full_rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor

    def lr_factor(self, epoch: int) -> float:
        """Of the learning rates with `lr_restart`."""
        phase = next((phase for phase in reversed(self.timeline()) if phase.start <= epoch), None)
        if phase is None:
            return 1.0
        since, period = epoch - phase.start, self.every_n_epochs
        if phase.admm:
            return 0.1 ** (since % period * 3 // period)
        if phase.name.startswith("retraining"):
            return 0.1 if 4 * since >= 3 * self.retrain_epochs else 1.0
        return 0.1

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._kept and trainer.gradient_clip_val:  # else what is held would count in the norm
            for layer, weight in self.weights(pl_module).items():
                if layer in self._kept and weight.grad is not None and weight.shape == self._kept[layer][0].shape:
                    weight.grad.mul_(self._kept[layer][0])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._detach()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def own_state(self) -> dict[str, Any]:
        held = {layer: {"bits": pack_mask(mask), "shape": list(mask.shape)} for layer, mask in self.held.items()}
        return {"steps": dict(self.steps), "held": held, "rates": self._full_rates}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self.steps = dict(state["steps"])
        self.held = {layer: unpack_mask(mask["bits"], mask["shape"]) for layer, mask in state["held"].items()}
        self._full_rates = state["rates"]
        self._kept.clear()

    # ---- at the end

    def weight_widths(self) -> dict[str, int]:
        return dict(self._bits) if self.is_quantised else {}

    def packed(self, pl_module: LightningModule) -> dict[str, Gaps]:
        """The pruned and quantised layers as they are stored; none before the first cut."""
        found = {}
        for layer in self.layers:
            quantised = self.is_quantised and layer in self.steps
            if quantised or self.parameter_name(pl_module, layer) in self.masks:
                weight: Any = pl_module.get_submodule(layer).weight
                step, levels = (self.steps[layer], self._count(layer)) if quantised else (0.0, 0)
                unit = "weight" if weight.ndim == 2 else UNITS.get(self.structure, "column")
                found[layer] = encode_gaps(weight, unit, step=step, levels=levels)
        return found

    def artefact(self, trainer: Trainer, pl_module: LightningModule) -> Artefact:
        """``admm_nn.gaps`` and ``admm_nn_storage.json`` in the run's folder, the bytes of layers, the comparison."""
        packed = self.packed(pl_module)
        if not packed:
            return {}, []
        costs, stored = {}, {}
        for name, gaps in packed.items():
            layer: Any = pl_module.get_submodule(name)
            costs[name] = self.packed_cost(layer, gaps.nbytes)
            kept = int(layer.weight.count_nonzero())
            stored[name] = Stored(layer.weight.numel(), kept, gaps.value_bits, gaps.nbytes, _is_conv(layer))
        report = compression_report(stored)
        groups = [group for group in ("all convolutions", "all layers") if group in report]
        notes = [sentence(report, group, self.structure != "irregular") for group in groups]
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = self.packed_path(trainer, ".gaps")
            size, index = save_gaps(path, packed), sum(gaps.index_bytes for gaps in packed.values())
            path.with_name(f"{path.stem}_storage.json").write_text(json.dumps(report, indent=1))
            notes.append(f"{path.name}: {len(packed)} layers in {size:,} bytes, of them {index:,} of indices.")
        return costs, notes


def _is_conv(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.conv._ConvNd) and not isinstance(layer, nn.modules.conv._ConvTransposeNd)
