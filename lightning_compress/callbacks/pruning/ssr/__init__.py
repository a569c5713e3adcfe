"""SSR: train a network against a copy of its filters in which whole filters are zero, then remove those.

Lin, Ji, Li, Deng, Li, "Toward Compact ConvNets via Structure-Sparsity Regularized Filter Pruning", IEEE TNNLS 31(2),
2020, arXiv:1901.07827. The solver, "alternative updating with Lagrange multipliers" (AULM), is the paper's.

    W in R^{N x d}   the N filters of a layer, flattened, with their biases as the last column
    min_W  loss(W) + sum over layers of lambda * g(W),   g(W) = sum_i ||w_i||_2  ("l21")  or  #{i : w_i != 0}  ("l20")

g is not smooth, so it moves to a copy F = W, with multiplier Y and penalty rho. Every few hundred steps, with
V = W + Y / rho,

    f_i = v_i * max(||v_i|| - lambda / rho, 0) / (||v_i|| + 1e-9)                   (l21)
    f_i = v_i  if  ||v_i|| > sqrt(2 lambda / rho)  else  0                           (l20)
    Y  <-  Y + rho * (W - F)

and in every step of SGD the gradient of W gets the one of <Y, W - F> + rho / 2 ||W - F||^2:  rho * (W - F) + Y.

At a fixed point W = F and -Y is the gradient of the loss: a filter dies if the loss would miss it by less than lambda.
The search ends after a fixed number of steps; the filters whose row of F is zero go, and the network is fine-tuned.

To read in this order: `aulm` (the mathematics), `layers` (which layers can be narrowed), `callback` (when this happens,
and what learns meanwhile).
"""

from lightning_compress.callbacks.pruning.ssr.aulm import (
    Split,
    group_rows,
    group_shrink_l21,
    group_threshold_l20,
    penalty,
    penalty_gradient,
    split_rows,
    update_fy,
)
from lightning_compress.callbacks.pruning.ssr.callback import SSR
from lightning_compress.callbacks.pruning.ssr.layers import lambda_by_layer

__all__ = [
    "SSR",
    "Split",
    "group_rows",
    "group_shrink_l21",
    "group_threshold_l20",
    "lambda_by_layer",
    "penalty",
    "penalty_gradient",
    "split_rows",
    "update_fy",
]
