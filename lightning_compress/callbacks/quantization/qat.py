r"""QAT: train a network with weights and inputs of layers rounded to a few levels, and learn where the levels are.

Two quantisers, both per tensor or with a range for each output channel of a weight:

* "interval": a learnt range [l, u] is mapped onto [0, 1] (inputs) or [-1, 1] (weights). Lee, Kim, Ham, "Network
  Quantization with Element-wise Gradient Scaling", CVPR 2021, arXiv:2104.00903, without the scaling, as in Zhong et
  al., "Exploiting the Partly Scratch-off Lottery Ticket for Quantization-Aware Training", arXiv:2211.08544. See
  ``core/quant/interval.py``.
* "lsq": multiples of a learnt step. Esser, McKinstry, Bablani, Appuswamy, Modha, "Learned Step Size Quantization",
  ICLR 2020, arXiv:1902.08153. See ``core/quant/lsq.py``.

A layer computes with quantised values, and gradients pass the rounding as if it were not there:

    y = W_q * x_q + bias,    dW_q/dW = 1 / (range) inside of it, 0 outside
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.progress import track
from torch import Tensor, nn

from lightning_compress.callbacks.pruning.channel_pruning import refuse_later_pruning
from lightning_compress.core.calibration import on_device, training_inputs
from lightning_compress.core.example_input import find_example_input
from lightning_compress.core.meta import evaluating
from lightning_compress.core.optimizers import check_held, check_optimizers, check_precision, own_group
from lightning_compress.core.quant.attach import (
    input_quantizer,
    quantize_input,
    quantize_weight,
    remove_quantizers,
    weight_quantizer,
)
from lightning_compress.core.quant.fold_norms import fold_norms
from lightning_compress.core.quant.interval import IntervalInput, IntervalWeight
from lightning_compress.core.quant.layers import bits_by_layer, check_bits, choose_quantized, first_layer, last_layer
from lightning_compress.core.quant.lsq import LSQInput, LSQWeight
from lightning_compress.core.quant.norm_behind import norms_behind
from lightning_compress.core.quant.observe import observe_inputs
from lightning_compress.core.quant.range_adam import RangeAdam
from lightning_compress.core.report import LayerCost, close_account, open_account
from lightning_compress.core.sparse.layers import weight_layers
from lightning_compress.core.surgery import (
    attach_record,
    change_in_setup,
    check_trainer,
    replayable,
    resume_in_setup,
)

CALIBRATION_BATCH = 128  # images; the authors' batch on CIFAR
ADAM_LR = 1e-4  # of the authors' ranges


@replayable
def attach_quantizers(module: nn.Module, layers: Mapping[str, Mapping[str, Any]], kind: str, per_channel: bool) -> Any:
    """Quantise layers.

    Args:
        layers: name -> ``weight_bits`` and ``activation_bits``, either of which may be None, and ``signed``: whether
            its input has negative values.
        kind: "interval" or "lsq".
        per_channel: a range for each output channel of a weight.
    """
    for name, spec in layers.items():
        layer: Any = module.get_submodule(name)
        weight, bits, input_bits = layer.weight.detach(), spec["weight_bits"], spec["activation_bits"]
        if bits is not None:
            of_weight = IntervalWeight if kind == "interval" else LSQWeight
            quantize_weight(layer, of_weight(weight, bits, per_channel=per_channel))
        if input_bits is not None:
            of_input = IntervalInput(input_bits) if kind == "interval" else LSQInput(input_bits, signed=spec["signed"])
            quantize_input(layer, of_input.to(weight.device))
    return partial(detach_quantizers, layers=list(layers))


def detach_quantizers(module: nn.Module, layers: Sequence[str]) -> None:
    """Take the quantisers of :func:`attach_quantizers` off again."""
    for name in layers:
        remove_quantizers(module.get_submodule(name))


class QAT(Callback):
    """Quantisation-aware training: in one ordinary fit, mostly from trained weights.

    Layers keep their type; weights stay real, and pass through a quantiser at every use. Ranges of weights start from
    the weights, those of inputs from training images, layer by layer, each seeing what those before it have quantised.
    In this pass, which is no training step, batch norms learn once more.

    Args:
        weight_bits: b of the weights, 1 to 8 ("lsq": 2 to 8): a number, or globs of layer names to numbers, of which a
            later one wins; weights of layers that none matches stay real.
        activation_bits: b of the inputs of layers, in the same way; None leaves all inputs real.
        quantizer: "interval" or "lsq". "lsq" takes signed levels where the inputs seen at the start have negative
            values, as images have, and the outputs of linear bottlenecks.
        per_channel: a range for each output channel of a weight, instead of one for all of it.
        first_last_bits: of weights and inputs of the first convolution and of the last linear layer; None: as the
            others. LSQ's authors take 8.
        include: globs of the names of layers to quantise.
        exclude: globs of the names of layers to leave alone.
        fold_batch_norms: put batch norms into the weights and biases of the convolutions whose output they alone read,
            for "lsq". What is trained is then what integer hardware computes, without norms; it needs a trained network
            and small learning rates.
        num_batches: batches of 128 training images, in all processes together, from which the ranges of inputs start.
        range_optimizer: "adam", or "same": that of the weights. None is "adam" for "interval" and "same" for "lsq", as
            in the papers.
        range_lr: learning rate of the ranges, which follows the schedule of the weights'. None: 1e-4 with "adam", as in
            the paper, and the weights' with "same". Ranges have no weight decay.

    What is stored: weights and ranges, in the module's own `state_dict`; see `lightning_compress.load`. Where the
    ranges have Adam, its moments are in the callback's state.

    With several processes the ranges that rank 0 found count.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, names that match no
            layer, a network without a layer to quantise, half precision, channel pruning in mid-fit.

    Example::

        from lightning_compress.callbacks import QAT
        trainer = Trainer(max_epochs=100, callbacks=[QAT(weight_bits=4, activation_bits=4)])
        trainer.fit(module, datamodule)

    Packaged config: ``method/qat``.
    """

    def __init__(
        self,
        weight_bits: int | dict[str, int] = 4,
        activation_bits: int | dict[str, int] | None = 4,
        *,
        quantizer: Literal["interval", "lsq"] = "interval",
        per_channel: bool = False,
        first_last_bits: int | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        fold_batch_norms: bool = False,
        num_batches: int = 1,
        range_optimizer: Literal["adam", "same"] | None = None,
        range_lr: float | None = None,
    ) -> None:
        super().__init__()
        if quantizer not in ("interval", "lsq"):
            raise ValueError(f"QAT(quantizer={quantizer!r}): choose 'interval' or 'lsq'.")
        if range_optimizer not in ("adam", "same", None):
            raise ValueError(f"QAT(range_optimizer={range_optimizer!r}): choose 'adam', 'same' or None.")
        check_bits(weight_bits, 1 if quantizer == "interval" else 2, 8, "QAT(weight_bits")
        check_bits(activation_bits, 1 if quantizer == "interval" else 2, 8, "QAT(activation_bits")
        check_bits(first_last_bits, 1 if quantizer == "interval" else 2, 8, "QAT(first_last_bits")
        if fold_batch_norms and quantizer == "interval":
            raise ValueError(
                "QAT(fold_batch_norms=True): quantizer='interval' maps weights onto [-1, 1], and needs the norms behind"
                " them for a scale. Choose quantizer='lsq'."
            )
        if num_batches < 1:
            raise ValueError(f"QAT(num_batches={num_batches}): give 1 or more; ranges of inputs start from images.")
        if range_lr is not None and range_lr <= 0:
            raise ValueError(f"QAT(range_lr={range_lr}): give a positive number.")
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        self.quantizer, self.per_channel, self.first_last_bits = quantizer, per_channel, first_last_bits
        self.include = [include] if isinstance(include, str) else list(include)
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.fold_batch_norms = fold_batch_norms
        self.num_batches = num_batches
        self.range_optimizer = range_optimizer or ("adam" if quantizer == "interval" else "same")
        self.range_lr = ADAM_LR if range_lr is None and self.range_optimizer == "adam" else range_lr
        self._adam = RangeAdam()
        self._left_alone: dict[str, str] = {}

    @property
    def state_key(self) -> str:
        return self._generate_state_key(
            quantizer=self.quantizer,
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            include=self.include,
            exclude=self.exclude,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self._adam.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._adam.load_state_dict(state_dict["adam"])

    def layers(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """The layers that this callback has quantised, by name."""
        own = [step for step in attach_record(pl_module).steps if step["by"] == self.state_key]
        names = [name for step in own for name in step["arguments"].get("layers", ())]
        return {name: pl_module.get_submodule(name) for name in names}

    # ---- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        attach_record(pl_module)
        if stage != "fit":
            return
        self._check(trainer)
        layers = self._choose(pl_module)
        open_account(trainer, pl_module)
        if resume_in_setup(trainer, pl_module, by=self.state_key) or self.layers(pl_module):
            return
        if self.fold_batch_norms:
            norms = norms_behind(pl_module, list(layers), find_example_input(trainer, pl_module))
            change_in_setup(trainer, pl_module, fold_norms, {"norms": norms}, by=self.state_key)
        reads_inputs = any(spec["activation_bits"] for spec in layers.values())
        count = CALIBRATION_BATCH * self.num_batches if reads_inputs else 0
        with on_device(trainer, pl_module):
            batches = list(training_inputs(trainer, pl_module, count, CALIBRATION_BATCH))
            if reads_inputs and self.quantizer == "lsq":
                self._find_signs(trainer, pl_module, layers, batches)
            arguments = {"layers": layers, "kind": self.quantizer, "per_channel": self.per_channel}
            change_in_setup(trainer, pl_module, attach_quantizers, arguments, by=self.state_key)
            self._find_ranges(trainer, pl_module, batches)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ranges = {
            f"{what} of the {side} of {name}": parameter
            for name, layer in self.layers(pl_module).items()
            for side, quantizer in (("weight", weight_quantizer(layer)), ("input", input_quantizer(layer)))
            if quantizer is not None
            for what, parameter in quantizer.named_parameters()
        }
        check_held(trainer, ranges, "QAT")
        own_group(trainer, ranges.values(), lr=self.range_lr, weight_decay=0.0)
        if self.range_optimizer == "adam":
            self._adam.attach(trainer, ranges.values())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_optimizers(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = self.layers(pl_module)
        quantizers = {name: (weight_quantizer(layer), input_quantizer(layer)) for name, layer in layers.items()}
        bits: Any = {name: weight.bits for name, (weight, _) in quantizers.items() if weight is not None}
        inputs = sorted({str(of_input.bits) for _, of_input in quantizers.values() if of_input is not None})
        width = f"{' and '.join(inputs)} bits" if inputs else "full precision"
        note = f"{self.quantizer} quantisers in {len(layers)} layers, whose inputs have {width}."
        left_alone = {name: why for name, why in self._left_alone.items() if name not in layers}
        costs = {name: LayerCost(bytes=_stored_bytes(layers[name])) for name in bits}
        close_account(trainer, pl_module, notes=[note], left_alone=left_alone, bits=bits, costs=costs)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._adam.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._adam.detach()

    # ---- the work

    def _find_signs(
        self, trainer: Trainer, pl_module: LightningModule, layers: dict[str, dict[str, Any]], batches: Sequence[Tensor]
    ) -> None:
        """Note which layers get negative values: rank 0 decides."""
        watched = {name: pl_module.get_submodule(name) for name in layers}
        with evaluating(pl_module):
            seen = observe_inputs(pl_module, watched, batches[:1])
        signed = [name for name in layers if name not in seen or seen[name].minimum < 0]
        signed = trainer.strategy.broadcast(signed)
        for name, spec in layers.items():
            spec["signed"] = name in signed

    def _find_ranges(self, trainer: Trainer, pl_module: LightningModule, batches: Sequence[Tensor]) -> None:
        """Start the ranges of inputs. DDP will give those of rank 0 to the others, with all parameters."""
        quantizers = {name: input_quantizer(layer) for name, layer in self.layers(pl_module).items()}
        watched = {name: quantizer for name, quantizer in quantizers.items() if quantizer is not None}
        if not watched:
            return
        show = trainer.is_global_zero and getattr(trainer.progress_bar_callback, "is_enabled", False)
        seen = observe_inputs(
            pl_module, watched, track(batches, "QAT: ranges of inputs", disable=not show, transient=True)
        )
        unseen = [name for name in watched if name not in seen]
        if unseen:
            rank_zero_warn(
                f"QAT: {', '.join(unseen)} got no input from a training image; their ranges start from 0 to 1."
            )

    def _choose(self, pl_module: LightningModule) -> dict[str, dict[str, Any]]:
        chosen, self._left_alone = choose_quantized(pl_module, self.include, self.exclude)
        weights = bits_by_layer(self.weight_bits, chosen, "weight_bits")
        inputs = bits_by_layer(self.activation_bits, chosen, "activation_bits")
        if self.first_last_bits is not None:
            every = weight_layers(pl_module)
            for name in (n for n in chosen if n in (first_layer(every), last_layer(every))):
                weights[name] = self.first_last_bits
                inputs[name] = None if inputs[name] is None else self.first_last_bits
        for name in chosen:
            if weights[name] is None and inputs[name] is None:
                self._left_alone[name] = "has no number in `weight_bits` or `activation_bits`"
        layers = {
            name: {"weight_bits": weights[name], "activation_bits": inputs[name], "signed": False}
            for name in chosen
            if name not in self._left_alone
        }
        if not layers and not self.layers(pl_module):
            raise MisconfigurationException(
                f"QAT finds no layer of {type(pl_module).__name__} to quantise: {self._left_alone}"
            )
        return layers

    def _check(self, trainer: Trainer) -> None:
        check_trainer(trainer, "QAT", in_fit=False)
        check_precision(trainer, "QAT", "ranges")
        refuse_later_pruning(trainer, self, "ranges that were found for some channels do not fit fewer")


def _stored_bytes(layer: Any) -> int:
    """Codes of the weight, and in float32 the bias and LSQ's steps; the interval quantiser's codes have one scale."""
    quantizer = weight_quantizer(layer)
    assert quantizer is not None
    floats = 0 if layer.bias is None else layer.bias.numel()
    if isinstance(quantizer, LSQWeight):
        floats += quantizer.step.numel()
    return -(-layer.weight.numel() * quantizer.bits // 8) + 4 * floats
