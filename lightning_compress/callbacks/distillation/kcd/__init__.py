r"""KCD: distil on fewer and fewer samples, those from which the student still learns.

Li, Lin, Ding, Lin, Zhuang, Huang, Ding, Cao, "Knowledge Condensation Distillation", ECCV 2022, arXiv:2207.05409.
Schedule and constants are those of the authors' code.

Which samples of the N are worth distilling is a latent variable, estimated and used in turns. In every epoch the
student's own entropy tells how unsure it still is of each sample that it is trained on:

    h_i = - sum_c p_ic log p_ic,   p_i = softmax(z_i)

At the end of each of the S stages all samples are ordered by their mean entropy, with a little more for those that were
seen in more of the epochs, and the set R shrinks by an equal step until theta N are left:

    v_i = (n_i / P)^0.03  mean(h_i),        |R| <- max( |R| - floor(N (1 - theta) / S), floor(theta N) )

The L samples that go are summarised in the L that are kept with the lowest value: image i = 0 .. L-1 of these, in
descending order, becomes

    x_i <- a_i x_i + (1 - a_i) x_lost(i),   a_i = 0.7 + 0.3 (L - i) / L

with its own label. Blends add up over the stages; the teacher sees the blended images. `condensation` holds these
formulas, `data` the condensed data set, `callback` says when.
"""

from lightning_compress.callbacks.distillation.kcd.callback import KCD

__all__ = ["KCD"]
