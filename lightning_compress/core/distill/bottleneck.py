"""A bottleneck behind an encoder, with a classifier of its own: what it lets through is the representation z.

Tian et al., "Farewell to Mutual Information: Variational Distillation for Cross-Modal Person Re-Identification",
CVPR 2021, arXiv:2104.02862.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class CountedDropout(nn.Module):
    """Dropout whose masks follow from a seed and the number of its call, which a checkpoint holds.

    So a resumed run draws what an uninterrupted one had drawn; Lightning does not save torch's generator. Processes
    draw masks of their own.

    Args:
        p: share that is dropped; the rest is scaled by 1 / (1 - p).
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p
        self.seed = int(torch.randint(2**31, (), device="cpu"))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        generator = torch.Generator(x.device).manual_seed(self.seed + 1_000_003 * self.calls + rank)
        self.calls += 1
        kept = torch.rand(x.shape, generator=generator, device=x.device) >= self.p
        return x * kept / (1 - self.p)

    def get_extra_state(self) -> dict[str, int]:
        return {"seed": self.seed, "calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seed, self.calls = state["seed"], state["calls"]

    def extra_repr(self) -> str:
        return f"p={self.p}"


class InformationBottleneck(nn.Module):
    """v -> z -> logits: (B, in_features) -> ((B, num_classes), (B, 2 z_dim)), no sampling in between.

    Linear, batch norm and ReLU for each of `hidden`, and a linear layer to z; then the classifier: linear, batch norm,
    LeakyReLU, dropout, linear.

    Args:
        in_features: of v.
        num_classes: C.
        z_dim: z has twice as many features, as if for mean and variance; the paper's 256 makes 512.
        hidden: widths on the way to z; the paper's for 2048 features.
        classifier_dim: width of the classifier's hidden layer.
        dropout: in the classifier.

    Raises:
        ValueError: a width below 1, or a dropout outside of [0, 1).

    >>> import torch
    >>> head = InformationBottleneck(2048, 395)
    >>> [sum(p.numel() for p in part.parameters()) for part in (head.encoder, head.classifier)]
    [2809012, 233355]
    >>> [tuple(out.shape) for out in head(torch.zeros(4, 2048))]
    [(4, 395), (4, 512)]
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        z_dim: int = 256,
        hidden: Sequence[int] = (1000, 500),
        classifier_dim: int = 256,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_bottleneck(z_dim, hidden, classifier_dim, dropout)
        widths = [in_features, *hidden]
        layers = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU())]
        self.encoder = nn.Sequential(*layers, nn.Linear(widths[-1], 2 * z_dim))
        self.classifier = nn.Sequential(
            nn.Linear(2 * z_dim, classifier_dim),
            nn.BatchNorm1d(classifier_dim),
            nn.LeakyReLU(0.1),
            CountedDropout(dropout),
            nn.Linear(classifier_dim, num_classes),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He et al.'s initialisation by fan-out, scales of norms about 1; the last layer starts with even odds."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.BatchNorm1d):
                nn.init.normal_(layer.weight, 1.0, 0.02)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.classifier[-1].weight, std=0.001)  # type: ignore[arg-type]

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (B, num_classes) and z (B, 2 z_dim)."""
        z = self.encoder(v)
        return self.classifier(z), z


def check_bottleneck(z_dim: int, hidden: Sequence[int], classifier_dim: int, dropout: float) -> None:
    """Raises ValueError for widths and shares that cannot be."""
    for argument, width in (("z_dim", z_dim), *(("hidden", w) for w in hidden), ("classifier_dim", classifier_dim)):
        if width < 1:
            raise ValueError(f"{argument}: expected at least 1 feature, got {width}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a share in [0, 1), got {dropout}.")
