"""Callbacks: what you add to a Trainer, for any LightningModule."""

from lightning_compress.callbacks.export_compressed import ExportCompressed
from lightning_compress.callbacks.pruning.abc_pruner import ABCPruner
from lightning_compress.callbacks.pruning.architecture_decoupling import ArchitectureDecoupling
from lightning_compress.callbacks.pruning.filter_sketch import FilterSketch
from lightning_compress.callbacks.pruning.hrank import HRank
from lightning_compress.callbacks.pruning.kse import KSE
from lightning_compress.callbacks.pruning.l1_norm import L1Norm
from lightning_compress.callbacks.pruning.random_channels import RandomChannels
from lightning_compress.callbacks.pruning.ssr import SSR
from lightning_compress.callbacks.pruning.white_box import WhiteBox
from lightning_compress.callbacks.restore_compressed import RestoreCompressed

__all__ = [
    "KSE",
    "SSR",
    "ABCPruner",
    "ArchitectureDecoupling",
    "ExportCompressed",
    "FilterSketch",
    "HRank",
    "L1Norm",
    "RandomChannels",
    "RestoreCompressed",
    "WhiteBox",
]
