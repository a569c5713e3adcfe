"""Datamodules: one file per kind of data."""

from lightning_compress.datamodules.cifar import CIFAR10, CIFAR100
from lightning_compress.datamodules.digits import Digits
from lightning_compress.datamodules.image_folder import ImageFolder
from lightning_compress.datamodules.mnist import MNIST, FashionMNIST

__all__ = ["CIFAR10", "CIFAR100", "MNIST", "Digits", "FashionMNIST", "ImageFolder"]
