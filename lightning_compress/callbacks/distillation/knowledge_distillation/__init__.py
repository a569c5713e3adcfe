r"""Knowledge distillation: a trained network, the teacher, tells a smaller one more than labels do.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", NIPS Deep Learning Workshop 2014,
arXiv:1503.02531, and what came after it, each loss a term of its own:

    L = gamma L_task + sum_k weight_k L_k(student, teacher)

    logits                     T^2 KL( softmax(z_t / T) || softmax(z_s / T) )        Hinton et al., arXiv:1503.02531
    target, non_target         its two parts, apart                                  DKD, arXiv:2203.08679
    hints                      features, through a learnt regressor                  FitNets, arXiv:1412.6550
    attention                  where features are strong                             AT, arXiv:1612.03928
    similarity                 which images are alike                                SP, arXiv:1907.09682
    distance, angle            how far images are apart, and at which angles         RKD, arXiv:1904.05068
    contrast                   whose embedding is whose                              after CRD, arXiv:1910.10699

The functions are in `lightning_compress.core.distill.losses`; `teachers` finds the teacher, `terms` the features that
are compared, `callback` says when.
"""

from lightning_compress.callbacks.distillation.knowledge_distillation.callback import KnowledgeDistillation

__all__ = ["KnowledgeDistillation"]
