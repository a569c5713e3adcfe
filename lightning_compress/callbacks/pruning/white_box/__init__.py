"""White-Box: learn for which classes each channel works, let all channels of all layers vote, keep what many need.

Zhang, Lin, Lin, Chen, Wu, Huang, Ji, "Carrying out CNN Channel Pruning in a White Box", IEEE TNNLS 34(10), 2023,
arXiv:2104.11883.

    M in R^{K x C}    one weight per class and channel for every masked layer, ones at first
    D in R^{B x K}    D[t, y_t] = 1, all others uniform in [0, 1): the sample's own class and a mixture of the rest
    G = D M           the guide; the feature map becomes out[t, c] = G[t, c] * x[t, c]
    loss = CE + lambda * sum over masks ||sum_k M[k, :]||_2            stage 1: weights and masks together
    s_c = |sum_k M[k, c]|                                              stage 2: the vote, over all layers at once
    keep rho of all channels, rho = 0.9, 0.89, ... until enough MACs are gone
    f_c = mean of G[:, c]                                              stage 3: the guide goes into the weights
    fine-tuning with the optimiser and the learning rate of the start  stage 4
"""

from lightning_compress.callbacks.pruning.white_box.callback import WhiteBox
from lightning_compress.callbacks.pruning.white_box.masks import (
    attach_masks,
    channel_scores,
    class_mixture,
    column_penalty,
    guide,
    mean_guide,
    official_factor,
)
from lightning_compress.callbacks.pruning.white_box.vote import Vote, global_vote, widths_at

__all__ = [
    "Vote",
    "WhiteBox",
    "attach_masks",
    "channel_scores",
    "class_mixture",
    "column_penalty",
    "global_vote",
    "guide",
    "mean_guide",
    "official_factor",
    "widths_at",
]
