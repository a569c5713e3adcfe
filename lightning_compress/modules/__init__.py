"""LightningModules: a task to train, or a method that is a training system of its own."""

from lightning_compress.modules.image_classifier import ImageClassifier

__all__ = ["ImageClassifier"]
