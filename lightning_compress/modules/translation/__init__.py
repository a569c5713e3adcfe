"""Image-to-image translation: generators that are trained against discriminators."""

from lightning_compress.modules.translation.crd import CRDCycleGAN, CRDPix2Pix
from lightning_compress.modules.translation.cycle_gan import CycleGAN
from lightning_compress.modules.translation.dcd import DCDCycleGAN, DCDPix2Pix
from lightning_compress.modules.translation.image_pool import ImagePool
from lightning_compress.modules.translation.losses import gan_loss, gradient_penalty
from lightning_compress.modules.translation.pix2pix import Pix2Pix
from lightning_compress.modules.translation.system import Direction, TranslationGAN

__all__ = [
    "CRDCycleGAN",
    "CRDPix2Pix",
    "CycleGAN",
    "DCDCycleGAN",
    "DCDPix2Pix",
    "Direction",
    "ImagePool",
    "Pix2Pix",
    "TranslationGAN",
    "gan_loss",
    "gradient_penalty",
]
