"""Losses of variational distillation against the paper's own numbers, by hand, and against the loops they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.distill import variational
from lightning_compress.core.distill.variational import (
    cross_distillation,
    cross_modal_rank,
    mutual_learning,
    posterior_divergence,
    self_distillation,
    sinkhorn,
)

_N = torch.arange(30.0)
A = torch.sin(0.9 * _N).view(6, 5)
B = torch.cos(0.5 * _N).view(6, 5)
P, Q = A.softmax(1), B.softmax(1)
_M = torch.arange(2560.0, dtype=torch.float64)
LARGE_P = (2 * torch.sin(0.9 * _M)).view(128, 20).softmax(1).float()
LARGE_Q = (2 * torch.cos(0.5 * _M**2)).view(128, 20).softmax(1).float()


def logits(seed: int, count: int = 6, classes: int = 5) -> Tensor:
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


# ---- divergences


@pytest.mark.parametrize(
    ("teacher", "student", "kl_mode", "expected"),
    [
        pytest.param(A, B, "kl", 0.231087, id="KL(p||q)"),
        pytest.param(B, A, "kl", 0.218749, id="KL(q||p)"),
        pytest.param(A, B, "official", -0.344311, id="k(p,q), released"),
        pytest.param(torch.zeros(3, 5), torch.zeros(3, 5), "official", (math.log(1 / 5) - 1 / 5) / 5, id="uniform"),
        pytest.param(A, A, "kl", 0.0, id="KL(p||p)"),
    ],
)
def test_both_readings_of_the_divergence(teacher: Tensor, student: Tensor, kl_mode: str, expected: float) -> None:
    assert posterior_divergence(student, teacher, kl_mode).item() == pytest.approx(expected, abs=1e-6)


def test_the_official_reading_is_torchs_kl_div_of_two_probabilities() -> None:
    with pytest.warns(UserWarning, match="batchmean"):
        expected = F.kl_div(P, Q)
    assert posterior_divergence(B, A).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_official_reading_pulls_the_student_towards_the_softmax_of_probabilities() -> None:
    """Its minimum for a given teacher: nearly even odds, whatever the teacher thinks."""
    student = torch.zeros(1, 5, requires_grad=True)
    teacher = torch.tensor([[9.0, 0.0, 0.0, 0.0, 0.0]])
    optimizer = torch.optim.LBFGS([student], max_iter=50)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = posterior_divergence(student, teacher)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(student.softmax(1), teacher.softmax(1).softmax(1), atol=1e-3, rtol=0)


def test_label_smoothing_is_torchs() -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    targets = 0.9 * F.one_hot(labels, 5) + 0.1 / 5
    by_hand = -(targets * A.log_softmax(1)).sum(1).mean()
    assert by_hand.item() == pytest.approx(2.180505, abs=1e-6)
    assert F.cross_entropy(A, labels, label_smoothing=0.1).item() == pytest.approx(2.180505, abs=1e-6)


@pytest.mark.parametrize("kl_mode", ["official", "kl"])
def test_only_representations_learn_from_observations(kl_mode: str) -> None:
    z, v, z2, v2 = (logits(seed).requires_grad_() for seed in range(4))
    self_distillation(z, v, kl_mode=kl_mode).backward()
    assert z.grad.any()
    assert v.grad is None
    z.grad = None
    cross_distillation((z, z2), (v, v2), kl_mode).backward()
    assert z.grad.any()
    assert z2.grad.any()
    assert v.grad is v2.grad is None
    expected = 0.5 * posterior_divergence(z2, v, kl_mode) + 0.5 * posterior_divergence(z, v2, kl_mode)
    assert cross_distillation((z, z2), (v, v2), kl_mode).item() == pytest.approx(expected.item())


def test_the_temperature_divides_both_and_has_no_factor() -> None:
    expected = posterior_divergence(B / 2, A / 2, "kl").item()
    assert self_distillation(B, A, temperature=2.0, kl_mode="kl").item() == pytest.approx(expected)
    # at a higher one both are nearer, about by its square
    assert self_distillation(B, A, 10.0, "kl").item() == pytest.approx(0.01 * 0.25, rel=0.15)


def test_mutual_learning_is_symmetric_and_teaches_both() -> None:
    one, two = logits(0).requires_grad_(), logits(1).requires_grad_()
    loss = mutual_learning(one, two)
    assert loss.item() == pytest.approx(mutual_learning(two, one).item())
    assert mutual_learning(B, A).item() == pytest.approx((0.231087 + 0.218749) / 2, abs=1e-6)
    loss.backward()
    assert one.grad.any()
    assert two.grad.any()


# ---- Sinkhorn


def reference_sinkhorn(p: Tensor, q: Tensor, eps: float = 0.01, limit: int = 100, tolerance: float = 0.1) -> Tensor:
    """As the released code goes about it, one iteration at a time."""
    cost = (p[:, None] - q[None]).abs().pow(2).sum(-1)
    mu, nu = torch.full((len(p),), 1 / len(p)), torch.full((len(q),), 1 / len(q))
    u, v = torch.zeros_like(mu), torch.zeros_like(nu)
    for _ in range(limit):
        before = u
        u = eps * ((mu + 1e-8).log() - (((u[:, None] + v[None] - cost) / eps).exp().sum(-1) + 1e-6).log()) + u
        v = eps * ((nu + 1e-8).log() - (((u[:, None] + v[None] - cost) / eps).exp().T.sum(-1) + 1e-6).log()) + v
        if (u - before).abs().sum() < tolerance:
            break
    return (((u[:, None] + v[None] - cost) / eps).exp() * cost).sum()


@pytest.mark.parametrize("mode", ["official", "log"])
@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        pytest.param(P, P, 0.000723, id="(p,p)"),
        pytest.param(P, Q, 0.025070, id="(p,q)"),
        pytest.param(Q, P, 0.025040, id="(q,p)"),
        pytest.param(LARGE_P, LARGE_Q, 0.078493, id="128 images, 3 iterations"),
    ],
)
def test_sinkhorn(p: Tensor, q: Tensor, expected: float, mode: str) -> None:
    found = sinkhorn(p, q, mode=mode).item()
    assert found == pytest.approx(expected, abs=2e-6 if mode == "official" else 2e-5)
    assert found == pytest.approx(reference_sinkhorn(p, q).item(), abs=2e-5)


def test_the_stop_rule_is_a_sum_over_points() -> None:
    """By a mean it would stop after the first iteration."""
    assert sinkhorn(LARGE_P, LARGE_Q, iterations=1).item() == pytest.approx(0.078685, abs=2e-6)
    three = sinkhorn(LARGE_P, LARGE_Q, iterations=3, tolerance=0.0)
    assert sinkhorn(LARGE_P, LARGE_Q).item() == three.item() != sinkhorn(LARGE_P, LARGE_Q, iterations=2).item()


def test_what_is_computed_past_the_stop_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for look_every in (1, 3, 4):
        monkeypatch.setattr(variational, "_LOOK_EVERY", look_every)
        p = LARGE_P.clone().requires_grad_()
        value = sinkhorn(p, LARGE_Q)
        value.backward()
        found.append((value.item(), p.grad))
    assert len({value for value, _ in found}) == 1
    for _, gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0][1], atol=1e-7, rtol=1e-5)


def test_sinkhorn_trains_both_batches_and_survives_points_far_apart() -> None:
    z, v = logits(0).requires_grad_(), logits(1).requires_grad_()
    sinkhorn(z.softmax(1), v.softmax(1)).backward()
    assert z.grad.isfinite().all()
    assert z.grad.any()
    assert v.grad.any()
    # exp(-2 / 0.01) is 0 in float32: the small numbers keep it finite, but the value goes wrong; not in the logarithm
    far, near = torch.eye(4)[:2].repeat(3, 1), torch.eye(4)[2:].repeat(3, 1)
    assert sinkhorn(far, near).isfinite()
    assert sinkhorn(far, near, mode="log").item() == pytest.approx(2.0, rel=1e-5)


def test_batches_of_different_length() -> None:
    expected = reference_sinkhorn(P, Q[:4]).item()
    assert sinkhorn(P, Q[:4]).item() == pytest.approx(expected, abs=1e-6)
    assert expected >= 0


# ---- ranks


def reference_rank(vectors: Tensor, labels: Tensor, modality: Tensor, m1=0.9, m2=1.0, a1=2.2, a2=2.0) -> float:
    """Anchor by anchor, pair by pair."""
    x = [v / v.norm() for v in vectors.double()]
    total = 0.0
    for i, anchor in enumerate(x):
        for within, m, a in ((True, m1, a1), (False, m2, a2)):
            others = [
                (float((anchor - other).norm()), labels[i] == labels[j])
                for j, other in enumerate(x)
                if i != j and bool(modality[i] == modality[j]) == within
            ]
            positives = [max(0.0, d + m - a) for d, same in others if same]
            total += sum(positives) / (len(positives) + 1e-5)
            weights = [(math.exp(a - d), a - d) for d, same in others if not same and d < a]
            total += sum(w * lack for w, lack in weights) / (sum(w for w, _ in weights) + 1e-5)
    return total / len(x)


def test_rank_loss_against_a_loop() -> None:
    vectors = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    labels, modality = torch.arange(24) // 8, torch.arange(24) % 2
    assert cross_modal_rank(vectors, labels, modality).item() == pytest.approx(
        reference_rank(vectors, labels, modality), rel=1e-5
    )
    margins = {"m1": 0.3, "m2": 0.5, "a1": 1.2, "a2": 1.4}
    assert cross_modal_rank(vectors, labels, modality, **margins).item() == pytest.approx(
        reference_rank(vectors, labels, modality, **margins), rel=1e-5
    )


def test_rank_loss_by_hand() -> None:
    same, apart = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.75**0.5])  # 1 apart
    alike = torch.stack([same, same])
    labels, modality = torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0])
    assert cross_modal_rank(alike, labels[:2], modality[:2]).item() == 0  # nothing to rank
    triple = torch.stack([same, same, apart])
    assert cross_modal_rank(triple, labels, modality).item() == pytest.approx(2.2 - 1, abs=1e-4)
    # across: positives are nearer than a2 - m2 = 1, and the boundary is a2
    across = torch.tensor([0, 0, 1])
    assert cross_modal_rank(triple, labels, across).item() == pytest.approx(2.0 - 1, abs=1e-4)
    # opposite images of one person, 2 apart: 2 + 0.9 - 2.2 within, 2 + 1 - 2 across
    opposite = torch.stack([same, -same])
    assert cross_modal_rank(opposite, labels[:2], modality[:2]).item() == pytest.approx(0.7, abs=1e-4)
    assert cross_modal_rank(opposite, labels[:2], torch.tensor([0, 1])).item() == pytest.approx(1.0, abs=1e-4)


def test_rank_loss_has_a_gradient_at_equal_vectors() -> None:
    vectors = torch.ones(4, 3, requires_grad=True)
    cross_modal_rank(vectors, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])).backward()
    assert vectors.grad.isfinite().all()


# ---- all of them

CALLS = {
    "official": lambda: self_distillation(B.bfloat16(), A.bfloat16()),
    "kl": lambda: self_distillation(B.bfloat16(), A.bfloat16(), kl_mode="kl"),
    "sinkhorn": lambda: sinkhorn(P.bfloat16(), Q.bfloat16()),
    "rank": lambda: cross_modal_rank(A.bfloat16(), torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(6) % 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_is_computed_in_float32(name: str) -> None:
    expected = CALLS[name]()
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert CALLS[name]() == expected


def test_a_mistyped_mode_is_answered() -> None:
    with pytest.raises(ValueError, match=r"kl_mode: expected 'official' or 'kl', got 'oficial'. Did you mean 'off"):
        posterior_divergence(A, B, "oficial")
    with pytest.raises(ValueError, match=r"mode: expected 'official' or 'log', got 'logs'. Did you mean 'log'"):
        sinkhorn(P, Q, mode="logs")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_finds_what_the_cpu_finds() -> None:
    labels, modality = torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(6) % 2
    for loss, tensors in (
        (self_distillation, (B, A)),
        (sinkhorn, (LARGE_P, LARGE_Q)),
        (cross_modal_rank, (A, labels, modality)),
    ):
        torch.testing.assert_close(loss(*(t.cuda() for t in tensors)).cpu(), loss(*tensors), atol=1e-5, rtol=1e-4)
