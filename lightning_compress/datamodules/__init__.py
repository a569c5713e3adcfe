"""Datamodules: one file per kind of data."""

from lightning_compress.datamodules.digits import Digits

__all__ = ["Digits"]
