"""What relations between the contents of an image cost: angles from squared distances against angles from differences.

The obvious form takes all n x n x d differences, gives each a length of 1, and multiplies them for all n^3 angles. Both
with the student's gradient, for the rows and the patches of an image of 256x256; the teacher's part has none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from _memory import peak, watched
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.distill.content_relations import ContentRelationLoss, Slicing, content_relation, contents

PIXELS = 256
ANGLES = {"w_d": 0.0, "w_a": 1.0}


def images() -> tuple[Tensor, Tensor]:
    """A student's, which gets a gradient, and a teacher's: smooth, with noise."""
    generator = torch.Generator().manual_seed(0)
    c, i, j = torch.meshgrid(torch.arange(3), torch.arange(PIXELS), torch.arange(PIXELS), indexing="ij")
    teacher = (torch.sin(0.05 * i + c) * torch.cos(0.03 * j - c))[None]
    return (0.8 * teacher + 0.1 * torch.randn(teacher.shape, generator=generator)).requires_grad_(), teacher


def cosines(points: Tensor) -> Tensor:
    """(n, d) -> (n, n, n)."""
    differences = points[None] - points[:, None]
    directions = differences / differences.norm(dim=2, keepdim=True).clamp(min=1e-12)
    return directions @ directions.mT


def naive(student: Tensor, teacher: Tensor) -> Tensor:
    with torch.no_grad():
        expected = cosines(teacher[0])
    return F.smooth_l1_loss(cosines(student[0]), expected)


def ours(student: Tensor, teacher: Tensor) -> Tensor:
    return content_relation(student, teacher, **ANGLES).sum()


def step(loss: Callable[[Tensor, Tensor], Tensor], slicing: Slicing, student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of one image, and the gradient for the student's, which is returned."""
    student.grad = None
    loss(contents(student, slicing), contents(teacher, slicing)).backward()
    assert student.grad is not None
    return student.grad


def claims() -> Iterator[Claim]:
    with threads(1):
        pair = images()
        for slicing, plural, target in (("row", "rows", 10.0), ("patch", "patches", None)):
            own, other = (partial(step, loss, slicing, *pair) for loss in (ours, naive))  # type: ignore[arg-type]
            difference = (own() - other()).norm() / other().norm()
            assert difference < 1e-4, f"gradients differ by {difference}"
            fast, slow = best_times(3, own, other)
            yield Claim(
                f"angles of {plural}, {PIXELS}x{PIXELS}, with gradients: n^3 form / ours", slow / fast, target,
                detail=milliseconds(slow, fast),
            )  # fmt: skip
        small, large = (peak(__file__, which) for which in ("ours", "naive"))
        yield Claim(
            "... of rows, peak memory", large / small, 5, detail=f"{large / 2**20:.0f} against {small / 2**20:.1f} MiB"
        )
        loss = ContentRelationLoss()
        (whole,) = best_times(3, lambda: loss(*pair).backward())
        yield Claim("all relations of one image / a second", whole, detail=milliseconds(whole))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        torch.set_num_threads(1)
        pair = images()
        # what the libraries of linear algebra set up at their first use is nobody's
        step(ours, "patch", *pair)
        print(watched(partial(step, ours if sys.argv[2] == "ours" else naive, "row", *pair)))
    else:
        print(machine())
        report(claims())
