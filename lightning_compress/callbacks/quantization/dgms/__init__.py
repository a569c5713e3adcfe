r"""DGMS: weights of 2, 3 or 4 bits, whose values are the means of a Gaussian mixture that is trained with them.

Dong, Tan, Wu, Zhang, Ma, "Finding the Task-Optimal Low-Bit Sub-Distribution in Deep Neural Networks", ICML 2022,
arXiv:2112.15139.

The weights of a layer are modelled by K = 2^b Gaussians. One has its mean at 0, the other K - 1 means are free. What a
component answers for, and that sharpened by a temperature:

    r_k   = pi_k N(w; mu_k, sigma_k) / sum_j pi_j N(w; mu_j, sigma_j),      mu_0 = 0
    phi_k = exp(r_k / tau) / sum_j exp(r_j / tau)

The network trains with the soft weight and is evaluated with the hard one:

    w_S = sum_k phi_k mu_k            (differentiable in w, mu, pi, sigma and tau; no straight-through estimator)
    w_P = mu_k of the largest phi_k   (K values; those of component 0 are zeros)

At tau = 0.01 both are nearly equal. Then phi is one-hot for almost all weights, and the loss moves mainly the means,
and weights near the boundary of two components. The mixture starts from k-means on the trained weights.

To read in this order: `mixture` (soft and hard weights, gradients), `initialisation` (k-means, EM), `quantizer` (the
parametrisation), `callback` (when all this happens).
"""

from lightning_compress.callbacks.quantization.dgms.callback import DGMS
from lightning_compress.callbacks.quantization.dgms.initialisation import initial_mixture, kmeans_1d
from lightning_compress.callbacks.quantization.dgms.mixture import assign, soft_weight
from lightning_compress.callbacks.quantization.dgms.quantizer import MixtureQuantizer, round_to_int8

__all__ = ["DGMS", "MixtureQuantizer", "assign", "initial_mixture", "kmeans_1d", "round_to_int8", "soft_weight"]
