r"""Find persons of infrared images among visible ones: three branches, each with an information bottleneck.

Tian, Zhang, Lin, Qu, Xie, Ma, "Farewell to Mutual Information: Variational Distillation for Cross-Modal Person
Re-Identification", CVPR 2021, arXiv:2104.02862, with the architecture of the released code. Every image x, visible or
infrared, goes through all branches; grey(x) is its luminance:

    V(x)    the branch of visible images            I(grey(x))             the branch of infrared ones
    S(x), S(grey(x))                                the branch that both share
    a branch: v = batch norm of a trunk's features, logits of v;  z = bottleneck(v), logits of z

    L = w_ce L_ce + w_rank L_rank + w_cml L_cml + w_vsd L_vsd + w_vcd L_vcd + w_vml L_vml

    L_ce    1/2 for I and V, 1/4 for each look of S, of the cross-entropies of v and z
    L_rank  the same of the ranking loss on the vectors v and z
    L_cml   Sinkhorn( p(y|v_I), p(y|v_V) )
    L_vsd   k( p(y|v_I), p(y|z_I) ) + k( p(y|v_V), p(y|z_V) )
    L_vcd   1/2 k( p(y|v_S(x)), p(y|z_S(grey)) ) + 1/2 k( p(y|v_S(grey)), p(y|z_S(x)) )
    L_vml   p(y|z_S(x)) and p(y|z_S(grey)) learn from each other

The losses are those of `core/distill/variational.py`. To tell persons apart, the vectors v of the four looks are put
side by side and scaled to length 1; the classifiers and, for v, the bottlenecks have then done their work.

`branches.py` has the networks, `losses.py` the losses of a batch, `module.py` the training.
"""

from lightning_compress.modules.reid.cross_modal_reid.branches import LOOKS, Branch, Embedder, Look, Looks, Observer
from lightning_compress.modules.reid.cross_modal_reid.module import CrossModalReID

__all__ = ["LOOKS", "Branch", "CrossModalReID", "Embedder", "Look", "Looks", "Observer"]
