"""When SSR searches which layers, when it removes filters, and what learns meanwhile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.callbacks.pruning.ssr.aulm import (
    Norm,
    Split,
    group_rows,
    penalty,
    penalty_gradient,
    split_rows,
    update_fy,
)
from lightning_compress.callbacks.pruning.ssr.layers import lambda_by_layer, why_not
from lightning_compress.core import plots
from lightning_compress.core.example_input import find_example_input
from lightning_compress.core.fresh_start import FreshStart
from lightning_compress.core.optimizers import check_optimizers
from lightning_compress.core.report import close_account, log_figure, open_account
from lightning_compress.core.surgery import (
    ChannelPlan,
    attach_record,
    channel_graph,
    check_cuts,
    check_epoch,
    check_trainer,
    resume_in_setup,
    shrink_in_fit,
)
from lightning_compress.core.surgery.compact import own_norm

# Attributes that are plain data and go into checkpoints as they are.
_PLAIN = ("lambdas", "norms", "left_alone", "notes", "first", "handled", "phase", "shares")


class SSR(Callback):
    """Learn which filters a network can do without, layer by layer or all at once; remove them and fine-tune, in a fit.

    A stage is a search of `steps_per_layer` optimiser steps, the removal of filters, and `finetune_steps` of training.
    ``"layerwise"`` has a stage for each layer, in forward order; while a layer is searched only its weights and biases
    learn, and the batch norms of all others stand still. ``"joint"`` has one stage, in which everything learns. Every
    search and every fine-tuning begins with the optimiser's memory empty and the learning rate that the fit began
    with; the LR schedule stands still in a search and runs from its beginning in each fine-tuning. Start from trained
    weights.

    Args:
        lambda_: weight of the regulariser; for ``"l21"``, lambda / rho is what the norm of a filter shrinks by. One
            number, or a dict from globs of layer names to numbers: layers without one are left alone. For LeNet-5 the
            authors use 0.4, 0.15 and 0.02.
        norm: ``"l21"`` or ``"l20"``. The authors' code has the first only.
        rho: penalty of the split. 1 as in the authors' code; rho * learning rate must stay below 1.
        rho_growth: factor on rho after each F-step; 1, none, as in the authors' code.
        update_fy_step: optimiser steps between two updates of F and Y. 200 as in the authors' code; much fewer chase
            the noise of mini-batches.
        mode: ``"layerwise"``, the authors' code, or ``"joint"``, the paper's formulation.
        steps_per_layer: optimiser steps of a search. 8000 as in the authors' code.
        finetune_steps: optimiser steps of training after each removal, which is a jump: weights are near their copy,
            not equal. 12000 as in the authors' code. The last fine-tuning goes on until the Trainer stops.
        include: globs of the names of layers that may be narrowed.
        exclude: globs of the names of layers that keep their width.
        include_bias: whether a filter's bias belongs to its row. Without it a bias is not pulled to zero and the jump
            is larger, as a removed filter always goes with its bias.
        include_norm: whether gain and shift of the batch norm behind a filter belong to its row.
        average_last: number of last F-steps that decide, by the majority, which filters go. 1, the last F alone, as in
            the authors' code; the set jitters by a few filters.
        start_epoch: the first search begins with this epoch; before it the network trains as without SSR.
        allow_incomplete: whether the Trainer may stop before all stages are done.

    Only convolutions and linear layers whose channels are not added to others' are narrowed: in a ResNet the inner
    layers of its blocks. The rest, also the classifier, keeps its width; the account says why.

    A filter is removed physically as soon as its search is over, with its batch-norm entries and the weights that read
    it: the same function and the same gradients as masking it, without its cost. The first step after the search begins
    with the narrow network, so a checkpoint written before it is of the whole one.

    The penalty's gradient is added after unscaling and before clipping. Weight decay is the optimiser's business: the
    authors have none.

    What is stored: removed channels in the module's own `state_dict`; F, Y, the stage and the steps done in the
    callback's. With several processes F and Y are computed by each from the same weights; nothing is sent.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, names that match no
            layer, a module that optimises manually, or a Trainer that stops before the last stage is done.

    Example::

        from lightning_compress.callbacks import SSR
        trainer = Trainer(max_steps=60_000, callbacks=[SSR({"*conv1": 0.4, "*conv2": 0.15, "*fc1": 0.02})])
        trainer.fit(module, datamodule)

    Packaged config: ``method/ssr``.
    """

    def __init__(
        self,
        lambda_: float | dict[str, float] = 0.1,
        *,
        norm: Norm = "l21",
        rho: float = 1.0,
        rho_growth: float = 1.0,
        update_fy_step: int = 200,
        mode: Literal["layerwise", "joint"] = "layerwise",
        steps_per_layer: int = 8000,
        finetune_steps: int = 12000,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        include_bias: bool = True,
        include_norm: bool = False,
        average_last: int = 1,
        start_epoch: int = 0,
        allow_incomplete: bool = False,
    ) -> None:
        super().__init__()
        for value in lambda_.values() if isinstance(lambda_, Mapping) else [lambda_]:
            if not 0 <= value < math.inf:
                raise ValueError(f"SSR(lambda_={lambda_}): give numbers of at least 0.")
        if norm not in ("l21", "l20"):
            raise ValueError(f"SSR(norm={norm!r}): give 'l21' or 'l20'.")
        if mode not in ("layerwise", "joint"):
            raise ValueError(f"SSR(mode={mode!r}): give 'layerwise' or 'joint'.")
        if not 0 < rho < math.inf:
            raise ValueError(f"SSR(rho={rho}): give a number above 0.")
        if not 1 <= rho_growth < math.inf:
            raise ValueError(f"SSR(rho_growth={rho_growth}): give a factor of at least 1.")
        for argument, number, least in (
            ("update_fy_step", update_fy_step, 1), ("steps_per_layer", steps_per_layer, 1),
            ("finetune_steps", finetune_steps, 1), ("average_last", average_last, 1), ("start_epoch", start_epoch, 0),
        ):  # fmt: skip
            if number < least:
                raise ValueError(f"SSR({argument}={number}): give a whole number of at least {least}.")
        self.lambda_ = lambda_
        self.norm: Norm = norm
        self.rho = rho
        self.rho_growth = rho_growth
        self.update_fy_step = update_fy_step
        self.mode = mode
        self.steps_per_layer = steps_per_layer
        self.finetune_steps = finetune_steps
        self.include = [include] if isinstance(include, str) else list(include)
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.include_bias = include_bias
        self.include_norm = include_norm
        self.average_last = average_last
        self.start_epoch = start_epoch
        self.allow_incomplete = allow_incomplete
        self._example: Any = None
        self._still: list[nn.Module] = []  # batch norms that a search put into eval mode
        self._begin()

    def _begin(self) -> None:
        """As before the first step."""
        self._lambdas: dict[str, float] = {}  # layer -> lambda, in forward order
        self._norms: dict[str, str] = {}  # layer -> the batch norm behind it, if there is one
        self._left_alone: dict[str, str] = {}
        self._notes: list[str] = []
        self._first: int | None = None  # the optimiser step with which the first stage begins
        self._handled = -1  # the last optimiser step that was prepared
        self._phase = -1  # 0, 2, 4: a search; 1, 3, 5: the fine-tuning after it
        self._splits: dict[str, Split] = {}  # the layers that are searched now
        self._shares: dict[str, list[float]] = {}  # layer -> share of its filters alive after each F-step
        self._fresh: FreshStart | None = None

    # ---- before the fit

    @property
    def state_key(self) -> str:
        names = ("lambda_", "norm", "mode", "steps_per_layer", "finetune_steps", "include", "exclude", "start_epoch")
        return self._generate_state_key(**{name: getattr(self, name) for name in names})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        attach_record(pl_module)
        if stage != "fit":
            return
        check_epoch(trainer, "SSR", "start_epoch", self.start_epoch)
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"SSR counts optimiser steps, of which {type(pl_module).__name__} takes several at will: it optimises "
                f"manually. Prune it with a callback that does not, such as L1Norm."
            )
        check_trainer(trainer, "SSR", in_fit=True)
        open_account(trainer, pl_module)
        self._example = find_example_input(trainer, pl_module)
        if resume_in_setup(trainer, pl_module, by=self.state_key, required=False):
            self._begin()  # which layers, and where in the timeline, comes with the callback's state
        elif trainer.global_step == 0 or not self._lambdas:  # else the same Trainer goes on
            self._begin()
            self._choose(pl_module)

    def _choose(self, pl_module: LightningModule) -> None:
        """Find the layers that can be narrowed alone."""
        graph = channel_graph(pl_module, self._example, include=self.include, exclude=self.exclude)
        reasons = {name: why_not(pl_module, graph, name) for name in graph.layers}
        alone = [name for name, reason in reasons.items() if not reason]
        self._left_alone = {**{name: reason for name, reason in reasons.items() if reason}, **graph.left_alone}
        if not alone:
            raise MisconfigurationException(
                f"SSR finds no layer of {type(pl_module).__name__} whose channels are its own: "
                f"{dict(list(self._left_alone.items())[:4])}. Shared channels can be removed by HRank and L1Norm."
            )
        self._lambdas = lambda_by_layer(self.lambda_, alone)
        if not self._lambdas:
            raise ValueError("SSR(lambda_={}): give a number for at least one layer.")
        self._left_alone |= {n: "has no number in `lambda_`" for n in alone if n not in self._lambdas}
        norms = {name: own_norm(pl_module, graph, name) for name in self._lambdas}
        self._norms = {name: norm for name, norm in norms.items() if norm is not None}
        one = ChannelPlan({name: torch.tensor([0]) for name in self._lambdas})
        check_cuts(pl_module, one.cuts(graph), self._example)  # now, not after hours of searching

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._lambdas:
            raise MisconfigurationException(
                f"The checkpoint was written by a run without {self.state_key}, so it cannot be resumed with it. To "
                f"prune a trained network, load its weights into the module and start a fit of its own."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_optimizers(trainer, pl_module)
        self._check_length(trainer)
        rate = max((group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups), default=0.0)
        rho = self.rho * self.rho_growth ** ((self.steps_per_layer - 1) // self.update_fy_step)
        if rho * rate >= 1:
            rank_zero_warn(f"SSR(rho={self.rho}): rho * learning rate reaches {rho * rate:.3g}; from 1 on it diverges.")
        self._fresh = self._fresh or FreshStart.of(trainer)
        # A search that is resumed:
        self._splits = {name: split.to(pl_module.device) for name, split in self._splits.items()}
        self._hold_norms(pl_module)

    def _check_length(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        counted = math.isfinite(trainer.num_training_batches)
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) if counted else 0
        endless = trainer.max_epochs in (None, -1) or not counted
        total = min(
            trainer.max_steps if trainer.max_steps >= 0 else math.inf,
            math.inf if endless else trainer.max_epochs * per_epoch,  # type: ignore[operator]
        )
        stages = len(self._stages)
        first = self.start_epoch * per_epoch if self._first is None else self._first
        needed = first + stages * (self.steps_per_layer + self.finetune_steps)
        if total < needed:
            message = (
                f"SSR needs {needed} optimiser steps, but the Trainer stops after {total}: "
                f"{f'{first} before start_epoch={self.start_epoch}, then ' if first else ''}{stages} stage"
                f"{'s' * (stages > 1)} of steps_per_layer={self.steps_per_layer} and "
                f"finetune_steps={self.finetune_steps}. "
            )
            if not self.allow_incomplete:
                raise MisconfigurationException(
                    f"{message}Raise max_epochs or max_steps, choose fewer steps or layers, or say "
                    f"allow_incomplete=True."
                )
            rank_zero_warn(f"{message}What is not searched to the end stays whole.")

    # ---- the timeline

    @property
    def _stages(self) -> list[list[str]]:
        """The layers that are searched together, in turn."""
        layers = list(self._lambdas)
        return [layers] if self.mode == "joint" else [[name] for name in layers]

    @property
    def _searching(self) -> bool:
        return self._phase >= 0 and self._phase % 2 == 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self._handled or trainer.current_epoch < self.start_epoch:  # accumulating; not yet
            return
        self._handled = step
        self._first = step if self._first is None else self._first
        stage, t = divmod(step - self._first, self.steps_per_layer + self.finetune_steps)
        phase = min(2 * stage + (t >= self.steps_per_layer), 2 * len(self._stages) - 1)
        if phase != self._phase:
            self._enter(trainer, pl_module, phase)
        if self._searching:
            assert self._fresh is not None
            if trainer.lr_scheduler_configs:
                self._fresh.restore_rates(trainer)
            if t % self.update_fy_step == 0:
                self._update(trainer, pl_module)

    def _enter(self, trainer: Trainer, pl_module: LightningModule, phase: int) -> None:
        """End a phase and begin the next: no memory of the optimiser is passed on."""
        if self._searching:
            self._remove(trainer, pl_module)
        self._release_norms()
        self._phase = phase
        assert self._fresh is not None
        self._fresh.restore(trainer)
        if self._searching:
            layers = self._stages[phase // 2]
            self._splits = {name: Split.of(self._matrix(pl_module, name), self.rho) for name in layers}
            self._hold_norms(pl_module)

    def _update(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """F, then Y, of all layers that are searched."""
        log: dict[str, float] = {}
        for name, split in self._splits.items():
            w = self._matrix(pl_module, name)
            f, y = update_fy(w, split.y, self._lambdas[name], split.rho, self.norm)
            alive = f.norm(dim=1) > 0
            if not alive.any() and not len(split.alive):
                rank_zero_warn(
                    f"SSR: lambda_={self._lambdas[name]:g} with rho={split.rho:g} lets no filter of {name!r} through: "
                    f"their norms are {float(w.norm(dim=1).max()):.3g} at most. If it stays so, one filter is kept."
                )
            recent = torch.cat([split.alive, alive[None].cpu()])[-self.average_last :]
            self._splits[name] = Split(f, y, split.rho * self.rho_growth, recent)
            self._shares.setdefault(name, []).append(float(alive.float().mean()))
            log[f"ssr/{name}/filters"] = float(alive.sum())
            log[f"ssr/{name}/penalty"] = float(penalty(w, f, y, split.rho))
        for logger in trainer.loggers:
            logger.log_metrics(log, step=trainer.global_step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self._searching:
            return
        if self.mode == "layerwise":
            # A parameter without gradient is not moved at all, by momentum and weight decay neither.
            learning = {id(p) for peer in trainer.callbacks if isinstance(peer, SSR) for p in peer._learning(pl_module)}  # type: ignore[attr-defined]
            for parameter in pl_module.parameters():
                if id(parameter) not in learning:
                    parameter.grad = None
        for name, split in self._splits.items():
            rows = self._rows_of(pl_module, name)
            gradient = penalty_gradient(self._matrix(pl_module, name), split.f, split.y, split.rho)
            for tensor, part in zip(rows, split_rows(gradient, rows), strict=True):
                tensor.grad = part if tensor.grad is None else tensor.grad.add_(part)

    def _remove(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the filters out whose copies are zero."""
        kept: dict[str, Tensor] = {}
        for name, split in self._splits.items():
            w = group_rows(self._rows_of(pl_module, name)).detach()
            kept[name] = split.survivors(w)
            gone = w.norm(dim=1).cpu().index_fill(0, kept[name], 0)
            jump = f"; those that went had norms of up to {float(gone.max()):.3g}" if gone.any() else ""
            self._notes.append(f"{name}: {len(kept[name])} of {len(w)} filters stay{jump}.")
            rank_zero_info(f"SSR: {self._notes[-1]}")
        self._splits = {}
        decided = trainer.strategy.broadcast(kept)
        if any(not torch.equal(decided[name], kept[name]) for name in kept):
            raise RuntimeError(f"SSR: rank {trainer.global_rank} would remove other filters than rank 0.")
        narrowed = {n: k for n, k in kept.items() if len(k) < len(pl_module.get_submodule(n).weight)}  # type: ignore[arg-type]
        if narrowed:
            graph = channel_graph(pl_module, self._example, include=list(narrowed))
            cuts = ChannelPlan(narrowed).cuts(graph)
            check_cuts(pl_module, cuts, self._example)
            shrink_in_fit(trainer, cuts, by=self.state_key)

    # ---- what belongs to a layer

    def _rows_of(self, pl_module: LightningModule, name: str) -> list[nn.Parameter]:
        """The parameters that make up the rows of W."""
        layer: Any = pl_module.get_submodule(name)
        tensors = [layer.weight, layer.bias if self.include_bias else None]
        if self.include_norm and name in self._norms:
            norm: Any = pl_module.get_submodule(self._norms[name])
            tensors += [norm.weight, norm.bias]
        return [t for t in tensors if t is not None and t.requires_grad]

    @torch.no_grad()
    def _matrix(self, pl_module: LightningModule, name: str) -> Tensor:
        """W, (N, d)."""
        w = group_rows(self._rows_of(pl_module, name))
        if name in self._splits and self._splits[name].f.shape != w.shape:
            raise RuntimeError(
                f"SSR: {name!r} changed from {tuple(self._splits[name].f.shape)} to {tuple(w.shape)} while it was "
                f"searched. Let the other callback do its work before the first search or after the last."
            )
        return w

    def _learning(self, pl_module: LightningModule) -> list[nn.Parameter]:
        """The parameters that a layer-wise search moves."""
        return [
            p for n in self._splits for p in (*pl_module.get_submodule(n).parameters(), *self._rows_of(pl_module, n))
        ]

    def _hold_norms(self, pl_module: LightningModule) -> None:
        """Batch norms of layers that do not learn must not learn either."""
        if self._searching and self.mode == "layerwise":
            own = {self._norms.get(name) for name in self._splits}
            norms = {n: m for n, m in pl_module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
            self._still = [m for n, m in norms.items() if m.training and n not in own]
            for module in self._still:
                module.eval()

    def _release_norms(self) -> None:
        for module in self._still:
            module.train()
        self._still = []

    # ---- afterwards

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        unfinished = [name for layers in self._stages[(self._phase + 1) // 2 :] for name in layers]
        missing = [f"The fit ended before {', '.join(unfinished)} had been searched."] if unfinished else []
        close_account(trainer, pl_module, notes=self._notes + missing, left_alone=self._left_alone)
        if self._shares and trainer.is_global_zero and plots.available():
            percent = {name: [100 * share for share in shares] for name, shares in self._shares.items()}
            title = "Filters that the search would keep"
            log_figure(trainer, "ssr_filters", plots.lines(percent, title=title, x_label="F-step", y_label="%"))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release_norms()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release_norms()

    def state_dict(self) -> dict[str, Any]:
        plain = {name: getattr(self, f"_{name}") for name in _PLAIN}
        splits = {name: vars(split) for name, split in self._splits.items()}
        return {**plain, "splits": splits, "fresh": None if self._fresh is None else self._fresh.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in _PLAIN:
            setattr(self, f"_{name}", state_dict[name])
        self._splits = {name: Split(**split) for name, split in state_dict["splits"].items()}
        self._fresh = None if state_dict["fresh"] is None else FreshStart.from_state_dict(state_dict["fresh"])
