"""The bits: how many are set in each layer, the scores that decide which, and the swap after every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.sparse.learnt_mask import insert_mask, masks_in, remove_mask
from lightning_compress.core.sparse.select_weights import drop_lowest, kth_smallest
from lightning_compress.core.surgery import replayable

Rate = Callable[[int, int], float]

# (epoch, epochs) -> rate of swaps. "none" is what the released code does, "poly4" what it means to do on CIFAR,
# "cosine" what it computes, and does not use, on ImageNet.
RESTRICTIONS: dict[str, Rate] = {
    "none": lambda epoch, epochs: 1.0,
    "poly4": lambda epoch, epochs: (1 - epoch / epochs) ** 4,
    "cosine": lambda epoch, epochs: (1 + math.cos(math.pi * epoch / epochs)) / 2,
}


def pruned_counts(magnitudes: Mapping[str, Tensor], sparsity: float, layerwise: str) -> dict[str, int]:
    """How many weights of each layer are out.

    Args:
        magnitudes: |w| by layer, of any shape.
        sparsity: p, of all layers together.
        layerwise: ``"l1"``: those below the q-th largest of all, q = floor(N (1 - p)); ``"uniform"``: floor(N_i p) of
            each layer. The products are those of floats, as in the authors' code: 0.1 of 20,018,880 keeps 2,001,887.
    """
    if layerwise == "uniform":
        return {name: int(size.numel() * sparsity) for name, size in magnitudes.items()}
    joined = torch.cat([size.flatten().float() for size in magnitudes.values()])
    kept = int(len(joined) * (1 - sparsity))
    threshold = kth_smallest(joined, len(joined) - kept + 1) if kept else torch.tensor(torch.inf)
    return {name: int((size.float() < threshold).count_nonzero()) for name, size in magnitudes.items()}


def swap(scores: Tensor, mask: Tensor, rate: float = 1.0) -> Tensor:
    """Let the highest scores enter and the lowest leave; as many weights stay in as were.

    Among equal scores the first by index are out, so a tie at the threshold does not stop the swap.

    Args:
        scores: any shape.
        mask: bool of the same shape, True for weights that are in.
        rate: share of the wanted swaps that happen, rounded up.

    Returns:
        The new mask.

    >>> swap(torch.tensor([3.0, 1.0, 2.0, 4.0]), torch.tensor([False, True, True, False]))
    tensor([ True, False, False,  True])
    >>> swap(torch.tensor([3.0, 1.0, 2.0, 4.0]), torch.tensor([False, True, True, False]), rate=0.5)
    tensor([False, False,  True,  True])
    """
    wanted = drop_lowest(scores, mask.numel() - int(mask.count_nonzero()))
    if rate >= 1:
        return wanted
    enter = (wanted & ~mask).flatten().nonzero()[:, 0]
    leave = (mask & ~wanted).flatten().nonzero()[:, 0]
    count = math.ceil(round(rate * len(enter), 9))
    values = scores.detach().flatten()
    new = mask.flatten().clone()
    new[enter[values[enter].sort(stable=True).indices[len(enter) - count :]]] = True
    new[leave[values[leave].sort(stable=True).indices[:count]]] = False
    return new.view_as(mask)


class JackpotMask(nn.Module):
    """Bits of a frozen weight and the scores that decide about them; a parametrisation."""

    mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.ones_like(weight, requires_grad=False))
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool, requires_grad=False))

    def forward(self, weight: Tensor) -> Tensor:
        # The difference is zero and has the gradient of the bit. Of plain operators, so that surgery can follow.
        return weight * (self.mask + (self.score - self.score.detach()))

    @torch.no_grad()
    def start(self, mask: Tensor, low: float, high: float) -> None:
        """Begin with a mask: scores `high` where a weight is in and `low` where it is out."""
        self.mask.copy_(mask)
        self.score.copy_(torch.where(self.mask, high, low))

    @torch.no_grad()
    def update(self, rate: float) -> Tensor:
        """Swap after a step of the optimiser. Returns how many weights entered."""
        new = swap(self.score, self.mask, rate)
        entered = (new & ~self.mask).count_nonzero()
        self.mask.copy_(new)
        return entered


@replayable
def draw_lots(module: nn.Module, layers: Sequence[str]) -> Any:
    """Give layers a :class:`JackpotMask` with all weights in."""
    for name in layers:
        layer: Any = module.get_submodule(name)
        insert_mask(layer, JackpotMask(layer.weight.detach()))
    return partial(return_lots, layers=list(layers))


def return_lots(module: nn.Module, layers: Sequence[str]) -> None:
    """Take the masks of :func:`draw_lots` out again."""
    for name in layers:
        remove_mask(module.get_submodule(name), JackpotMask)


def lots_in(module: nn.Module) -> dict[str, JackpotMask]:
    """Layer name -> its mask, of all layers that have one."""
    return masks_in(module, JackpotMask)
