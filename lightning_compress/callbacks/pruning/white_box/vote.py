"""The vote: one threshold for the channels of all layers, lowered until enough of the network's cost is gone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_compress.core.profile import Profile
from lightning_compress.core.surgery import ChannelGraph, Cut, scaled_macs

FlopsRule = Literal["conv_fc", "with_bn"]


@dataclass(frozen=True)
class Vote:
    """How a vote went.

    Attributes:
        widths: layer -> channels kept.
        share: share of the dense cost that is left.
        rho: the last share of all voting channels that the threshold let through.
        fallen: layers of which the threshold left too little, so that they keep `min_preserve`.
    """

    widths: dict[str, int]
    share: float
    rho: float
    fallen: tuple[str, ...]


def least_width(width: int, min_preserve: float) -> int:
    """Channels that a layer keeps whatever its scores: int(min_preserve * width), at least one."""
    return max(1, int(min_preserve * width))


def widths_at(
    scores: Mapping[str, Tensor], votes: Tensor, rho: float, min_preserve: float
) -> tuple[dict[str, int], list[str]]:
    """The widths that one threshold gives.

    Args:
        scores: layer that can be narrowed -> score of each channel (C,).
        votes: scores of all channels that vote, (N,), highest first. The int(rho N)-th is the threshold.
        rho: share of the votes that pass; 0 or less lets none pass.
        min_preserve: share of its channels that every layer keeps.

    Returns:
        Layer -> number of its highest channels that stay, and the layers that fell back to `min_preserve`.
    """
    number = int(len(votes) * rho)
    threshold = float(votes[number - 1]) if number > 0 else math.inf
    widths, fallen = {}, []
    for name, score in scores.items():
        widths[name] = int((score >= threshold).sum())
        if widths[name] < min_preserve * len(score):
            widths[name] = least_width(len(score), min_preserve)
            fallen.append(name)
    return widths, fallen


def global_vote(
    scores: Mapping[str, Tensor],
    voters: Sequence[Tensor],
    share: Callable[[Mapping[str, int]], float],
    target_macs: float,
    *,
    start_keep: float = 0.9,
    keep_step: float = 0.01,
    min_preserve: float = 0.3,
    follower: tuple[str, int] | None = None,
) -> Vote:
    """Lower rho from `start_keep` in steps of `keep_step`, until no more than `target_macs` of the cost is left.

    Args:
        scores: layer that can be narrowed -> score of each channel (C,).
        voters: scores of all layers that vote, also of those that keep their width.
        share: layer -> width, to the share of the dense cost that is left.
        follower: name and width of a layer that keeps the share of its channels that the round before left of the
            cost, whatever their scores (all in the first round).
    """
    votes = torch.cat(list(voters)).sort(descending=True).values
    rho, left = start_keep, 1.0
    while True:
        widths, fallen = widths_at(scores, votes, rho, min_preserve)
        if follower is not None:
            name, width = follower
            widths[name] = max(1, int(width * left))
        left = share(widths)
        if 1 - left >= 1 - target_macs or rho <= 0:
            return Vote(widths, left, rho, tuple(fallen))
        rho -= keep_step  # by repeated subtraction: 0.9 - 0.01 k in one go can keep another channel


def narrowed_cost(dense: Profile, graph: ChannelGraph, cuts: Sequence[Cut], rule: FlopsRule) -> float:
    """Cost after `cuts`, without building the network.

    Args:
        rule: ``"conv_fc"`` counts the MACs of convolutions and linear layers; ``"with_bn"`` adds 2 per output of a
            batch norm and 1 per output of a convolution with bias.
    """
    cost = scaled_macs({layer.name: layer.macs for layer in dense.layers}, graph, cuts)
    if rule == "with_bn":
        outputs = {layer.name: layer.cost("paper") - layer.macs for layer in dense.layers}
        cost += scaled_macs(outputs, graph, [cut for cut in cuts if cut.dim == 0])
    return cost
