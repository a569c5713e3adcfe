"""Datamodules: one file per kind of data."""

from lightning_compress.datamodules.cifar import CIFAR10, CIFAR100
from lightning_compress.datamodules.digits import Digits
from lightning_compress.datamodules.image_folder import ImageFolder
from lightning_compress.datamodules.mnist import MNIST, FashionMNIST
from lightning_compress.datamodules.photographs import Photographs
from lightning_compress.datamodules.super_resolution_folder import SuperResolutionFolder

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "Digits",
    "FashionMNIST",
    "ImageFolder",
    "Photographs",
    "SuperResolutionFolder",
]
