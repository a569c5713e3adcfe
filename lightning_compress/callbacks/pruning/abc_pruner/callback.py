"""When ABCPruner searches, and what becomes of the structure that it finds."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_compress.callbacks.pruning.abc_pruner.colony import LEVELS, BeeColony, Code
from lightning_compress.callbacks.pruning.abc_pruner.inherit import (
    Rule,
    coded_layers,
    forget_norms,
    inherited_filters,
    start_afresh,
    width_of_ratio,
)
from lightning_compress.callbacks.pruning.abc_pruner.search import Fitness, Found, PlanFile, fingerprint, search
from lightning_compress.callbacks.pruning.channel_pruning import ChannelPruning
from lightning_compress.core import plots
from lightning_compress.core.example_input import find_example_input
from lightning_compress.core.inference_copy import plain_copy
from lightning_compress.core.report import log_figure
from lightning_compress.core.surgery import ChannelGraph, ChannelPlan, apply_cuts, check_cuts, check_trainer

Layers = list[tuple[str, ...]]


class ABCPruner(ChannelPruning):
    """Search the width of every layer with a bee colony, before a fit, and fine-tune the best network found.

    Args:
        max_preserve: P, 1 to 10: at most P tenths of a layer stay. The only budget: MACs are no part of the fitness.
        food_number: S, number of structures that the bees improve.
        max_cycle: T, cycles of the search, S + 2 S T networks in all (210 by default); the paper's ImageNet runs: 50.
        food_limit: M, failures after which a structure is given up for a random one.
        honeychange_num: q, numbers of the code that a bee moves.
        calfitness_epoch: e, epochs that a network is trained for before it is judged, at the initial learning rate.
        fitness_batches: training batches in each of these epochs; None takes all of them.
        random_rule: what a narrow network inherits: ``"random_pretrain"`` filters drawn at random from the trained
            network (the paper), ``"l1_pretrain"`` those of the largest L1 norm, ``"random"`` nothing: all weights
            start afresh.
        inherit_bn: whether batch norms, biases and the classifier are inherited too. False is the authors' code for
            VGG and ResNets: batch norms, biases of convolutions and a classifier that loses inputs start afresh.
        fixed_code: one number, 1 to 10, per layer or block, instead of a search.
        plan_file: where the search is kept, written after every network. One that is finished is used as it is; one
            that is not is continued. By default ``abc_pruner-<checksum of the search's settings and weights>.pt`` in
            the Trainer's `default_root_dir`, so that the same command continues what was killed.
        monitor: metric of the validation data that is the fitness; higher is better, as a share or in per cent.
        mutate_last: False is the authors' code, which is off by one: the last number of a code only changes by
            scouting, and a scout never draws P. True corrects both.
        draw_last: False is the authors' code, which never draws a layer's last filter.
        cache: whether a code that comes again keeps its fitness, instead of being judged again with other filters.
        include: globs of the names of layers that may be narrowed.
        exclude: globs of the names of layers that keep their width.
        seed: of the bees, of the filters drawn, and of every short training.

    Which layers a code describes, see `coded_layers`. The defaults are those of the authors' code. Use a validation
    split (``val_size`` of our datamodules), not the test images: the best of 210 networks is an optimistic choice.

    What is stored: in `plan_file` the colony, the best code, its filters and trained weights; beside it a config that
    trains the structure without a search (``fixed_code``); the removed channels in the module's own `state_dict`.

    With several processes each trains a network of its own, on all training images, and the bees of a round move from
    the same sources. One process is the authors' order.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, a monitor that is not
            logged or falls with quality, a plan of another network, or names that match no layer.

    Example::

        from lightning_compress.callbacks import ABCPruner
        trainer = Trainer(callbacks=[ABCPruner(max_preserve=7, monitor="val/acc")])
        trainer.fit(module, datamodule)

    Packaged config: ``method/abc_pruner``.
    """

    SEARCH = (
        "max_preserve", "food_number", "max_cycle", "food_limit", "honeychange_num", "calfitness_epoch",
        "fitness_batches", "random_rule", "inherit_bn", "monitor", "mutate_last", "draw_last", "cache", "seed",
    )  # fmt: skip
    IDENTITY = ("fixed_code", *SEARCH, "include", "exclude")

    def __init__(
        self,
        max_preserve: int = 9,
        *,
        food_number: int = 10,
        max_cycle: int = 10,
        food_limit: int = 5,
        honeychange_num: int = 2,
        calfitness_epoch: int = 2,
        fitness_batches: int | None = None,
        random_rule: Rule = "random_pretrain",
        inherit_bn: bool = True,
        fixed_code: list[int] | None = None,
        plan_file: str | None = None,
        monitor: str = "val/acc",
        mutate_last: bool = False,
        draw_last: bool = True,
        cache: bool = False,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(include=include, exclude=exclude, seed=seed)
        if calfitness_epoch < 1:
            raise ValueError(f"ABCPruner(calfitness_epoch={calfitness_epoch}): give a whole number of at least 1.")
        if fitness_batches is not None and fitness_batches < 1:
            raise ValueError(f"ABCPruner(fitness_batches={fitness_batches}): give at least 1, or None for all.")
        if random_rule not in ("random", "random_pretrain", "l1_pretrain"):
            raise ValueError(
                f"ABCPruner(random_rule={random_rule!r}): give 'random', 'random_pretrain' or 'l1_pretrain'."
            )
        if fixed_code is not None and not all(1 <= number <= LEVELS for number in fixed_code):
            raise ValueError(f"ABCPruner(fixed_code={fixed_code}): give whole numbers from 1 to {LEVELS}.")
        if "loss" in monitor.lower() or "error" in monitor.lower():
            raise ValueError(f"ABCPruner(monitor={monitor!r}): the bees look for high values; name an accuracy.")
        self.max_preserve = max_preserve
        self.food_number = food_number
        self.max_cycle = max_cycle
        self.food_limit = food_limit
        self.honeychange_num = honeychange_num
        self.calfitness_epoch = calfitness_epoch
        self.fitness_batches = fitness_batches
        self.random_rule = random_rule
        self.inherit_bn = inherit_bn
        self.fixed_code = fixed_code
        self.plan_file = plan_file
        self.monitor = monitor
        self.mutate_last = mutate_last
        self.draw_last = draw_last
        self.cache = cache
        self._colony(1)  # its arguments are checked there
        self.found: Found | None = None

    # ---- what ChannelPruning asks for

    def scores(self, trainer: Trainer, pl_module: LightningModule, graph: ChannelGraph) -> dict[str, Tensor]:
        """1 for the filters that the structure keeps, 0 for the others; the search happens here."""
        check_trainer(trainer, "ABCPruner", in_fit=False)
        layers = self._layers(pl_module, graph)
        if self.fixed_code is None:
            self.found = self._search(trainer, pl_module, graph, layers)
        else:
            code = self._fixed(layers)
            network, plan = self._narrow(pl_module, graph, layers, code, seed=self.seed)
            self.found = Found(list(code), kept=plan.to_dict(), weights=tensors(network))
        scores = {name: torch.zeros(graph.width(name)) for name in graph.layers}
        for name, kept in self.found.kept.items():
            scores[name][kept] = 1
        return scores

    def ratios(self, pl_module: LightningModule, graph: ChannelGraph) -> dict[str, float]:
        layers = self._layers(pl_module, graph)
        code = self._fixed(layers) if self.found is None else self.found.code
        return {name: 1 - number / LEVELS for names, number in zip(layers, code, strict=True) for name in names}

    def width(self, width: int, ratio: float) -> int:
        return width_of_ratio(width, ratio)

    def new_values(self, pl_module: LightningModule, graph: ChannelGraph, plan: ChannelPlan) -> dict[str, Tensor]:
        assert self.found is not None
        return self.found.weights

    def _decide(self, trainer: Trainer, pl_module: LightningModule, graph: ChannelGraph, scores: Any) -> ChannelPlan:
        plan = super()._decide(trainer, pl_module, graph, scores)
        assert self.found is not None
        judged = f", {self.monitor} {self.found.fitness:.4g} in the search" if self.fixed_code is None else ""
        self._notes.append(f"Tenths that each layer or block keeps: {self.found.code}{judged}.")
        return plan

    # ---- the work

    def _layers(self, pl_module: LightningModule, graph: ChannelGraph) -> Layers:
        layers = coded_layers(pl_module, graph)
        if not layers:
            raise MisconfigurationException(
                f"ABCPruner finds no layer of {type(pl_module).__name__} whose channels no other layer writes too, "
                f"among {', '.join(list(graph.layers)[:6])}."
            )
        coded = {name for names in layers for name in names}
        for group in graph.groups:
            shared = len(group.layers) > 1 and not coded.intersection(group.layers)
            reason = "shares its channels with other layers" if shared else "has no number in the code"
            self._left_alone |= {name: reason for name in group.layers if not coded.intersection(group.layers)}
        return layers

    def _fixed(self, layers: Layers) -> Code:
        assert self.fixed_code is not None
        if len(self.fixed_code) != len(layers):
            raise ValueError(
                f"ABCPruner(fixed_code={self.fixed_code}) has {len(self.fixed_code)} numbers, but there are "
                f"{len(layers)} layers or blocks to narrow, of which the first is {', '.join(layers[0])}."
            )
        return tuple(self.fixed_code)

    def _colony(self, length: int) -> BeeColony:
        return BeeColony(
            length,
            max_preserve=self.max_preserve,
            food_number=self.food_number,
            max_cycle=self.max_cycle,
            food_limit=self.food_limit,
            honeychange_num=self.honeychange_num,
            mutate_last=self.mutate_last,
            seed=self.seed,
        )

    def _narrow(
        self, pl_module: LightningModule, graph: ChannelGraph, layers: Layers, code: Code, seed: int
    ) -> tuple[LightningModule, ChannelPlan]:
        """A copy of the module with the widths of `code`, and the filters that it inherited."""
        with isolate_rng(include_cuda=torch.cuda.is_available()):
            generator = torch.manual_seed(seed)
            plan = inherited_filters(pl_module, graph, layers, code, self.random_rule, generator, self.draw_last)
            network: Any = plain_copy(pl_module)
            swaps = apply_cuts(network, plan.cuts(graph))
            if self.random_rule == "random":
                start_afresh(network)
            elif not self.inherit_bn:
                forget_norms(network, swaps)
        return network, plan

    def _search(self, trainer: Trainer, pl_module: LightningModule, graph: ChannelGraph, layers: Layers) -> Found:
        """The best network of a search: of the finished one in the file, or of one that starts or continues here."""
        _share_weights(trainer, pl_module)
        settings = {name: getattr(self, name) for name in self.SEARCH} | {"weights": fingerprint(pl_module)}
        widths = {name: graph.width(name) for names in layers for name in names}
        path: Path | None = self._path(trainer, settings, widths)
        colony = self._colony(len(layers))
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            path, colony.food_number, colony.max_cycle = None, 2, 1
        plan = PlanFile(settings, widths, colony.state_dict(), Found())
        saved = PlanFile.load(path) if trainer.is_global_zero and path is not None and path.exists() else None
        saved = trainer.strategy.broadcast(saved)
        if saved is not None:
            assert path is not None
            saved.check(path, settings, widths)
            plan = saved
            rank_zero_info(f"ABCPruner: {path} holds {len(plan.colony['history'])} networks.")
        if not plan.finished:
            colony.load_state_dict(plan.colony)
            fitness = Fitness(trainer, pl_module, self.monitor, self.calfitness_epoch, self.fitness_batches)

            def evaluate(code: Code, number: int) -> tuple[float, ChannelPlan, dict[str, Tensor]]:
                seed = (self.seed * 1_000_003 + number) % 2**32
                network, kept = self._narrow(pl_module, graph, layers, code, seed)
                return fitness(network, seed), kept, tensors(network)

            if saved is None:  # what cannot work fails here, not after the first epochs of the first network
                network, kept = self._narrow(pl_module, graph, layers, (1,) * len(layers), self.seed)
                check_cuts(pl_module, kept.cuts(graph), find_example_input(trainer, pl_module))
                fitness.rehearse(network)
            search(trainer, colony, evaluate, plan, path, self.cache)
            if path is not None and trainer.is_global_zero:
                path.with_suffix(".yaml").write_text(self._config(plan.found, len(colony.history), path))
                rank_zero_info(f"ABCPruner: best of {len(colony.history)} networks: {path.with_suffix('.yaml')}")
                self._draw(trainer, colony)
        return plan.found

    def _path(self, trainer: Trainer, settings: Mapping[str, Any], widths: Mapping[str, int]) -> Path:
        if self.plan_file is not None:
            return Path(self.plan_file)
        root = str(trainer.default_root_dir)
        if "://" in root:
            raise MisconfigurationException(f"ABCPruner(plan_file=None): {root!r} is not local; name a local file.")
        checksum = zlib.crc32(json.dumps([settings, widths]).encode())
        return Path(root) / f"abc_pruner-{checksum:08x}.pt"

    def _config(self, found: Found, judged: int, path: Path) -> str:
        """A YAML fragment that trains the structure found, without a search."""
        names = ["random_rule", "inherit_bn", "draw_last", "include", "exclude", "seed"]
        arguments = {"fixed_code": found.code} | {name: getattr(self, name) for name in names}
        return "\n".join(
            [
                f"# ABCPruner: the best of {judged} structures; {self.monitor} {found.fitness:.4g} when it was judged.",
                "# Trains it without a search: lc fit --config data/... --config model/... --config THIS_FILE",
                f"# Filters are inherited anew; plan_file: {path.name} instead brings those of the search, trained.",
                "trainer:",
                "  callbacks+:",
                "    - class_path: lightning_compress.callbacks.ABCPruner",
                "      init_args:",
                *(f"        {name}: {json.dumps(value)}" for name, value in arguments.items()),
                "",
            ]
        )

    def _draw(self, trainer: Trainer, colony: BeeColony) -> None:
        if plots.available():
            judged = [fitness for _, fitness in colony.history]
            series = {"network": judged, "best so far": list(accumulate(judged, max))}
            figure = plots.lines(series, title="ABCPruner: search", x_label="networks", y_label=self.monitor)
            log_figure(trainer, "abc_pruner/search", figure)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, in main memory."""
    return {n: t.detach().cpu().clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}


def _share_weights(trainer: Trainer, pl_module: LightningModule) -> None:
    """Let all processes start from rank 0's weights, as they will in the fit: their networks are compared."""
    if trainer.world_size > 1:
        if any(isinstance(module, nn.SyncBatchNorm) for module in pl_module.modules()):
            raise MisconfigurationException(
                "ABCPruner trains another network in every process, and SyncBatchNorm would average them. Leave "
                "batch norms as they are and set Trainer(sync_batchnorm=True), which comes after the search."
            )
        mine = {**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers())}
        with torch.no_grad():
            for name, value in trainer.strategy.broadcast(tensors(pl_module)).items():
                mine[name].copy_(value)
