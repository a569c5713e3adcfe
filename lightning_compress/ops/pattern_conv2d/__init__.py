"""3x3 convolution with few weights: of every kernel that is left, some taps in one of a few shapes.

Ma et al., "PCONV: The Missing but Desirable Sparsity in DNN Weight Pruning for Real-time Execution on Mobile Devices",
AAAI 2020, arXiv:1909.05073; Niu et al., "PatDNN", ASPLOS 2020, arXiv:2001.00138.

    y[n, f_bk] = bias + sum_{i in block b} w[i, k] * shift(x[n, c_i], tap_i)     the K filters of b share (c_i, tap_i)

`pattern_conv2d` is one operator for torch, `torch.compile` and export; `PatternConv2d` is the layer.
"""

from lightning_compress.ops.pattern_conv2d.layer import PatternConv2d, to_pattern_layers
from lightning_compress.ops.pattern_conv2d.operator import NonZeros, dense_weight, non_zeros, pattern_conv2d

__all__ = ["NonZeros", "PatternConv2d", "dense_weight", "non_zeros", "pattern_conv2d", "to_pattern_layers"]
