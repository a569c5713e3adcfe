"""Whether translated images show what the labels say: a segmentation network reads them, and its labels are compared.

Isola, Zhu, Zhou, Efros, "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017,
arXiv:1611.07004, section 3.4, for photographs made from Cityscapes' label maps:

    IoU_c = n_cc / (sum_k n_ck + sum_k n_kc - n_cc),   n_ck: pixels of class c that are taken for class k
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix

from lightning_compress.core.distill.teacher import Teacher
from lightning_compress.core.images import as_bytes

# of Cityscapes' photographs in [0, 1], which the DRN networks (arXiv:1705.09914) are given
_MEAN = (0.2901, 0.3281, 0.2870)
_STD = (0.1830, 0.1866, 0.1845)


def mean_iou(confusion: Tensor) -> Tensor:
    """Mean intersection over union in percent of pixel counts (K, K), rows the true classes.

    Classes that are neither there nor found do not count; nan if that is true of all.

    >>> mean_iou(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))  # 3/4 and 4/5
    tensor(77.5000)
    """
    both = confusion.diagonal().float()
    return 100 * (both / (confusion.sum(0) + confusion.sum(1) - both)).nanmean()


class SegmentationIoU(Metric):
    """Mean intersection over union, in percent, of the labels that a segmentation network gives translated images.

    Pixels are counted over all images, and over all processes, before anything is divided. (torchmetrics' `MeanIoU`
    averages the images' own values.)

    Args:
        segmenter: network from normalised images (N, 3, H, W) to scores (N, K, h, w); a copy in eval mode is kept,
            which is in no ``state_dict`` and no optimiser. Papers take DRN-D-105; nothing is downloaded.
        num_classes: K.
        mean: per channel, of images in [0, 1], as the segmenter was trained; Cityscapes' by default.
        std: likewise.
        kwargs: see `torchmetrics.Metric`.
    """

    higher_is_better = True
    full_state_update = False
    confusion: Tensor

    def __init__(
        self,
        segmenter: nn.Module,
        num_classes: int = 19,
        mean: Sequence[float] = _MEAN,
        std: Sequence[float] = _STD,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        if num_classes < 2:
            raise ValueError(f"num_classes: expected 2 or more, got {num_classes}.")
        self._segmenter = Teacher(segmenter)  # no nn.Module
        self.num_classes = num_classes
        self.mean, self.std = tuple(mean), tuple(std)
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Add images and their labels.

        Args:
            images: (N, 3, H, W) in [-1, 1]; they are read as the bytes that a file would hold.
            labels: (N, H', W'), integers; scores are resized to H', W' (bilinear). What is not in 0..K-1 is ignored.

        Raises:
            ValueError: the segmenter does not know K classes.
        """
        mean, std = (images.new_tensor(x, dtype=torch.float32)[:, None, None] for x in (self.mean, self.std))
        with torch.autocast(images.device.type, enabled=False):
            scores = self._segmenter.to(images.device)((as_bytes(images).float() / 255 - mean) / std)
        if scores.shape[1] != self.num_classes:
            raise ValueError(f"num_classes: {self.num_classes}, but the segmenter has {scores.shape[1]} classes.")
        found = F.interpolate(scores, labels.shape[-2:], mode="bilinear", align_corners=False).argmax(1)
        known = (labels >= 0) & (labels < self.num_classes)
        # not in place: after a standalone validation this is an inference tensor
        self.confusion = self.confusion + multiclass_confusion_matrix(
            found[known], labels[known].long(), self.num_classes, validate_args=False
        )

    def compute(self) -> Tensor:
        return mean_iou(self.confusion)
