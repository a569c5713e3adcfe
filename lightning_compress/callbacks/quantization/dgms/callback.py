"""When mixtures are attached, started and accounted for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.progress import track
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_compress.callbacks.quantization.dgms.initialisation import Init, Start, initial_mixture
from lightning_compress.callbacks.quantization.dgms.mixture import TAU_FLOOR
from lightning_compress.callbacks.quantization.dgms.quantizer import MixtureQuantizer, attach_mixtures, mixtures_in
from lightning_compress.core import plots
from lightning_compress.core.optimizers import check_held, check_optimizers, check_precision, own_group
from lightning_compress.core.quant.attach import real_weight
from lightning_compress.core.quant.codebook import Codebook, save_codebooks
from lightning_compress.core.quant.layers import choose_quantized
from lightning_compress.core.report import LayerCost, close_account, log_figure, open_account, run_folder
from lightning_compress.core.select import match
from lightning_compress.core.sparse.learnt_mask import keep_off_the_wire
from lightning_compress.core.surgery import attach_record, change_in_setup, check_trainer, resume_in_setup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "dgms.codebooks"
MOST_BITS = 8  # a code is a byte
MOST_CURVES = 6  # in one picture


class DGMS(Callback):
    """Fine-tune a trained network whose weights take 2^b values per layer, which are learnt as means of a mixture.

    Layers keep their type. In training they compute with soft weights, in evaluation with hard ones: of 2^b values,
    one of them 0. Start from trained weights and train with a small learning rate. Activations are not quantised.

    Args:
        weight_bits: b, 2 to 8; or by glob of layer names, where later globs win and other layers keep their weights.
        tau: temperature of the soft weights at the start. Towards 1 they are far from the hard ones.
        init: from what mixtures start: ``"kmeans"``; ``"empirical"``, k-means with one width for all components (the
            authors' choice for CIFAR-10); ``"em"``, a maximum-likelihood fit.
        sigma_empirical: that width.
        learn_tau: whether the temperature is trained. It never falls below 1e-4.
        exclude_first: leave the first convolution as it is.
        exclude_linear: leave linear layers as they are.
        include: globs of names of layers to quantise.
        exclude: globs of names of layers to leave as they are.
        gmm_lr: learning rate of the mixtures, before any schedule (with OneCycleLR its peak). They are wrecked by
            rates that suit weights trained from scratch; 1e-4 is what the authors' 2e-5 amounts to, see the method's
            page. None is that of the weights.
        gmm_weight_decay: of the mixtures; None is that of the weights.
        kmeans_iters: at most so many iterations of k-means, and of EM.
        seed: None starts k-means from quantiles; a number from weights drawn at random, as the authors do.
        official_eps: divide densities by their sum + 1e-11, as the authors do: a weight far from all means then stands
            for 0, not for the nearest mean.

    What is stored: weights and mixtures, in the module's own `state_dict`; see `lightning_compress.load`. At the end of
    the fit the network with packed indices and codebooks is written beside the account as ``dgms.codebooks``; see
    `lightning_compress.core.quant.codebook`.

    With several processes the mixtures start on rank 0; later their gradients are averaged like all others.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, names that match no
            layer, a network without a layer to quantise, layers that have a quantiser, half precision.

    Example::

        from lightning_compress.callbacks import DGMS
        trainer = Trainer(max_epochs=60, callbacks=[DGMS(weight_bits=4)])
        trainer.fit(module, datamodule)

    Packaged config: ``method/dgms``.
    """

    def __init__(
        self,
        weight_bits: int | dict[str, int] = 4,
        *,
        tau: float = 0.01,
        init: Init = "kmeans",
        sigma_empirical: float = 0.01,
        learn_tau: bool = True,
        exclude_first: bool = True,
        exclude_linear: bool = True,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        gmm_lr: float | None = 1e-4,
        gmm_weight_decay: float | None = 5e-4,
        kmeans_iters: int = 300,
        seed: int | None = None,
        official_eps: bool = False,
    ) -> None:
        super().__init__()
        for bits in weight_bits.values() if isinstance(weight_bits, dict) else [weight_bits]:
            if not 2 <= bits <= MOST_BITS:
                raise ValueError(f"DGMS(weight_bits={weight_bits}): give 2 to {MOST_BITS}.")
        if init not in get_args(Init):
            raise ValueError(f"DGMS(init={init!r}): give {', '.join(map(repr, get_args(Init)))}.")
        if not tau >= TAU_FLOOR:
            raise ValueError(f"DGMS(tau={tau}): give at least {TAU_FLOOR}.")
        for argument, value in (("sigma_empirical", sigma_empirical), ("gmm_lr", gmm_lr)):
            if value is not None and not value > 0:
                raise ValueError(f"DGMS({argument}={value}): give a positive number.")
        if gmm_weight_decay is not None and gmm_weight_decay < 0:
            raise ValueError(f"DGMS(gmm_weight_decay={gmm_weight_decay}): give 0 or more.")
        if kmeans_iters < 1:
            raise ValueError(f"DGMS(kmeans_iters={kmeans_iters}): give 1 or more.")
        self.weight_bits = weight_bits
        self.tau, self.learn_tau, self.official_eps = tau, learn_tau, official_eps
        self.init: Init = init
        self.sigma_empirical, self.kmeans_iters, self.seed = sigma_empirical, kmeans_iters, seed
        self.exclude_first, self.exclude_linear = exclude_first, exclude_linear
        self.include = [include] if isinstance(include, str) else list(include)
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.gmm_lr, self.gmm_weight_decay = gmm_lr, gmm_weight_decay
        self._left_alone: dict[str, str] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def state_key(self) -> str:
        return self._generate_state_key(weight_bits=self.weight_bits, include=self.include, exclude=self.exclude)

    def state_dict(self) -> dict[str, Any]:
        return {"left_alone": dict(self._left_alone)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._left_alone = dict(state_dict["left_alone"])

    # ---- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        attach_record(pl_module)
        if stage != "fit":
            return
        self._check(trainer)
        open_account(trainer, pl_module)
        if not resume_in_setup(trainer, pl_module, by=self.state_key) and not self._own(pl_module):
            arguments = {"layers": self._choose(pl_module), "tau": self.tau, "learn_tau": self.learn_tau}
            arguments["official_eps"] = self.official_eps
            change_in_setup(trainer, pl_module, attach_mixtures, arguments, by=self.state_key)
        flags = [f"{name}.parametrizations.weight.0.gmm_initialized" for name in self._own(pl_module)]
        keep_off_the_wire(pl_module, flags)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = self._own(pl_module)
        check_held(trainer, {f"the means of {name}": mixture.mu for name, mixture in own.items()}, "DGMS")
        parameters = [parameter for mixture in own.values() for parameter in mixture.parameters()]
        own_group(trainer, parameters, lr=self.gmm_lr, weight_decay=self.gmm_weight_decay)
        fresh = {name: mixture for name, mixture in own.items() if not mixture.started}
        starts: dict[str, list[Tensor]] = {}
        if trainer.is_global_zero:
            hidden = not getattr(trainer.progress_bar_callback, "is_enabled", False)
            for name in track(fresh, "DGMS: mixtures of the weights", disable=hidden, transient=True):
                starts[name] = [value.cpu() for value in self._start(pl_module, name, fresh[name])]
        for name, start in trainer.strategy.broadcast(starts).items():
            fresh[name].start(Start(*start))
        self._clamp_after_steps(trainer, own)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_optimizers(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        used, zeros, weights = 0, 0, 0
        for name, mixture in self._own(pl_module).items():
            counts = torch.bincount(mixture.codes(real_weight(pl_module.get_submodule(name))).flatten().long())
            used += int(counts.count_nonzero())
            zeros, weights = zeros + int(counts[0]), weights + int(counts.sum())
        pl_module.log("dgms/sparsity", zeros / weights, prog_bar=True, rank_zero_only=True)
        pl_module.log("dgms/levels", used / len(self._own(pl_module)), rank_zero_only=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        books = self.codebooks(pl_module)
        costs = {}
        for name, book in books.items():
            bias: Any = pl_module.get_submodule(name).bias
            costs[name] = LayerCost(bytes=book.nbytes + (0 if bias is None else bias.nbytes))
        notes = [_sentence(books)]
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            size = save_codebooks(pl_module, run_folder(trainer) / FILE)
            notes.append(f"{FILE}: the whole network in {size:,} bytes.")
        bits = {name: book.bits for name, book in books.items()}
        close_account(trainer, pl_module, notes=notes, left_alone=self._left_alone, bits=bits, costs=costs)
        if plots.available():
            log_figure(trainer, "dgms_values", _curves(books))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    # ---- the work

    def codebooks(self, pl_module: LightningModule) -> dict[str, Codebook]:
        """What this callback has quantised, packed, by the names of the layers."""
        own = self._own(pl_module)
        return {name: q.codebook(real_weight(pl_module.get_submodule(name)).detach()) for name, q in own.items()}

    def _start(self, pl_module: LightningModule, name: str, mixture: MixtureQuantizer) -> Start:
        return initial_mixture(
            real_weight(pl_module.get_submodule(name)), 2**mixture.bits, self.init,
            sigma_empirical=self.sigma_empirical, iterations=self.kmeans_iters, seed=self.seed,
        )  # fmt: skip

    def _clamp_after_steps(self, trainer: Trainer, own: Mapping[str, MixtureQuantizer]) -> None:
        def clamp(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            for mixture in own.values():
                mixture.clamp()

        self._detach()
        self._handles = [optimizer.register_step_post_hook(clamp) for optimizer in trainer.optimizers]

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _own(self, pl_module: LightningModule) -> dict[str, MixtureQuantizer]:
        """The mixtures of this callback."""
        own = [step for step in attach_record(pl_module).steps if step["by"] == self.state_key]
        mixtures = mixtures_in(pl_module) if own else {}
        return {name: mixtures[name] for step in own for name in step["arguments"]["layers"]}

    def _choose(self, pl_module: LightningModule) -> dict[str, int]:
        """The layers to quantise, with their bits."""
        names, self._left_alone = choose_quantized(
            pl_module, self.include, self.exclude, exclude_first=self.exclude_first, exclude_linear=self.exclude_linear
        )
        stated = self.weight_bits if isinstance(self.weight_bits, dict) else {"*": self.weight_bits}
        everything = [*names, *self._left_alone]
        bits = {name: b for glob, b in stated.items() for name in match(everything, [glob], "weight_bits")}
        chosen = {}
        for name in names:
            weights = pl_module.get_submodule(name).weight.numel()  # type: ignore[operator]
            if name not in bits:
                self._left_alone[name] = "is not in `weight_bits`"
            elif weights <= 2 ** bits[name]:
                self._left_alone[name] = f"has {weights} weights, no more than {bits[name]} bits tell apart"
            else:
                chosen[name] = bits[name]
        if not chosen:
            raise MisconfigurationException(
                f"DGMS finds no layer of {type(pl_module).__name__} to quantise: {self._left_alone}"
            )
        return chosen

    def _check(self, trainer: Trainer) -> None:
        check_trainer(trainer, "DGMS", in_fit=False)
        check_precision(trainer, "DGMS", "means and widths in small steps")


def _sentence(books: Mapping[str, Codebook]) -> str:
    weights = sum(book.weights for book in books.values())
    kept = sum(book.nonzeros for book in books.values())
    bits = sum(book.bits * book.nonzeros for book in books.values())
    widths = " and ".join(str(b) for b in sorted({book.bits for book in books.values()}))
    return (
        f"DGMS: {weights:,} weights of {len(books)} layers with {widths} bits, {1 - kept / weights:.1%} of them 0; "
        f"{32 * weights / max(bits, 1):.2f}× smaller where zeros cost nothing."
    )


def _curves(books: Mapping[str, Codebook]) -> Figure:
    """The values of some layers, in ascending order."""
    names = list(books)[:: -(-len(books) // MOST_CURVES)]
    series = {name: books[name].values.sort().values.tolist() for name in names}
    return plots.lines(series, title="DGMS: values of the weights", x_label="their number", y_label="value")
