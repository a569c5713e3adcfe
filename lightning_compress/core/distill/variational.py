r"""An information bottleneck trained by distillation: no estimate of mutual information, only predictions compared.

Tian, Zhang, Lin, Qu, Xie, Ma, "Farewell to Mutual Information: Variational Distillation for Cross-Modal Person
Re-Identification", CVPR 2021, arXiv:2104.02862. v is what an encoder observes, z a bottleneck's representation of it.
z knows as much of the label y as v does, I(z; y) = I(v; y), once both predict alike; 1 and 2 are two views of one
object:

    VSD   k( p(y|v), p(y|z) )                                       z is sufficient: it loses nothing about y
    VCD   1/2 [ k( p(y|v_1), p(y|z_2) ) + k( p(y|v_2), p(y|z_1) ) ]  ... and says nothing that one view alone shows
    VML   1/2 [ KL( p(y|z_1) || p(y|z_2) ) + KL( p(y|z_2) || p(y|z_1) ) ]
    CML   Sinkhorn distance of { p(y|v_1) } and { p(y|v_2) }        conventional mutual learning
    rank  same object closer than a - m, others farther than a

No gradient reaches the posteriors of v in VSD and VCD, but it does reach v through z. There are two readings of k:

    "kl"         KL(p || q) = mean_n sum_c p (log p - log q)        as the paper states it
    "official"   mean_nc q (log q - p)                              as the released code computes it

The second is the entropy of the student, negative, less its agreement with the teacher, divided by the number of
classes too: no divergence, and it may be negative. The published figures come from it, with weights that suit its
scale, which is about C times smaller.

Each function gives a scalar and computes in float32 outside autocast. Logits are (B, C).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.distill.losses import in_float32
from lightning_compress.core.select import did_you_mean

KLMode = Literal["official", "kl"]
SinkhornMode = Literal["official", "log"]


@in_float32
def posterior_divergence(student: Tensor, teacher: Tensor, kl_mode: KLMode = "official") -> Tensor:
    """k(p, q), with p = softmax(teacher) and q = softmax(student); gradients flow into both.

    Args:
        student: logits (B, C).
        teacher: logits (B, C).
        kl_mode: the reading of k, see above.

    Raises:
        ValueError: another `kl_mode`.

    >>> z = torch.zeros(1, 5)
    >>> round(posterior_divergence(z, z).item(), 6), posterior_divergence(z, z, "kl").item()
    (-0.361888, 0.0)
    """
    check_mode("kl_mode", kl_mode, KLMode)
    log_q, log_p = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    if kl_mode == "kl":
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return (log_q.exp() * (log_q - log_p.exp())).mean()


def self_distillation(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, kl_mode: KLMode = "official"
) -> Tensor:
    """VSD: the representation's classifier learns from the observation's.

    Args:
        student: logits (B, C) of z.
        teacher: logits (B, C) of v, which get no gradient.
        temperature: T of both; there is no factor T^2.
        kl_mode: the reading of k, see above.
    """
    return posterior_divergence(student / temperature, teacher.detach() / temperature, kl_mode)


def cross_distillation(
    students: tuple[Tensor, Tensor], teachers: tuple[Tensor, Tensor], kl_mode: KLMode = "official"
) -> Tensor:
    """VCD: the representation of each view learns from the observation of the other; mean of both directions.

    Args:
        students: logits (B, C) of z_1 and of z_2; rows belong together.
        teachers: logits (B, C) of v_1 and of v_2, which get no gradient.
        kl_mode: the reading of k, see above.
    """
    first, second = (teacher.detach() for teacher in teachers)
    return 0.5 * (
        posterior_divergence(students[1], first, kl_mode) + posterior_divergence(students[0], second, kl_mode)
    )


def mutual_learning(student: Tensor, other: Tensor) -> Tensor:
    """VML: the representations of both views predict alike; gradients flow into both. Always the true divergence.

    The released code leaves it out, as VCD leads there too.

    Args:
        student: logits (B, C) of z_1.
        other: logits (B, C) of z_2.
    """
    return 0.5 * (posterior_divergence(student, other, "kl") + posterior_divergence(other, student, "kl"))


# How many iterations are computed between two looks at the stop rule: each look makes a GPU wait for the CPU.
_LOOK_EVERY = 4


@in_float32
def sinkhorn(
    p: Tensor,
    q: Tensor,
    eps: float = 0.01,
    iterations: int = 100,
    tolerance: float = 0.1,
    mode: SinkhornMode = "official",
) -> Tensor:
    """CML: cost of moving one batch of class posteriors onto another, entropy-regularised (Wasserstein).

    Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport", NIPS 2013, arXiv:1306.0895. The cost of
    a pair is its squared distance, all rows weigh alike. Gradients flow through the iterations, into both batches.

    Args:
        p: probabilities (N, C).
        q: probabilities (M, C).
        eps: strength of the regularisation.
        iterations: at most so many.
        tolerance: stop once the potentials of p have moved by less than this in sum.
        mode: ``"official"`` adds small numbers inside the logarithms, as the released code does, which biases the
            value where exp underflows; ``"log"`` computes in the logarithm.

    Raises:
        ValueError: another `mode`.

    >>> p = torch.eye(2)
    >>> round(sinkhorn(p, p, mode="log").item(), 6)
    0.0
    """
    check_mode("mode", mode, SinkhornMode)
    cost = (p.square().sum(1)[:, None] + q.square().sum(1)[None] - 2 * p @ q.T).clamp(min=0)
    n, m = cost.shape
    u, v = cost.new_zeros(n), cost.new_zeros(m)

    def plan(u: Tensor, v: Tensor) -> Tensor:
        """Logarithm of the coupling (N, M)."""
        return (u[:, None] + v[None] - cost) / eps

    def step(potential: Tensor, log_mass: Tensor) -> Tensor:
        """Scale the rows of exp(log_mass) to sum 1 / len each."""
        if mode == "log":
            return eps * (-math.log(len(potential)) - log_mass.logsumexp(1)) + potential
        total = log_mass.exp().sum(1)
        return eps * (math.log(1 / len(potential) + 1e-8) - (total + 1e-6).log()) + potential

    done = torch.zeros((), dtype=torch.bool, device=cost.device)
    for iteration in range(1, iterations + 1):
        next_u = step(u, plan(u, v))
        next_v = step(v, plan(next_u, v).T)
        moved = (next_u - u).detach().abs().sum()
        u, v = torch.where(done, u, next_u), torch.where(done, v, next_v)
        done = done | (moved < tolerance)
        if iteration % _LOOK_EVERY == 0 and bool(done):
            break
    return (plan(u, v).exp() * cost).sum()


@in_float32
def cross_modal_rank(
    vectors: Tensor,
    labels: Tensor,
    modality: Tensor,
    m1: float = 0.9,
    m2: float = 1.0,
    a1: float = 2.2,
    a2: float = 2.0,
) -> Tensor:
    """Ranked-list loss that knows of modalities: (N, D) -> scalar, mean over all anchors.

    Vectors are scaled to length 1. Of an anchor's own label, those nearer than a - m cost nothing and the others the
    excess, on average; of other labels, those farther than a cost nothing, the others what they lack, nearer ones
    weighted more (by exp). Both within the modality (a1, m1) and across (a2, m2), four means in all.

    Args:
        vectors: (N, D).
        labels: (N,), class indices.
        modality: (N,), anything that tells modalities apart.
        m1: margin within the modality.
        m2: margin across.
        a1: from where on others cost nothing, within the modality; beyond 2, the largest distance, so all cost.
        a2: the same across.

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]])
    >>> labels, modality = torch.tensor([0, 0, 1]), torch.zeros(3)
    >>> round(cross_modal_rank(x[:2], labels[:2], modality[:2]).item(), 3), round(
    ...     cross_modal_rank(x, labels, modality).item(), 3)
    (0.0, 1.2)
    """
    x = F.normalize(vectors, dim=1)
    distance = (2 - 2 * x @ x.T).clamp(min=1e-12).sqrt()
    same = labels[:, None] == labels[None]
    within = modality[:, None] == modality[None]
    others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    total = distance.new_zeros(len(x))
    for kind, margin, boundary in ((within, m1, a1), (~within, m2, a2)):
        positives, negatives = kind & same & others, kind & ~same
        excess = (distance + margin - boundary).clamp(min=0)
        total = total + _mean(excess, positives.float())
        lack = boundary - distance
        # where nothing lacks, no weight; exp of at most a, so no overflow
        total = total + _mean(lack, lack.exp() * (negatives & (lack > 0)))
    return total.mean()


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of each row; the released code's 1e-5 makes it 0 without any weight."""
    return (values * weights).sum(1) / (weights.sum(1) + 1e-5)


def check_mode(argument: str, value: str, choices: object) -> None:
    """Raises ValueError for a value that a Literal type does not have."""
    names = get_args(choices)
    if value not in names:
        raise ValueError(
            f"{argument}: expected {' or '.join(map(repr, names))}, got {value!r}.{did_you_mean(value, names)}"
        )
