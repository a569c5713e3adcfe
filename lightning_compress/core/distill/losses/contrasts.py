"""Which embedding belongs to which image, against other images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.distill.losses.parts import in_float32


@in_float32
def contrast(student: Tensor, teacher: Tensor, labels: Tensor | None = None, temperature: float = 0.07) -> Tensor:
    """Each image's two embeddings belong together, and not to other images of the batch.

    After Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699. Theirs is a
    noise-contrastive estimate against 16,384 negatives from a memory of the whole data set, :func:`noise_contrast`;
    here it is a softmax over the batch (InfoNCE), which needs no memory and no index of images. As there, both sides
    are anchors, and images of the own class are no negatives.

    Args:
        student: embeddings (B, D).
        teacher: embeddings (B, D).
        labels: (B,), class indices; None: all other images are negatives.

    >>> e = torch.eye(2)
    >>> round(contrast(e, e, temperature=1.0).item(), 4)  # 2 log(1 + 1/e)
    0.6265
    """
    scores = F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).T / temperature
    own = torch.arange(len(scores), device=scores.device)
    if labels is not None:
        same = (labels[:, None] == labels[None]).fill_diagonal_(False)
        scores = scores.masked_fill(same, -torch.inf)
    return F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)


def noise_contrast(own: Tensor, others: Tensor, images: int) -> Tensor:
    """Tell each image's own embedding from K drawn as noise, by a classifier of the two cases (NCE).

    Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699:

        -ln( o / (o + c) ) - sum_k ln( c / (o_k + c) ),   c = K / N

    Args:
        own: o, unnormalised probability that the embedding is the image's, (B,); float32.
        others: o_k, the same of those drawn, (B, K).
        images: N, of the whole data set.

    >>> loss = noise_contrast(torch.tensor([1.0]), torch.tensor([[1.0, 1.0]]), 2)  # c = 1: 3 ln 2
    >>> round(loss.item(), 4)
    2.0794
    """
    chance = others.shape[1] / images
    known = (own / (own + chance + 1e-7)).log()
    rejected = (chance / (others + chance + 1e-7)).log().sum(1)
    return -(known + rejected).mean()
