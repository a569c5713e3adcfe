r"""FFSD: networks of one architecture teach each other, and a leader learns from what they have in common.

Li, Lin, Wang, Wu, Tian, Shao, Ji, "Distilling a Powerful Student Model via Online Knowledge Distillation", IEEE TNNLS
2022, arXiv:2103.14473. FFSD stands for feature fusion and self-distillation.

M students and a leader, all of one architecture and from random weights, see the same images. o are logits, F^1 ... F^K
feature maps, shallow to deep, A(F) = mean_C F^2 an attention map, N(x) = x / ||x|| for each image,

    d(x, y) = mean (N(x) - N(y))^2,     KL(p || q) at temperature T, times T^2,

and gradients end at every target. A fusion module makes maps Q and logits o_F of Z = concat_i F_i^K, and a small module
of the leader makes P of F_L^K, as wide as Z. Every network but the first student has a self-distillation module S that
makes maps of the sizes of F^(K-1) ... F^1 of a deepest map; imposed(F, G) = sum_k d(A(F^k), A(S(G)^k)):

    student i      CE + 1/(M-1) sum_(j != i) KL(o_j || o_i)
                   + lambda_div [ Div(A(F_i^K), A(F_(i-1)^K)) + imposed(F_i, Shift(F_(i-1)^K)) ]       (not for i = 0)
    fusion         CE + KL(mean_i o_i || o_F)
    leader         CE + KL(o_F || o_L) + lambda_fus [ d(A(F_L^K), A(Q)) + d(A(P), A(Z)) + imposed(F_L, Q) ]
    S              lambda_sd sum_k [ d(S(F^K)^k, F^k) + d(A(S(F^K)^k), A(F^k)) ]

Div and Shift move attention: where the student before is strong, the target is weak, and the other way round. All
lambdas are ramped up over the first epochs. The leader alone is deployed; it costs what the plain network costs.

To read in this order: `losses` (the mathematics), `parts` (the modules), `maps` (where features are read), `module`
(the training).
"""

from lightning_compress.modules.distillation.ffsd.module import FFSD
from lightning_compress.modules.distillation.ffsd.parts import Fusion, SelfDistillation, TransFusion

__all__ = ["FFSD", "Fusion", "SelfDistillation", "TransFusion"]
