"""A memory of past translations, which keeps a discriminator from chasing the latest ones alone.

Shrivastava et al., "Learning from Simulated and Unsupervised Images through Adversarial Training", CVPR 2017,
arXiv:1612.07828.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ImagePool:
    """Holds up to `size` images, and gives out new ones or, half of the time, old ones.

    While there is room, an image is kept and given back. Then a fair coin decides, image by image, between giving it
    back and giving one from the memory, drawn evenly, whose place it takes.

    Args:
        size: images in memory; 0 gives every image back. 50 in the papers.
        generator: of the coin and the draw, on the CPU. Pools may share one.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        if size < 0:
            raise ValueError(f"pool_size: expected 0 or more images, got {size}.")
        self.size = size
        self.generator = generator
        self.images: Tensor | None = None  # (up to size, C, H, W)

    def query(self, images: Tensor) -> Tensor:
        """Give as many images as come in, (N, C, H, W), without a graph; one after the other, in the batch's order.

        Raises:
            ValueError: images of another size than those in memory.
        """
        images = images.detach()
        if not self.size:
            return images
        held = images[:0] if self.images is None else self.images.to(images)
        if held.shape[1:] != images.shape[1:]:
            raise ValueError(f"The pool holds images of shape {tuple(held.shape[1:])}, got {tuple(images.shape[1:])}.")
        room = self.size - len(held)
        held = torch.cat([held, images[:room]]) if room else held
        given = [images[:room]]
        for image in images[room:]:
            if torch.rand((), generator=self.generator, dtype=torch.float32) > 0.5:
                place = int(torch.randint(self.size, (), generator=self.generator))
                given.append(held[place : place + 1].clone())
                held[place] = image
            else:
                given.append(image[None])
        self.images = held
        return torch.cat(given)

    def state_dict(self) -> dict[str, Any]:
        """The images in memory, on the CPU; not the generator."""
        return {"images": None if self.images is None else self.images.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.images = None if state["images"] is None else state["images"].clone()
