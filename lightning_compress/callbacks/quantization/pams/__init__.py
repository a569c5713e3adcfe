r"""PAMS: super-resolution with a few bits, where every activation has a range that is learnt.

Li, Yan, Lin, Zheng, Chao, Yang, Ji, "PAMS: Quantized Super-Resolution via Parameterized Max Scale", ECCV 2020,
arXiv:2011.04212.

Super-resolution networks have no batch norm, so their activations are wide, and differ from layer to layer and from
image to image. Each quantised activation gets one learnt number alpha. With k bits and q = 2^(k-1) - 1:

    W_q = round(W q / m) m / q,              m = max|W| + 1e-8,      dL/dW = dL/dW_q
    x_q = round(x_c q / alpha) alpha / q,    x_c = max(min(x, alpha), -alpha)
    dx_q/dx = 1 where |x| < alpha, else 0
    dx_q/dalpha = (round(u) - u) / q with u = x q / alpha where |x| < alpha, else sign(x)

For one epoch alpha is measured, as the mean over a batch of the largest |x| of each image, and nothing is clipped;
from then on it is learnt. A real network, the teacher, helps (structured knowledge transfer): where the features F in
front of the upsampler are strong in the one, they are to be strong in the other:

    L = mean|SR - HR| + w_at * mean( (A(F_student) - A(F_teacher))^2 ),   A(F) = normalised over HW( mean_C F^2 )

`quantizers` has the arithmetic, `transfer` the second term, `placement` where quantisers sit, `callback` the rest.
"""

from lightning_compress.callbacks.quantization.pams.callback import PAMS
from lightning_compress.callbacks.quantization.pams.placement import Placement, place, quantize
from lightning_compress.callbacks.quantization.pams.quantizers import MaxScaleWeight, OnGrid, PAMSQuantizer
from lightning_compress.callbacks.quantization.pams.transfer import structured_transfer

__all__ = [
    "PAMS",
    "MaxScaleWeight",
    "OnGrid",
    "PAMSQuantizer",
    "Placement",
    "place",
    "quantize",
    "structured_transfer",
]
