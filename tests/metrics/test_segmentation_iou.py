from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_compress.metrics import SegmentationIoU
from lightning_compress.metrics.segmentation_iou import mean_iou


class Segmenter(nn.Module):
    """Scores at half the size, from the pixels alone."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, classes, 1), nn.AvgPool2d(2), nn.Dropout(0.5))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def example(seed: int, count: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1
    return images, torch.randint(-1, 7, (count, 16, 24), generator=generator)


def test_it_is_the_jaccard_index_of_all_pixels_together() -> None:
    segmenter = Segmenter().eval()
    metric = SegmentationIoU(segmenter, num_classes=5)
    reference = MulticlassJaccardIndex(5, ignore_index=-1)
    for seed in range(3):
        images, labels = example(seed)
        metric.update(images, labels)
        stored = ((images + 1) / 2 * 255).floor() / 255
        mean, std = ((torch.tensor(x)[:, None, None]) for x in ((0.2901, 0.3281, 0.2870), (0.1830, 0.1866, 0.1845)))
        with torch.no_grad():
            scores = F.interpolate(segmenter((stored - mean) / std), (16, 24), mode="bilinear")
        reference.update(scores.argmax(1), torch.where(labels < 5, labels, -1))
    assert metric.compute().item() == pytest.approx(100 * reference.compute().item(), rel=1e-6)


def test_log_probabilities_and_scores_give_the_same_labels() -> None:
    segmenter = Segmenter()
    one = SegmentationIoU(segmenter, num_classes=5)
    other = SegmentationIoU(nn.Sequential(segmenter, nn.LogSoftmax(1)), num_classes=5)
    for metric in (one, other):
        metric.update(*example(0))
    assert torch.equal(one.confusion, other.confusion)


def test_classes_that_are_nowhere_do_not_count() -> None:
    assert mean_iou(torch.diag(torch.tensor([4, 0, 2]))).item() == 100
    assert mean_iou(torch.tensor([[4, 0, 0], [0, 0, 0], [2, 0, 0]])).item() == pytest.approx(100 * (4 / 6 + 0) / 2)
    assert mean_iou(torch.zeros(3, 3)).isnan()


def test_pixels_without_a_known_label_do_not_count() -> None:
    metric = SegmentationIoU(Segmenter(), num_classes=5)
    images, labels = example(0)
    metric.update(images, labels)
    assert metric.confusion.sum() == ((labels >= 0) & (labels < 5)).sum()
    metric.update(images, torch.full_like(labels, 255))
    assert metric.confusion.sum() == ((labels >= 0) & (labels < 5)).sum()


def test_counts_of_batches_and_processes_add_up() -> None:
    whole, parts = (SegmentationIoU(Segmenter(), num_classes=5) for _ in range(2))
    images, labels = example(0, 6)
    whole.update(images, labels)
    with torch.inference_mode():
        parts.update(images[:2], labels[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts.update(images[2:], labels[2:])
    assert torch.equal(whole.confusion, parts.confusion)
    assert whole._reductions["confusion"].__name__ == "dim_zero_sum"  # type: ignore[union-attr]


def test_the_segmenter_is_outside() -> None:
    metric = SegmentationIoU(Segmenter(), num_classes=5)
    assert not list(metric.parameters())
    assert not metric.state_dict()


def test_the_number_of_classes_has_to_fit() -> None:
    with pytest.raises(ValueError, match="num_classes: expected 2 or more, got 1"):
        SegmentationIoU(Segmenter(), num_classes=1)
    with pytest.raises(ValueError, match="num_classes: 19, but the segmenter has 5 classes"):
        SegmentationIoU(Segmenter()).update(*example(0))
