"""Metrics that torchmetrics does not ship."""

from lightning_compress.metrics.luminance import LuminancePSNR, LuminanceSSIM

__all__ = ["LuminancePSNR", "LuminanceSSIM"]
