r"""GAL: learn without labels which blocks, branches and channels a network can do without, and cut them out.

Lin, Ji, Yan, Zhang, Cao, Ye, Huang, Doermann, "Towards Optimal Structured CNN Pruning via Generative Adversarial
Learning", CVPR 2019, arXiv:1903.09291.

Every structure gets a scale m, its soft mask. The trained network f_b stays frozen; a copy f_g with weights W and masks
m must give the same logits, judged by their distance and by a small discriminator D that is trained to tell them apart:

    min_{W, m} max_D   E[log D(f_b)] + E[log(1 - D(f_g))] + miu * mean((f_b - f_g)^2) + lambda * ||m||_1 + R(D)

The l1 norm is minimised by FISTA, an accelerated proximal gradient step that lands on exact zeros, and no mask is
negative after it:

    y = m + (alpha - 1) / alpha' * (m - m_prev),    v = y - eta * g,    m = max(|v| - eta * lambda, 0) where v > 0

What has m = 0 is cut out, which changes nothing of the function, the other masks are multiplied into the weights, and
the network that is left, plain and smaller, is trained on by cross-entropy.

To read in this order: `fista` (the optimiser), `adversary` (the discriminator and its losses), `points` (what can be
masked, found from the network's structure), `masks` (the masks at work), `cut` (from zeros to a smaller network),
`module` (when all this happens).
"""

from lightning_compress.modules.pruning.gal.adversary import Discriminator
from lightning_compress.modules.pruning.gal.fista import FISTA, shrink
from lightning_compress.modules.pruning.gal.module import GAL
from lightning_compress.modules.pruning.gal.points import Point, find_points

__all__ = ["FISTA", "GAL", "Discriminator", "Point", "find_points", "shrink"]
