"""Metrics that torchmetrics does not ship."""

from lightning_compress.metrics.band_errors import BandErrors
from lightning_compress.metrics.frechet_distance import FrechetDistance, InceptionFeatures, RandomFeatures
from lightning_compress.metrics.luminance import LuminancePSNR, LuminanceSSIM
from lightning_compress.metrics.retrieval import CrossCameraRetrieval
from lightning_compress.metrics.segmentation_iou import SegmentationIoU

__all__ = [
    "BandErrors",
    "CrossCameraRetrieval",
    "FrechetDistance",
    "InceptionFeatures",
    "LuminancePSNR",
    "LuminanceSSIM",
    "RandomFeatures",
    "SegmentationIoU",
]
