"""Architecture Decoupling: every image computes only the filters that it needs.

Li, Ji, Lin, Zhang, Yan, Ye, Huang, Shao, Ji, "Interpretable Neural Network Decoupling", ECCV 2020, arXiv:1906.01166.

A small controller reads the input of a convolution and answers with a binary mask over its filters. What is not
selected need not be computed, and the masks of all layers side by side, the *calculation path*, tell what an image is:

    y = A2 ReLU(A1 GAP(X) + b1) + b2,   m = 1[y > 0],   out = m * act(BN(conv(X)))
    L = CE + lambda_k L_k + lambda_s L_s + lambda_m L_m

To read in this order: `semhash` (how a binary mask is trained), `losses` (what it is trained for), `units` (where
gates go), `gates` (controllers and the hooks that apply them), `paths` (what masks tell and cost), `dynamic` (skipping
what is not selected), `callback` (when all this happens).
"""

from lightning_compress.callbacks.pruning.architecture_decoupling.callback import ArchitectureDecoupling
from lightning_compress.callbacks.pruning.architecture_decoupling.dynamic import dynamic_copy
from lightning_compress.callbacks.pruning.architecture_decoupling.gates import gates_of
from lightning_compress.callbacks.pruning.architecture_decoupling.paths import (
    class_paths,
    filter_kinds,
    hamming,
    path,
    prune_static,
)

__all__ = [
    "ArchitectureDecoupling",
    "class_paths",
    "dynamic_copy",
    "filter_kinds",
    "gates_of",
    "hamming",
    "path",
    "prune_static",
]
