"""DMAD: find a narrow generator by masks that become zeros and ones by themselves.

Li, Lin, Wang, Chao, Shao, Ji, "Learning Efficient GANs for Image Translation via Differentiable Masks and
co-Attention Distillation", IEEE Transactions on Multimedia 2022, arXiv:2011.08382. Every channel of a generator is
multiplied by m(w), a smooth step of one learnt number w around 0, with a band of half-width b:

    m(w) = 0                      w < -b
           (w + b)^2 / 2b^2       -b <= w <= 0
           1 - (b - w)^2 / 2b^2    0 <= w <= b
           1                      w > b
    L_G = L_base + lambda sum over masks of what pushes the w inside the band to its end
    b(t) = max(0, 1 - (t / 0.75 T)^(1/3))

With b = 0 every mask is a zero or a one, and no threshold has to be chosen. Channels that are added up in the residual
blocks are pushed together: the closer all blocks are to giving one up, the harder. As soon as what is not dead yet
costs no more than a target, a generator's masks are settled. What they have killed is then removed. Their second half,
the distillation that follows, is `CoAttentionDistillation`.
"""

from lightning_compress.callbacks.pruning.dmad.callback import DMAD

__all__ = ["DMAD"]
