"""The three losses that are added to the cross-entropy, for one layer. Masks m are (B, N) in [0, 1].

L_m = CE(F m, target)                                       a lower bound of the information of a mask on the class
L_k = mean_{b,j} KL(softmax(GAP(out)) || softmax(m))        a mask shall say which filters respond
L_s = | mean_b ||m_b||_1 - R N |                            few filters, or a share R of them
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

KLDirection = Literal["mask_from_out", "out_from_mask"]


def information_loss(mask: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """L_m: cross-entropy of a linear prediction of the class from the mask.

    Args:
        mask: (B, N).
        head: F, (K, N).
        targets: class indices (B,), or soft labels (B, K).
    """
    return F.cross_entropy(F.linear(mask, head), targets)


def divergence_loss(mask: Tensor, pooled: Tensor, direction: KLDirection = "mask_from_out") -> Tensor:
    """L_k: how far the distribution of the mask is from that of the responses.

    The mean is over batch and filters, as in the authors' code; a mean over the batch alone would be N times as much.

    Args:
        mask: (B, N).
        pooled: global average of the layer's output before the mask, (B, N).
        direction: ``"mask_from_out"`` is KL(softmax(pooled) || softmax(mask)), ``"out_from_mask"`` the other way round.

    >>> import torch
    >>> mask, pooled = torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([[1.0, 0], [0, 2]])
    >>> [round(divergence_loss(mask, pooled, d).item(), 7) for d in ("mask_from_out", "out_from_mask")]
    [0.0819533, 0.1084452]
    """
    approximation, truth = (mask, pooled) if direction == "mask_from_out" else (pooled, mask)
    return F.kl_div(approximation.log_softmax(1), truth.softmax(1), reduction="sum") / mask.numel()


def sparsity_loss(ones: Tensor, width: int | Tensor, target_density: float = 0.0) -> Tensor:
    """L_s.

    Args:
        ones: mean_b ||m_b||_1 of a layer, or (L,) of several.
        width: N, or (L,).
        target_density: R.

    Returns:
        A scalar, summed over layers.

    >>> import torch
    >>> ones = torch.tensor([[1.0, 0, 1, 0], [1, 1, 0, 0]]).sum(1).mean()
    >>> [round(sparsity_loss(ones, 4, R).item(), 4) for R in (0.0, 0.6)]
    [2.0, 0.4]
    """
    return (ones - target_density * width).abs().sum()
