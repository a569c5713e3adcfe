"""KSE: input channels keep as many 2-D kernels as they are worth, and their outputs share them.

Li, Lin, Zhang, Liu, Doermann, Wu, Huang, Ji, "Exploiting Kernel Sparsity and Entropy for Interpretable CNN
Compression", CVPR 2019, arXiv:1812.04368.

Input channel c of a convolution with weight W (N, C, kh, kw) is read by N kernels W[:, c]. It matters if they are
large, and it is cheap to compress if they lie close together:

    s_c  = sum_n |W[n, c]|_1                                          kernel sparsity
    dm_i = sum of the distances of kernel i to its 5 nearest others,  p_i = dm_i / sum_j dm_j
    e_c  = - sum_i p_i log2 p_i                                       kernel entropy
    v_c  = sqrt(s_c / (1 + alpha e_c)),                               the indicator; s, e and v scaled to [0, 1]

    q_c  = 0                          if floor(v_c G) = 0             kernels that the channel keeps
         = N                          if ceil(v_c G) = G
         = ceil(N / 2^(G - ceil(v_c G) + T))  else: the centres of k-means on its N kernels

To read in this order: `indicator` (v and q), `clustering` (k-means), `core.sparse.shared_kernels` (the form of such a
convolution: parametrisation, file, and the two-step convolution), `callback` (when all this happens).
"""

from lightning_compress.callbacks.pruning.kse.callback import KSE
from lightning_compress.callbacks.pruning.kse.clustering import kmeans
from lightning_compress.callbacks.pruning.kse.indicator import (
    channel_levels,
    importance,
    kernel_budgets,
    kernel_entropy,
    kernel_sparsity,
)

__all__ = ["KSE", "channel_levels", "importance", "kernel_budgets", "kernel_entropy", "kernel_sparsity", "kmeans"]
