"""The callback: it decides when masks come, when the vote is, and what follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_compress.callbacks.pruning.white_box.masks import (
    MASK,
    attach_masks,
    channel_scores,
    class_mixture,
    column_penalty,
    mean_guide,
    official_factor,
)
from lightning_compress.callbacks.pruning.white_box.placement import (
    Conv,
    MaskHooks,
    Place,
    Position,
    fold_into_norms,
    fold_into_weights,
    place_masks,
    readers_of,
    split_layers,
)
from lightning_compress.callbacks.pruning.white_box.vote import (
    FlopsRule,
    Vote,
    global_vote,
    least_width,
    narrowed_cost,
)
from lightning_compress.core import plots
from lightning_compress.core.batches import targets_of
from lightning_compress.core.example_input import find_example_input
from lightning_compress.core.fresh_start import FreshStart
from lightning_compress.core.losses import add_loss_term, around_training_step
from lightning_compress.core.optimizers import check_optimizers
from lightning_compress.core.profile import profile
from lightning_compress.core.report import close_account, log_figure, open_account
from lightning_compress.core.select import match
from lightning_compress.core.surgery import (
    ChannelGraph,
    ChannelPlan,
    allocate,
    attach_record,
    change_in_setup,
    channel_graph,
    check_cuts,
    check_epoch,
    check_trainer,
    resume_in_setup,
    shrink_in_fit,
    undo_changes,
)
from lightning_compress.core.surgery.compact import own_norm

LEAST_FACTOR = 1e-3  # what folding multiplies by is at least this far from 0, or the channel would never learn again
MANY_CLASSES = 100  # from here on an unnormalised guide is too large for float16


class WhiteBox(Callback):
    """Learn class-wise channel masks, prune by one vote over all layers, and fine-tune, in one fit.

    Up to `end_epoch`, weights and masks train together at the initial learning rate. At its start the network becomes
    narrow, and optimiser and learning-rate schedule begin anew: epochs of a schedule count from there. Validation in
    the first part sees the network without masks, so its scores mean little; best checkpoints and early stopping count
    from the vote on.

    Args:
        num_classes: K; None takes ``num_classes`` of the datamodule or the module, or the width of its output layer.
        include: globs of convolutions that get masks. Those that share their channels with others (residual sums) keep
            their width whatever is said here.
        exclude: globs of convolutions that get none.
        vote_layers: globs of convolutions that vote; None: all that are masked, and see `include_unused`.
        target_macs: share of the MACs to keep, in (0, 1); 1 minus the paper's pruning rate.
        end_epoch: epochs of training with masks, at least 1. The paper: 30 on CIFAR, 9 on ImageNet.
        sparse_lambda: lambda, the weight of the masks' norm. The paper: 0 for ResNets and 1e-2 for VGG and MobileNetV2
            on CIFAR, 5e-4 on ImageNet. The default is smaller than its non-zero ones: too large a value nearly wipes
            out layers, after which training does not start.
        min_preserve: share of its channels that every layer keeps.
        start_keep: rho, the share of all voting channels that the first threshold lets through.
        keep_step: by how much rho falls until the target is met.
        flops_rule: what the target counts: ``"conv_fc"`` MACs of convolutions and linear layers; ``"with_bn"``, as the
            authors, also 2 per output of a batch norm and 1 per output of a convolution with bias.
        include_unused: whether convolutions that keep their width have masks that vote too. These never act on
            features; weight decay and the penalty move them. The authors do so in ResNets.
        position: where masks act. ``"before_bn"``: on the output of the convolution. ``"after_activation"``: on what
            its readers get. ``"auto"`` is the paper's choice: the first in residual blocks of two convolutions, the
            second elsewhere.
        fold: ``"exact"`` multiplies the mean guide into the convolution's weight, or into its readers' where masks act
            behind the activation: the network stays what it was. ``"official"`` multiplies half of the column sum
            into weight and bias of the batch norms.
        scale_unused: whether the official fold also shrinks the norms behind masks that only vote.
        last_layer: ``"score"``: the last convolution before the classifier, where it can be narrowed, votes as all do.
            ``"random"``, as the authors: it keeps the share that the previous round of the vote left of the cost, drawn
            at random.
        normalize_guide: divide the guide by its initial mean (K + 1) / 2. A norm behind the mask takes the factor away
            again, so training is the same, but folded weights keep their size and float16 does not overflow.
        seed: of the random mixtures, and of a random last layer.

    What is stored: masks, as parameters of their layers, until the vote; the removed channels afterwards, in the
    module's own `state_dict`; rates and schedules of the start, in the callback's. A resumed run draws the same
    mixtures as one that never stopped: they depend on seed, process, epoch and batch alone.

    With several processes each draws mixtures of its own; the vote is the first one's.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, a target that
            `min_preserve` puts out of reach, names that match no layer, or batches without labels.

    Example::

        from lightning_compress.callbacks import WhiteBox
        trainer = Trainer(max_epochs=330, callbacks=[WhiteBox(target_macs=0.45, end_epoch=30)])
        trainer.fit(module, datamodule)

    Packaged config: ``method/white_box``.
    """

    # What makes two instances different: in a list of callbacks, and when a run is resumed.
    IDENTITY = ("include", "exclude", "vote_layers", "target_macs", "end_epoch", "seed")

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        vote_layers: Sequence[str] | None = None,
        target_macs: float = 0.5,
        end_epoch: int = 30,
        sparse_lambda: float = 1e-4,
        min_preserve: float = 0.3,
        start_keep: float = 0.9,
        keep_step: float = 0.01,
        flops_rule: FlopsRule = "conv_fc",
        include_unused: bool = True,
        position: Position = "auto",
        fold: Literal["exact", "official"] = "exact",
        scale_unused: bool = False,
        last_layer: Literal["score", "random"] = "score",
        normalize_guide: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for argument, value, allowed, holds in (
            ("num_classes", num_classes, "2 or more", num_classes is None or num_classes > 1),
            ("target_macs", target_macs, "the share of MACs to keep, between 0 and 1", 0 < target_macs < 1),
            ("end_epoch", end_epoch, "an epoch of 1 or later", end_epoch >= 1),
            ("sparse_lambda", sparse_lambda, "0 or more", sparse_lambda >= 0),
            ("min_preserve", min_preserve, "a share from 0 to 1", 0 <= min_preserve <= 1),
            ("start_keep", start_keep, "a share above 0, up to 1", 0 < start_keep <= 1),
            ("keep_step", keep_step, "a share above 0, below 1", 0 < keep_step < 1),
            ("seed", seed, "0 or more", seed >= 0),
            *(
                (argument, value, " or ".join(map(repr, choices)), value in choices)
                for argument, value, choices in (
                    ("flops_rule", flops_rule, ("conv_fc", "with_bn")),
                    ("position", position, ("auto", "before_bn", "after_activation")),
                    ("fold", fold, ("exact", "official")),
                    ("last_layer", last_layer, ("score", "random")),
                )
            ),
        ):
            if not holds:
                raise ValueError(f"WhiteBox({argument}={value!r}): give {allowed}.")
        self.num_classes = num_classes
        self.include = _globs(include)
        self.exclude = _globs(exclude)
        self.vote_layers = None if vote_layers is None else _globs(vote_layers)
        self.target_macs = target_macs
        self.end_epoch = end_epoch
        self.sparse_lambda = sparse_lambda
        self.min_preserve = min_preserve
        self.start_keep = start_keep
        self.keep_step = keep_step
        self.flops_rule = flops_rule
        self.include_unused = include_unused
        self.position = position
        self.fold = fold
        self.scale_unused = scale_unused
        self.last_layer = last_layer
        self.normalize_guide = normalize_guide
        self.seed = seed
        self._places: list[Place] = []
        self._layers: list[str] = []  # all that have a mask; those that are no place only vote
        self._classes = 0
        self._hooks: MaskHooks | None = None
        self._handles: list[Any] = []
        self._fresh_start: FreshStart | None = None
        self._step = (0, 0, 0)  # process, epoch, batch
        self._notes: list[str] = []
        self._left_alone: dict[str, str] = {}

    # ---- the fit

    @property
    def state_key(self) -> str:
        return self._generate_state_key(**{name: getattr(self, name) for name in self.IDENTITY})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        record = attach_record(pl_module)
        if stage != "fit":
            return
        check_epoch(trainer, "WhiteBox", "end_epoch", self.end_epoch)
        open_account(trainer, pl_module)
        resume_in_setup(trainer, pl_module, by=self.state_key)
        if not any(step["by"] == self.state_key and not step.get("change") for step in record.steps):
            self._prepare(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_optimizers(trainer, pl_module)
        if not self._searching:
            return
        held = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        stray = [name for name, mask in self._masks(pl_module).items() if id(mask) not in held]
        if stray:
            raise MisconfigurationException(
                f"WhiteBox: no optimiser holds the masks of {', '.join(stray[:3])}{' ...' if stray[3:] else ''}. Build "
                f"it in `configure_optimizers` from all parameters of those layers: `self.parameters()`."
            )
        if self._fresh_start is None:
            self._fresh_start = FreshStart.of(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._searching or self._fresh_start is None:
            return
        if trainer.current_epoch >= self.end_epoch:
            self._prune(trainer, pl_module)
            self._fresh_start.restore(trainer)
            self._fresh_start = None
            return
        self._fresh_start.restore_rates(trainer)
        for stopping in trainer.early_stopping_callbacks:  # a search is not over because its scores stand still
            stopping.wait_count = 0
            stopping.best_score = torch.tensor(float("inf") if stopping.mode == "min" else float("-inf"))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = (trainer.global_rank, trainer.current_epoch, batch_idx)
        if self._fresh_start is not None and any(c.interval == "step" for c in trainer.lr_scheduler_configs):
            self._fresh_start.restore_rates(trainer)

    def on_train_batch_end(self, *args: Any) -> None:
        # Not when the training step ends: activation checkpointing runs blocks again in the backward pass.
        if self._hooks is not None:
            self._hooks.mixture = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        close_account(trainer, pl_module, notes=self._notes, left_alone=self._left_alone)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()
        if stage == "fit" and trainer.fast_dev_run:  # type: ignore[attr-defined]
            undo_changes(pl_module, by=self.state_key)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def state_dict(self) -> dict[str, Any]:
        fresh = None if self._fresh_start is None else self._fresh_start.state_dict()
        return {"fresh_start": fresh, "notes": list(self._notes)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        fresh = state_dict["fresh_start"]
        self._fresh_start = None if fresh is None else FreshStart.from_state_dict(fresh)
        self._notes = list(state_dict["notes"])

    # ---- stage 1: masks

    @property
    def _searching(self) -> bool:
        return self._hooks is not None

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach masks, unless a checkpoint has brought them, and put them to work."""
        check_trainer(trainer, "WhiteBox", in_fit=True)
        self._release()
        self._fresh_start = None
        graph = self._trace(trainer, pl_module)
        self._rehearse(trainer, pl_module, graph)
        steps = [step for step in attach_record(pl_module).steps if step["by"] == self.state_key]
        if not steps:
            layers = list(dict.fromkeys([*(place.layer for place in self._places), *self._voters(pl_module, graph)]))
            classes = self.num_classes or find_num_classes(trainer, pl_module, graph)
            arguments = {"layers": layers, "num_classes": classes}
            change_in_setup(trainer, pl_module, attach_masks, arguments, by=self.state_key)
            steps = attach_record(pl_module).steps[-1:]
        self._layers, self._classes = steps[0]["arguments"]["layers"], steps[0]["arguments"]["num_classes"]
        if trainer.precision == "16-mixed" and self._classes >= MANY_CLASSES and not self.normalize_guide:
            rank_zero_warn(
                f"WhiteBox: with {self._classes} classes a guide starts near {(self._classes + 1) / 2:.0f}, which "
                f"overflows float16. Use normalize_guide=True, or precision='bf16-mixed'."
            )
        self._hooks = MaskHooks(pl_module, self._places, self.normalize_guide)
        twins = [c for c in trainer.callbacks if isinstance(c, WhiteBox)]  # type: ignore[attr-defined]
        term = f"penalty_{twins.index(self) + 1}" if len(twins) > 1 else "penalty"
        self._handles = [
            around_training_step(pl_module, "WhiteBox", self._classes_of),
            # also for lambda = 0: it gives masks that only vote a gradient of 0, so that weight decay moves them
            add_loss_term(pl_module, "white_box", term, lambda *_: self._penalty(pl_module), self.sparse_lambda),
        ]

    def _release(self) -> None:
        """Take hooks and loss term away; masks stay in the module."""
        for handle in (self._hooks, *self._handles):
            if handle is not None:
                handle.remove()
        self._hooks, self._handles = None, []

    @contextmanager
    def _classes_of(self, batch: Any) -> Iterator[None]:
        """Draw D for the labels of a batch; `on_train_batch_end` forgets it."""
        assert self._hooks is not None
        targets = targets_of(batch, "WhiteBox")
        first = self._step[1:] == (0, 0)  # looking at values makes a GPU wait
        if first and not targets.is_floating_point() and not 0 <= int(targets.max()) < self._classes:
            raise MisconfigurationException(
                f"WhiteBox(num_classes={self._classes}): the first batch has a label {int(targets.max())}."
            )
        state = np.random.SeedSequence((self.seed, *self._step)).generate_state(1, np.uint64)
        generator = torch.Generator(targets.device).manual_seed(int(state[0]))
        self._hooks.mixture = class_mixture(targets, self._classes, generator, len(self._places))
        yield

    def _masks(self, pl_module: LightningModule) -> dict[str, Tensor]:
        return {name: getattr(pl_module.get_submodule(name), MASK) for name in self._layers}

    def _penalty(self, pl_module: LightningModule) -> Tensor:
        return column_penalty(self._masks(pl_module).values())

    def _trace(self, trainer: Trainer, pl_module: LightningModule) -> ChannelGraph:
        """The channels of the module, and from them the places of the masks."""
        example = find_example_input(trainer, pl_module)
        graph = channel_graph(pl_module, example, include=self.include, exclude=self.exclude)
        alone, coupled = split_layers(pl_module, graph)
        self._left_alone = {**graph.left_alone, **dict.fromkeys(coupled, "shares its channels with other layers")}
        if not alone:
            raise MisconfigurationException(
                f"WhiteBox finds no convolution of {type(pl_module).__name__} that it could narrow: "
                f"{dict(list(self._left_alone.items())[:4])}"
            )
        self._places = place_masks(pl_module, graph, alone, self.position)
        return graph

    def _voters(self, pl_module: LightningModule, graph: ChannelGraph) -> list[str]:
        if self.vote_layers is not None:
            convs = [n for n in graph.order if isinstance(pl_module.get_submodule(n), Conv)]
            return match(convs, self.vote_layers, "vote_layers")
        drawn = self._drawn_layer(pl_module, graph)
        masked = [place.layer for place in self._places if place.layer != drawn]
        return masked + (split_layers(pl_module, graph)[1] if self.include_unused else [])

    def _drawn_layer(self, pl_module: LightningModule, graph: ChannelGraph) -> str | None:
        """The last masked layer, if it is to be narrowed at random and only output layers read it."""
        last = self._places[-1].layer
        readers = readers_of(pl_module, graph, last)
        at_end = bool(readers) and all(is_output(graph, name) for name in readers)
        return last if self.last_layer == "random" and at_end else None

    # ---- stage 2: the vote

    def _prune(self, trainer: Trainer, pl_module: LightningModule) -> None:
        graph = self._trace(trainer, pl_module)
        masks = self._masks(pl_module)
        bad = [name for name, mask in masks.items() if not mask.isfinite().all()]
        if bad:
            raise RuntimeError(
                f"WhiteBox: the masks of {', '.join(bad[:3])} are not finite. Try a lower learning rate."
            )
        vote, plan = trainer.strategy.broadcast(self._decide(trainer, pl_module, graph, masks))
        if trainer.is_global_zero and not trainer.fast_dev_run and plots.available():  # type: ignore[attr-defined]
            for name in (place.layer for place in self._places):
                title = f"Class mask of {name}"
                figure = plots.heat_map(masks[name], title=title, row_label="class", column_label="channel")
                log_figure(trainer, f"white_box/{name}", figure)
        self._fold(pl_module, graph, masks)
        self._release()
        undo_changes(pl_module, by=self.state_key)
        shrink_in_fit(trainer, plan.cuts(graph), by=self.state_key)
        self._tell(vote, plan, graph)

    def _decide(
        self, trainer: Trainer, pl_module: LightningModule, graph: ChannelGraph, masks: Mapping[str, Tensor]
    ) -> tuple[Vote, ChannelPlan]:
        by_channel = {name: channel_scores(mask).cpu() for name, mask in masks.items()}
        drawn, order = self._drawn_layer(pl_module, graph), by_channel
        if drawn is not None:
            chance = torch.Generator().manual_seed(self.seed)
            order = {**by_channel, drawn: torch.rand(graph.width(drawn), generator=chance)}
        narrow = self._narrowing(trainer, pl_module, graph, order)
        by_unit = {place.layer: unit_means(graph, place.layer, by_channel[place.layer]) for place in self._places}
        vote = global_vote(
            {name: score for name, score in by_unit.items() if name != drawn},
            [by_unit.get(name, by_channel[name]) for name in self._voters(pl_module, graph)],
            lambda widths: narrow(widths)[1],
            self.target_macs,
            start_keep=self.start_keep,
            keep_step=self.keep_step,
            min_preserve=self.min_preserve,
            follower=None if drawn is None else (drawn, len(by_unit[drawn])),
        )
        return vote, narrow(vote.widths)[0]

    def _narrowing(
        self, trainer: Trainer, pl_module: LightningModule, graph: ChannelGraph, scores: Mapping[str, Tensor]
    ) -> Callable[[Mapping[str, int]], tuple[ChannelPlan, float]]:
        """(layer -> channels to keep) -> the plan, and the share of the dense cost that it leaves."""
        dense = profile(pl_module, find_example_input(trainer, pl_module))
        whole = narrowed_cost(dense, graph, [], self.flops_rule)

        def narrow(widths: Mapping[str, int]) -> tuple[ChannelPlan, float]:
            ratios = {name: 1 - width / len(graph.group_of(name).units) for name, width in widths.items()}
            plan = allocate(graph, scores, ratios, width=lambda width, ratio: round(width * (1 - ratio)))
            return plan, narrowed_cost(dense, graph, plan.cuts(graph), self.flops_rule) / whole

        return narrow

    def _rehearse(self, trainer: Trainer, pl_module: LightningModule, graph: ChannelGraph) -> None:
        """Find in `setup` what would fail at the vote, hours later: the narrowest network it can lead to."""
        units = {place.layer: len(graph.group_of(place.layer).units) for place in self._places}
        scores = {name: torch.zeros(graph.width(name)) for name in units}
        least = {name: least_width(width, self.min_preserve) for name, width in units.items()}
        plan, share = self._narrowing(trainer, pl_module, graph, scores)(least)
        if share > self.target_macs:
            raise MisconfigurationException(
                f"WhiteBox(target_macs={self.target_macs}) is out of reach: min_preserve={self.min_preserve} of the "
                f"channels of every masked layer leaves {share:.3f} of the cost."
            )
        check_cuts(pl_module, plan.cuts(graph), find_example_input(trainer, pl_module))

    def _tell(self, vote: Vote, plan: ChannelPlan, graph: ChannelGraph) -> None:
        kept = {place.layer: (len(plan.kept.get(place.layer, ())), graph.width(place.layer)) for place in self._places}
        told = ", ".join(f"{name} {width or dense} of {dense}" for name, (width, dense) in kept.items())
        rank_zero_info(f"WhiteBox keeps {told}.")
        self._notes = [
            f"The vote ended at rho = {vote.rho:.2f} and left {vote.share:.1%} of the cost ({self.flops_rule})."
        ]
        if vote.fallen:
            self._notes.append(f"Kept by min_preserve={self.min_preserve} alone: {', '.join(vote.fallen)}.")
            rank_zero_warn(
                f"WhiteBox: the vote nearly wiped out {len(vote.fallen)} of {len(kept)} layers: "
                f"{', '.join(vote.fallen[:5])}. They keep {self.min_preserve:.0%} of their channels. If training does "
                f"not recover, use a smaller sparse_lambda (it is {self.sparse_lambda:g})."
            )

    # ---- stage 3: inheritance

    def _fold(self, pl_module: LightningModule, graph: ChannelGraph, masks: Mapping[str, Tensor]) -> None:
        for place in self._places:
            if self.fold == "official" and place.norms:
                factor = official_factor(masks[place.layer], self.normalize_guide)
                fold_into_norms(pl_module, place.norms, factor.clamp(min=LEAST_FACTOR))  # ReLU passes no sign
            else:
                factor = mean_guide(masks[place.layer], self.normalize_guide)
                away = torch.where(factor < 0, factor.clamp(max=-LEAST_FACTOR), factor.clamp(min=LEAST_FACTOR))
                fold_into_weights(pl_module, place, away)
        if self.scale_unused:
            for name in masks.keys() - {place.layer for place in self._places}:
                norm = own_norm(pl_module, graph, name) if name in graph.layers else None
                if norm is not None:
                    factor = official_factor(masks[name], self.normalize_guide)
                    fold_into_norms(pl_module, [norm], factor.clamp(min=LEAST_FACTOR))


def find_num_classes(trainer: Trainer, pl_module: LightningModule, graph: ChannelGraph) -> int:
    """``num_classes`` of the datamodule or the module, or the width of its only output layer.

    Raises:
        MisconfigurationException: neither says so.
    """
    for owner in (getattr(trainer, "datamodule", None), pl_module, pl_module.hparams):
        number = getattr(owner, "num_classes", None)
        if isinstance(number, int) and number > 1:
            return number
    widths = [graph.axes[f"{name}.weight", 0].size for name in graph.order if is_output(graph, name)]
    if len(widths) != 1:
        raise MisconfigurationException(
            f"WhiteBox(num_classes=None): {type(pl_module).__name__} does not tell how many classes there are; give "
            f"their number, or let the module or the datamodule have an attribute num_classes."
        )
    return widths[0]


def is_output(graph: ChannelGraph, name: str) -> bool:
    """Whether what a layer computes is what the network returns."""
    return graph.left_alone.get(name, "").startswith("is the network's output")


def unit_means(graph: ChannelGraph, name: str, scores: Tensor) -> Tensor:
    """Scores (C,) of channels, averaged over those that can only go together (grouped convolutions): (units,)."""
    _, unit = np.unique(graph.layers[name], return_inverse=True)
    at = torch.from_numpy(unit)
    return torch.zeros(int(at.max()) + 1).index_add(0, at, scores) / at.bincount()


def _globs(patterns: Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)
