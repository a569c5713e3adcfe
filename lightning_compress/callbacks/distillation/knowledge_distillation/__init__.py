r"""Knowledge distillation: a trained network, the teacher, tells a smaller one more than labels do.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", NIPS Deep Learning Workshop 2014,
arXiv:1503.02531, and what came after it, each loss a term of its own:

    L = gamma L_task + sum_k weight_k L_k(student, teacher)

    logits                     T^2 KL( softmax(z_t / T) || softmax(z_s / T) )        Hinton et al., arXiv:1503.02531
    target, non_target         its two parts, apart                                  DKD, arXiv:2203.08679
    hints                      features, through a learnt regressor                  FitNets, arXiv:1412.6550
    attention                  where features are strong                             AT, arXiv:1612.03928
    selectivity                what channels answer to                               NST, arXiv:1707.01219
    flow                       what happens between places                           FSP, CVPR 2017
    factors                    a few learnt factors of features                      FT, arXiv:1802.04977
    boundary                   which neurons fire                                    AB, arXiv:1811.03233
    information                what can be expected of features                      VID, arXiv:1904.05835
    similarity                 which images are alike                                SP, arXiv:1907.09682
    distance, angle            how far images are apart, and at which angles         RKD, arXiv:1904.05068
    correlation                how embeddings of neighbours differ                   CC, arXiv:1904.01802
    probability                who is whose neighbour                                PKT, arXiv:1803.10837
    contrast, noise_contrast   whose embedding is whose, in the batch or in all      CRD, arXiv:1910.10699

The functions are in `lightning_compress.core.distill.losses`; `teachers` finds the teacher, `terms` the features that
are compared, `memories` keeps embeddings of all images, `callback` says when.
"""

from lightning_compress.callbacks.distillation.knowledge_distillation.callback import KnowledgeDistillation

__all__ = ["KnowledgeDistillation"]
