"""The callback: freeze the network, draw lots, swap after every step, leave the jackpot behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_compress.callbacks.sparsity.lottery_jackpots.file import save_jackpot
from lightning_compress.callbacks.sparsity.lottery_jackpots.lots import (
    RESTRICTIONS,
    JackpotMask,
    draw_lots,
    lots_in,
    pruned_counts,
)
from lightning_compress.core.optimizers import check_held, check_precision
from lightning_compress.core.ratio import parse_ratio
from lightning_compress.core.report import close_account, open_account, run_folder
from lightning_compress.core.sparse.fixed_masks import FixedMasks
from lightning_compress.core.sparse.layers import choose_layers, weight_layers
from lightning_compress.core.sparse.learnt_mask import keep_off_the_wire, weight_name
from lightning_compress.core.sparse.select_weights import drop_lowest
from lightning_compress.core.surgery import (
    attach_record,
    change_in_setup,
    check_trainer,
    resume_in_setup,
    undo_in_fit,
)

_Norm = nn.modules.batchnorm._NormBase


class LotteryJackpots(Callback):
    """Learn which weights of a trained network to keep; the weights themselves never move.

    Needs a trained network in the module when the fit starts, and an optimiser over `self.parameters()`; only scores
    have gradients. Networks must be in train mode, so that batch norms follow.

    Args:
        sparsity: share of the weights that are out (the paper's prune rate).
        layerwise: ``"l1"`` ranks the magnitudes of all layers together to say how many weights each loses;
            ``"uniform"`` takes the same share of every layer.
        include: globs of the names of layers to mask.
        exclude: globs of the names of layers to keep whole; None stands for the last one, the classifier.
        restriction: rate of the swaps by epoch: ``"none"``, always 1, as in the released code; ``"poly4"``,
            (1 - epoch / epochs)^4; ``"cosine"``; or a function of (epoch, epochs).
        init: the mask to start from, by ``"magnitude"`` or ``"random"``, which needs about three times the epochs.
        init_low: score at the start of weights that are out.
        init_high: score at the start of weights that are in.
        freeze_bn_affine: whether weights and biases of norms are frozen too.
        update_every_n_steps: the mask is updated after so many steps of the optimiser.
        tune_epochs: train the weights that are in for so many epochs at the end, with the mask fixed.
        tune_lr: learning rate of that, falling to 0 in a cosine, without weight decay.
        seed: of the random mask.

    What is stored: weights, bits and scores, in the module's own `state_dict`; see `lightning_compress.load`. In the
    end, unless the weights were tuned, ``jackpot.pt`` in the run's folder: the bits alone, which with the dense
    checkpoint are the network (:func:`load_jackpot`).

    With several processes the first mask is made on rank 0 and sent to the others; scores are equal everywhere after
    each step, and so are the masks.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, names that match no
            layer, a network without a layer to mask, an optimiser without the scores, averages of the weights.

    Example::

        from lightning_compress.callbacks import LotteryJackpots
        trainer = Trainer(max_epochs=30, callbacks=[LotteryJackpots(sparsity=0.9)])
        trainer.fit(module, datamodule)

    Packaged config: ``method/lottery_jackpots``.
    """

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        layerwise: Literal["l1", "uniform"] = "l1",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] | None = None,
        restriction: Literal["none", "poly4", "cosine"] | Callable[[int, int], float] = "none",
        init: Literal["magnitude", "random"] = "magnitude",
        init_low: float = 0.99,
        init_high: float = 1.0,
        freeze_bn_affine: bool = True,
        update_every_n_steps: int = 1,
        tune_epochs: int = 0,
        tune_lr: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(parse_ratio(sparsity, "sparsity"), float):
            raise ValueError(f"LotteryJackpots(sparsity={sparsity!r}): give one number for all layers.")
        for argument, value, allowed in (
            ("layerwise", layerwise, ("l1", "uniform")),
            ("init", init, ("magnitude", "random")),
            ("restriction", restriction, tuple(RESTRICTIONS)),
        ):
            if value not in allowed and not (argument == "restriction" and callable(value)):
                more = ", or a function of (epoch, epochs)" if argument == "restriction" else ""
                raise ValueError(
                    f"LotteryJackpots({argument}={value!r}): give {' or '.join(map(repr, allowed))}{more}."
                )
        if not init_low <= init_high:
            raise ValueError(
                f"LotteryJackpots(init_low={init_low}, init_high={init_high}): low must not be above high."
            )
        if update_every_n_steps < 1:
            raise ValueError(f"LotteryJackpots(update_every_n_steps={update_every_n_steps}): give 1 or more.")
        if tune_epochs < 0:
            raise ValueError(f"LotteryJackpots(tune_epochs={tune_epochs}): give 0 or more.")
        if tune_lr <= 0:
            raise ValueError(f"LotteryJackpots(tune_lr={tune_lr}): give a positive number.")
        self.sparsity, self.layerwise = float(sparsity), layerwise
        self.include = [include] if isinstance(include, str) else list(include)
        self.exclude = [exclude] if isinstance(exclude, str) else exclude if exclude is None else list(exclude)
        self.restriction = restriction
        self.init, self.init_low, self.init_high = init, init_low, init_high
        self.freeze_bn_affine = freeze_bn_affine
        self.update_every_n_steps = update_every_n_steps
        self.tune_epochs, self.tune_lr = tune_epochs, tune_lr
        self.seed = seed
        self._steps = 0  # of the optimiser
        self._rate = 1.0
        self._swaps: Tensor | int = 0  # in this epoch
        self._masks = FixedMasks()  # while the weights are tuned
        self._frozen: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._left_alone: dict[str, str] = {}

    @property
    def state_key(self) -> str:
        names = ("sparsity", "layerwise", "include", "exclude", "init", "seed", "tune_epochs")
        return self._generate_state_key(**{name: getattr(self, name) for name in names})

    def state_dict(self) -> dict[str, Any]:
        return {**self._masks.state_dict(), "steps": self._steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._masks.load_state_dict(state_dict)
        self._steps = state_dict["steps"]

    # ---- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        attach_record(pl_module)
        if stage != "fit":
            return
        self._check(trainer)
        layers = self._choose(pl_module)
        open_account(trainer, pl_module)
        resumes = resume_in_setup(trainer, pl_module, by=self.state_key, required=False)
        if not resumes and not self._masks and not self._own(pl_module):
            masks = trainer.strategy.broadcast(self.first_masks(pl_module, layers))
            change_in_setup(trainer, pl_module, draw_lots, {"layers": layers}, by=self.state_key)
            for name, lots in self._own(pl_module).items():
                lots.start(masks[name].to(lots.mask.device), self.init_low, self.init_high)
        if self._own(pl_module):
            self._freeze(pl_module)
        # A byte per weight, and equal everywhere by itself.
        keep_off_the_wire(pl_module, [f"{name}.parametrizations.weight.0.mask" for name in lots_in(pl_module)])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = self._own(pl_module)
        if not own and not self._masks:
            raise MisconfigurationException(
                f"The checkpoint was written by a run without {self.state_key}, so it cannot be resumed with it. To "
                f"find a jackpot in a trained network, load its weights into the module and start a fit of its own."
            )
        tuned = dict(pl_module.named_parameters()) if self.tune_epochs else {}
        check_held(
            trainer, {**{f"the scores of {name}": lots.score for name, lots in own.items()}, **tuned}, "LotteryJackpots"
        )

        def update(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            scores = {id(lots.score) for lots in own.values()}  # others after a cut
            if any(id(p) in scores for group in optimizer.param_groups for p in group["params"]):
                self._steps += 1
                if self._steps % self.update_every_n_steps == 0:
                    self._swaps += sum(lots.update(self._rate) for lots in own.values())

        self._handles = [optimizer.register_step_post_hook(update) for optimizer in trainer.optimizers]
        self._masks.attach(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        still = [name for name, m in pl_module.named_modules() if isinstance(m, _Norm) and not m.training]
        if still:
            rank_zero_warn(
                f"LotteryJackpots: {still[0]!r} and {len(still) - 1} more batch norms are in eval mode, so their "
                f"statistics will not follow the sparse network."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._tune_epoch(trainer) >= 0 and self._own(pl_module):
            self._tune(trainer, pl_module)
        self._rate = self.rate(trainer)
        self._swaps = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        epoch = self._tune_epoch(trainer)
        if epoch >= 0:
            lr = self.tune_lr * (1 + math.cos(math.pi * epoch / self.tune_epochs)) / 2
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    group.update(lr=lr, weight_decay=0.0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._masks:
            pl_module.log("lottery_jackpots/swaps", float(self._swaps), prog_bar=True, rank_zero_only=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        notes = []
        own = self._own(pl_module)
        if own and trainer.is_global_zero:
            zeros = sum(int((~lots.mask).count_nonzero()) for lots in own.values())
            total = sum(lots.mask.numel() for lots in own.values())
            notes.append(f"{zeros / total:.4%} of the weights of {len(own)} layers are out; none has moved.")
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                path = run_folder(trainer) / "jackpot.pt"
                path.parent.mkdir(parents=True, exist_ok=True)
                size = save_jackpot(pl_module, path, self._changed(pl_module))
                notes.append(f"{path.name}: the mask in {size:,} bytes, and the statistics of the norms.")
        close_account(trainer, pl_module, notes=notes, left_alone=self._left_alone)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release(pl_module)

    # ---- the work

    def first_masks(self, pl_module: nn.Module, layers: Sequence[str]) -> dict[str, Tensor]:
        """Layer name -> the mask to start from, on the CPU."""
        weights: dict[str, Any] = {name: pl_module.get_submodule(name).weight for name in layers}
        sizes = {name: weight.detach().abs().float().cpu() for name, weight in weights.items()}
        counts = pruned_counts(sizes, self.sparsity, self.layerwise)
        if self.init == "random":
            generator = torch.Generator().manual_seed(self.seed)
            sizes = {name: torch.rand(size.shape, generator=generator) for name, size in sizes.items()}
        return {name: drop_lowest(size, counts[name]) for name, size in sizes.items()}

    def rate(self, trainer: Trainer) -> float:
        """Share of the wanted swaps that happen in this epoch."""
        function = self.restriction if callable(self.restriction) else RESTRICTIONS[self.restriction]
        return function(trainer.current_epoch, self._last(trainer))

    def _tune(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From bits to zeros in plain weights, which now train."""
        masks = {name: lots.mask.clone() for name, lots in self._own(pl_module).items()}
        self._unfreeze(pl_module)
        undo_in_fit(trainer, by=self.state_key)
        names = {name: weight_name(pl_module.get_submodule(name), name) for name in masks}
        self._masks.set(pl_module, {names[name]: mask for name, mask in masks.items()})

    def _own(self, pl_module: nn.Module) -> dict[str, JackpotMask]:
        """The masks of this callback, while they learn."""
        steps = [step for step in attach_record(pl_module).steps if step["by"] == self.state_key]
        lots = lots_in(pl_module) if steps else {}
        return {name: lots[name] for step in steps for name in step["arguments"]["layers"]}

    def _freeze(self, pl_module: LightningModule) -> None:
        scores = {id(lots.score) for lots in lots_in(pl_module).values()}
        norms = [m for m in pl_module.modules() if isinstance(m, _Norm | nn.GroupNorm | nn.LayerNorm)]
        free = set() if self.freeze_bn_affine else {id(p) for norm in norms for p in norm.parameters()}
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad and id(parameter) not in scores | free:
                parameter.requires_grad_(False)
                self._frozen.append(name)

    def _unfreeze(self, pl_module: nn.Module) -> None:
        parameters = dict(pl_module.named_parameters())
        for name in self._frozen:
            if name in parameters:
                parameters[name].requires_grad_(True)
        self._frozen.clear()

    def _release(self, pl_module: nn.Module) -> None:
        self._unfreeze(pl_module)
        self._masks.detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _changed(self, pl_module: nn.Module) -> dict[str, Tensor]:
        """What is not a mask and not frozen, by its name in the state dict."""
        buffers = dict(pl_module.named_buffers())
        trained = {n for n, p in pl_module.named_parameters() if p.requires_grad}
        return {
            name: value
            for name, value in pl_module.state_dict().items()
            if (name in buffers or name in trained) and ".parametrizations." not in name
        }

    def _choose(self, pl_module: nn.Module) -> list[str]:
        layers = weight_layers(pl_module)
        exclude = list(layers)[-1:] if self.exclude is None else self.exclude
        chosen, self._left_alone = choose_layers(layers, self.include, exclude)
        if not chosen:
            raise MisconfigurationException(
                f"LotteryJackpots finds no layer of {type(pl_module).__name__} to mask: {self._left_alone}"
            )
        return chosen

    def _last(self, trainer: Trainer) -> int:
        """Epochs of the search."""
        return (trainer.max_epochs or 1) - self.tune_epochs

    def _tune_epoch(self, trainer: Trainer) -> int:
        """Epoch of the tuning; negative before it."""
        return trainer.current_epoch - self._last(trainer) if self.tune_epochs else -1

    def _check(self, trainer: Trainer) -> None:
        check_trainer(trainer, "LotteryJackpots", in_fit=True)
        check_precision(trainer, "LotteryJackpots", "scores")
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        endless = trainer.max_epochs in (None, -1)
        if endless and (self.tune_epochs or self.restriction != "none"):
            raise MisconfigurationException(
                f"LotteryJackpots(restriction={self.restriction!r}, tune_epochs={self.tune_epochs}) counts back from "
                f"the last epoch: give the Trainer max_epochs."
            )
        if not endless and self.tune_epochs and self._last(trainer) < 1:
            raise MisconfigurationException(
                f"LotteryJackpots(tune_epochs={self.tune_epochs}) leaves no epoch of max_epochs={trainer.max_epochs} "
                f"to find the mask in."
            )
