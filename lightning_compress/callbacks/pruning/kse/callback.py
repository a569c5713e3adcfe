"""When KSE compresses, and what it tells about it."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.progress import track
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.callbacks.pruning.kse.clustering import Init, kmeans
from lightning_compress.callbacks.pruning.kse.indicator import (
    Axis,
    channel_levels,
    importance,
    kernel_budgets,
    kernel_entropy,
    kernel_sparsity,
    level_count,
)
from lightning_compress.core import plots
from lightning_compress.core.example_input import find_example_input
from lightning_compress.core.optimizers import check_optimizers
from lightning_compress.core.profile import profile
from lightning_compress.core.report import LayerCost, close_account, log_figure, open_account, run_folder
from lightning_compress.core.select import match
from lightning_compress.core.sparse.shared_kernels import (
    SharedKernels,
    originals,
    save_packed,
    set_kernels,
    share_kernels,
    shared_convolutions,
)
from lightning_compress.core.surgery import (
    attach_record,
    change_in_setup,
    check_trainer,
    resume_in_setup,
)
from lightning_compress.core.units import human

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class KSE(Callback):
    """Let the kernels of each input channel of a convolution share values, the fewer the less the channel is worth.

    The worth of a channel follows from the weights alone, so that the network must be trained. In ``setup("fit")`` the
    weight of every convolution is replaced by the kernels that stay; they and all else are then trained as usual.

    Args:
        G: levels that the channels of a layer are sorted into: 0 keep no kernel, G - 1 all N, those between
            ceil(N * 2^(g + 1 - T - G)). More levels compress more. 0 takes the number of input channels (or their ratio
            to the N kernels, where they are more). The G of the paper's tables is not that of its code: see
            the documentation.
        T: halves the kernels of the levels between so many times.
        alpha: weight of the entropy in the indicator; 1 in the paper.
        k_neighbors: neighbours that the density of a kernel is estimated from; 5 in the paper. Layers with no more
            outputs than that are left alone.
        entropy_axis: ``"paper"`` takes the entropy over the kernels that read a channel; ``"official"`` over those that
            the authors' code takes by a slip in its memory layout, for comparison with its numbers.
        kmeans_init: how k-means starts, ``"k-means++"`` or ``"random"``.
        kmeans_restarts: runs of k-means, of which the best counts; 10 as in the authors' code.
        kmeans_iters: steps of a run at most; 300 as in the authors' code.
        seed: of k-means. Each layer draws from it on its own.
        include: globs of the names of convolutions that may be compressed.
        exclude: globs of the names of convolutions that stay as they are.

    The first convolution, grouped ones, and those with few outputs are always left alone.

    What is stored: kernels, indices and how they belong together, in the module's own `state_dict`; see
    `lightning_compress.load`. At the end of the fit `kse.pt` in the run's folder holds the same with bit-packed
    indices, for :func:`~lightning_compress.core.sparse.shared_kernels.load_packed`.

    With several processes rank 0 decides and clusters.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, names that match no
            convolution, or a network without one that could be compressed.

    Example::

        from lightning_compress.callbacks import KSE
        trainer = Trainer(callbacks=[KSE(G=4)])
        trainer.fit(module, datamodule)

    Packaged config: ``method/kse``.
    """

    IDENTITY = ("G", "T", "alpha", "k_neighbors", "entropy_axis", "kmeans_init", "kmeans_restarts", "kmeans_iters",
                "seed", "include", "exclude")  # fmt: skip

    def __init__(
        self,
        G: int = 4,
        T: int = 0,
        alpha: float = 1.0,
        *,
        k_neighbors: int = 5,
        entropy_axis: Axis = "paper",
        kmeans_init: Init = "k-means++",
        kmeans_restarts: int = 10,
        kmeans_iters: int = 300,
        seed: int = 0,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if G < 0 or G == 1:
            raise ValueError(f"KSE(G={G}): give 2 or more levels, or 0 to go by the channels of each layer.")
        for argument, value, least in (
            ("T", T, 0),
            ("k_neighbors", k_neighbors, 1),
            ("kmeans_restarts", kmeans_restarts, 1),
            ("kmeans_iters", kmeans_iters, 1),
        ):
            if value < least:
                raise ValueError(f"KSE({argument}={value}): give a whole number of at least {least}.")
        if not 0 <= alpha < math.inf:
            raise ValueError(f"KSE(alpha={alpha}): give a number of at least 0.")
        for argument, chosen, allowed in (("entropy_axis", entropy_axis, get_args(Axis)),
                                          ("kmeans_init", kmeans_init, get_args(Init))):  # fmt: skip
            if chosen not in allowed:
                raise ValueError(f"KSE({argument}={chosen!r}): give {' or '.join(map(repr, allowed))}.")
        self.G = G
        self.T = T
        self.alpha = alpha
        self.k_neighbors = k_neighbors
        self.entropy_axis: Axis = entropy_axis
        self.kmeans_init: Init = kmeans_init
        self.kmeans_restarts = kmeans_restarts
        self.kmeans_iters = kmeans_iters
        self.seed = seed
        self.include = [include] if isinstance(include, str) else list(include)
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self._left_alone: dict[str, str] = {}

    # ---- what it does to a layer

    def levels(self, weight: Tensor) -> tuple[list[int], list[int]]:
        """Level of every input channel, (C,), and kernels that it may keep by level, (G,), of (N, C, kh, kw)."""
        n, c = weight.shape[:2]
        levels = level_count(n, c, self.G)
        entropy = kernel_entropy(weight, self.k_neighbors, self.entropy_axis)
        v = importance(kernel_sparsity(weight), entropy, self.alpha)
        return channel_levels(v, levels).tolist(), kernel_budgets(n, levels, self.T)

    def indices(self, weight: Tensor, form: SharedKernels, generator: torch.Generator) -> list[Tensor]:
        """Which of its q kernels stands for each: (N, C, kh, kw) -> (N, C_q) for every q in ascending order."""
        kernels = weight.flatten(2).transpose(0, 1)
        found = []
        for q, channels, index in form.shared:
            labels = kmeans(
                kernels[channels.to(weight.device)],
                q,
                init=self.kmeans_init,
                restarts=self.kmeans_restarts,
                iterations=self.kmeans_iters,
                generator=generator,
            )
            found.append(labels.T.to("cpu", index.dtype))
        return found

    # ---- when

    @property
    def state_key(self) -> str:
        return self._generate_state_key(**{name: getattr(self, name) for name in self.IDENTITY})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        record = attach_record(pl_module)
        if stage != "fit":
            return
        refuse_averaged_indices(trainer)
        open_account(trainer, pl_module)
        resume_in_setup(trainer, pl_module, by=self.state_key)
        convs = self._convolutions(trainer, pl_module)
        self._left_alone = self._reasons(convs)
        if all(step["by"] != self.state_key for step in record.steps):
            self.compress(trainer, pl_module, [name for name in convs if name not in self._left_alone])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_optimizers(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        shared = {name: form for name, _, form in shared_convolutions(pl_module)}
        notes = [note(shared.values())]
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = save_packed(pl_module, run_folder(trainer) / "kse.pt")
            notes.append(f"KSE: {path.name} holds the network with packed indices, {human(path.stat().st_size, 'B')}.")
        left_alone = {name: why for name, why in self._left_alone.items() if name not in shared}
        close_account(trainer, pl_module, notes=notes, left_alone=left_alone, costs=layer_costs(trainer, pl_module))
        if plots.available():
            log_figure(trainer, "kse_levels", level_map(shared))

    def compress(self, trainer: Trainer, pl_module: LightningModule, names: list[str]) -> None:
        """Decide and cluster as rank 0 does, and replace the weights of these convolutions."""
        check_trainer(trainer, "KSE", in_fit=False)
        if not names:
            raise MisconfigurationException(
                f"KSE finds no convolution of {type(pl_module).__name__} that it could compress: "
                f"{dict(list(self._left_alone.items())[:4])}"
            )
        weights = {name: pl_module.get_parameter(f"{name}.weight").detach().clone() for name in names}
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise MisconfigurationException(f"KSE: the weight of {name!r} is not finite.")
        decided = self._cluster(trainer, weights) if trainer.is_global_zero else ({}, {})
        forms, indices = trainer.strategy.broadcast(decided)
        change_in_setup(trainer, pl_module, share_kernels, {"layers": forms}, by=self.state_key)
        for name, weight in weights.items():
            set_kernels(pl_module.get_submodule(name), indices[name], weight)
        rank_zero_info(f"KSE: {len(names)} convolutions share kernels.")

    def _convolutions(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, nn.Conv2d]:
        """All of them, in forward order."""
        run = [layer.name for layer in profile(pl_module, find_example_input(trainer, pl_module)).layers]
        convs = {name: m for name in run if isinstance(m := pl_module.get_submodule(name), nn.Conv2d)}
        if not convs:
            raise MisconfigurationException(f"KSE finds no Conv2d in {type(pl_module).__name__}.")
        return convs

    def _reasons(self, convs: dict[str, nn.Conv2d]) -> dict[str, str]:
        """Why convolutions stay as they are, for those that do."""
        chosen, excluded = match(convs, self.include, "include"), match(convs, self.exclude, "exclude")
        owners = Counter(id(p) for conv in convs.values() for p in conv.parameters(recurse=False))
        reasons: dict[str, str] = {}
        for i, (name, conv) in enumerate(convs.items()):
            if i == 0:
                reasons[name] = "is the first convolution"
            elif name in excluded or name not in chosen:
                reasons[name] = "is left out by `exclude`" if name in excluded else "is not in `include`"
            elif conv.groups > 1:
                reasons[name] = "is grouped: each output reads few channels"
            elif parametrize.is_parametrized(conv, "weight"):
                reasons[name] = "has a weight that is parametrised already"
            elif owners[id(conv.weight)] > 1:
                reasons[name] = "shares its weight with another layer"
            elif conv.out_channels <= self.k_neighbors:
                reasons[name] = f"has {conv.out_channels} outputs, too few for {self.k_neighbors} neighbours"
        return reasons

    def _cluster(
        self, trainer: Trainer, weights: dict[str, Tensor]
    ) -> tuple[dict[str, dict[str, list[int]]], dict[str, list[Tensor]]]:
        """Of every layer: the arguments of its `SharedKernels`, and its indices."""
        forms: dict[str, dict[str, list[int]]] = {}
        indices = {}
        device = trainer.strategy.root_device if trainer.strategy.root_device.type == "cuda" else "cpu"  # for float64
        hidden = not getattr(trainer.progress_bar_callback, "is_enabled", False)
        for name, weight in track(weights.items(), "KSE: clustering kernels", disable=hidden, transient=True):
            weight = weight.to(device)
            levels, budgets = self.levels(weight)
            forms[name] = {"levels": levels, "budgets": budgets}
            generator = torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))
            indices[name] = self.indices(weight, SharedKernels(levels, budgets), generator)
        return forms, indices


def refuse_averaged_indices(trainer: Trainer) -> None:
    """An average of buffers is one of floats, cut off to whole numbers: an index of 5 becomes 4.

    Raises:
        MisconfigurationException: names the callback, and its argument.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._use_buffers:
            name = type(callback).__name__
            raise MisconfigurationException(
                f"KSE: {name} would average the indices of the kernels, which are whole numbers. Give {name} "
                f"use_buffers=False: it then averages the kernels, and copies indices and norms."
            )


def layer_costs(trainer: Trainer, pl_module: LightningModule) -> dict[str, LayerCost]:
    """What the convolutions that share kernels cost in their own form, not as the dense ones that they stand for."""
    dense = {layer.name: layer.macs for layer in profile(pl_module, find_example_input(trainer, pl_module)).layers}
    costs = {}
    for name, conv, form in shared_convolutions(pl_module):
        tensors = [*originals(conv), *([] if conv.bias is None else [conv.bias])]
        costs[name] = LayerCost(
            macs=dense[name] * form.kernels // (form.outputs * len(form.levels)),
            params=sum(t.numel() for t in tensors),
            nonzeros=sum(int(t.count_nonzero()) for t in tensors),
            bytes=sum(t.numel() * t.element_size() for t in tensors) + math.ceil(form.index_bits / 8),
        )
    return costs


def note(forms: Iterable[SharedKernels]) -> str:
    """What was done, in a sentence."""
    forms = list(forms)
    kept, dense = sum(f.kernels for f in forms), sum(f.outputs * len(f.levels) for f in forms)
    channels, gone = sum(len(f.levels) for f in forms), sum(f.levels.count(0) for f in forms)
    full = sum(f.levels.count(len(f.budgets) - 1) for f in forms)
    return (
        f"KSE: {len(forms)} convolutions keep {kept / dense:.0%} of their kernels; of {channels:,} input channels "
        f"{full:,} keep all and {gone:,} none. MACs, parameters and bytes are those of this form; it runs, and was "
        f"timed, as the dense convolutions that it stands for."
    )


def level_map(forms: dict[str, SharedKernels]) -> Figure:
    """Picture of the share of each layer's input channels (rows) on each level (columns)."""
    levels = max(len(form.budgets) for form in forms.values())
    shares = torch.stack(
        [torch.tensor(form.levels).bincount(minlength=levels) / len(form.levels) for form in forms.values()]
    )
    return plots.heat_map(
        shares,
        title="Share of input channels by level: 0 keeps no kernel, the last all",
        row_label="layer",
        column_label="level",
        rows=list(forms),
        columns=[str(level) for level in range(levels)],
    )
