"""LightningModules: a task to train, or a method that is a training system of its own."""

from lightning_compress.modules.image_classifier import ImageClassifier
from lightning_compress.modules.pruning.gal import GAL
from lightning_compress.modules.super_resolution import SuperResolution

__all__ = ["GAL", "ImageClassifier", "SuperResolution"]
