r"""SiMaN: one-bit weights that say which half of a filter's weights is large, not which are positive.

Lin, Ji, Xu, Zhang, Chao, Lin, Shao, "SiMaN: Sign-to-Magnitude Network Binarization", IEEE TPAMI 2023, arXiv:2102.07981.

The code b in {0,1}^n with the smallest angle to the magnitudes |w| of a filter has a closed form:

    max over b of  b^T |w| / (sqrt(sum b) |w|_2)  =  the m largest,   m = argmax_m (sum of the m largest |w|) / sqrt(m)

For weights whose magnitudes are spread evenly, m is near n / 2 (2/3 n), and half ones, half zeros is the code of most
information. Weight decay makes them Laplacian instead (m = n / e); so binary weights have none, and m is n / 2 always:
a weight is one if its magnitude is above the median of its filter. Outliers are squeezed before each step,

    w <- sign(w - mean) * clamp(|w - mean|, L, H),   L, H the p and 100 - p percentiles of a layer,  p = p_0 (1 - e / E)

and the layer computes with 2 b - 1, as the authors' code does, or with b, as the paper says: both give the same up to a
number per place that all filters share. Gradients go straight from the code to the magnitude. Activations are
standardised over each sample, and their sign has the derivative max(0, 2 - 2 |a|).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_compress.callbacks.quantization.binarization import Binarization
from lightning_compress.core.optimizers import own_group
from lightning_compress.core.quant.attach import quantize_input, quantize_weight, real_weight, weight_quantizer
from lightning_compress.core.quant.binary import (
    SQRT2,
    ChannelScale,
    SampleSign,
    SampleStandard,
    binary_layers,
    is_downsample,
    scale_output,
    standardize,
    unbinarize,
)
from lightning_compress.core.sparse.learnt_mask import keep_off_the_wire
from lightning_compress.core.surgery import replayable

# Inside of the root: streams that begin at 1e-8 are not blown up to 1, and all have the steepest slope.
NU = 1e-5

Ones = Literal["half", "optimal"]
Median = Literal["median", "sort"]
WeightCode = Literal["pm1", "01"]


def largest_half(magnitudes: Tensor) -> Tensor:
    """The floor(n / 2) largest of each row: (O, n) -> bool (O, n), by its median; of equal ones the first."""
    half = magnitudes.shape[1] // 2
    median = magnitudes.median(1, keepdim=True).values  # the lower one of an even number
    above, equal = magnitudes > median, magnitudes == median
    missing = half - above.sum(1, keepdim=True)  # 0 unless several are equal to the median
    return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= missing))


def largest(magnitudes: Tensor, counts: Tensor | int) -> Tensor:
    """So many largest of each row: (O, n), (O, 1) or a number -> bool (O, n), by sorting; of equal ones the first."""
    order = magnitudes.sort(dim=1, descending=True, stable=True).indices
    ranks = torch.arange(magnitudes.shape[1], device=magnitudes.device).expand_as(order)
    return torch.zeros_like(magnitudes, dtype=torch.bool).scatter_(1, order, ranks < counts)


def optimal_counts(magnitudes: Tensor) -> Tensor:
    """How many ones make the smallest angle, m = argmax (sum of the m largest) / sqrt(m): (O, n) -> (O, 1).

    >>> optimal_counts(torch.tensor([[0.9, 0.1, 0.4, 0.7, 0.05, 0.3, 0.55, 0.2]]))
    tensor([[4]])
    """
    sums = magnitudes.sort(1, descending=True).values.cumsum(1)
    roots = torch.arange(1, magnitudes.shape[1] + 1, device=magnitudes.device).sqrt()
    return (sums / roots).argmax(1, keepdim=True) + 1


def magnitude_code(magnitudes: Tensor, ones: Ones = "half", median: Median = "median") -> Tensor:
    """Which weights are one: (O, n) magnitudes -> bool (O, n)."""
    if ones == "optimal":
        return largest(magnitudes, optimal_counts(magnitudes))
    return largest_half(magnitudes) if median == "median" else largest(magnitudes, magnitudes.shape[1] // 2)


def ascending(values: Tensor) -> Tensor:
    """All values in order: any shape -> (N,). On the CPU by numpy, which takes a tenth of the time."""
    values = values.detach().flatten()
    return torch.from_numpy(np.sort(values.numpy())) if values.device.type == "cpu" else values.sort().values


def percentile(ordered: Tensor, percent: float) -> Tensor:
    """As numpy's: the rank percent / 100 * (N - 1), counted from 0, between order statistics in proportion: (N,) -> ().

    `torch.quantile` is the same, for at most 16 million values.

    >>> percentile(torch.arange(100.0), 15)
    tensor(14.8500)
    """
    rank = percent / 100 * (len(ordered) - 1)
    low = math.floor(rank)
    return torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], rank - low)


def clip_magnitudes(weight: Tensor, percent: float) -> Tensor:
    """Squeeze outliers of a layer: each filter without its mean, magnitudes between two percentiles of all of them."""
    centred = weight - weight.mean(tuple(range(1, weight.ndim)), keepdim=True)
    magnitudes = centred.abs()
    ordered = ascending(magnitudes)
    return centred.sign() * magnitudes.clamp(percentile(ordered, percent), percentile(ordered, 100 - percent))


def clip_percent(epoch: float, epochs: int, start: float = 15.0) -> float:
    """p in an epoch, from 0.

    >>> [clip_percent(e, 400) for e in (0, 200, 399)]
    [15.0, 7.5, 0.0375]
    """
    return round(start * max(1 - epoch / epochs, 0.0), 12)


class MagnitudeCode(nn.Module):
    """The code of a weight's magnitudes; a parametrisation.

    :meth:`refresh` makes it anew before each step of training. In evaluation the last one counts, which is one step of
    the optimiser older than the weight.

    Args:
        weight: (C_out, C_in / groups, kh, kw).
        weight_code: ``"pm1"`` for -1 and +1, ``"01"`` for 0 and +1.
        ones: ``"half"`` or ``"optimal"``.
        median: ``"median"`` or ``"sort"``: how the larger half is found; the same half.
        clip_in_forward: clip the weight itself in every forward pass, as the authors' code does, also in evaluation;
            and make the code there, in training.

    Attributes:
        code: bool (C_out, n). The signs, until it is made.
        percent: of the clip in the forward pass.
    """

    bits = 1
    code: Tensor

    def __init__(
        self,
        weight: Tensor,
        weight_code: WeightCode = "pm1",
        ones: Ones = "half",
        median: Median = "median",
        clip_in_forward: bool = False,
    ) -> None:
        super().__init__()
        self.weight_code, self.ones, self.median = weight_code, ones, median
        self.clip_in_forward = clip_in_forward
        self.percent = 0.0
        # bool: averages and DDP's broadcasts of floats would make fractions of it, at 32 times the size
        self.register_buffer("code", weight.detach().flatten(1) > 0)

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Make the code anew."""
        magnitudes = (weight - weight.mean((1, 2, 3), keepdim=True)).abs().flatten(1)
        self.code.copy_(magnitude_code(magnitudes, self.ones, self.median))

    def forward(self, weight: Tensor) -> Tensor:
        if self.clip_in_forward:
            weight.data.copy_(clip_magnitudes(weight.detach(), self.percent))
            if self.training:
                self.refresh(weight)
        with torch.autocast(weight.device.type, enabled=False):
            magnitudes = standardize(weight.float(), nu=NU).flatten(1).abs()
            code = self.code.to(magnitudes.dtype)
            values = code if self.weight_code == "01" else 2 * code - 1
            return (values + (magnitudes - magnitudes.detach())).view(weight.shape)  # of 0, but with a gradient


@replayable
def code_magnitudes(
    module: nn.Module,
    layers: Sequence[str],
    activation_bits: int,
    weight_code: WeightCode,
    ones: Ones,
    median: Median,
    clip_in_forward: bool,
) -> Any:
    """Give layers a :class:`MagnitudeCode` of their weight, the sign of their input, and a scale."""
    for name in layers:
        layer: Any = module.get_submodule(name)
        weight = layer.weight.detach()
        quantize_weight(layer, MagnitudeCode(weight, weight_code, ones, median, clip_in_forward))
        quantize_input(layer, SampleSign(0.0, NU, t=SQRT2) if activation_bits == 1 else SampleStandard(0.0, NU))
        scale_output(layer, ChannelScale(weight))
    return partial(unbinarize, layers=list(layers))


def siman_param_groups(
    module: nn.Module, weight_decay: float, match_official_groups: bool = False
) -> list[dict[str, Any]]:
    """Groups for an optimiser that is made after `SiMaN` has binarised the module: binary layers have no weight decay.

    `SiMaN` does this by itself to the optimiser of any module, unless `zero_decay=False`.

    Args:
        module: with binary layers.
        weight_decay: of all other parameters.
        match_official_groups: leave their weight decay to binary 1x1 convolutions of shortcuts, as the authors' choice
            by name does.
    """
    free = {id(p) for p in _without_decay(binary_layers(module), match_official_groups)}
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if id(p) not in free], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in free], "weight_decay": 0.0},
    ]


def _without_decay(layers: Mapping[str, nn.Module], match_official_groups: bool) -> Iterable[nn.Parameter]:
    for name, layer in layers.items():
        if not (match_official_groups and is_downsample(name, layer)):
            yield from layer.parameters()


class SiMaN(Binarization):
    """Train a network of one-bit weights, half of them ones, and one-bit activations.

    Layers keep their type. From random weights as in the paper, or from trained ones.

    Args:
        clip_start: p_0, per cent of a layer's weights that are clipped at either end in the first epoch.
        weight_code: what the layers compute with: ``"pm1"``, -1 and +1, as the authors' code, or ``"01"``, 0 and +1.
        ones: how many: ``"half"`` of each filter, or what is ``"optimal"`` for it.
        median: how the larger half is found, by ``"median"`` or by ``"sort"``; the codes are the same.
        zero_decay: move the weights and scales of binary layers into groups of the optimiser without weight decay.
        match_official_groups: leave it to binary 1x1 convolutions of shortcuts, as the authors' choice by name does.
        clip_in_forward: clip and code in every forward pass, as the authors' code does, and clip also in evaluation,
            where the weights then drift. Otherwise once, before each step: the same training.
        max_epochs: E, over which the clip fades; None is that of the Trainer. It is saved.
        kwargs: see :class:`Binarization`.

    What is stored, in the module's own `state_dict`, see `lightning_compress.load`: real weights, alpha and the code of
    each layer. `lightning_compress.save_packed` writes the bits alone.

    With several processes weights are equal on all ranks after each step, and so are clips and codes.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, names that match no
            layer, a network without a layer to binarise, methods that need zeros among the weights.

    Example::

        from lightning_compress.callbacks import SiMaN
        trainer = Trainer(max_epochs=400, callbacks=[SiMaN()])
        trainer.fit(module, datamodule)

    Packaged config: ``method/siman``.
    """

    def __init__(
        self,
        *,
        clip_start: float = 15.0,
        weight_code: WeightCode = "pm1",
        ones: Ones = "half",
        median: Median = "median",
        zero_decay: bool = True,
        match_official_groups: bool = False,
        clip_in_forward: bool = False,
        activation_bits: Literal[1, 32] = 1,
        exclude_first: bool = True,
        exclude_last: bool = True,
        exclude_downsample: bool = True,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        max_epochs: int | None = None,
    ) -> None:
        super().__init__(
            activation_bits=activation_bits, exclude_first=exclude_first, exclude_last=exclude_last,
            exclude_downsample=exclude_downsample, include=include, exclude=exclude, max_epochs=max_epochs,
        )  # fmt: skip
        if not 0 <= clip_start < 50:
            raise ValueError(f"SiMaN(clip_start={clip_start}): give per cents from 0 to below 50.")
        for argument, value, choices in (
            ("weight_code", weight_code, ("pm1", "01")), ("ones", ones, ("half", "optimal")),
            ("median", median, ("median", "sort")),
        ):  # fmt: skip
            if value not in choices:
                raise ValueError(f"SiMaN({argument}={value!r}): choose {' or '.join(map(repr, choices))}.")
        self.clip_start = clip_start
        self.weight_code: WeightCode = weight_code
        self.ones: Ones = ones
        self.median: Median = median
        self.zero_decay = zero_decay
        self.match_official_groups = match_official_groups
        self.clip_in_forward = clip_in_forward
        self._percent = 0.0
        self._clipped_at = -1  # the optimiser's step before which the weights were clipped last

    def change(self, layers: list[str]) -> tuple[Any, dict[str, Any]]:
        return code_magnitudes, {
            "layers": layers,
            "activation_bits": self.activation_bits,
            "weight_code": self.weight_code,
            "ones": self.ones,
            "median": self.median,
            "clip_in_forward": self.clip_in_forward,
        }

    # ---- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":  # equal on all ranks, being made of equal weights
            names = [f"{name}.parametrizations.weight.0.code" for name in self.layers(pl_module)]
            keep_off_the_wire(pl_module, names)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._clipped_at = -1
        if self.zero_decay:
            free = {id(p) for p in _without_decay(self.layers(pl_module), self.match_official_groups)}
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            for moved in [[p for p in group["params"] if id(p) in free] for group in groups]:
                if moved:  # group by group, so that each keeps its learning rate
                    own_group(trainer, moved, weight_decay=0.0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._percent = clip_percent(trainer.current_epoch, self.epochs, self.clip_start)
        for layer in self.layers(pl_module).values():
            weight_quantizer(layer).percent = self._percent  # type: ignore[union-attr]
        pl_module.log("siman/clip_percent", self._percent, prog_bar=True, rank_zero_only=True)

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.clip_in_forward or trainer.global_step == self._clipped_at:  # gradients are still being gathered
            return
        self._clipped_at = trainer.global_step
        for layer in self.layers(pl_module).values():
            weight, quantizer = real_weight(layer), weight_quantizer(layer)
            assert isinstance(quantizer, MagnitudeCode)
            weight.copy_(clip_magnitudes(weight, self._percent))
            quantizer.refresh(weight)
