"""Datamodules: one file per kind of data."""

from lightning_compress.datamodules.cifar import CIFAR10, CIFAR100
from lightning_compress.datamodules.digits import Digits
from lightning_compress.datamodules.image_folder import ImageFolder
from lightning_compress.datamodules.mnist import MNIST, FashionMNIST
from lightning_compress.datamodules.paired_images import PairedImages
from lightning_compress.datamodules.paired_photographs import PairedPhotographs
from lightning_compress.datamodules.photographs import Photographs
from lightning_compress.datamodules.regdb import RegDB
from lightning_compress.datamodules.super_resolution_folder import SuperResolutionFolder
from lightning_compress.datamodules.sysu_mm01 import SYSUMM01
from lightning_compress.datamodules.two_view_digits import TwoViewDigits
from lightning_compress.datamodules.unpaired_images import UnpairedImages
from lightning_compress.datamodules.unpaired_photographs import UnpairedPhotographs

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "SYSUMM01",
    "Digits",
    "FashionMNIST",
    "ImageFolder",
    "PairedImages",
    "PairedPhotographs",
    "Photographs",
    "RegDB",
    "SuperResolutionFolder",
    "TwoViewDigits",
    "UnpairedImages",
    "UnpairedPhotographs",
]
