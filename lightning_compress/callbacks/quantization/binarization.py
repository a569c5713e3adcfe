"""What all methods do that give convolutions one bit: choose layers, attach, check, account."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_compress.callbacks.pruning.channel_pruning import refuse_later_pruning
from lightning_compress.core.example_input import find_example_input
from lightning_compress.core.measurement import LayerCost, disk_bytes, time_in_turns
from lightning_compress.core.optimizers import check_held, check_optimizers, check_precision
from lightning_compress.core.quant.attach import real_weight
from lightning_compress.core.quant.binary import binary_layers, is_downsample, packed_bytes, why_not_binary
from lightning_compress.core.quant.layers import choose_quantized
from lightning_compress.core.quant.norm_behind import norms_behind
from lightning_compress.core.report import close_account, open_account
from lightning_compress.core.surgery import attach_record, change_in_setup, check_trainer, resume_in_setup
from lightning_compress.core.units import human
from lightning_compress.export.packed import binary_network


class Binarization(Callback):
    """Give the convolutions of a network one-bit weights, and one-bit inputs, before the first step.

    Args:
        activation_bits: of the inputs of binary layers: 1, or 32 to standardise them only.
        exclude_first: leave the first convolution as it is.
        exclude_last: leave the last linear layer as it is; all linear layers stay real anyway.
        exclude_downsample: leave the 1x1 convolutions of shortcuts as they are: those with a stride, or whose name has
            a part ``downsample`` or ``shortcut``. So do the papers' networks for ImageNet; their ResNet-18 for CIFAR
            does not.
        include: globs of the names of layers.
        exclude: globs of the names of layers.
        max_epochs: of the schedule; None is that of the Trainer.
    """

    def __init__(
        self,
        *,
        activation_bits: Literal[1, 32] = 1,
        exclude_first: bool = True,
        exclude_last: bool = True,
        exclude_downsample: bool = True,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        max_epochs: int | None = None,
    ) -> None:
        super().__init__()
        self._name = type(self).__name__
        if activation_bits not in (1, 32):
            raise ValueError(f"{self._name}(activation_bits={activation_bits!r}): choose 1 or 32.")
        if max_epochs is not None and max_epochs < 1:
            raise ValueError(f"{self._name}(max_epochs={max_epochs}): give 1 or more, or None.")
        self.activation_bits: Literal[1, 32] = activation_bits
        self.exclude_first, self.exclude_last = exclude_first, exclude_last
        self.exclude_downsample = exclude_downsample
        self.include = [include] if isinstance(include, str) else list(include)
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.max_epochs = max_epochs
        self._epochs: int | None = None
        self._left_alone: dict[str, str] = {}

    @abstractmethod
    def change(self, layers: list[str]) -> tuple[Any, dict[str, Any]]:
        """The replayable function that attaches what the method needs, and its arguments."""

    @property
    def state_key(self) -> str:
        return self._generate_state_key(include=self.include, exclude=self.exclude)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._epochs is None else {"epochs": self._epochs}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._epochs = state_dict["epochs"]

    # ---- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        attach_record(pl_module)
        if stage != "fit":
            return
        self._check(trainer)
        own = self.layers(pl_module)
        chosen, reasons = self.choose(pl_module)
        self._left_alone = {name: reason for name, reason in reasons.items() if name not in own}
        if not chosen and not own:
            raise MisconfigurationException(
                f"{self._name} finds no convolution of {type(pl_module).__name__} to binarise: {reasons}"
            )
        open_account(trainer, pl_module)
        resumes = resume_in_setup(trainer, pl_module, by=self.state_key)
        if not resumes and not own:
            self._epochs = None
            change, arguments = self.change(chosen)
            change_in_setup(trainer, pl_module, change, arguments, by=self.state_key)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epochs = self._epochs or self.max_epochs or trainer.max_epochs
        trained = {
            f"{what} of {name}": parameter
            for name, layer in self.layers(pl_module).items()
            for what, parameter in layer.named_parameters()
            if parameter.requires_grad
        }
        check_held(trainer, trained, self._name)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_optimizers(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            layers, example_input = self.layers(pl_module), find_example_input(trainer, pl_module)
            weights = sum(real_weight(layer).numel() for layer in layers.values())
            notes = [f"{self._name}: {weights:,} weights of one bit, in {len(layers)} convolutions."]
            first = next(c for c in trainer.callbacks if isinstance(c, Binarization))  # type: ignore[attr-defined]
            if self is first and self.activation_bits == 1:  # one note for the network
                notes.append(_as_bits(trainer, pl_module, example_input))
            close_account(
                trainer, pl_module, notes=notes, left_alone=self._left_alone, bits=dict.fromkeys(layers, 1),
                costs=_costs(pl_module, layers, example_input),
            )  # fmt: skip

    # ---- the work

    def layers(self, pl_module: LightningModule) -> dict[str, nn.Conv2d]:
        """The layers that this callback has binarised."""
        own = [step for step in attach_record(pl_module).steps if step["by"] == self.state_key]
        return binary_layers(pl_module, [name for step in own for name in step["arguments"]["layers"]])

    def choose(self, module: nn.Module) -> tuple[list[str], dict[str, str]]:
        """The layers to binarise, and for each of the others the reason why not."""
        names, reasons = choose_quantized(
            module, self.include, self.exclude, exclude_first=self.exclude_first, exclude_last=self.exclude_last
        )
        for name in names:
            layer = module.get_submodule(name)
            if reason := why_not_binary(layer):
                reasons[name] = reason
            elif self.exclude_downsample and is_downsample(name, layer):
                reasons[name] = "is the convolution of a shortcut (exclude_downsample)"
        return [name for name in names if name not in reasons], reasons

    @property
    def epochs(self) -> int:
        """E of the schedule, while a fit runs."""
        assert self._epochs is not None
        return self._epochs

    def _check(self, trainer: Trainer) -> None:
        if trainer.max_epochs in (None, -1) and self.max_epochs is None:
            raise MisconfigurationException(
                f"{self._name}(max_epochs=None): the Trainer has max_epochs={trainer.max_epochs}, and the schedule "
                f"must know how many epochs there will be: give {self._name} max_epochs."
            )
        check_trainer(trainer, self._name, in_fit=False)
        check_precision(trainer, self._name, "weights in small steps")
        refuse_later_pruning(trainer, self, "channels cannot go from a layer of one-bit weights")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            name = type(callback).__name__
            if isinstance(callback, WeightAveraging) and getattr(callback, "_use_buffers", False):
                raise MisconfigurationException(
                    f"{self._name} and {name}: what {self._name} keeps in buffers has no average. Give {name} "
                    f"use_buffers=False."
                )
            if type(callback).__module__.startswith("lightning_compress.callbacks.sparsity"):
                raise MisconfigurationException(
                    f"{self._name} and {name}: a weight of one bit is -1 or +1, and cannot be the zero that {name} "
                    f"makes of it."
                )


def _costs(module: nn.Module, layers: Mapping[str, nn.Conv2d], example_input: Any) -> dict[str, LayerCost]:
    """Bits by the filter; and nothing for a scale that goes into the norm behind."""
    norms = norms_behind(module, list(layers), example_input)
    costs = {f"{name}.output_scale": LayerCost(params=0, bytes=0) for name in norms}
    for name, layer in layers.items():
        bias = 0 if layer.bias is None else layer.bias.numel()
        costs[name] = LayerCost(params=real_weight(layer).numel() + bias, bytes=packed_bytes(layer) + 4 * bias)
    return costs


def _as_bits(trainer: Trainer, module: nn.Module, example_input: Any) -> str:
    """What the network takes that computes with bits; the one that is trained computes with floats."""
    network = binary_network(module, example_input)
    size, device = disk_bytes(network), trainer.strategy.root_device
    latency = time_in_turns([network.to(device)], example_input)[0]
    return (
        f"Computed with bits (`binary_network`) it takes {human(size, 'B')} on disk and "
        f"{human(latency.median_ms, 'ms')} for a batch of {latency.batch}; the latency above is that of floats."
    )
