"""When HRank collects ranks, and when it removes channels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.progress import track
from torch import Tensor, nn

from lightning_compress.callbacks.pruning.channel_pruning import ChannelPruning
from lightning_compress.callbacks.pruning.hrank.published import (
    is_known,
    layer_ratios,
    layout,
    rank_arrays,
    rank_taps,
)
from lightning_compress.callbacks.pruning.hrank.ranks import (
    FeatureRanks,
    feature_map_rank,
    kept_width,
    select_channels,
)
from lightning_compress.callbacks.pruning.hrank.sequential import Stages
from lightning_compress.callbacks.pruning.hrank.taps import feature_maps
from lightning_compress.callbacks.pruning.hrank.unaligned import unaligned_values
from lightning_compress.core.calibration import on_device, training_inputs
from lightning_compress.core.meta import evaluating
from lightning_compress.core.ratio import parse_ratio, ratio_by_layer
from lightning_compress.core.report import open_account
from lightning_compress.core.surgery import (
    ChannelGraph,
    ChannelPlan,
    attach_record,
    check_trainer,
    resume_path,
)


class HRank(ChannelPruning):
    """Prune the filters whose feature maps have the lowest rank, averaged over a few hundred training images.

    Args:
        pruning_ratio: share of the filters to remove: a number, a dict by glob, or the paper's list. For the networks
            of the paper a list is read in its authors' order (`published.py`), else it has one number per
            convolution in forward order. Linear layers stay whole.
        mode: ``"one_shot"`` removes all filters at once and fine-tunes (the authors' second code, HRankPlus);
            ``"sequential"`` masks layer after layer and trains `epochs_per_layer` epochs after each (the paper).
        num_batches: batches of `rank_batch_size` training images that ranks are averaged over, in all processes
            together. 6 x 128 = 768 images: so were the authors' published ranks made.
        rank_batch_size: see `num_batches`.
        rank_file: take ranks from here instead: a file of :meth:`FeatureRanks.save`, or a folder with the authors'
            ``rank_conv<k>.npy``.
        epochs_per_layer: length of a stage of ``"sequential"``; 30 as in the paper's README.
        stage_layers: numbers (from 1) of the layers after which ``"sequential"`` trains; None trains after each. For
            ResNet-50 the authors use the ends of its blocks: 1,5,8,11,15,18,21,24,28,31,34,37,40,43,47,50,53.
        rounding: ``"keep"`` keeps int(n * (1 - p)) of n filters, ``"prune"`` removes int(p * n); by default the rule
            of the code that `mode` follows, ``"keep"`` for one_shot and ``"prune"`` for sequential.
        align_residual: layers that are added share one choice, by their mean rank. False lets each choose its own,
            as HRankPlus does: the widths are the same, but channels of different meaning are added.
        reset_bn: start all batch norms afresh, as HRankPlus does, instead of keeping the remaining entries.
        monitor: metric that decides which weights of a stage are passed to the next, the higher the better.

    `shared` are the arguments of :class:`~lightning_compress.callbacks.pruning.channel_pruning.ChannelPruning`.
    ``sequential`` ends with zeros in place of filters; what is exported and counted has them removed.

    With several processes each ranks its own share of the images; sums and counts are added up before dividing.

    Example::

        from lightning_compress.callbacks import HRank
        trainer = Trainer(callbacks=[HRank(pruning_ratio=0.5)])
        trainer.fit(module, datamodule)

    Packaged config: ``method/hrank``.
    """

    IDENTITY = (*ChannelPruning.IDENTITY, "mode")

    def __init__(
        self,
        pruning_ratio: float | list[float] | dict[str, float] | str = 0.5,
        *,
        mode: Literal["one_shot", "sequential"] = "one_shot",
        num_batches: int = 6,
        rank_batch_size: int = 128,
        rank_file: str | None = None,
        epochs_per_layer: int = 30,
        stage_layers: list[int] | None = None,
        rounding: Literal["keep", "prune"] | None = None,
        align_residual: bool = True,
        reset_bn: bool = False,
        monitor: str = "val/acc",
        **shared: Any,
    ) -> None:
        super().__init__(pruning_ratio, **shared)
        if mode not in ("one_shot", "sequential"):
            raise ValueError(f"HRank(mode={mode!r}): give 'one_shot' or 'sequential'.")
        if rounding not in ("keep", "prune", None):
            raise ValueError(f"HRank(rounding={rounding!r}): give 'keep' or 'prune'.")
        for argument, value in (("num_batches", num_batches), ("rank_batch_size", rank_batch_size),
                                ("epochs_per_layer", epochs_per_layer)):  # fmt: skip
            if value < 1:
                raise ValueError(f"HRank({argument}={value}): give a whole number of at least 1.")
        if rank_file is not None and not Path(rank_file).exists():
            raise ValueError(f"HRank(rank_file={rank_file!r}): there is no such file or folder.")
        if mode == "sequential" and (self.start_epoch or self.target_macs is not None or self.round_to > 1):
            raise ValueError("HRank(mode='sequential') takes no start_epoch, target_macs or round_to.")
        self.mode = mode
        self.num_batches = num_batches
        self.rank_batch_size = rank_batch_size
        self.rank_file = rank_file
        self.rounding: Literal["keep", "prune"] = rounding or ("keep" if mode == "one_shot" else "prune")
        self.align_residual = align_residual
        self.reset_bn = reset_bn
        self.ranks: FeatureRanks | None = None
        self._stages = Stages(epochs_per_layer, stage_layers, monitor) if mode == "sequential" else None

    # ---- what to remove

    def scores(self, trainer: Trainer, pl_module: LightningModule, graph: ChannelGraph) -> dict[str, Tensor]:
        layers = self.prunable(pl_module, graph)
        prefix, network = paper_network(pl_module)
        if self.rank_file is not None:
            arrays = rank_arrays(network) if network is not None else {}
            names = {f"{prefix}{n}": stem for n, stem in arrays.items() if f"{prefix}{n}" in layers} or layers
            self.ranks = FeatureRanks.load(self.rank_file, names)
        else:
            self.ranks = collect_ranks(trainer, pl_module, layers, self.num_batches, self.rank_batch_size)
        layers = [n for n in layers if n in self.ranks.sums]
        self.ranks.check({n: graph.width(n) for n in layers})
        return {n: self.ranks.mean(n) for n in layers}

    def rehearse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().rehearse(trainer, pl_module)
        if self.rank_file is not None:
            self.scores(trainer, pl_module, self.trace(trainer, pl_module))

    def prunable(self, pl_module: LightningModule, graph: ChannelGraph) -> list[str]:
        return [n for n in graph.layers if isinstance(pl_module.get_submodule(n), nn.Conv2d)]

    def ratios(self, pl_module: LightningModule, graph: ChannelGraph) -> dict[str, float]:
        convolutions = self.prunable(pl_module, graph)
        ratio = self.pruning_ratio if isinstance(self.pruning_ratio, Mapping) else parse_ratio(self.pruning_ratio)
        prefix, network = paper_network(pl_module)
        if isinstance(ratio, list) and network is not None:
            version: Literal["plus", "original"] = "plus" if self.mode == "one_shot" else "original"
            named = {f"{prefix}{n}": r for n, r in layer_ratios(network, ratio, version).items()}
            return {n: named.get(n, 0.0) for n in convolutions}
        return ratio_by_layer(ratio, convolutions)

    def width(self, width: int, ratio: float) -> int:
        return kept_width(width, ratio, self.rounding)

    def new_values(self, pl_module: LightningModule, graph: ChannelGraph, plan: ChannelPlan) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        if not self.align_residual:
            assert self.ranks is not None
            values = unaligned_values(pl_module, graph, plan, {n: self.ranks.mean(n) for n in self.ranks.sums})
        if self.reset_bn:
            for name, m in pl_module.named_modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    fresh = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
                    values |= {f"{name}.{k}": torch.tensor(v) for k, v in fresh.items() if getattr(m, k) is not None}
        return values

    # ---- when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._stages is None or stage != "fit":
            super().setup(trainer, pl_module, stage)
            return
        attach_record(pl_module)
        check_trainer(trainer, "HRank", in_fit=True)
        open_account(trainer, pl_module)
        graph = self.trace(trainer, pl_module)
        ratios = self.ratios(pl_module, graph)
        self._stages.prepare(pl_module, graph, stage_order(pl_module, ratios))
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._stages.check_length(trainer.max_epochs)
        if resume_path(trainer) is None:
            scores = self.scores(trainer, pl_module, graph)
            kept = {n: select_channels(scores[n], ratios[n], self.rounding) for n in scores}
            self._stages.kept = trainer.strategy.broadcast(kept)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._stages is not None:
            self._stages.attach(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._stages is None:
            super().on_train_epoch_start(trainer, pl_module)
        else:
            self._stages.begin(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._stages is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stages.judge(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._stages is not None:
            self._stages.take_best(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._stages is not None:
            self._stages.detach()

    def state_dict(self) -> dict[str, Any]:
        return {} if self._stages is None else self._stages.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stages is not None:
            self._stages.load_state_dict(state_dict)


def paper_network(module: nn.Module) -> tuple[str, nn.Module | None]:
    """The first network inside `module` that the authors pruned too, and the prefix of its layers' names."""
    for name, network in module.named_modules():
        if is_known(network):
            return (f"{name}." if name else ""), network
    return "", None


def stage_order(module: nn.Module, ratios: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Layers in the order in which "sequential" masks them; an inception's together, as its list has one number."""
    prefix, network = paper_network(module)
    if network is None:
        return [(name,) for name in ratios]
    order = [f"{prefix}{name}" for name in rank_taps(network)]
    groups = [tuple(f"{prefix}{n}" for n in names if f"{prefix}{n}" in ratios) for names in layout(network, "original")]
    return sorted(filter(None, groups), key=lambda names: order.index(names[0]))


def collect_ranks(
    trainer: Trainer, pl_module: LightningModule, layers: list[str], num_batches: int, batch_size: int
) -> FeatureRanks:
    """Average ranks of the feature maps of `layers` over training images, all layers in one pass.

    Args:
        num_batches: batches of `batch_size` images, over all processes together.

    Returns:
        Sums and counts over all processes.
    """
    prefix, network = paper_network(pl_module)
    known_taps = rank_taps(network) if network is not None else {}
    taps = {
        f"{prefix}{n}": tap._replace(module=f"{prefix}{tap.module}")
        for n, tap in known_taps.items()
        if f"{prefix}{n}" in layers
    }
    ranks = FeatureRanks()
    batches = training_inputs(trainer, pl_module, num_batches * batch_size, batch_size)
    show = trainer.is_global_zero and getattr(trainer.progress_bar_callback, "is_enabled", False)
    with (
        on_device(trainer, pl_module),
        evaluating(pl_module),
        feature_maps(pl_module, layers, taps, lambda layer, maps: ranks.update(layer, feature_map_rank(maps))),
    ):
        total = -(-num_batches // trainer.world_size)
        for images in track(batches, "HRank: ranks of feature maps", total=total, disable=not show, transient=True):
            pl_module(images)
    if trainer.world_size > 1:
        for layer in layers:
            width = len(pl_module.get_submodule(layer).weight)  # type: ignore[arg-type]
            ranks.update(layer, torch.zeros(0, width))  # a process may have got no image
            for part in (ranks.sums, ranks.counts):
                here = part[layer].to(trainer.strategy.root_device)
                part[layer] = trainer.strategy.reduce(here, reduce_op="sum").cpu()
    return ranks
