r"""How the parts of one image lie to each other, for a student image to imitate the teacher's.

You, Lin, Hu, Chao, Ji, "Exploring Content Relationships for Distilling Efficient GANs", 2022, arXiv:2212.11091. An
image is cut into n contents e_i (its rows, its columns, or its patches), each a point in d dimensions:

    distances   D_ij = |e_i - e_j| / mean,                   L_dist = mean_ij  huber(D^S_ij - D^T_ij)
    angles      A_ijk = cos(e_j - e_i, e_k - e_i),           L_angle = mean_ijk huber(A^S_ijk - A^T_ijk)
    relation    w_d L_dist + w_a L_angle

Both need no more of the contents than their squared distances, which come from one product E E^T:

    S_ij = q_i + q_j - 2 (E E^T)_ij,  q = diag(E E^T)
    A_ijk = (S_ij + S_ik - S_jk) / (2 sqrt(S_ij S_ik))

so that no n x n x d differences are formed, and the n^3 angles are looked at some vertices i at a time, with their
gradient taken at the same time: S is all that the backward pass needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_compress.core.select import did_you_mean

Slicing = Literal["row", "column", "patch"]
PatchMode = Literal["image", "released"]

# angles looked at in one go: they fit a processor's cache, or keep a GPU busy
_CPU_BLOCK, _GPU_BLOCK = 2**17, 2**24
# two contents that are closer than this share of the mean square are the same content, apart from rounding
_SAME = 1e-12
# of the contents about their mean, as root mean square: what is less is rounding, see `content_relation`
_FLAT = 1e-4


def contents(images: Tensor, slicing: Slicing, patch: int = 32, patch_mode: PatchMode = "image") -> Tensor:
    """Cut images into contents: (N, C, H, W) -> (N, n, d).

    Args:
        images: the images.
        slicing: ``"row"``: n = H, d = C W; ``"column"``: n = W, d = C H; ``"patch"``: squares that do not overlap,
            row by row, n = H W / patch^2, d = C patch^2.
        patch: height and width of a patch.
        patch_mode: ``"image"``: all patches of an image are its contents. ``"released"``, as in the authors' code for
            pairs: image k has the k-th of all patches of the batch, and its channels are the contents, n = C,
            d = patch^2.

    Raises:
        ValueError: an unknown slicing or mode, or patches that do not fit the images.

    >>> contents(torch.zeros(2, 3, 64, 96), "patch").shape
    torch.Size([2, 6, 3072])
    """
    _check(slicing, patch, patch_mode)
    if slicing == "row":
        return images.transpose(1, 2).flatten(2)
    if slicing == "column":
        return images.permute(0, 3, 1, 2).flatten(2)
    height, width = images.shape[2:]
    if height % patch or width % patch:
        raise ValueError(f"patch: images of {height}x{width} do not divide into patches of {patch}x{patch}.")
    cells = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (N, C, rows, patch, columns, patch)
    if patch_mode == "image":
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)[: len(images)].flatten(2)


def squared_distances(points: Tensor) -> Tensor:
    """Squared distances of points, (N, n, d) -> (N, n, n), in float64; the diagonal is exactly 0.

    Points are taken about their mean, and their products in float64: neighbouring rows of an image are close, and
    their distance is a small difference of large numbers.
    """
    with torch.autocast(points.device.type, enabled=False):
        points = points.double()
        points = points - points.mean(1, keepdim=True)
        products = points @ points.mT
    norms = products.diagonal(dim1=1, dim2=2)
    return (norms[:, :, None] + norms[:, None] - 2 * products) * _pairs(products)


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """L_dist of squared distances (N, n, n), of each image: (N,); the mean distance is that of the n^2 - n pairs."""

    def relative(squares: Tensor) -> Tensor:
        pairs = _pairs(squares)
        lengths = squares.clamp(min=1e-12).sqrt() * pairs
        return lengths / (lengths.sum((1, 2), keepdim=True) / pairs.sum())

    return F.smooth_l1_loss(relative(student), relative(teacher), reduction="none").mean((1, 2))


def _pairs(squares: Tensor) -> Tensor:
    """(n, n), 1 for two points and 0 for a point and itself."""
    return 1 - torch.eye(squares.shape[-1], dtype=squares.dtype, device=squares.device)


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """L_angle of squared distances (N, n, n), of each image: (N,); contents that coincide form no angle.

    Angles are computed in the dtype of these, float32 or float64; the backward pass costs nothing.
    """
    return _AngleLoss.apply(student, teacher)


class _AngleLoss(torch.autograd.Function):
    """Loss (N,) of squared distances (N, n, n), with the gradient for the student's taken on the way.

    With W_ijk = clamp(A^S - A^T, -1, 1), the slope of huber, and r_ij = S_ij^(-1/2), symmetric in j and k:

        dL / dS_ij = sum_k W_ijk (r_ij r_ik - A_ijk r_ij^2)    for the sides at vertex i
        dL / dS_jk = -1/2 sum_i W_ijk r_ij r_ik                for the side that lies opposite
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor) -> Tensor:
        count, n, _ = student.shape
        at_once = max(1, (_CPU_BLOCK if student.device.type == "cpu" else _GPU_BLOCK) // (count * n * n))
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        sides, other_sides = _inverse_lengths(student), _inverse_lengths(teacher)
        total = student.new_zeros(count, dtype=torch.float64)
        for block in (slice(i, i + at_once) for i in range(0, n, at_once)):
            cosines = _cosines(student, sides, block)
            apart = cosines - _cosines(teacher, other_sides, block)
            slope = apart.clamp(-1, 1)
            # huber(x) = c (x - c / 2) with c = clamp(x, -1, 1)
            total += apart.sub_(slope, alpha=0.5).mul_(slope).sum((1, 2, 3))
            if gradient is not None:
                at_i = sides[:, block]  # (N, b, n)
                turned = cosines.mul_(slope).sum(3)
                slope.mul_(at_i[:, :, None])
                gradient[:, block] += at_i * slope.sum(3) - at_i.square() * turned
                gradient -= slope.mul_(at_i[..., None]).sum(1) / 2
        ctx.save_for_backward(gradient)
        ctx.triples = n**3
        return (total / n**3).to(student.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (grads[0] / ctx.triples)[:, None, None], None


def _inverse_lengths(squares: Tensor) -> Tensor:
    """S^(-1/2), (N, n, n); 0 for the same content."""
    apart = squares > _SAME * squares.mean((1, 2), keepdim=True)
    return torch.where(apart, squares, 1.0).rsqrt() * apart


def _cosines(squares: Tensor, inverse: Tensor, vertices: slice) -> Tensor:
    """A_ijk of some vertices i: (N, b, n, n)."""
    at_i, r = squares[:, vertices], inverse[:, vertices]
    sums = at_i[..., None] + at_i[:, :, None]
    return sums.sub_(squares[:, None]).mul_(r[..., None] / 2).mul_(r[:, :, None])


def content_relation(student: Tensor, teacher: Tensor, w_d: float = 1.0, w_a: float = 2.0) -> Tensor:
    """w_d L_dist + w_a L_angle of contents (N, n, d), of each image: (N,), float32, or float64 as the contents.

    Where all contents of an image are the same, student's or teacher's, the relation is 0: their distances would be
    rounding noise in units of itself. (The authors' code relates the noise.)

    Args:
        student: contents, see :func:`contents`; only n has to be the teacher's.
        teacher: likewise; without gradient.
        w_d: weight of distances; the authors' default.
        w_a: weight of angles; likewise.
    """
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    own, theirs = squared_distances(student), squared_distances(teacher.detach())
    flat = _is_flat(own, student.shape[2]) | _is_flat(theirs, teacher.shape[2])
    loss = w_d * distance_loss(own, theirs).to(dtype) + w_a * angle_loss(own.to(dtype), theirs.to(dtype))
    return torch.where(flat, torch.zeros_like(loss), loss)


def _is_flat(squares: Tensor, dimensions: int) -> Tensor:
    # the mean of all squared distances is twice that of the squared norms about the mean
    return squares.mean((1, 2)) < 2 * dimensions * _FLAT**2


class ContentRelationLoss(nn.Module):
    """How the contents of two batches of images lie to each other, summed over the ways to cut them.

    Args:
        w_d: weight of distances.
        w_a: weight of angles.
        slices: which of "row", "column" and "patch".
        patch: height and width of a patch.
        reduction: of the images of a batch: "sum", as in the authors' code for pairs, or "mean".
        patch_mode: "image", or "released" for what the authors' code for pairs does, see :func:`contents`.

    Raises:
        ValueError: an argument out of range.

    >>> images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    >>> float(ContentRelationLoss()(2 * images + 1, images)) < 1e-6  # distances are relative
    True
    """

    def __init__(
        self,
        w_d: float = 1.0,
        w_a: float = 2.0,
        slices: Sequence[Slicing] = ("row", "column", "patch"),
        patch: int = 32,
        reduction: Literal["sum", "mean"] = "sum",
        patch_mode: PatchMode = "image",
    ) -> None:
        super().__init__()
        if min(w_d, w_a) < 0:
            raise ValueError(f"w_d, w_a: expected 0 or more, got {w_d} and {w_a}.")
        if not slices or len(set(slices)) < len(slices):
            raise ValueError(f"slices: expected one or more of {', '.join(get_args(Slicing))}, got {list(slices)}.")
        for slicing in slices:
            _check(slicing, patch, patch_mode)
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}.")
        self.w_d, self.w_a = w_d, w_a
        self.slices = tuple(slices)
        self.patch = patch
        self.reduction = reduction
        self.patch_mode: PatchMode = patch_mode

    def terms(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """The relation of each way to cut images (N, C, H, W), by its name."""
        terms: dict[str, Tensor] = {}
        for slicing in self.slices:
            own, theirs = (contents(images, slicing, self.patch, self.patch_mode) for images in (student, teacher))
            relation = content_relation(own, theirs, self.w_d, self.w_a)
            terms[slicing] = relation.sum() if self.reduction == "sum" else relation.mean()
        return terms

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The sum of the :meth:`terms`."""
        return torch.stack(list(self.terms(student, teacher).values())).sum()


def _check(slicing: str, patch: int, patch_mode: str) -> None:
    if slicing not in get_args(Slicing):
        choices = get_args(Slicing)
        hint = did_you_mean(slicing, choices) or f" There is: {', '.join(choices)}."
        raise ValueError(f"slices: there is no slicing {slicing!r}.{hint}")
    if patch < 1:
        raise ValueError(f"patch: expected 1 or more pixels, got {patch}.")
    if patch_mode not in get_args(PatchMode):
        raise ValueError(f"patch_mode must be 'image' or 'released', got {patch_mode!r}.")
