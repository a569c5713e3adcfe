r"""Lottery Jackpots: find a sparse network inside a trained one without touching a single weight.

Zhang, Lin, Zhong, Chao, Ji, "Lottery Jackpots Exist in Pre-trained Models", IEEE TPAMI 45(12), 2023, arXiv:2104.08700.

Weights W of the trained network are frozen. Each has a score S and a bit b, and the layer computes with

    W_hat = b * W,      dL/dS = dL/dW_hat * W      straight through the bit, also where it is 0.

c_i weights of layer i are out: as many as lie below the q-th largest magnitude of the whole network (l1), or the same
share of every layer (uniform). The start is the magnitude mask, S = 1 where b = 1 and 0.99 where b = 0: a gap that a
few steps can close. After each step of the optimiser the c_i lowest scores should be out. Those that are in and must
leave, V, change places with those that are out and may enter, U, of which there are as many:

    m = ceil(rate * |U|):   the m highest of U enter, the m lowest of V leave

The short restriction is a rate that falls from 1 to 0 with the epochs; the released experiments run with 1. The
statistics of batch norms follow the sparse network, everything else stays as it was: a bit per weight is learnt.

To read in this order: `lots` (the mathematics and the parametrisation), `file` (the bits alone), `callback`.
"""

from lightning_compress.callbacks.sparsity.lottery_jackpots.callback import LotteryJackpots
from lightning_compress.callbacks.sparsity.lottery_jackpots.file import load_jackpot, save_jackpot
from lightning_compress.callbacks.sparsity.lottery_jackpots.lots import JackpotMask, pruned_counts, swap

__all__ = ["JackpotMask", "LotteryJackpots", "load_jackpot", "pruned_counts", "save_jackpot", "swap"]
