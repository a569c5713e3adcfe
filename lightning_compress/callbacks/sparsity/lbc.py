r"""LBC: train an N:M sparse network from scratch by learning which combination of weights each group keeps.

Zhang, Lin, Lin, Luo, Li, Chao, Wu, Ji, "Learning Best Combination for Efficient N:M Sparsity", NeurIPS 2022,
arXiv:2206.06662.

A group of M consecutive inputs can keep its N weights in C = binom(M, N) ways. Every way c has a score alpha_c, and the
mask of the group is the union of the ways that are still alive:

    mask = [ P^T alive > 0 ],   P in {0,1}^{C x M} the combinations in lexicographic order
    W_hat = mask * W            is what the layer computes with
    dL/dalpha = alive * ( P (dL/dW_hat * W) ),   dL/dW = mask * dL/dW_hat

so a score collects, to first order, what its weights are worth to the loss. All combinations are alive at the start,
and the network is dense. At the start of epoch e the lowest scored leave, until at t_f one per group is left:

    alive combinations = 1 + ceil( (C - 1) (1 - (e - t_i) / (t_f - t_i))^3 )

Then the scores have done their work. The network goes on as a plain one whose other weights are zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_compress.callbacks.pruning.channel_pruning import refuse_later_pruning
from lightning_compress.core.optimizers import check_held, check_optimizers, check_precision, own_group
from lightning_compress.core.report import close_account, open_account
from lightning_compress.core.sparse.fixed_masks import FixedMasks
from lightning_compress.core.sparse.layers import choose_layers, weight_layers
from lightning_compress.core.sparse.learnt_mask import (
    insert_mask,
    keep_off_the_wire,
    masks_in,
    remove_mask,
    weight_name,
)
from lightning_compress.core.sparse.nm import check_nm, is_nm
from lightning_compress.core.surgery import (
    attach_record,
    change_in_setup,
    check_trainer,
    replayable,
    resume_in_setup,
    undo_in_fit,
)

# 4:8 has 70, and its scores take 9 times the memory of the weights; 8:16 has 12,870.
MOST_COMBINATIONS = 256


def combinations(n: int, m: int) -> Tensor:
    """All ways to keep n of m weights: (C, m) of 0 and 1, in lexicographic order of the positions kept.

    >>> combinations(2, 3)
    tensor([[1., 1., 0.],
            [1., 0., 1.],
            [0., 1., 1.]])
    """
    kept = torch.combinations(torch.arange(m), n)
    return torch.zeros(len(kept), m).scatter_(1, kept, 1.0)


def initial_score(n: int, m: int) -> float:
    """1 / binom(m - 1, n - 1): each weight is in so many combinations, and their scores sum to one."""
    return 1 / math.comb(m - 1, n - 1)


def removed_combinations(epoch: float, total: int, start_epoch: int, end_epoch: int, exponent: float = 3.0) -> int:
    """How many of the `total` combinations of a group are gone in `epoch`: 0 at `start_epoch`, all but one at the end.

    >>> [removed_combinations(epoch, 6, 0, 60) for epoch in (0, 4, 5, 10, 16, 25, 59, 60, 99)]
    [0, 0, 1, 2, 3, 4, 4, 5, 5]
    """
    if epoch >= end_epoch:
        return total - 1
    if epoch <= start_epoch:
        return 0
    left = (total - 1) * (1 - (epoch - start_epoch) / (end_epoch - start_epoch)) ** exponent
    return total - 1 - math.ceil(round(left, 9))


def remove_lowest(scores: Tensor, alive: Tensor, count: int) -> Tensor:
    """Let so many combinations of each group be gone: those that are, then the lowest scores; of equal ones the first.

    What is gone stays gone, wherever an optimiser's momentum has moved its score.

    Args:
        scores: (C, G).
        alive: (C, G), bool.

    Returns:
        The new `alive`.
    """
    order = scores.detach().masked_fill(~alive, -torch.inf).sort(dim=0, stable=True).indices
    return alive.scatter(0, order[:count], False)


def union_mask(alive: Tensor, patterns: Tensor) -> Tensor:
    """Weights that some surviving combination keeps: (C, G) bool, (C, m) -> (m, G) bool."""
    return patterns.T @ alive.to(patterns.dtype) > 0


def by_position(weight: Tensor, m: int) -> Tensor:
    """View a weight as (m, out, in / m, ...): first the position in the group, then the group."""
    return weight.unflatten(1, (-1, m)).movedim(2, 0)


class _Combine(torch.autograd.Function):
    """Multiply the weight by its mask; the mask's gradient goes straight to the scores."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, alive: Tensor, patterns: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, alive, patterns, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, alive, patterns, mask = ctx.saved_tensors
        for_weight = grad * mask if ctx.needs_input_grad[0] else None
        for_scores = None
        if ctx.needs_input_grad[1]:
            m = patterns.shape[1]
            with torch.autocast(grad.device.type, enabled=False):
                worth = patterns.new_empty(by_position(weight, m).shape)
                torch.mul(by_position(grad, m), by_position(weight, m), out=worth)
                for_scores = (patterns @ worth.view(m, -1)).mul_(alive.view(torch.uint8))
        return for_weight, for_scores, None, None, None


class CombinationMask(nn.Module):
    """The mask of a weight while its combinations compete; a parametrisation.

    Args:
        weight: (out, in) or (out, in, kh, kw); `in` is a multiple of m.

    Attributes:
        scores: (C, G), one column per group; groups in the order (out, in / m, kh, kw), so that one product of
            matrices, with long rows, makes their gradient from the weight's.
        alive: (C, G), bool.
    """

    alive: Tensor
    patterns: Tensor
    mask: Tensor

    def __init__(self, weight: Tensor, n: int, m: int) -> None:
        super().__init__()
        self.n, self.m = n, m
        shape = (math.comb(m, n), weight.numel() // m)
        self.scores = nn.Parameter(torch.full(shape, initial_score(n, m), device=weight.device))
        self.register_buffer("alive", torch.ones(shape, dtype=torch.bool, device=weight.device))
        self.register_buffer("patterns", combinations(n, m).to(weight.device), persistent=False)
        # of 0 and 1: it changes at most once an epoch, and uint8 multiplies faster than bool
        ones = torch.ones_like(weight, dtype=torch.uint8, requires_grad=False)
        self.register_buffer("mask", ones, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return _Combine.apply(weight, self.scores, self.alive, self.patterns, self.mask)

    @torch.no_grad()
    def remove(self, count: int) -> None:
        """Let `count` combinations of each group be gone."""
        if len(self.alive) - int(self.alive[:, 0].count_nonzero()) >= count:
            return
        self.alive.copy_(remove_lowest(self.scores, self.alive, count))
        self._refresh()

    @property
    def density(self) -> float:
        """Share of the weights that the union keeps."""
        return float(self.mask.count_nonzero()) / self.mask.numel()

    def _refresh(self) -> None:
        positions = by_position(self.mask, self.m)
        positions.copy_(union_mask(self.alive, self.patterns).view(positions.shape))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._refresh()


def layers_to_learn(
    module: nn.Module, m: int, include: Sequence[str] = ("*",), exclude: Sequence[str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """The layers that LBC makes sparse, and the reason for each that it does not. See :class:`LBC`."""
    layers = weight_layers(module)
    if exclude is None:
        first = [name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)][:1]
        last = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)][-1:]
        exclude = first + last
    return choose_layers(layers, include, exclude, m=m)


@replayable
def compete(module: nn.Module, layers: Sequence[str], n: int, m: int) -> Any:
    """Give layers a :class:`CombinationMask` with all combinations alive."""
    for name in layers:
        layer: Any = module.get_submodule(name)
        insert_mask(layer, CombinationMask(layer.weight.detach(), n, m))
    return partial(stop_competing, layers=list(layers))


def stop_competing(module: nn.Module, layers: Sequence[str]) -> None:
    """Take the masks of :func:`compete` out again."""
    for name in layers:
        remove_mask(module.get_submodule(name), CombinationMask)


class LBC(Callback):
    """Learn an N:M sparse network in one ordinary fit, from random or from trained weights.

    Layers keep their type and, after `end_epoch`, everything else: weights are plain, all but n of every m are zero.

    Args:
        n: weights that each group keeps.
        m: consecutive inputs that make a group.
        start_epoch: t_i, until when the network is dense. Scores learn from the first epoch.
        end_epoch: t_f, from when on each group has its n weights; half of the paper's epochs for ResNets.
        exponent: of the schedule: 3 for the paper's ResNets, 4 for its DeiT.
        include: globs of the names of layers to make sparse.
        exclude: globs of the names of layers to leave dense; None stands for the first convolution and the last linear
            layer. Grouped convolutions and layers whose inputs are no multiple of m are left dense anyway.
        score_lr_factor: learning rate of the scores, as a multiple of the weights'.
        score_weight_decay: of the scores; None is that of the weights.

    What is stored: until `end_epoch` scores and survivors, in the module's own `state_dict`; see
    `lightning_compress.load`. Then zeros, and the masks, as bits, in the callback's state.

    With several processes the scores are equal everywhere after each step, and so are the survivors.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, names that match no
            layer, a network without a layer to make sparse, averages of the weights, channel pruning in mid-fit.

    Example::

        from lightning_compress.callbacks import LBC
        trainer = Trainer(max_epochs=120, callbacks=[LBC(n=2, m=4, end_epoch=60)])
        trainer.fit(module, datamodule)

    Packaged config: ``method/lbc``.
    """

    def __init__(
        self,
        n: int = 2,
        m: int = 4,
        *,
        start_epoch: int = 0,
        end_epoch: int = 60,
        exponent: float = 3.0,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] | None = None,
        score_lr_factor: float = 1.0,
        score_weight_decay: float | None = None,
    ) -> None:
        super().__init__()
        check_nm(n, m, "LBC")
        if math.comb(m, n) > MOST_COMBINATIONS:
            raise ValueError(
                f"LBC(n={n}, m={m}): there are {math.comb(m, n):,} ways to keep {n} of {m} weights, and each needs a "
                f"score in every group; at most {MOST_COMBINATIONS} are allowed. Take smaller groups, such as 2:4."
            )
        for argument, value in (("start_epoch", start_epoch), ("end_epoch", end_epoch)):
            if value < 0:
                raise ValueError(f"LBC({argument}={value}): give 0 or a later epoch.")
        if exponent <= 0:
            raise ValueError(f"LBC(exponent={exponent}): give a positive number.")
        if score_lr_factor <= 0:
            raise ValueError(f"LBC(score_lr_factor={score_lr_factor}): give a positive number.")
        if score_weight_decay is not None and score_weight_decay < 0:
            raise ValueError(f"LBC(score_weight_decay={score_weight_decay}): give 0 or more.")
        self.n, self.m = n, m
        self.start_epoch, self.end_epoch, self.exponent = start_epoch, end_epoch, exponent
        self.include = [include] if isinstance(include, str) else list(include)
        self.exclude = [exclude] if isinstance(exclude, str) else exclude if exclude is None else list(exclude)
        self.score_lr_factor = score_lr_factor
        self.score_weight_decay = score_weight_decay
        self._masks = FixedMasks()
        self._left_alone: dict[str, str] = {}

    @property
    def state_key(self) -> str:
        return self._generate_state_key(n=self.n, m=self.m, include=self.include, exclude=self.exclude)

    def state_dict(self) -> dict[str, Any]:
        return self._masks.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._masks.load_state_dict(state_dict)

    # ---- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        attach_record(pl_module)
        if stage != "fit":
            return
        self._check(trainer)
        layers = self._choose(pl_module)
        open_account(trainer, pl_module)
        resumes = resume_in_setup(trainer, pl_module, by=self.state_key, required=False)
        if not resumes and not self._masks and not self._competing(pl_module):
            change_in_setup(
                trainer, pl_module, compete, {"layers": layers, "n": self.n, "m": self.m}, by=self.state_key
            )
        # As large as scores and weights, and equal everywhere by themselves.
        names = [f"{name}.parametrizations.weight.0" for name in masks_in(pl_module, CombinationMask)]
        keep_off_the_wire(pl_module, [f"{name}.{buffer}" for name in names for buffer in ("alive", "mask", "patterns")])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        competing = self._competing(pl_module)
        if not competing and not self._masks:
            raise MisconfigurationException(
                f"The checkpoint was written by a run without {self.state_key}, so it cannot be resumed with it. To "
                f"make a trained network sparse, load its weights into the module and start a fit of its own."
            )
        check_held(trainer, {f"the scores of {name}": mask.scores for name, mask in competing.items()}, "LBC")
        if self.score_lr_factor != 1 or self.score_weight_decay is not None:
            own_group(
                trainer,
                [mask.scores for mask in competing.values()],
                lr_factor=self.score_lr_factor,
                weight_decay=self.score_weight_decay,
            )
        self._masks.attach(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_optimizers(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        competing = self._competing(pl_module)
        if not competing:
            return
        total = math.comb(self.m, self.n)
        count = removed_combinations(trainer.current_epoch, total, self.start_epoch, self.end_epoch, self.exponent)
        for mask in competing.values():
            mask.remove(count)
        density = sum(mask.density * mask.mask.numel() for mask in competing.values())
        density /= sum(mask.mask.numel() for mask in competing.values())
        if count == total - 1:
            self._finish(trainer, pl_module, competing)
        pl_module.log("lbc/density", density, prog_bar=True, rank_zero_only=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        note = f"{self.n}:{self.m} sparsity in {len(self._masks)} layers."
        close_account(trainer, pl_module, notes=[note], left_alone=self._left_alone)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._masks.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._masks.detach()

    # ---- the work

    def _finish(self, trainer: Trainer, pl_module: LightningModule, competing: Mapping[str, CombinationMask]) -> None:
        """From scores to zeros: one combination per group is left, and nothing more to learn about it."""
        kept = {name: mask.mask.bool() for name, mask in competing.items()}
        undo_in_fit(trainer, by=self.state_key)
        weights = {weight_name(pl_module.get_submodule(name), name): mask for name, mask in kept.items()}
        self._masks.set(pl_module, weights)
        self._masks.clear_momentum(trainer, pl_module)
        assert all(is_nm(pl_module.get_parameter(name), self.n, self.m) for name in weights)

    def _competing(self, pl_module: LightningModule) -> dict[str, CombinationMask]:
        """The masks of this callback, while there are any."""
        own = [step for step in attach_record(pl_module).steps if step["by"] == self.state_key]
        masks = masks_in(pl_module, CombinationMask) if own else {}
        return {name: masks[name] for step in own for name in step["arguments"]["layers"]}

    def _choose(self, pl_module: LightningModule) -> list[str]:
        chosen, self._left_alone = layers_to_learn(pl_module, self.m, self.include, self.exclude)
        if not chosen:
            raise MisconfigurationException(
                f"LBC finds no layer of {type(pl_module).__name__} to make sparse: {self._left_alone}"
            )
        return chosen

    def _check(self, trainer: Trainer) -> None:
        endless = trainer.max_epochs in (None, -1) or trainer.fast_dev_run  # type: ignore[attr-defined]
        for argument, epoch in (("start_epoch", self.start_epoch), ("end_epoch", self.end_epoch)):
            if not endless and epoch >= trainer.max_epochs:  # type: ignore[operator]
                raise MisconfigurationException(
                    f"LBC({argument}={epoch}): the Trainer stops after max_epochs={trainer.max_epochs}, before the "
                    f"network is {self.n}:{self.m} sparse. Give an earlier epoch; half of them is the paper's end."
                )
        if self.end_epoch < self.start_epoch:
            raise MisconfigurationException(
                f"LBC(start_epoch={self.start_epoch}, end_epoch={self.end_epoch}): the end is before the start."
            )
        check_trainer(trainer, "LBC", in_fit=True)
        check_precision(trainer, "LBC", "scores")
        refuse_later_pruning(trainer, self, f"removing channels would tear groups of {self.m} inputs apart")
