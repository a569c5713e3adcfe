"""HRank: remove the filters whose feature maps have the lowest rank.

Lin, Ji, Wang, Zhang, Zhang, Tian, Shao, "HRank: Filter Pruning using High-Rank Feature Map", CVPR 2020 (oral),
arXiv:2002.10179.

A filter whose outputs are matrices of low rank carries little information, and the mean rank over a few hundred images
is nearly the same whichever images they are:

    r_j = (1/g) sum_t rank(O[t, j]),    of n filters the pruning_ratio * n with the smallest r_j go.

To read in this order: `ranks` (the mathematics), `published` (which of the paper's numbers means which layer, and its
way of counting), `taps` (where maps are read), `sequential` (the paper's layer-by-layer training), `unaligned` (what
the authors' second code adds up), `callback` (when all this happens).
"""

from lightning_compress.callbacks.pruning.hrank.callback import HRank
from lightning_compress.callbacks.pruning.hrank.ranks import FeatureRanks, feature_map_rank, select_channels

__all__ = ["FeatureRanks", "HRank", "feature_map_rank", "select_channels"]
