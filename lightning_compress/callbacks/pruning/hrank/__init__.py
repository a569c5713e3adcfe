"""HRank: remove the channels whose feature maps have the lowest rank."""

from __future__ import annotations

from lightning_compress.callbacks.pruning.hrank.ranks import FeatureRanks, feature_map_rank, select_channels

__all__ = ["FeatureRanks", "feature_map_rank", "select_channels"]
