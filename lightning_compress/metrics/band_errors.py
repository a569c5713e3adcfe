"""In which frequencies generated images are wrong.

Zhang, Chen, Tu, Wan, Xu, Ma, "Wavelet Knowledge Distillation: Towards Efficient Image-to-Image Translation", CVPR 2022,
arXiv:2203.06321, who found generators, small ones above all, good at low frequencies and bad at high ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_compress.core.distill.wavelets import DETAILS, Wavelet, decompose


class BandErrors(Metric):
    """Errors of images by the bands of a wavelet transform: mean |generated - reference| / mean |reference| of each.

    Both sums are over all images, and over all processes, before they are divided. `compute` returns a dict, from fine
    to coarse: ``horizontal_1``, ``vertical_1``, ``diagonal_1``, ..., ``low_J``.

    Args:
        levels: J, how often the low band is split.
        wavelet: ``"haar"``, or ``"db2"`` to ``"db4"``.
        kwargs: see `torchmetrics.Metric`.

    >>> errors = BandErrors(levels=1)
    >>> image = torch.rand(1, 3, 8, 8)
    >>> errors.update(image + 0.1, image)
    >>> {name: round(error.item(), 2) for name, error in errors.compute().items() if "low" not in name}
    {'horizontal_1': 0.0, 'vertical_1': 0.0, 'diagonal_1': 0.0}
    """

    higher_is_better = False
    full_state_update = False
    sums: Tensor

    def __init__(self, levels: int = 4, wavelet: Wavelet = "haar", **kwargs) -> None:
        super().__init__(**kwargs)
        self.levels = levels
        self.wavelet: Wavelet = wavelet
        self.names = [f"{band}_{level}" for level in range(1, levels + 1) for band in DETAILS] + [f"low_{levels}"]
        self.add_state("sums", torch.zeros(2, len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, generated: Tensor, reference: Tensor) -> None:
        """Add images (N, C, H, W) and what they should be."""
        with torch.no_grad(), torch.autocast(generated.device.type, enabled=False):
            difference = generated.float() - reference.float()
            sizes = torch.stack([self._sizes(difference), self._sizes(reference.float())])
        # not in place: after a standalone validation this is an inference tensor
        self.sums = self.sums + sizes.to(self.sums)

    def compute(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.sums[0] / self.sums[1], strict=True))

    def _sizes(self, images: Tensor) -> Tensor:
        low, details = decompose(images, self.levels, self.wavelet)
        bands = [*(band for level in details for band in level), low]
        return torch.stack([band.abs().sum(dtype=torch.float64) for band in bands])
