"""The arithmetic of PAMS: rounding weights and activations to 2 q + 1 levels, and what flows back through it.

With k bits there are q = 2^(k-1) - 1 levels on either side of zero.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_compress.core.quant.integer import IntegerInput, IntegerWeight

# Below it a scale would divide by zero; no feature of an image is so small.
SMALLEST_ALPHA = 1e-6
# Added to max|W|, for the sake of a weight of zeros.
EPSILON = 1e-8


def levels(bits: int) -> int:
    """q = 2^(k-1) - 1.

    >>> [levels(bits) for bits in (8, 4, 2)]
    [127, 7, 1]
    """
    return 2 ** (bits - 1) - 1


def weight_step(weight: Tensor, bits: int) -> Tensor:
    """Distance of two levels, (max|W| + 1e-8) / q: one number for the whole tensor, ()."""
    return (weight.detach().abs().amax().float() + EPSILON) / levels(bits)


def batch_maximum(x: Tensor) -> Tensor:
    """M, the largest |x| of a sample, on average over the samples: (N, ...) -> (1,), in float32."""
    x, dims = x.detach(), tuple(range(1, x.ndim))
    return torch.maximum(x.amax(dims), -x.amin(dims)).float().mean().view(1)


class _QuantizeWeight(torch.autograd.Function):
    """round(W / step) step. The gradient is that of the identity everywhere, since no weight exceeds the maximum."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int) -> Tensor:
        step = weight_step(weight, bits)
        return torch.div(weight.float(), step).round_().mul_(step).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class _QuantizeActivation(torch.autograd.Function):
    """round(x_c / step) step with step = alpha / q, where x_c is x, clipped to [-alpha, alpha] or not.

    At x = +-alpha the two sides of a clip share the gradient, as those of max and min do.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, q: int, clip: bool) -> Tensor:
        bound = alpha.float().clamp(min=SMALLEST_ALPHA)
        step = bound / q
        codes = torch.div(x.float(), step).round_()
        if clip:
            codes.clamp_(-q, q)
        ctx.save_for_backward(x, bound)
        ctx.q, ctx.clip, ctx.kind = q, clip, alpha.dtype
        return codes.mul_(step).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, bound = ctx.saved_tensors
        x, grad = x.float(), grads[0].float()
        for_x, for_alpha = grad, None
        if ctx.clip:
            for_x = grad * torch.heaviside(bound - x.abs(), torch.full_like(bound, 0.5))
        if ctx.needs_input_grad[1]:
            u = x * (ctx.q / bound)
            if ctx.clip:
                u.clamp_(-ctx.q, ctx.q)
            for_alpha = (grad * (u.round() - u)).sum() / ctx.q
            if ctx.clip:
                for_alpha += ((grad - for_x) * x.sign()).sum()
            for_alpha = for_alpha.view(1).to(ctx.kind)
        return for_x.to(grads[0].dtype), for_alpha, None, None


class MaxScaleWeight(nn.Module):
    """A weight's quantiser, with the range of the weight as it is now; a parametrisation.

    Args:
        bits: k, 2 to 16.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        return _QuantizeWeight.apply(weight, self.bits)

    def integer(self, weight: Tensor) -> IntegerWeight:
        step = weight_step(weight, self.bits)
        return IntegerWeight((weight.detach().float() / step).round().to(torch.int16), step, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class PAMSQuantizer(nn.Module):
    """An activation's quantiser, whose range [-alpha, alpha] is measured first and learnt then.

    Until the end of epoch `ema_epoch` alpha is what the batches at hand show, and nothing is clipped in training; later
    alpha is a parameter like others, and larger values are clipped. In evaluation they always are. Before any range is
    known the input passes as it is.

    Args:
        bits: k, 2 to 16.
        alpha_init: value of alpha before a batch was seen.
        ema_epoch: last epoch in which alpha is measured; 0 lets it learn from `alpha_init` at once.
        ema_decay: weight of the past in a moving average.
        init: ``"last"``: in the first epoch the last batch counts alone, and later ones average, as in the authors'
            code. ``"ema"``: an average from the first batch on, as in the paper.

    Attributes:
        alpha: (1,).
        max_val: (1,), the measured maximum.
        epoch: (), int64, the epoch that runs, counted from 1.
        ready: (), bool, whether there is a range.
    """

    max_val: Tensor
    epoch: Tensor
    ready: Tensor

    def __init__(
        self,
        bits: int = 8,
        *,
        alpha_init: float = 10.0,
        ema_epoch: int = 1,
        ema_decay: float = 0.9997,
        init: Literal["last", "ema"] = "last",
    ) -> None:
        super().__init__()
        self.bits, self.ema_epoch, self.ema_decay, self.init = bits, ema_epoch, ema_decay, init
        self.alpha = nn.Parameter(torch.full((1,), alpha_init))
        self.register_buffer("max_val", torch.zeros(1))
        self.register_buffer("epoch", torch.ones((), dtype=torch.int64))
        self.register_buffer("ready", torch.tensor(ema_epoch == 0))
        # What the last two say, where asking them would make a GPU wait.
        self._epoch, self._ready = 1, ema_epoch == 0

    @property
    def measures(self) -> bool:
        """Whether training still measures alpha, instead of learning it."""
        return self._epoch <= self.ema_epoch

    def begin(self, epoch: int) -> None:
        """Epoch `epoch`, counted from 1, begins. What was learnt is not measured again: none before the last counts."""
        if epoch > self._epoch:
            self._epoch = epoch
            self.epoch.fill_(epoch)

    def forward(self, x: Tensor) -> Tensor:
        free = self.training and self.measures
        if free:
            self._measure(x)
        elif not self._ready:
            return x
        return _QuantizeActivation.apply(x, self.alpha, levels(self.bits), not free)

    @torch.no_grad()
    def _measure(self, x: Tensor) -> None:
        maximum = batch_maximum(x)
        first = not self._ready if self.init == "ema" else self._epoch == 1
        self.max_val.copy_(maximum if first else self.max_val.lerp(maximum, 1 - self.ema_decay))
        self.alpha.copy_(self.max_val)
        if not self._ready:
            self._ready = True
            self.ready.fill_(True)

    def integer(self) -> IntegerInput:
        """Codes -q..q of the range as it is now.

        Raises:
            ValueError: there is no range yet.
        """
        if not self._ready:
            raise ValueError("This activation was never measured: train first, or load a trained checkpoint.")
        q = levels(self.bits)
        step = float(self.alpha.detach().float().clamp(min=SMALLEST_ALPHA) / q)
        return IntegerInput(offset=0.0, step=step, value=step, lowest=-q, highest=q, bits=self.bits)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("alpha", "max_val"):  # the authors' files hold () after training, (1,) before
            if f"{prefix}{name}" in state_dict:
                state_dict[f"{prefix}{name}"] = state_dict[f"{prefix}{name}"].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._epoch, self._ready = int(self.epoch), bool(self.ready)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class OnGrid(nn.Module):
    """The input quantiser of a layer that gets what another quantiser has put out: passes it on, and knows its codes.

    Args:
        source: the quantiser, which lives elsewhere in the network.
    """

    def __init__(self, source: PAMSQuantizer) -> None:
        super().__init__()
        self._source = (source,)  # in a tuple, so that it is not registered a second time

    def forward(self, x: Tensor) -> Tensor:
        return x

    def integer(self) -> IntegerInput:
        return self._source[0].integer()
