r"""What a student can learn from a teacher: distances between their logits and between their features.

Each is a pure function of the student's and the teacher's tensors, gives a scalar, and computes in float32 outside
autocast. z are logits (B, K), f features (B, ...), v = f / |f|, T the temperature; means are over all elements:

    soft_targets        T^2 KL( softmax(z_t / T) || softmax(z_s / T) )                         Hinton 2015
    target_class        T^2 KL( b_t || b_s ),  b = (p_y, 1 - p_y)                              DKD 2022
    non_target_classes  T^2 KL( softmax(z_t / T without y) || softmax(z_s / T without y) )     DKD 2022

    hints               mean (r(f_s) - f_t)^2,  r a learnt regressor                           FitNets 2015
    attention           mean (A(f_s) - A(f_t))^2,  A = mean_C f^2 with an L2 norm of 1         AT 2017
    selectivity         MMD^2 of channels, each a map of norm 1, kernel <a, b>^2               NST 2017
    flow                mean (F_s - F_t)^2,  F = f_l f_{l+1}^T / (H W)                         FSP 2017
    factors             mean |A(a_s) - A(a_t)|,  a learnt factors of the features              FT 2018
    boundary            sum (f_s + 1)^2 [f_t <= 0, f_s > -1] + (f_s - 1)^2 [f_t > 0, f_s <= 1] AB 2019
    information         mean 1/2 ( (mu(f_s) - f_t)^2 / var + ln var ),  mu and var learnt      VID 2019

    similarity          1/B^2 || G(f_s) - G(f_t) ||_F^2,  G = f f^T with rows of norm 1        SP 2019
    distance            Huber( |f_i - f_j| / mean )                                            RKD 2019
    angle               Huber( cos(f_i - f_j, f_k - f_j) )                                     RKD 2019
    correlation         mean_i < |e_s - e_t|_i, |e_s - e_t|_{i+1} >,  e learnt embeddings      CC 2019
    probability         mean P_t ln( P_t / P_s ),  P = (cos(f_i, f_j) + 1) / 2, rows of sum 1  PKT 2018

    contrast            -ln of the share of the own image among those of the batch             after CRD 2020
    noise_contrast      -ln P(own) - sum_k ln (1 - P(k)) against K from a memory of all images CRD 2020
"""

from lightning_compress.core.distill.losses.contrasts import contrast, noise_contrast
from lightning_compress.core.distill.losses.features import (
    attention,
    attention_map,
    boundary,
    factors,
    flow,
    flow_matrix,
    hints,
    information,
    selectivity,
)
from lightning_compress.core.distill.losses.logits import non_target_classes, soft_targets, target_class
from lightning_compress.core.distill.losses.parts import in_float32, matched, resized
from lightning_compress.core.distill.losses.relations import angle, correlation, distance, probability, similarity

__all__ = [
    "angle",
    "attention",
    "attention_map",
    "boundary",
    "contrast",
    "correlation",
    "distance",
    "factors",
    "flow",
    "flow_matrix",
    "hints",
    "in_float32",
    "information",
    "matched",
    "noise_contrast",
    "non_target_classes",
    "probability",
    "resized",
    "selectivity",
    "similarity",
    "soft_targets",
    "target_class",
]
