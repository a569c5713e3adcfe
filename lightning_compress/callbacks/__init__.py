"""Callbacks: what you add to a Trainer, for any LightningModule."""

from lightning_compress.callbacks.distillation.co_attention import CoAttentionDistillation
from lightning_compress.callbacks.distillation.kcd import KCD
from lightning_compress.callbacks.distillation.knowledge_distillation import KnowledgeDistillation
from lightning_compress.callbacks.distillation.variational_distillation import VariationalDistillation
from lightning_compress.callbacks.distillation.wavelet_distillation import WaveletDistillation
from lightning_compress.callbacks.export_compressed import ExportCompressed
from lightning_compress.callbacks.pruning.abc_pruner import ABCPruner
from lightning_compress.callbacks.pruning.architecture_decoupling import ArchitectureDecoupling
from lightning_compress.callbacks.pruning.dmad import DMAD
from lightning_compress.callbacks.pruning.filter_sketch import FilterSketch
from lightning_compress.callbacks.pruning.hrank import HRank
from lightning_compress.callbacks.pruning.kse import KSE
from lightning_compress.callbacks.pruning.l1_norm import L1Norm
from lightning_compress.callbacks.pruning.random_channels import RandomChannels
from lightning_compress.callbacks.pruning.ssr import SSR
from lightning_compress.callbacks.pruning.white_box import WhiteBox
from lightning_compress.callbacks.quantization.dgms import DGMS
from lightning_compress.callbacks.quantization.lts import LTS
from lightning_compress.callbacks.quantization.pams import PAMS
from lightning_compress.callbacks.quantization.qat import QAT
from lightning_compress.callbacks.quantization.rbnn import RBNN
from lightning_compress.callbacks.quantization.siman import SiMaN
from lightning_compress.callbacks.restore_compressed import RestoreCompressed
from lightning_compress.callbacks.sparsity.admm_nn import ADMMNN
from lightning_compress.callbacks.sparsity.lbc import LBC
from lightning_compress.callbacks.sparsity.lottery_jackpots import LotteryJackpots
from lightning_compress.callbacks.sparsity.magnitude_pruning import MagnitudePruning
from lightning_compress.callbacks.sparsity.pattern_pruning import PatternPruning
from lightning_compress.callbacks.sparsity.pcnn import PCNN
from lightning_compress.callbacks.sparsity.pconv import PCONV

__all__ = [
    "ADMMNN",
    "DGMS",
    "DMAD",
    "KCD",
    "KSE",
    "LBC",
    "LTS",
    "PAMS",
    "PCNN",
    "PCONV",
    "QAT",
    "RBNN",
    "SSR",
    "ABCPruner",
    "ArchitectureDecoupling",
    "CoAttentionDistillation",
    "ExportCompressed",
    "FilterSketch",
    "HRank",
    "KnowledgeDistillation",
    "L1Norm",
    "LotteryJackpots",
    "MagnitudePruning",
    "PatternPruning",
    "RandomChannels",
    "RestoreCompressed",
    "SiMaN",
    "VariationalDistillation",
    "WaveletDistillation",
    "WhiteBox",
]
