"""The mixture as a parametrisation of a layer's weight, and how it is attached to a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.callbacks.quantization.dgms.initialisation import Start
from lightning_compress.callbacks.quantization.dgms.mixture import TAU_FLOOR, assign, soft_weight
from lightning_compress.core.quant.attach import (
    quantize_weight,
    quantized_layers,
    remove_quantizers,
    weight_quantizer,
)
from lightning_compress.core.quant.codebook import Codebook, encode_codebook
from lightning_compress.core.quant.integer import IntegerWeight
from lightning_compress.core.surgery import replayable

# Codes of the integer form, -127 to 127: as many on both sides of zero.
INT8 = 127


class MixtureQuantizer(nn.Module):
    """Replaces weights by the means of a Gaussian mixture: softly in training, one of 2^bits values in evaluation.

    Until :meth:`start` is called weights pass through unchanged.

    Args:
        bits: b; there are K = 2^b components.
        tau: the temperature at the start.
        learn_tau: whether it is trained.
        official_eps: see :func:`~lightning_compress.callbacks.quantization.dgms.mixture.responsibilities`.

    Attributes:
        mu: (K - 1,), the means that are learnt; component 0 has none, its mean is 0.
        pi: (K,), shares, up to signs and scale.
        sigma: (K,), widths, up to signs.
        tau: (1,).
        gmm_initialized: (), bool.
    """

    gmm_initialized: Tensor

    def __init__(self, bits: int, tau: float = 0.01, learn_tau: bool = True, official_eps: bool = False) -> None:
        super().__init__()
        self.bits, self.official_eps = bits, official_eps
        components = 2**bits
        self.mu = nn.Parameter(torch.zeros(components - 1))
        self.pi = nn.Parameter(torch.full((components,), 1 / components))
        self.sigma = nn.Parameter(torch.ones(components))
        self.tau = nn.Parameter(torch.tensor([tau]), requires_grad=learn_tau)
        self.register_buffer("gmm_initialized", torch.tensor(False))
        self._started = False  # the buffer, once it is true: asking a GPU for it at every step would wait for it
        self._hard: tuple[tuple[float, ...], Tensor] | None = None

    @property
    def started(self) -> bool:
        """Whether the mixture has its first values."""
        self._started = self._started or bool(self.gmm_initialized)
        return self._started

    def forward(self, weight: Tensor) -> Tensor:
        if not self.started:
            return weight
        if not self.training:
            return self.hard_weight(weight)
        return soft_weight(weight, self.mu, self.pi, self.sigma, self.tau, self.official_eps).to(weight.dtype)

    @torch.no_grad()
    def start(self, mixture: Start) -> None:
        """Write the first values of the mixture."""
        for parameter, value in zip((self.mu, self.pi, self.sigma), mixture, strict=True):
            parameter.copy_(value)
        self.gmm_initialized.fill_(True)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the temperature above 1e-4, wherever a step has led it."""
        self.tau.clamp_(min=TAU_FLOOR)

    @property
    def levels(self) -> Tensor:
        """(K,), the values that weights can take; the first is 0."""
        return F.pad(self.mu.detach(), (1, 0))

    def codes(self, weight: Tensor) -> Tensor:
        """The component of each weight, uint8 of its shape."""
        return assign(weight.detach(), self.mu, self.pi, self.sigma, self.official_eps)

    def hard_weight(self, weight: Tensor) -> Tensor:
        """Each weight as the mean of its component; in evaluation computed again only when something changed."""
        if self.training or torch.compiler.is_compiling():
            return self._quantise(weight)
        with torch.inference_mode(False), torch.no_grad():  # what is kept must serve outside of inference mode, too
            key = self._fingerprint(weight)
            if self._hard is None or self._hard[0] != key or self._hard[1].device != weight.device:
                self._hard = key, self._quantise(weight)
        return self._hard[1]

    def codebook(self, weight: Tensor) -> Codebook:
        """The weight as indices of few bits and the values they stand for."""
        return encode_codebook(self.codes(weight), self.levels, self.bits)

    def integer(self, weight: Tensor) -> IntegerWeight:
        """The weight as codes of 8 bits: every value rounded to the nearest of 255, at most max|mu| / 254 away.

        After :func:`round_to_int8` nothing is rounded any more.
        """
        scale, codes = _int8(self.levels)
        return IntegerWeight(codes[self.codes(weight).long()], scale, 8)

    def train(self, mode: bool = True) -> MixtureQuantizer:
        self._hard = None
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"bits={self.bits}" + ", official_eps=True" * self.official_eps

    def _load_from_state_dict(self, *args: Any) -> None:
        self._started, self._hard = False, None
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hard": None}

    def _quantise(self, weight: Tensor) -> Tensor:
        return self.levels[self.codes(weight).long()].to(weight.dtype)

    def _fingerprint(self, weight: Tensor) -> tuple[float, ...]:
        """Changes when a tensor does: by their versions, and by sums, since writes to ``.data`` raise no version."""
        tensors = (weight, self.mu, self.pi, self.sigma)
        sums = torch.stack([tensor.sum(dtype=torch.float64) for tensor in tensors]).tolist()
        return (*sums, *(0 if tensor.is_inference() else tensor._version for tensor in tensors))


@replayable
def attach_mixtures(
    module: nn.Module, layers: Mapping[str, int], tau: float, learn_tau: bool, official_eps: bool
) -> Any:
    """Give layers, by name with their bits, a :class:`MixtureQuantizer` that is still to be started."""
    for name, bits in layers.items():
        layer: Any = module.get_submodule(name)
        quantizer = MixtureQuantizer(bits, tau, learn_tau, official_eps).to(layer.weight.device)
        quantize_weight(layer, quantizer.train(layer.training))
    return partial(detach_mixtures, layers=list(layers))


def detach_mixtures(module: nn.Module, layers: Sequence[str]) -> None:
    """Take the quantisers of :func:`attach_mixtures` off again; the weights are as they were trained."""
    for name in layers:
        remove_quantizers(module.get_submodule(name))


def mixtures_in(module: nn.Module) -> dict[str, MixtureQuantizer]:
    """The quantisers of this method by the names of their layers."""
    found = {name: weight_quantizer(layer) for name, layer in quantized_layers(module).items()}
    return {name: quantizer for name, quantizer in found.items() if isinstance(quantizer, MixtureQuantizer)}


@torch.no_grad()
def round_to_int8(module: nn.Module) -> None:
    """Move the means of all mixtures to whole multiples of max|mu| / 127, so that int8 holds the network exactly."""
    for quantizer in mixtures_in(module).values():
        scale, codes = _int8(quantizer.levels)
        quantizer.mu.copy_((scale * codes)[1:])


def _int8(levels: Tensor) -> tuple[Tensor, Tensor]:
    scale = (levels.abs().max() / INT8).clamp(min=torch.finfo(levels.dtype).tiny)
    return scale, (levels / scale).round().to(torch.int16)
