"""ABCPruner: search how many filters each layer keeps, with an artificial bee colony.

Lin, Ji, Zhang, Zhang, Wu, Tian, "Channel Pruning via Automatic Structure Search", IJCAI 2020, arXiv:2001.08565.
The colony: Karaboga, "An idea based on honey bee swarm for numerical optimization", TR06, Erciyes University, 2005.

What matters is how many filters a layer has, not which. A structure is a code with one number per layer,

    C in {1, ..., P}^D,    layer j keeps int(n_j * C_j / 10) of its n_j filters,

and its fitness is the accuracy of a network of these widths, with filters taken from the trained one, after a short
training. S food sources (codes) are improved for T cycles:

    employed bees   every source i: V = C_i, then in q random places d:  V_d = int(C_id + r * (C_id - C_kd)),
                    clipped to 1..P, of a random other source k, r ~ U(-1, 1); V replaces C_i if it is fitter
    onlookers       the same S times more, on source i with probability  p_i = 0.9 * f_i / max f + 0.1
    scout           a source that failed to improve M times is abandoned for a random code

The fittest code ever seen, with the weights of its short training, is what is fine-tuned. MACs are no part of the
fitness: P is the budget.

To read in this order: `colony` (the bees, without a network), `inherit` (from a code to a narrow network), `search`
(fitness, and a search that can be killed at any time), `callback` (when all this happens).
"""

from lightning_compress.callbacks.pruning.abc_pruner.callback import ABCPruner
from lightning_compress.callbacks.pruning.abc_pruner.colony import BeeColony
from lightning_compress.callbacks.pruning.abc_pruner.inherit import kept_width, published_macs

__all__ = ["ABCPruner", "BeeColony", "kept_width", "published_macs"]
