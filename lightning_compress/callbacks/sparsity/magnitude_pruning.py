"""Magnitude pruning: zero the weights that are smallest, and train on without them. The baseline of all sparsity.

Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015,
arXiv:1506.02626.

    mask_i = [ |w_i| is not among the share `sparsity` of smallest ones ],   w <- mask * w   after every step

The smallest ones of the whole network, of each layer, or of each group of M inputs (N:M). Step by step, if asked to:
Zhu, Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017,
arXiv:1710.01878, raise the sparsity over the epochs t_0 ... t_1,

    s_t = s (1 - (1 - (t - t_0) / (t_1 - t_0))^3),

and what is zero stays zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_compress.core.calibration import recalibrate_batch_norm
from lightning_compress.core.ratio import parse_ratio, ratio_by_layer
from lightning_compress.core.report import close_account, open_account
from lightning_compress.core.schedules import Ramp
from lightning_compress.core.sparse.fixed_masks import FixedMasks
from lightning_compress.core.sparse.layers import choose_layers, weight_layers
from lightning_compress.core.sparse.learnt_mask import weight_name
from lightning_compress.core.sparse.nm import check_nm, top_of_groups
from lightning_compress.core.sparse.select_weights import drop_lowest, drop_lowest_of_all
from lightning_compress.core.surgery import attach_record, check_epoch, check_trainer, resume_in_setup


def magnitude(weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """|w| in float32, of any shape; -1 where an earlier mask has zeroed it, so that it leaves before all others."""
    size = weight.detach().abs().float()
    return size if mask is None else size.masked_fill_(~mask.to(size.device), -1.0)


def network_masks(magnitudes: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """One ranking over all layers: name -> bool of its shape, True for the weights that stay.

    >>> import torch
    >>> network_masks({"a": torch.tensor([0.1, 3.0]), "b": torch.tensor([0.2, 0.3])}, 0.5)
    {'a': tensor([False,  True]), 'b': tensor([False,  True])}
    """
    total = sum(size.numel() for size in magnitudes.values())
    return drop_lowest_of_all(magnitudes, round(sparsity * total))


def layer_masks(magnitudes: Mapping[str, Tensor], sparsity: Mapping[str, float]) -> dict[str, Tensor]:
    """A ranking in every layer, which loses its own share."""
    return {name: drop_lowest(size, round(sparsity[name] * size.numel())) for name, size in magnitudes.items()}


class MagnitudePruning(Callback):
    """Zero the smallest weights of convolutions and linear layers, and keep them zero while the others train on.

    Args:
        sparsity: share of the weights to zero: a number; a list with one number per layer in the order of definition,
            also as text such as ``"[0.5]+[0.9]*35"``; or a dict from globs of layer names to numbers, where later globs
            win. Lists and dicts hold layer by layer.
        n: weights that stay of every `m` consecutive inputs, instead of a `sparsity`.
        m: size of these groups.
        scope: whether one number holds for the network as a whole, ``"global"``, so that layers with larger weights
            lose less, or for every ``"layer"``.
        include: globs of the names of layers to prune.
        exclude: globs of the names of layers to leave dense.
        start_epoch: 0 prunes before the first epoch, in `setup`; k > 0 at the start of epoch k.
        end_epoch: None prunes at once; else the sparsity rises from 0 in `start_epoch` to its full value in this one.
        recalibrate_bn: batches of 128 training images to estimate the statistics of batch norms anew with, after
            weights were zeroed and before training goes on; 0 for none.

    What is stored: zeros in the weights; the masks, as bits, in the callback's state.

    With several processes the masks are made on rank 0 and sent to the others.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, names that match no
            layer, a network without a layer to prune, averages of the weights beside pruning in mid-fit.

    Example::

        from lightning_compress.callbacks import MagnitudePruning
        trainer = Trainer(callbacks=[MagnitudePruning(sparsity=0.9, recalibrate_bn=8)])
        trainer.fit(module, datamodule)

    Packaged config: ``method/magnitude_pruning``.
    """

    def __init__(
        self,
        sparsity: float | list[float] | dict[str, float] | str = 0.5,
        *,
        n: int | None = None,
        m: int | None = None,
        scope: Literal["global", "layer"] = "global",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        start_epoch: int = 0,
        end_epoch: int | None = None,
        recalibrate_bn: int = 0,
    ) -> None:
        super().__init__()
        for value in sparsity.values() if isinstance(sparsity, dict) else [sparsity]:
            parse_ratio(value, "sparsity")
        if (n is None) != (m is None):
            raise ValueError(f"MagnitudePruning(n={n}, m={m}): give both or neither.")
        if n is not None and m is not None:
            check_nm(n, m, "MagnitudePruning")
            if end_epoch is not None:
                raise ValueError(f"MagnitudePruning(end_epoch={end_epoch}): n:m pruning is one step; leave it out.")
        if scope not in ("global", "layer"):
            raise ValueError(f"MagnitudePruning(scope={scope!r}): give 'global' or 'layer'.")
        if start_epoch < 0:
            raise ValueError(f"MagnitudePruning(start_epoch={start_epoch}): give 0 or a later epoch.")
        if end_epoch is not None and end_epoch <= start_epoch:
            raise ValueError(
                f"MagnitudePruning(start_epoch={start_epoch}, end_epoch={end_epoch}): the sparsity rises between them; "
                f"give a later end, or None to prune at once."
            )
        if recalibrate_bn < 0:
            raise ValueError(f"MagnitudePruning(recalibrate_bn={recalibrate_bn}): give 0 or more batches.")
        self.sparsity, self.n, self.m, self.scope = sparsity, n, m, scope
        self.include = [include] if isinstance(include, str) else list(include)
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.start_epoch, self.end_epoch = start_epoch, end_epoch
        self.recalibrate_bn = recalibrate_bn
        self._masks = FixedMasks()
        self._reached = 0.0  # share of the full sparsity
        self._left_alone: dict[str, str] = {}

    @property
    def state_key(self) -> str:
        names = ("sparsity", "n", "m", "scope", "include", "exclude", "start_epoch", "end_epoch")
        return self._generate_state_key(**{name: getattr(self, name) for name in names})

    def state_dict(self) -> dict[str, Any]:
        return {**self._masks.state_dict(), "reached": self._reached}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._masks.load_state_dict(state_dict)
        self._reached = state_dict["reached"]

    # ---- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        attach_record(pl_module)
        if stage != "fit":
            return
        self._check(trainer)
        self._choose(pl_module)
        open_account(trainer, pl_module)
        resumes = resume_in_setup(trainer, pl_module, by=self.state_key, required=False)
        if not resumes and self._in_setup and not self._masks:
            self.prune(trainer, pl_module, 1.0)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._in_setup and not self._masks:
            raise MisconfigurationException(
                f"The checkpoint was written by a run without {self.state_key}, so it cannot be resumed with it. To "
                f"prune a trained network, load its weights into the module and start a fit of its own."
            )
        self._masks.attach(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        share = self._share(trainer.current_epoch)
        if share > self._reached:
            self.prune(trainer, pl_module, share)
            self._masks.clear_momentum(trainer, pl_module)
        pl_module.log("magnitude_pruning/sparsity", self._masks.sparsity, prog_bar=True, rank_zero_only=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        note = f"{self._masks.sparsity:.1%} of the weights of {len(self._masks)} layers are zero."
        close_account(trainer, pl_module, notes=[note], left_alone=self._left_alone)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._masks.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._masks.detach()

    # ---- the work

    def prune(self, trainer: Trainer, pl_module: LightningModule, share: float) -> None:
        """Zero this share of what is to be zeroed in the end."""
        layers: dict[str, Any] = {name: pl_module.get_submodule(name) for name in self._choose(pl_module)}
        names = {name: weight_name(layer, name) for name, layer in layers.items()}
        sizes = {name: magnitude(pl_module.get_parameter(key), self._masks.get(key)) for name, key in names.items()}
        masks = trainer.strategy.broadcast(self._decide(sizes, share))
        self._masks.set(pl_module, {names[name]: mask for name, mask in masks.items()})
        self._reached = share
        if self.recalibrate_bn:
            recalibrate_batch_norm(trainer, pl_module, self.recalibrate_bn)

    def _decide(self, sizes: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        if self.n is not None and self.m is not None:
            masks = {name: top_of_groups(size, self.n, self.m) for name, size in sizes.items()}
        else:
            ratios = ratio_by_layer(self.sparsity, list(sizes), "sparsity")
            number = isinstance(self.sparsity, (int, float, str)) and isinstance(parse_ratio(self.sparsity), float)
            if number and self.scope == "global":
                masks = network_masks(sizes, share * next(iter(ratios.values())))
            else:
                masks = layer_masks(sizes, {name: share * ratio for name, ratio in ratios.items()})
        return {name: mask.cpu() for name, mask in masks.items()}

    @property
    def _in_setup(self) -> bool:
        return self.start_epoch == 0 and self.end_epoch is None

    def _share(self, epoch: int) -> float:
        if self.end_epoch is None:
            return float(epoch >= self.start_epoch)
        return Ramp(0.0, 1.0, self.start_epoch, self.end_epoch)(epoch)

    def _choose(self, pl_module: LightningModule) -> list[str]:
        layers = weight_layers(pl_module)
        chosen, self._left_alone = choose_layers(layers, self.include, self.exclude, m=self.m)
        if not chosen:
            raise MisconfigurationException(
                f"MagnitudePruning finds no layer of {type(pl_module).__name__} to prune: {self._left_alone}"
            )
        if self.n is None:
            ratio_by_layer(self.sparsity, chosen, "sparsity")  # raises for a list of another length, unknown names
        return chosen

    def _check(self, trainer: Trainer) -> None:
        check_epoch(trainer, "MagnitudePruning", "start_epoch", self.start_epoch)
        check_epoch(trainer, "MagnitudePruning", "end_epoch", self.end_epoch or 0)
        check_trainer(trainer, "MagnitudePruning", in_fit=not self._in_setup)
