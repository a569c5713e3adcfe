r"""RBNN: one-bit weights and activations, with the weights turned towards their signs before they are taken.

Lin, Ji, Xu, Zhang, Wang, Wu, Huang, Lin, "Rotated Binary Neural Network", NeurIPS 2020, arXiv:2009.13055.

Between a filter w of n weights and sign(w) is an angle, cos = |w|_1 / (sqrt(n) |w|_2). A rotation of all filters of a
layer makes it smaller. One of n x n numbers is too large to learn; so w, standardised, is seen as an a x b matrix X,
and two small ones act on its sides:

    w' = R1^T X R2,    max over B in {-1,+1}, R1, R2 of  sum_i tr( B_i R2^T X_i^T R1 )

which is solved in turns, each step in closed form, at the first batch of an epoch:

    B = sign(R1^T X R2)
    R1 = V U^T   of   sum_i B_i R2^T X_i^T = U S V^T
    R2 = U V^T   of   sum_i X_i^T R1 B_i   = U S V^T

How far each filter follows is learnt, beta_o from pi/2 on, and what the layer computes with is

    sign( w + |sin beta| (w' - w) ),   backward  max(0, k (sqrt(2) t - t^2 |.|)),
    t = 10^( log10 t_min + (log10 t_max - log10 t_min) e / E ),   k = max(1 / t, 1)   in epoch e of E

so the derivative is nearly that of a straight line at first, and a tall narrow peak in the end. Activations are
standardised over each sample and have k = 1 and t >= 1. Nothing of the rotation is left for inference: signs, and one
factor per output channel, which the batch norm behind takes up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_compress.callbacks.quantization.binarization import Binarization
from lightning_compress.core.quant.attach import quantize_input, quantize_weight, real_weight, weight_quantizer
from lightning_compress.core.quant.binary import (
    ChannelScale,
    SampleSign,
    SampleStandard,
    binarize,
    scale_output,
    sign,
    standardize,
    unbinarize,
)
from lightning_compress.core.surgery import replayable

# Far below the 1e-8 at which the residual stream of a network begins whose batch norms begin so.
EPS = 1e-12


def factor_pair(n: int) -> tuple[int, int]:
    """The two factors of n that are nearest to its root: a <= b, a * b = n.

    >>> [factor_pair(n) for n in (64, 144, 288, 4608)]
    [(8, 8), (12, 12), (16, 18), (64, 72)]
    """
    a = next(a for a in range(math.isqrt(n), 0, -1) if n % a == 0)
    return a, n // a


def random_rotation(n: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix (n, n), uniform among all of them: Q of a Gaussian, with the diagonal of R made positive."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


def rotate(x: Tensor, r1: Tensor, r2: Tensor) -> Tensor:
    """R1^T X_i R2: (O, a, b), (a, a), (b, b) -> (O, a, b)."""
    return r1.T @ (x @ r2)


class Rotation(NamedTuple):
    """Of one layer: R1 (a, a), R2 (b, b), and the mean cosine of its rotated filters and their signs, ()."""

    r1: Tensor
    r2: Tensor
    cosine: Tensor


def update_rotations(
    xs: Sequence[Tensor], r1s: Sequence[Tensor], r2s: Sequence[Tensor], rounds: int = 3
) -> list[Rotation]:
    """Turn the filters of several layers towards their signs, `rounds` times.

    What is turned further is the rotated filters, Y = R1^T X R2: with B = sign(Y), sum_i B_i R2^T X_i^T is
    (sum_i B_i Y_i^T) R1^T, so its rotation is one of Y's rows followed by the old R1^T; likewise for R2. That takes
    four products a round, each of one matrix with all filters of a layer side by side; and layers of one (a, b) have
    their singular vectors computed together.

    Args:
        xs: the filters of each layer, (O, a, b), with any O.
        r1s: (a, a) of each layer.
        r2s: (b, b) of each layer.
        rounds: each of which refreshes the signs B, R1 and R2.
    """
    found: dict[int, Rotation] = {}
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, x in enumerate(xs):
        groups.setdefault(tuple(x.shape[1:]), []).append(index)
    for (a, b), group in groups.items():
        r1, r2 = torch.stack([r1s[i] for i in group]), torch.stack([r2s[i] for i in group])
        columns = [xs[i].movedim(0, 1).reshape(a, -1) for i in group]  # (a, O b); its rows are (a O, b)
        ys = [p.T @ (x.view(-1, b) @ q).view(a, -1) for x, p, q in zip(columns, r1, r2, strict=True)]
        for _ in range(rounds):
            codes = [sign(y) for y in ys]
            turns = nearest_rotation(torch.stack([c @ y.T for c, y in zip(codes, ys, strict=True)]))
            ys, r1 = [turn @ y for turn, y in zip(turns, ys, strict=True)], r1 @ turns.mT
            sums = [y.view(-1, b).T @ c.view(-1, b) for c, y in zip(codes, ys, strict=True)]
            turns = nearest_rotation(torch.stack(sums))
            ys, r2 = [(y.view(-1, b) @ turn).view(a, -1) for turn, y in zip(turns, ys, strict=True)], r2 @ turns
        r1, r2 = nearest_rotation(r1), nearest_rotation(r2)  # products of rotations drift
        for place, (index, y) in enumerate(zip(group, ys, strict=True)):
            found[index] = Rotation(r1[place], r2[place], cosine(y.view(a, -1, b).movedim(1, 0)))
    return [found[index] for index in range(len(xs))]


def nearest_rotation(m: Tensor) -> Tensor:
    """U V^T of M = U S V^T, (..., n, n): it does not depend on which singular vectors are found."""
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    return u @ vh


def cosine(x: Tensor) -> Tensor:
    """Of the angle between filters and their signs, |x|_1 / (sqrt(n) |x|_2), on average: (O, ...) -> ()."""
    x = x.flatten(1)
    return (x.abs().mean(1) / x.square().mean(1).sqrt().clamp(min=EPS)).mean()


def sharpness(epoch: float, epochs: int, t_min: float = 1e-2, t_max: float = 1e1) -> tuple[float, float]:
    """(k, t) of the weights' slope in an epoch, from 0.

    >>> [tuple(round(x, 6) for x in sharpness(e, 150)) for e in (0, 75, 149)]
    [(100.0, 0.01), (3.162278, 0.316228), (1.0, 9.549926)]
    """
    low, high = math.log10(t_min), math.log10(t_max)
    t = 10 ** (low + (high - low) * min(epoch / epochs, 1.0))
    return max(1 / t, 1.0), t


class RotatedSign(nn.Module):
    """The signs of a weight that follows its rotation; a parametrisation.

    Args:
        weight: (C_out, C_in / groups, kh, kw).
        seed: of the two random rotations that it starts with.
        through_rotation: whether the weight's gradient also passes through the rotation.

    Attributes:
        rotate: beta, (C_out, 1, 1, 1).
        r1: (a, a); r2: (b, b), with a * b = n weights in a filter.
        k: of the slope; t: likewise. They follow from the epoch and are not stored.
    """

    bits = 1
    r1: Tensor
    r2: Tensor

    def __init__(self, weight: Tensor, seed: int = 0, through_rotation: bool = False) -> None:
        super().__init__()
        a, b = factor_pair(weight[0].numel())
        generator = torch.Generator().manual_seed(seed)
        device = weight.device
        self.rotate = nn.Parameter(torch.full((len(weight), 1, 1, 1), math.pi / 2, device=device))
        self.register_buffer("r1", random_rotation(a, generator).to(device))
        self.register_buffer("r2", random_rotation(b, generator).to(device))
        self.through_rotation = through_rotation
        self.k, self.t = 1.0, 1.0

    def matrices(self, weight: Tensor) -> Tensor:
        """Its standardised filters as matrices, (C_out, a, b)."""
        return standardize(weight.float(), EPS).view(len(weight), len(self.r1), len(self.r2))

    def mixed(self, weight: Tensor) -> Tensor:
        """Of which the signs are taken: w + |sin beta| (w' - w)."""
        x = self.matrices(weight)
        rotated = rotate(x if self.through_rotation else x.detach(), self.r1, self.r2)
        return (x + self.rotate.sin().abs().flatten(1)[:, :, None] * (rotated - x)).view(weight.shape)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return binarize(self.mixed(weight), self.k, self.t)


@replayable
def rotate_and_binarize(
    module: nn.Module, layers: Sequence[str], activation_bits: int, through_rotation: bool, seed: int
) -> Any:
    """Give layers a :class:`RotatedSign` of their weight, the sign of their input, and a scale."""
    for index, name in enumerate(layers):
        layer: Any = module.get_submodule(name)
        weight = layer.weight.detach()
        quantize_weight(layer, RotatedSign(weight, seed + index, through_rotation))
        quantize_input(layer, SampleSign(EPS, 0.0) if activation_bits == 1 else SampleStandard(EPS, 0.0))
        scale_output(layer, ChannelScale(weight))
    return partial(unbinarize, layers=list(layers))


def _copy(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


class RBNN(Binarization):
    """Train a network of one-bit weights and activations whose weights are rotated towards their signs.

    Layers keep their type. From random weights as in the paper, or from trained ones.

    Args:
        rotation_update: epochs from one update of the rotations to the next.
        rotation_iters: rounds of each update.
        t_min: of the slope that stands for the sign's derivative, in the first epoch.
        t_max: of the slope in the last one.
        grad_through_rotation: whether the weights' gradient passes through the rotation, as the paper derives it. The
            authors' code, which made its numbers, lets it pass by: then filters learn as far as |sin beta| is below 1.
        max_epochs: E, over which the slope sharpens; None is that of the Trainer. It is saved, so that a run that is
            resumed goes on along the same curve.
        seed: of the rotations at the start.
        kwargs: see :class:`Binarization`.

    What is stored, in the module's own `state_dict`, see `lightning_compress.load`: real weights, alpha, beta, R1 and
    R2 of each layer. `lightning_compress.save_packed` writes the bits alone.

    With several processes rank 0 updates the rotations and sends them to the others.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, names that match no
            layer, a network without a layer to binarise, SGD without weight decay of beta, methods that need zeros
            among the weights.

    Example::

        from lightning_compress.callbacks import RBNN
        trainer = Trainer(max_epochs=400, callbacks=[RBNN()])
        trainer.fit(module, datamodule)

    Packaged config: ``method/rbnn``.
    """

    def __init__(
        self,
        *,
        rotation_update: int = 1,
        rotation_iters: int = 3,
        t_min: float = 1e-2,
        t_max: float = 1e1,
        activation_bits: Literal[1, 32] = 1,
        exclude_first: bool = True,
        exclude_last: bool = True,
        exclude_downsample: bool = True,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        grad_through_rotation: bool = False,
        max_epochs: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            activation_bits=activation_bits, exclude_first=exclude_first, exclude_last=exclude_last,
            exclude_downsample=exclude_downsample, include=include, exclude=exclude, max_epochs=max_epochs,
        )  # fmt: skip
        for argument, value in (("rotation_update", rotation_update), ("rotation_iters", rotation_iters)):
            if value < 1:
                raise ValueError(f"RBNN({argument}={value}): give 1 or more.")
        for argument, bound in (("t_min", t_min), ("t_max", t_max)):
            if bound <= 0:
                raise ValueError(f"RBNN({argument}={bound}): give a positive number.")
        if t_max < t_min:
            raise ValueError(f"RBNN(t_min={t_min}, t_max={t_max}): the slope sharpens from t_min up to t_max.")
        self.rotation_update, self.rotation_iters = rotation_update, rotation_iters
        self.t_min, self.t_max = t_min, t_max
        self.grad_through_rotation = grad_through_rotation
        self.seed = seed

    def change(self, layers: list[str]) -> tuple[Any, dict[str, Any]]:
        return rotate_and_binarize, {
            "layers": layers,
            "activation_bits": self.activation_bits,
            "through_rotation": self.grad_through_rotation,
            "seed": self.seed,
        }

    # ---- hooks

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._check_decay(trainer, self._quantizers(pl_module))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        k, t = sharpness(trainer.current_epoch, self.epochs, self.t_min, self.t_max)
        for layer in self.layers(pl_module).values():
            quantizer: Any = weight_quantizer(layer)
            quantizer.k, quantizer.t = k, t
            if isinstance(layer.input_quantizer, SampleSign):
                layer.input_quantizer.k, layer.input_quantizer.t = 1.0, max(t, 1.0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # a run that is resumed in the middle of an epoch does not begin with its first batch
        if batch_idx == 0 and trainer.current_epoch % self.rotation_update == 0:
            angle = self._update(trainer, pl_module)
            pl_module.log("rbnn/cosine", angle, prog_bar=True, rank_zero_only=True)

    # ---- the work

    @torch.no_grad()
    def _update(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """New rotations for all layers, from rank 0; the mean cosine of filters and signs with them."""
        layers = self.layers(pl_module)
        quantizers = self._quantizers(pl_module)
        rotations = [r for quantizer in quantizers.values() for r in (quantizer.r1, quantizer.r2)]
        angle = 0.0
        if trainer.is_global_zero:
            filters = [quantizers[name].matrices(real_weight(layer)) for name, layer in layers.items()]
            found = update_rotations(filters, rotations[::2], rotations[1::2], self.rotation_iters)
            angle = float(torch.stack([rotation.cosine for rotation in found]).mean())
            _copy(rotations, [r for rotation in found for r in rotation[:2]])
        if trainer.world_size > 1:
            _copy(rotations, trainer.strategy.broadcast([r.cpu() for r in rotations]))
        return angle

    def _quantizers(self, pl_module: LightningModule) -> dict[str, RotatedSign]:
        return {name: weight_quantizer(layer) for name, layer in self.layers(pl_module).items()}  # type: ignore[misc]

    def _check_decay(self, trainer: Trainer, quantizers: Mapping[str, RotatedSign]) -> None:
        """At pi/2 neither beta nor the weights have a gradient; weight decay is what sets SGD going."""
        betas = {id(quantizer.rotate) for quantizer in quantizers.values()}
        plain = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, torch.optim.SGD)]
        groups = [group for optimizer in plain for group in optimizer.param_groups if not group["weight_decay"]]
        if not self.grad_through_rotation and any(id(p) in betas for group in groups for p in group["params"]):
            raise MisconfigurationException(
                "RBNN: the optimiser's group that holds the angles beta (`...rotate`) has weight_decay=0. At "
                "beta = pi/2 no gradient reaches the weights, and only weight decay leads away from it: give that "
                "group weight_decay=1e-4, or take RBNN(grad_through_rotation=True)."
            )
