"""When PAMS does what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.callbacks.pruning.channel_pruning import refuse_later_pruning
from lightning_compress.callbacks.quantization.pams.placement import Placement, place, quantize, without_quantizers
from lightning_compress.callbacks.quantization.pams.quantizers import PAMSQuantizer
from lightning_compress.callbacks.quantization.pams.transfer import structured_transfer
from lightning_compress.core import plots
from lightning_compress.core.distill.taps import InputTap
from lightning_compress.core.distill.teacher import Teacher
from lightning_compress.core.inference_copy import plain_copy
from lightning_compress.core.losses import LossTerm, add_loss_term
from lightning_compress.core.optimizers import check_held, check_optimizers, check_precision, own_group
from lightning_compress.core.report import close_account, log_figure, open_account
from lightning_compress.core.select import did_you_mean
from lightning_compress.core.sparse.layers import weight_layers
from lightning_compress.core.sparse.learnt_mask import keep_off_the_wire
from lightning_compress.core.surgery import attach_record, change_in_setup, check_trainer, resume_in_setup
from lightning_compress.core.weights import put_weights


class PAMS(Callback):
    """Quantise weights and activations to a few bits, with ranges that are learnt and a real network as the teacher.

    Made for super-resolution networks, which have no batch norm; works on any network with convolutions or linear
    layers. EDSR and RDN say where their activations are quantised; in others it is the input of each chosen layer.
    Layers keep their type. Start from trained weights.

    Args:
        weight_bits: k of the weights, 2 to 16.
        activation_bits: k of the activations, 2 to 16; the paper has one k for both.
        teacher: the real network: a module, a LightningModule, or the file of its weights or its checkpoint. None: the
            network as it is when the fit starts.
        init_from_teacher: whether the network starts with the teacher's weights, where a `teacher` is given.
        w_at: weight of the knowledge transfer in the loss; 0 leaves teacher and transfer out.
        feature_layer: name of the module whose input is matched with the teacher's. None: what the network names (EDSR
            and RDN: the upsampling tail); for others the last convolution.
        ema_epoch: the last epoch, counted from 1, in which ranges are measured; from the next one they are learnt. With
            0 they are learnt from `alpha_init` at once, which images of 0..255 do not survive.
        ema_decay: of the moving average of the measurements.
        init: ``"last"``, as the authors' code: in the first epoch the last batch counts alone, averages begin in the
            second. ``"ema"``, as the paper: an average from the first batch on.
        alpha_init: value of a range before it is measured.
        alpha_lr: learning rate of the ranges, whatever the optimiser's; its schedule counts for them too. They get no
            weight decay.
        quantize_block_input: whether the first convolution of each EDSR block, and the last of RDN's body, gets
            quantised inputs too, as integer inference needs; the authors' code leaves them real.
        include: globs of the names of layers to quantise.
        exclude: globs of the names of layers to leave real; None stands for all but the body where the network names it
            (EDSR, RDN), else for the first convolution and the last linear layer.

    What is stored: real weights, ranges and phase in the module's own `state_dict`, see `lightning_compress.load`; in
    the callback's state source and SHA-256 of the teacher, and its weights where it is the network's own past.

    With several processes, measured ranges are averaged before each step, and learnt ones have averaged gradients. Of
    several PAMS in one Trainer, each with layers of its own, the first brings the teacher.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, names that match no
            layer, a network without a layer to quantise, a teacher that does not fit, channel pruning that comes later.

    Example::

        from lightning_compress.callbacks import PAMS
        trainer = Trainer(max_epochs=30, callbacks=[PAMS(weight_bits=4, activation_bits=4, teacher="edsr.ckpt")])
        trainer.fit(SuperResolution("edsr_baseline", scale=4), datamodule)

    Packaged config: ``method/pams``.
    """

    def __init__(
        self,
        weight_bits: int = 8,
        activation_bits: int = 8,
        *,
        teacher: nn.Module | str | None = None,
        init_from_teacher: bool = True,
        w_at: float = 1000.0,
        feature_layer: str | None = None,
        ema_epoch: int = 1,
        ema_decay: float = 0.9997,
        init: Literal["last", "ema"] = "last",
        alpha_init: float = 10.0,
        alpha_lr: float = 0.01,
        quantize_block_input: bool = False,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] | None = None,
    ) -> None:
        for argument, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
            if not isinstance(bits, int) or not 2 <= bits <= 16:
                raise ValueError(f"{argument}: expected a number of bits from 2 to 16, got {bits!r}.")
        if w_at < 0:
            raise ValueError(f"w_at: expected a weight of at least 0, got {w_at}.")
        if ema_epoch < 0:
            raise ValueError(f"ema_epoch: expected an epoch, or 0 for none, got {ema_epoch}.")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay: expected a number in [0, 1), got {ema_decay}.")
        if init not in ("last", "ema"):
            raise ValueError(f"init: expected 'last' or 'ema', got {init!r}.")
        for argument, value in (("alpha_init", alpha_init), ("alpha_lr", alpha_lr)):
            if value <= 0:
                raise ValueError(f"{argument}: expected a number above 0, got {value}.")
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        self.teacher = teacher
        self.init_from_teacher = init_from_teacher
        self.w_at = w_at
        self.feature_layer = feature_layer
        self.measuring = {
            "alpha_init": alpha_init, "ema_epoch": ema_epoch, "ema_decay": ema_decay, "init": init
        }  # fmt: skip
        self.alpha_lr = alpha_lr
        self.quantize_block_input = quantize_block_input
        self.include = [include] if isinstance(include, str) else list(include)
        self.exclude = [exclude] if isinstance(exclude, str) else None if exclude is None else list(exclude)
        self._placement: Placement | None = None
        self._teacher: Teacher | None = None
        self._teacher_state: dict[str, Any] = {}
        self._feature = ("", "")  # names: the network, and in it the layer whose input is matched
        self._taps: list[InputTap] = []
        self._term: LossTerm | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(
            weight_bits=self.weight_bits, activation_bits=self.activation_bits, include=self.include,
            exclude=self.exclude, quantize_block_input=self.quantize_block_input,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        if self._teacher is None:
            return {}
        return {"teacher": self._teacher.state_dict(weights=self.teacher is None)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._teacher_state = dict(state_dict["teacher"])

    # ---- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        attach_record(pl_module)
        if stage != "fit":
            return
        self._check(trainer)
        open_account(trainer, pl_module)
        fresh = not self._steps(pl_module)
        if fresh:
            self._placement = self._place(pl_module)
        if self._teaches(trainer):
            self._feature = self._find_features(pl_module)
            self._make_teacher(pl_module)
        if not resume_in_setup(trainer, pl_module, by=self.state_key) and fresh:
            if self._teacher is not None and self.init_from_teacher:
                self._start_from(self._teacher, pl_module)
            self._quantize(trainer, pl_module)
        if self._teaches(trainer):
            self._term = add_loss_term(pl_module, "pams", "skt", self._transfer, self.w_at)
        # Equal everywhere by themselves, from the first step on.
        buffers = [f"{n}.{b}" for n, q in self._quantizers(pl_module).items() for b, _ in q.named_buffers()]
        keep_off_the_wire(pl_module, buffers)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        alphas = {name: quantizer.alpha for name, quantizer in self._quantizers(pl_module).items()}
        check_held(trainer, {f"the range of {name}": alpha for name, alpha in alphas.items()}, "PAMS")
        own_group(trainer, alphas.values(), lr=self.alpha_lr, weight_decay=0.0)
        if not self._teaches(trainer):
            return
        network = self._network(pl_module)
        if self._teacher is None:  # not earlier: now all processes have the same weights
            self._teacher = Teacher(without_quantizers(plain_copy(network)))
        if self._teacher_state:
            if self.teacher is not None:  # it wins over one that the run had before
                self._teacher_state.pop("weights", None)
            self._teacher.load_state_dict(self._teacher_state)
            self._teacher_state = {}
        self._teacher.to(pl_module.device)
        self._taps = [InputTap(network), InputTap(network.get_submodule(self._feature[1]))]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_optimizers(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for quantizer in self._quantizers(pl_module).values():
            quantizer.begin(trainer.current_epoch + 1)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Each process has measured its own images."""
        if trainer.world_size == 1:
            return
        quantizers = self._quantizers(pl_module).values()
        if not any(quantizer.measures for quantizer in quantizers):
            return
        held = [tensor for q in quantizers for tensor in (q.alpha.data, q.max_val)]
        means = trainer.strategy.reduce(torch.cat(held), reduce_op="mean")
        torch._foreach_copy_(held, list(means.split(1)))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        alphas = [quantizer.alpha.detach() for quantizer in self._quantizers(pl_module).values()]
        if alphas:
            pl_module.log("pams/alpha", torch.cat(alphas).mean(), prog_bar=True, rank_zero_only=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = [name for step in self._steps(pl_module) for name in step["arguments"]["weights"]]
        note = (
            f"{self.weight_bits}-bit weights in {len(layers)} layers, "
            f"{self.activation_bits}-bit activations at {len(self._quantizers(pl_module))} places."
        )
        close_account(
            trainer, pl_module, notes=[note], bits=dict.fromkeys(layers, self.weight_bits),
            left_alone=self._placement.left_alone if self._placement else {},
        )  # fmt: skip
        self._draw(trainer, list(self._quantizers(pl_module).values()))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    # ---- quantisers

    def _place(self, pl_module: LightningModule) -> Placement:
        placement = place(pl_module, self.include, self.exclude, quantize_block_input=self.quantize_block_input)
        if not placement.weights:
            raise MisconfigurationException(
                f"PAMS finds no layer of {type(pl_module).__name__} to quantise: {placement.left_alone}"
            )
        return placement

    def _quantize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._placement is not None
        bits = {"weight_bits": self.weight_bits, "activation_bits": self.activation_bits}
        arguments = {**self._placement.arguments(), **bits, "measuring": self.measuring}
        change_in_setup(trainer, pl_module, quantize, arguments, by=self.state_key)

    def _steps(self, pl_module: LightningModule) -> list[dict[str, Any]]:
        return [step for step in attach_record(pl_module).steps if step["by"] == self.state_key]

    def _quantizers(self, pl_module: LightningModule) -> dict[str, PAMSQuantizer]:
        """This callback's own, by name."""
        names = [
            name
            for step in self._steps(pl_module)
            for name in (*(f"{layer}.input_quantizer" for layer in step["arguments"]["inputs"]),
                         *step["arguments"]["points"])
        ]  # fmt: skip
        return {name: pl_module.get_submodule(name) for name in names}  # type: ignore[misc]

    def _draw(self, trainer: Trainer, quantizers: Sequence[PAMSQuantizer]) -> None:
        if not quantizers or not trainer.is_global_zero or not plots.available():
            return
        values = {
            "measured": [quantizer.max_val.item() for quantizer in quantizers],
            "learnt": [quantizer.alpha.item() for quantizer in quantizers],
        }
        title = "The largest value that each activation tells apart"
        figure = plots.lines(values, title=title, x_label="place, in the order of definition", y_label="α")
        log_figure(trainer, "pams/ranges", figure)

    # ---- teacher

    def _teaches(self, trainer: Trainer) -> bool:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return self.w_at > 0 and self is next(c for c in callbacks if isinstance(c, PAMS))

    def _find_features(self, pl_module: LightningModule) -> tuple[str, str]:
        """The network, and in it the layer whose input is matched: an attribute of the module and what is below."""
        names = [name for name, _ in pl_module.named_modules()]
        layer = self.feature_layer
        if layer is None:
            named = [
                f"{name}.{network.feature_layer}" if name else str(network.feature_layer)
                for name, network in pl_module.named_modules()
                if isinstance(getattr(network, "feature_layer", None), str)
            ]
            convolutions = [n for n, m in weight_layers(pl_module).items() if not isinstance(m, nn.Linear)]
            if not named + convolutions:
                raise MisconfigurationException(
                    f"PAMS(feature_layer=None): {type(pl_module).__name__} has no convolution. Name the module whose "
                    f"input is matched with the teacher's, or give w_at=0."
                )
            layer = (named[:1] or convolutions[-1:])[0]
        elif layer not in names:
            raise ValueError(
                f"feature_layer: {type(pl_module).__name__} has no module {layer!r}.{did_you_mean(layer, names)}"
            )
        network, _, below = layer.partition(".")
        return (network, below.removeprefix("_orig_mod.")) if below else ("", layer)

    def _network(self, pl_module: LightningModule) -> nn.Module:
        network = pl_module.get_submodule(self._feature[0])
        return getattr(network, "_orig_mod", network)  # what torch.compile has wrapped

    def _make_teacher(self, pl_module: LightningModule) -> None:
        """The teacher that was given; one that is the network's own past comes in `on_fit_start`."""
        name, layer = self._feature
        if self._teacher is not None or self.teacher is None:
            return
        if isinstance(self.teacher, nn.Module):
            inside = dict(self.teacher.named_children()).get(name)
            self._teacher = Teacher(inside or self.teacher)
        else:
            like = without_quantizers(plain_copy(self._network(pl_module)))
            self._teacher = Teacher.from_file(self.teacher, like, prefix=name)
        if layer not in dict(self._teacher.network.named_modules()):
            raise MisconfigurationException(
                f"teacher: {type(self._teacher.network).__name__} has no module {layer!r}, whose input is matched. "
                f"Give a feature_layer that both networks have."
            )

    def _start_from(self, teacher: Teacher, pl_module: LightningModule) -> None:
        try:
            put_weights(self._network(pl_module), teacher.network.state_dict(), "The teacher")
        except ValueError as error:
            raise MisconfigurationException(f"{error} With init_from_teacher=False it need not.") from error

    def _transfer(self, outputs: Any, batch: Any, batch_idx: int) -> Tensor:
        call, features = (tap.take() for tap in self._taps)
        if call is None or features is None:
            raise MisconfigurationException(
                f"PAMS: the training step computes without {'.'.join(filter(None, self._feature))!r}. Give another "
                f"feature_layer, or w_at=0."
            )
        assert self._teacher is not None
        args, kwargs = call
        expected = self._teacher.input_at(self._feature[1], *args, **kwargs)
        student = features[0][0]
        if student.ndim != 4 or student.shape[2:] != expected.shape[2:]:
            raise MisconfigurationException(
                f"PAMS: the input of feature_layer {self._feature[1]!r} must be (N, C, H, W), with one H and W in both "
                f"networks; it is {tuple(student.shape)}, the teacher's {tuple(expected.shape)}."
            )
        return structured_transfer(student, expected)

    def _detach(self) -> None:
        for tap in self._taps:
            tap.remove()
        self._taps = []
        if self._term is not None:
            self._term.remove()
            self._term = None
        if self._teacher is not None:
            self._teacher.to("cpu")

    # ---- what cannot work

    def _check(self, trainer: Trainer) -> None:
        check_trainer(trainer, "PAMS", in_fit=False)
        check_precision(trainer, "PAMS", "ranges")
        endless = trainer.max_epochs in (None, -1) or trainer.fast_dev_run  # type: ignore[attr-defined]
        ema_epoch: Any = self.measuring["ema_epoch"]
        if not endless and ema_epoch >= trainer.max_epochs:
            rank_zero_warn(
                f"PAMS(ema_epoch={ema_epoch}): ranges are measured until the fit ends after "
                f"max_epochs={trainer.max_epochs}, and never learnt."
            )
        refuse_later_pruning(trainer, self, "ranges are those of the channels that are there")
