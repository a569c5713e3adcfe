"""What all channel pruners share: when to prune, by how much, and everything that must follow.

A method adds its criterion: :meth:`ChannelPruning.score` for one layer, or :meth:`ChannelPruning.scores` for all of
them at once. The highest scores stay. The rest is the machinery's: coupled layers, optimiser, DDP, checkpoint, account.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_compress.core.example_input import find_example_input
from lightning_compress.core.optimizers import check_optimizers
from lightning_compress.core.profile import profile
from lightning_compress.core.ratio import parse_ratio, ratio_by_layer
from lightning_compress.core.report import close_account, open_account
from lightning_compress.core.surgery import (
    ChannelGraph,
    ChannelPlan,
    allocate,
    attach_record,
    channel_graph,
    check_cuts,
    check_epoch,
    check_trainer,
    floor_width,
    resume_in_setup,
    scaled_macs,
    shrink_in_fit,
    shrink_in_setup,
)


class ChannelPruning(Callback):
    """Remove channels once, in `setup` or at the start of an epoch, and train on with the narrow network.

    Args:
        pruning_ratio: share of the channels to remove from every layer: a number; a list with one number per layer
            in forward order, also as text in the papers' notation ``"[0.1]+[0.6]*35"``; or a dict from globs of layer
            names to numbers, where later globs win.
        target_macs: share of the MACs to keep, in (0, 1), instead of a pruning ratio: the smallest uniform ratio that
            reaches it is found by bisection.
        include: globs of the names of layers that may be narrowed.
        exclude: globs of the names of layers that keep their width.
        round_to: kept widths become the nearest multiple of this, because odd widths run slower.
        start_epoch: 0 prunes before the first epoch, in `setup`; k > 0 prunes at the start of epoch k, in mid-fit,
            with the optimiser's state carried along.
        seed: of whatever the method draws at random.

    What is stored: the removed channels, in the module's own `state_dict`; see `lightning_compress.load`.

    With several processes the plan is made on rank 0 and sent to the others.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, names that match no
            layer, or a network whose channels cannot be followed.
    """

    # The arguments that make two instances different: in a list of callbacks, and when a run is resumed.
    IDENTITY: tuple[str, ...] = (
        "pruning_ratio", "target_macs", "include", "exclude", "round_to", "start_epoch", "seed"
    )  # fmt: skip

    def __init__(
        self,
        pruning_ratio: float | list[float] | dict[str, float] | str = 0.5,
        *,
        target_macs: float | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        round_to: int = 1,
        start_epoch: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if isinstance(pruning_ratio, dict):
            for value in pruning_ratio.values():
                parse_ratio(value)
        else:
            parse_ratio(pruning_ratio)
        if target_macs is not None and not 0 < target_macs < 1:
            raise ValueError(f"{name}(target_macs={target_macs}): give the share of MACs to keep, between 0 and 1.")
        if round_to < 1:
            raise ValueError(f"{name}(round_to={round_to}): give a whole number of at least 1.")
        if start_epoch < 0:
            raise ValueError(f"{name}(start_epoch={start_epoch}): give 0 or a later epoch.")
        self.pruning_ratio = pruning_ratio
        self.target_macs = target_macs
        self.include = [include] if isinstance(include, str) else list(include)
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.round_to = round_to
        self.start_epoch = start_epoch
        self.seed = seed
        self._notes: list[str] = []
        self._left_alone: dict[str, str] = {}

    # ---- what a method defines

    def score(self, name: str, layer: nn.Module) -> Tensor:
        """Score every output channel of a conv or linear layer: (C_out,), higher is kept."""
        raise NotImplementedError

    def scores(self, trainer: Trainer, pl_module: LightningModule, graph: ChannelGraph) -> dict[str, Tensor]:
        """Score all layers: layer name -> (C_out,)."""
        with torch.no_grad():
            return {name: self.score(name, pl_module.get_submodule(name)) for name in graph.layers}

    def prunable(self, pl_module: LightningModule, graph: ChannelGraph) -> list[str]:
        """Names of the layers that this method narrows, in forward order."""
        return list(graph.layers)

    def ratios(self, pl_module: LightningModule, graph: ChannelGraph) -> dict[str, float]:
        """Layer name -> share to remove. A method whose paper orders its lists otherwise overrides this."""
        return ratio_by_layer(self.pruning_ratio, self.prunable(pl_module, graph))

    def width(self, width: int, ratio: float) -> int:
        """Channels kept of `width`. Papers round differently."""
        return floor_width(width, ratio)

    def new_values(self, pl_module: LightningModule, graph: ChannelGraph, plan: ChannelPlan) -> dict[str, Tensor]:
        """Tensor name -> value in the narrow network, where it is not just the kept slice. Called before the cut."""
        return {}

    # ---- hooks

    @property
    def state_key(self) -> str:
        return self._generate_state_key(**{name: getattr(self, name) for name in self.IDENTITY})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        record = attach_record(pl_module)
        if stage != "fit":
            return
        check_epoch(trainer, type(self).__name__, "start_epoch", self.start_epoch)
        open_account(trainer, pl_module)
        resume_in_setup(trainer, pl_module, by=self.state_key, required=self.start_epoch == 0)
        if self._is_done(record.steps):
            return
        if self.start_epoch == 0:
            self.prune(trainer, pl_module)
        else:
            self.rehearse(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_optimizers(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if 0 < self.start_epoch <= trainer.current_epoch and not self._is_done(attach_record(pl_module).steps):
            self.prune(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        close_account(trainer, pl_module, notes=self._notes, left_alone=list(self._left_alone.items()))

    # ---- the work

    def trace(self, trainer: Trainer, pl_module: LightningModule) -> ChannelGraph:
        """The channels of the module, with `include` and `exclude` applied."""
        example = find_example_input(trainer, pl_module)
        graph = channel_graph(pl_module, example, include=self.include, exclude=self.exclude)
        if not graph.layers:
            raise MisconfigurationException(
                f"{type(self).__name__} finds no layer of {type(pl_module).__name__} that it could narrow: "
                f"{dict(list(graph.left_alone.items())[:4])}"
            )
        self._left_alone = graph.left_alone
        return graph

    def prune(self, trainer: Trainer, pl_module: LightningModule) -> ChannelPlan:
        """Score, decide as rank 0 does, shrink."""
        graph = self.trace(trainer, pl_module)
        scores = self.scores(trainer, pl_module, graph)
        plan = self._decide(trainer, pl_module, graph, scores)  # everywhere, so that what is impossible ends all ranks
        values = self.new_values(pl_module, graph, plan) if trainer.is_global_zero else {}
        plan, values = trainer.strategy.broadcast((plan, values))
        cuts = plan.cuts(graph)
        check_cuts(pl_module, cuts, find_example_input(trainer, pl_module))
        if self.start_epoch == 0:
            shrink_in_setup(trainer, pl_module, cuts, by=self.state_key)
        else:
            shrink_in_fit(trainer, cuts, by=self.state_key)
        tensors = {**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers())}
        with torch.no_grad():
            for name, value in values.items():
                tensors[name].copy_(value)
        self._check_ranks(trainer, pl_module)
        rank_zero_info(f"{type(self).__name__}: {len(plan.kept)} layers narrowed.")
        return plan

    def rehearse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find in `setup` what would fail in `start_epoch`, hours later: everything but the scores is known."""
        check_trainer(trainer, type(self).__name__, in_fit=True)
        graph = self.trace(trainer, pl_module)
        scores = {name: torch.zeros(graph.width(name)) for name in self.prunable(pl_module, graph)}
        cuts = self._decide(trainer, pl_module, graph, scores).cuts(graph)
        check_cuts(pl_module, cuts, find_example_input(trainer, pl_module))

    def _decide(
        self, trainer: Trainer, pl_module: LightningModule, graph: ChannelGraph, scores: Mapping[str, Tensor]
    ) -> ChannelPlan:
        def plan(ratios: Mapping[str, float], round_to: int = self.round_to) -> ChannelPlan:
            return allocate(graph, scores, ratios, width=self.width, round_to=round_to)

        dense = profile(pl_module, find_example_input(trainer, pl_module))
        macs = {layer.name: layer.macs for layer in dense.layers}

        def share(plan: ChannelPlan) -> float:
            return scaled_macs(macs, graph, plan.cuts(graph)) / max(1, dense.macs)

        self._notes = []
        if self.target_macs is None:
            ratios = self.ratios(pl_module, graph)
        else:
            layers = self.prunable(pl_module, graph)
            ratio = self._reach(self.target_macs, lambda r: share(plan(dict.fromkeys(layers, r))))
            ratios = dict.fromkeys(layers, ratio)
        chosen = plan(ratios)
        if self.round_to > 1:
            self._notes.append(
                f"Rounding widths to multiples of {self.round_to} moved the MACs from {share(plan(ratios, 1)):.1%} "
                f"to {share(chosen):.1%} of the dense network's."
            )
        return chosen

    def _reach(self, target: float, share: Callable[[float], float]) -> float:
        """The smallest uniform ratio whose share of MACs is within the target."""
        low, high = 0.0, 0.999
        lowest = share(high)
        if lowest > target:
            raise MisconfigurationException(
                f"{type(self).__name__}(target_macs={target}) is out of reach: with one channel left in every layer "
                f"that may be narrowed, {lowest:.3f} of the MACs remain."
            )
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (low, middle) if share(middle) <= target else (middle, high)
        self._notes.append(f"target_macs={target:g} is reached by pruning_ratio={high:.4f} in every layer.")
        return high

    def _is_done(self, steps: Sequence[Mapping[str, Any]]) -> bool:
        return any(step["by"] == self.state_key for step in steps)

    def _check_ranks(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Same structure everywhere, or stop now: with different shapes the next collective would hang."""
        if trainer.world_size > 1:
            mine = [tuple(p.shape) for p in pl_module.parameters()]
            if trainer.strategy.broadcast(mine) != mine:
                raise RuntimeError(f"{type(self).__name__}: rank {trainer.global_rank} has other shapes than rank 0.")


def refuse_later_pruning(trainer: Trainer, callback: Callback, why: str, advice: str = "") -> None:
    """For the `setup` of a method that brings what has the width of the layers it finds: channels must go before.

    Args:
        callback: the method's.
        why: what does not fit fewer channels.
        advice: another way out.

    Raises:
        MisconfigurationException: the Trainer has a `ChannelPruning` that prunes in mid-fit, or is listed later.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    own = type(callback).__name__
    for position, other in enumerate(callbacks):
        late = getattr(other, "start_epoch", 1) > 0 or position > callbacks.index(callback)
        if isinstance(other, ChannelPruning) and late:
            name = type(other).__name__
            raise MisconfigurationException(
                f"{own} and {name}: {why}. Let {name} prune before, with start_epoch=0 and listed before {own}{advice}."
            )
