"""PSNR and SSIM as super-resolution papers report them: of the luminance, without the border, mean over images.

    PSNR = 10 log10(255^2 / mean (x - y)^2)
    SSIM = mean over windows of (2 mx my + C1) (2 cov + C2) / ((mx^2 + my^2 + C1) (vx + vy + C2))

SSIM is Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to Structural Similarity",
IEEE TIP 13(4), 2004, with its constants: Gaussian windows of 11x11, sigma 1.5, that stay inside the image,
C1 = (0.01 255)^2, C2 = (0.03 255)^2. (torchmetrics lets windows hang over the border, and takes the PSNR of all
images' pixels together.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

# ITU-R BT.601: the Y of YCbCr in 16..235, from R, G, B in 0..255, as MATLAB's rgb2ycbcr computes it.
_Y_OF_RGB = (65.481 / 255, 128.553 / 255, 24.966 / 255)
_Y_OF_BLACK = 16.0


def luminance(images: Tensor, border: int = 0) -> Tensor:
    """Luminance of what would be stored: (N, 3, H, W) in 0..255 to (N, 1, H - 2 border, W - 2 border) in 16..235.

    Values are rounded and clamped to 0..255 first; the luminance itself is not rounded. Grey images, (N, 1, H, W), keep
    their values.

    Args:
        images: any floating point or integer type.
        border: pixels that are cut off on each side; papers use the scale, which is as far as a network has to invent.

    Raises:
        ValueError: neither colour nor grey, or nothing would be left.

    >>> luminance(torch.tensor([0.0, 255.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)).flatten()
    tensor([ 16., 235.])
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected (N, 3, H, W) or (N, 1, H, W), got {tuple(images.shape)}.")
    height, width = images.shape[-2:]
    if not 0 <= 2 * border < min(height, width):
        raise ValueError(f"border: {border} pixels on each side leave nothing of {height}x{width} pixels.")
    images = images[:, :, border : height - border, border : width - border]
    images = images.float().round().clamp(0, 255)
    if images.shape[1] == 1:
        return images
    weights = images.new_tensor(_Y_OF_RGB)[:, None, None]
    return _Y_OF_BLACK + (weights * images).sum(1, keepdim=True)


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, for a peak of 255: (N, C, H, W) twice to (N,)."""
    return 10 * torch.log10(255**2 / (images - target).square().flatten(1).mean(1))


def ssim(images: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each image, see above: (N, 1, H, W) twice, at least 11x11, to (N,)."""
    if min(images.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs 11x11 pixels inside of the border, got {images.shape[-2]}x{images.shape[-1]}.")
    bell = torch.exp(-torch.arange(-5, 6, device=images.device).square() / (2 * 1.5**2)).to(images.dtype)
    bell = bell / bell.sum()

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, bell.view(1, 1, 11, 1)), bell.view(1, 1, 1, 11))

    mean_x, mean_y = mean(images), mean(target)
    var_x, var_y = mean(images * images) - mean_x**2, mean(target * target) - mean_y**2
    covariance = mean(images * target) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similar / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).flatten(1).mean(1)


class LuminanceMetric(Metric):
    """Mean over images of a score of their luminance.

    Args:
        border: pixels that are cut off on each side, see `luminance`.
        kwargs: see `torchmetrics.Metric`.
    """

    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, border: int = 0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.border = border
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def score(self, images: Tensor, target: Tensor) -> Tensor:
        """Score images (N, 1, H, W): (N,)."""
        raise NotImplementedError

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add images (N, 3, H, W) in 0..255, and what they should be."""
        # variances are small differences of large squares: nothing for half precision
        with torch.autocast(preds.device.type, enabled=False):
            scores = self.score(luminance(preds, self.border), luminance(target, self.border))
        # not in place: after a standalone validation these are inference tensors
        self.total = self.total + scores.sum()
        self.count = self.count + len(scores)

    def compute(self) -> Tensor:
        return self.total / self.count


class LuminancePSNR(LuminanceMetric):
    """Peak signal-to-noise ratio of the luminance in dB, the mean of all images' own values.

    Args:
        border: pixels that are cut off on each side, see `luminance`.
        kwargs: see `torchmetrics.Metric`.

    >>> metric = LuminancePSNR(border=2)
    >>> round(metric(torch.full((1, 3, 8, 8), 100.0), torch.full((1, 3, 8, 8), 110.0)).item(), 3)
    29.453
    """

    def score(self, images: Tensor, target: Tensor) -> Tensor:
        return psnr(images, target)


class LuminanceSSIM(LuminanceMetric):
    """Structural similarity of the luminance, mean over images.

    Args:
        border: pixels that are cut off on each side, see `luminance`.
        kwargs: see `torchmetrics.Metric`.

    >>> metric = LuminanceSSIM()
    >>> metric(torch.full((1, 3, 16, 16), 100.0), torch.full((1, 3, 16, 16), 100.0))
    tensor(1.)
    """

    def score(self, images: Tensor, target: Tensor) -> Tensor:
        return ssim(images, target)
