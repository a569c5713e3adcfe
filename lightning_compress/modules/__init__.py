"""LightningModules: a task to train, or a method that is a training system of its own."""

from lightning_compress.modules.distillation.ffsd import FFSD
from lightning_compress.modules.distillation.online_distillation import OnlineDistillation
from lightning_compress.modules.image_classifier import ImageClassifier
from lightning_compress.modules.pruning.gal import GAL
from lightning_compress.modules.reid.cross_modal_reid import CrossModalReID
from lightning_compress.modules.super_resolution import SuperResolution
from lightning_compress.modules.translation import (
    CRDCycleGAN,
    CRDPix2Pix,
    CycleGAN,
    DCDCycleGAN,
    DCDPix2Pix,
    Pix2Pix,
)

__all__ = [
    "FFSD",
    "GAL",
    "CRDCycleGAN",
    "CRDPix2Pix",
    "CrossModalReID",
    "CycleGAN",
    "DCDCycleGAN",
    "DCDPix2Pix",
    "ImageClassifier",
    "OnlineDistillation",
    "Pix2Pix",
    "SuperResolution",
]
