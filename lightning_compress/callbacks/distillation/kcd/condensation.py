"""What a sample is worth, which ones stay, and how those that go are summarised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


@torch.no_grad()
def entropies(logits: Tensor) -> Tensor:
    """How unsure a student is of each sample: (B, K) -> (B,), in nats, float32.

    Of log-probabilities, so that a class without any chance adds 0, not NaN.

    >>> entropies(torch.zeros(1, 100))
    tensor([4.6052])
    """
    log_p = logits.float().log_softmax(1).clamp_min(torch.finfo(torch.float32).min)
    return (log_p.exp() * log_p).sum(1).neg().clamp_min(0)


def values(total: Tensor, visits: Tensor, norm: float, exponent: float = 0.03) -> Tensor:
    r"""What each sample is worth: its mean entropy, a little more if it was seen often (cost-aware ranking).

        v_i = (n_i / norm)^exponent * total_i / n_i

    A sample that was never seen has not been judged yet: it is worth more than any other.

    Args:
        total: sum of the entropies of each sample, (N,), float64.
        visits: n, how often each was seen, (N,).
        norm: epochs of one stage.

    >>> values(torch.tensor([2.4, 2.0]), torch.tensor([3, 4]), norm=40)
    tensor([0.7402, 0.4666])
    """
    seen = visits.clamp_min(1)
    return torch.where(visits > 0, (seen / norm).pow(exponent) * total / seen, torch.inf)


def next_size(size: int, count: int, keep_ratio: float, num_stages: int) -> int:
    """How many samples are left after a stage, at least one; every stage drops as many, rounded down.

    Args:
        size: how many there are now.
        count: N, how many there were at first.
        keep_ratio: theta, share of them that is left in the end.
        num_stages: S.

    >>> next_size(50_000, 50_000, 0.7, 6), next_size(29_170, 50_000, 0.5, 6)
    (47500, 25004)
    """
    tiny = 1e-6  # int(100 * (1 - 0.9)) would be 9
    return max(size - int(count * (1 - keep_ratio) / num_stages + tiny), int(keep_ratio * count + tiny), 1)


class Partition(NamedTuple):
    """The samples of highest value are kept as they are, those of middle value are blended with those that go."""

    kept: Tensor  # (n,), by descending value; the last of them are `tail`
    tail: Tensor  # (L,)
    lost: Tensor  # (L,)


def partition(worth: Tensor, size: int, before: int) -> Partition:
    """Order all samples by what they are worth, and draw the lines.

    A sample that went earlier may come back. Of equal ones the first is worth more.

    Args:
        worth: (N,).
        size: how many are kept.
        before: how many were.
    """
    order = worth.argsort(descending=True, stable=True)
    pairs = min(before - size, size)
    # copies: as parts of `order` each would bring all of it into a checkpoint
    return Partition(order[:size].clone(), order[size - pairs : size].clone(), order[size : size + pairs].clone())


def shares(count: int, low: float = 0.7) -> Tensor:
    """How much of itself a blended sample keeps, the best of them most: (L,).

    >>> shares(4)
    tensor([1.0000, 0.9250, 0.8500, 0.7750])
    """
    return low + (1 - low) * (1 - torch.arange(count) / max(count, 1))


def blend(kept: Tensor, lost: Tensor, share: Tensor) -> Tensor:
    """``share * kept + (1 - share) * lost``, computed in float32; bytes are cut off, not rounded.

    Args:
        kept: images (L, ...).
        lost: images (L, ...).
        share: (L,).

    >>> blend(torch.tensor([[200]]).byte(), torch.tensor([[100]]).byte(), torch.tensor([0.85])).item()
    185
    """
    share = share.view(-1, *[1] * (kept.ndim - 1))
    return (share * kept.float() + (1 - share) * lost.float()).to(kept.dtype)


@dataclass
class KnowledgeSet:
    """The samples that still teach, and what the student has shown of all of them.

    Attributes:
        total: sum of entropies, (N,), float64.
        visits: how often each was seen, (N,), int64.
        kept: indices of those that teach, (n,), int64.
        blends: (tail, lost) of each stage so far; from them the blended images are made again.
    """

    total: Tensor
    visits: Tensor
    kept: Tensor
    blends: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def full(cls, count: int) -> KnowledgeSet:
        """All samples."""
        return cls(torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.int64), torch.arange(count))

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def count(self) -> int:
        """N, how many there were at first."""
        return len(self.total)

    def hear(self, entropies: Tensor) -> None:
        """Add the entropies of one epoch, (N,); below 0, or no number, where a sample was not seen."""
        seen = entropies >= 0
        self.total = self.total + torch.where(seen, entropies, 0)  # anew: a checkpoint may still be written
        self.visits = self.visits + seen

    def keep(self, parts: Partition, mix: bool) -> None:
        """Go on with what was decided."""
        self.kept = parts.kept
        if mix:
            self.blends.append((parts.tail, parts.lost))

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> KnowledgeSet:
        return cls(**state)
