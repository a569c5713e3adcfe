"""Convolution of signs with signs: a bit per weight, a bit per input, up to 512 products in three instructions.

Rastegari, Ordonez, Redmon, Farhadi, "XNOR-Net", ECCV 2016, arXiv:1603.05279; with the conventions of Lin et al.,
"Rotated Binary Neural Network", NeurIPS 2020, arXiv:2009.13055, and "SiMaN: Sign-to-Magnitude Network Binarization",
TPAMI 2023, arXiv:2102.07981.

    a = sign(x - mean(x))    per sample, sign(0) = +1; padding is 0, neither -1 nor +1
    y = activation(scale * sum w a + shift + residual)
    w in {-1, +1}:  sum w a = K - 2 popcount(w xor a)          K: how many products there are
    w in { 0, +1}:  sum w a = 2 popcount(w and a) - popcount(w)

`binary_conv2d` is one operator for torch, `torch.compile` and export; `BinaryConv2d` is the layer; `fuse` rewrites a
network so that what stands behind these layers is computed in them.
"""

from lightning_compress.ops.binary_conv2d.fuse import fuse
from lightning_compress.ops.binary_conv2d.layer import BinaryConv2d
from lightning_compress.ops.binary_conv2d.operator import binary_conv2d, pack_rows, unpack_rows

__all__ = ["BinaryConv2d", "binary_conv2d", "fuse", "pack_rows", "unpack_rows"]
