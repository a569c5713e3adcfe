"""ADMM-NN-S: prune weights, single ones or whole units, quantise what is left, and account for what that is worth.

Ma, Lin, Ye, He, Zhang, Yuan, Tan, Li, Fan, Qian, Lin, Ma, Wang, "Non-Structured DNN Weight Pruning - Is It Beneficial
in Any Platform?", IEEE TNNLS 2021, arXiv:1907.02124; before it Zhang et al., arXiv:1804.03294 (pruning by ADMM), Ren et
al., arXiv:1812.11677 (pruning and quantisation), Ye et al., arXiv:1903.09769 (progressive rounds).

    min f(W)   with W_l in S_l (at most so many units are not zero) and then in Q_l = {0, +-a, +-2a, ..., +-M a}

    Z = P(W + U):   prune     zero the floor(r N) units of smallest magnitude or norm
                    quantise  sign(w) clip(round(|w| / a), 1, M) a,  zeros stay
    a = <w, k> / <k, k> for the codes k that it leads to, the best fixed point from many starts

Then W <- P(W) by a mask, and retraining. Levels are not assigned at once: a share of the weights, those closest to
their level, is snapped and held while the others train on, round by round.

To read in this order: `projections` (the mathematics), `storage` (how non-structured and structured pruning compare),
`callback` (when all this happens).
"""

from lightning_compress.callbacks.sparsity.admm_nn.callback import ADMMNN
from lightning_compress.callbacks.sparsity.admm_nn.storage import compression_report

__all__ = ["ADMMNN", "compression_report"]
