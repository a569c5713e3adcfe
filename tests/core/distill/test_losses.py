"""What is learnt from a teacher, against numbers by hand and against loops that say what is meant."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from lightning_compress.core.distill import losses

T = 4.0
LABELS = torch.tensor([0, 2, 2, 1, 0])


def logits(seed, count=5, classes=7):
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def maps(seed, *shape):
    return torch.randn(shape or (5, 3, 4, 4), generator=torch.Generator().manual_seed(seed))


# ---- logits


def test_soft_targets_by_hand():
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # against (1/2, 1/2)
    assert losses.soft_targets(student, teacher, 1.0).item() == pytest.approx(expected)
    # both flattened by T, and T^2 times as much
    assert losses.soft_targets(T * student, T * teacher, T).item() == pytest.approx(T**2 * expected, rel=1e-5)


def test_gradient_of_soft_targets_is_the_difference_of_probabilities():
    student, teacher = logits(0).requires_grad_(), logits(1)
    losses.soft_targets(student, teacher, T).backward()
    expected = T * ((student / T).softmax(1) - (teacher / T).softmax(1)) / len(student)
    torch.testing.assert_close(student.grad, expected)


def test_at_high_temperatures_soft_targets_match_logits():
    """Hinton et al., section 2.1: the gradient tends to (z_s - z_t) / (B K) for logits of mean zero."""
    student, teacher = (z - z.mean(1, keepdim=True) for z in (logits(0).double(), logits(1).double()))
    student = student.float().requires_grad_()
    losses.soft_targets(student, teacher, 1000.0).backward()
    torch.testing.assert_close(student.grad, ((student - teacher) / student.numel()).float(), rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("image", range(5))
def test_the_decoupled_parts_make_up_the_whole(image):
    """DKD, equation 5: KD = TCKD + (1 - p_y) NCKD, for each image."""
    one = slice(image, image + 1)
    student, teacher, label = logits(0)[one], logits(1)[one], LABELS[one]
    rest = 1 - (teacher / T).softmax(1)[0, label]
    parts = losses.target_class(student, teacher, label, T) + rest * losses.non_target_classes(
        student, teacher, label, T
    )
    torch.testing.assert_close(parts, losses.soft_targets(student, teacher, T).expand(1))


def test_a_sure_teacher_still_orders_the_wrong_classes():
    student, teacher = torch.zeros(1, 3), torch.tensor([[100.0, 2.0, 0.0]])
    label = torch.tensor([0])
    assert losses.soft_targets(student, teacher, 1.0).item() == pytest.approx(math.log(3))  # of the right class alone
    wrong = torch.tensor([2.0, 0.0]).softmax(0)
    assert losses.non_target_classes(student, teacher, label, 1.0).item() == pytest.approx(
        float((wrong * (2 * wrong).log()).sum()), rel=1e-5
    )
    assert losses.target_class(student, teacher, label, 1.0).isfinite()


# ---- features


def test_hints():
    assert losses.hints(maps(0), maps(1)).item() == pytest.approx(((maps(0) - maps(1)) ** 2).mean().item())


def test_attention_looks_at_places_and_averages_larger_maps():
    student, teacher = maps(0, 5, 3, 4, 4), maps(1, 5, 6, 8, 8)
    total = 0.0
    for own, theirs in zip(student, F.avg_pool2d(teacher, 2), strict=True):
        a, b = ((f**2).mean(0).flatten() for f in (own, theirs))
        total += float(((a / a.norm() - b / b.norm()) ** 2).mean())
    assert losses.attention(student, teacher).item() == pytest.approx(total / 5, rel=1e-5)
    assert losses.attention(student, -3 * student).item() == pytest.approx(0, abs=1e-12)


def test_similarity_against_a_loop():
    def gram(features):
        rows = []
        for one in features:
            row = torch.stack([(one * other).sum() for other in features])
            rows.append(row / row.norm())
        return torch.stack(rows)

    student, teacher = maps(0, 5, 3, 4, 4), maps(1, 5, 9)
    expected = (gram(student) - gram(teacher)).square().sum() / 5**2
    torch.testing.assert_close(losses.similarity(student, teacher), expected)


def huber(values):
    return sum(0.5 * v * v if abs(v) < 1 else abs(v) - 0.5 for v in values) / len(values)


def test_distance_against_a_loop():
    def relative(features):
        flat = features.flatten(1)
        pairs = torch.tensor([[float((a - b).norm()) for a in flat] for b in flat])
        return (pairs / pairs[pairs > 0].mean()).flatten()

    student, teacher = maps(0), maps(1, 5, 9)
    expected = huber((relative(student) - relative(teacher)).tolist())
    assert losses.distance(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert losses.distance(student, 7 * student + 1).item() == pytest.approx(0, abs=1e-10)  # of any scale and place


def test_angle_against_a_loop():
    def cosines(features):
        flat = features.flatten(1).double()
        return [
            float(F.cosine_similarity(i - j, k - j, dim=0)) if not (torch.equal(i, j) or torch.equal(k, j)) else 0.0
            for j in flat
            for i in flat
            for k in flat
        ]

    student, teacher = maps(0), maps(1, 5, 9)
    expected = huber([a - b for a, b in zip(cosines(student), cosines(teacher), strict=True)])
    assert losses.angle(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    rotation = torch.linalg.qr(maps(2, 9, 9)).Q
    assert losses.angle(teacher, 3 * teacher @ rotation).item() == pytest.approx(0, abs=1e-10)


def test_angles_far_from_the_origin():
    """Inner products of points far away nearly cancel."""
    near = maps(0, 6, 8)
    torch.testing.assert_close(
        losses.angle(near + 1000, maps(1, 6, 8)), losses.angle(near, maps(1, 6, 8)), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("labels", [None, LABELS], ids=["images", "classes"])
def test_contrast_against_a_loop(labels):
    student, teacher = maps(0, 5, 6), maps(1, 5, 6)
    total = 0.0
    for anchors, others in ((student, teacher), (teacher, student)):
        for i, anchor in enumerate(anchors):
            rivals = [j for j in range(5) if j == i or labels is None or labels[j] != labels[i]]
            scores = torch.tensor([float(F.cosine_similarity(anchor, others[j], dim=0)) / 0.1 for j in rivals])
            total -= float(scores.log_softmax(0)[rivals.index(i)])
    assert losses.contrast(student, teacher, labels, 0.1).item() == pytest.approx(total / 5, rel=1e-5)


def test_selectivity_against_a_loop():
    def kernel(a, b):
        values = [float((x @ y) ** 2) for one, other in zip(a, b, strict=True) for x in one for y in other]
        return sum(values) / len(values)

    student, teacher = maps(0, 5, 3, 4, 4), maps(1, 5, 6, 8, 8)
    own, theirs = (
        [[row / row.norm() for row in image.flatten(1)] for image in f] for f in (student, F.avg_pool2d(teacher, 2))
    )
    expected = kernel(own, own) + kernel(theirs, theirs) - 2 * kernel(own, theirs)
    assert losses.selectivity(student, teacher).item() == pytest.approx(expected, rel=1e-4)
    # in any order of channels
    assert losses.selectivity(student, 2 * student[:, [2, 0, 1]]).item() == pytest.approx(0, abs=1e-7)


def test_selectivity_by_hand():
    student = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    teacher = torch.tensor([[[[3.0, 4.0]]]])  # of norm 1: (0.6, 0.8)
    assert losses.selectivity(student, teacher).item() == pytest.approx(1 / 2 + 1 - 2 * (0.36 + 0.64) / 2)


def test_flow_against_a_loop():
    lower, upper = maps(0, 5, 3, 8, 8), maps(1, 5, 2, 4, 4)
    pooled = F.avg_pool2d(lower, 2)
    expected = torch.stack(
        [
            torch.stack([torch.stack([(a * b).mean() for a in one]) for b in other])
            for one, other in zip(pooled, upper, strict=True)
        ]
    )
    matrix = losses.flow_matrix(lower, upper)
    assert matrix.shape == (5, 2, 3)
    torch.testing.assert_close(matrix, expected)
    teacher = losses.flow_matrix(maps(2, 5, 3, 8, 8), maps(3, 5, 2, 4, 4))
    assert losses.flow(matrix, teacher).item() == pytest.approx(float(((expected - teacher) ** 2).mean()))


def test_factors_are_compared_by_where_they_are():
    student, teacher = maps(0, 5, 3, 4, 4), maps(1, 5, 6, 8, 8)
    total = 0.0
    for own, theirs in zip(student, F.avg_pool2d(teacher, 2), strict=True):
        a, b = ((f**2).mean(0).flatten() for f in (own, theirs))
        total += float((a / a.norm() - b / b.norm()).abs().mean())
    assert losses.factors(student, teacher).item() == pytest.approx(total / 5, rel=1e-5)


def test_boundary_against_a_loop():
    student, teacher = 2 * maps(0), maps(1)
    teacher[0] = 0  # neither fires
    total = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        if s > -1 and t <= 0:
            total += (s + 1) ** 2
        if s <= 1 and t > 0:
            total += (s - 1) ** 2
    assert losses.boundary(student, teacher).item() == pytest.approx(3 / 1000 * total / 5, rel=1e-5)


def test_information_against_a_loop():
    student, teacher, variance = maps(0), maps(1), torch.tensor([0.5, 1.0, 5.0])
    total = 0.0
    for channel, v in enumerate(variance.tolist()):
        for s, t in zip(student[:, channel].flatten().tolist(), teacher[:, channel].flatten().tolist(), strict=True):
            total += 0.5 * ((s - t) ** 2 / v + math.log(v))
    assert losses.information(student, teacher, variance).item() == pytest.approx(total / student.numel(), rel=1e-5)
    # up to constants it is minus the logarithm of a normal density
    density = torch.distributions.Normal(student, variance.sqrt().view(-1, 1, 1)).log_prob(teacher).mean()
    constant = 0.5 * math.log(2 * math.pi)
    assert losses.information(student, teacher, variance).item() == pytest.approx(-float(density) - constant, rel=1e-5)


def test_correlation_against_a_loop():
    student, teacher = logits(0), logits(1)
    apart = (student - teacher).abs().tolist()
    total = sum(a * b for one, two in pairwise(apart) for a, b in zip(one, two, strict=True))
    assert losses.correlation(student, teacher).item() == pytest.approx(total / 4, rel=1e-5)
    assert losses.correlation(student[:1], teacher[:1]).item() == 0  # an image alone has no neighbour


def test_probability_against_a_loop():
    def rows(features):
        kernel = [[(float(F.cosine_similarity(a, b, dim=0)) + 1) / 2 for b in features] for a in features]
        return [[k / sum(row) for k in row] for row in kernel]

    student, teacher = logits(0), logits(1)
    total = 0.0
    for own, theirs in zip(rows(student), rows(teacher), strict=True):
        total += sum(t * math.log((t + 1e-7) / (s + 1e-7)) for s, t in zip(own, theirs, strict=True))
    assert losses.probability(student, teacher).item() == pytest.approx(total / 25, rel=1e-4)
    assert losses.probability(student, 3 * student).item() == pytest.approx(0, abs=1e-7)


def test_probability_by_hand():
    student, teacher = torch.eye(2), torch.ones(2, 2)
    # the student's rows are (2/3, 1/3), the teacher's (1/2, 1/2)
    expected = (0.5 * math.log(0.75) + 0.5 * math.log(1.5)) / 2
    assert losses.probability(student, teacher).item() == pytest.approx(expected, rel=1e-5)


# ---- all of them

CALLS = {
    "soft_targets": lambda s, t: losses.soft_targets(s, t, T),
    "target_class": lambda s, t: losses.target_class(s, t, LABELS, T),
    "non_target_classes": lambda s, t: losses.non_target_classes(s, t, LABELS, T),
    "hints": losses.hints,
    "similarity": losses.similarity,
    "distance": losses.distance,
    "angle": losses.angle,
    "contrast": lambda s, t: losses.contrast(s, t, LABELS),
    "attention": lambda s, t: losses.attention(folded(s), folded(t)),
    "selectivity": lambda s, t: losses.selectivity(folded(s), folded(t)),
    "factors": lambda s, t: losses.factors(folded(s), folded(t)),
    "flow": lambda s, t: losses.flow(*(losses.flow_matrix(folded(f)[:, :, :3], folded(f)[:, :, 3:6]) for f in (s, t))),
    "boundary": losses.boundary,
    "information": lambda s, t: losses.information(s, t, torch.ones(7)),
    "correlation": losses.correlation,
    "probability": losses.probability,
}


def folded(features):
    """Seven numbers of an image as a map of one channel."""
    return features.view(len(features), 1, -1, 1)


@pytest.mark.parametrize("name", CALLS)
def test_learns_what_the_teacher_knows(name):
    """Zero where they agree (lower at least), and steps downhill lead there."""
    teacher = logits(1)
    student = logits(0).requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.1)
    first = CALLS[name](student, teacher).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = CALLS[name](student, teacher)
        loss.backward()
        assert student.grad.isfinite().all()
        optimizer.step()
    assert loss.item() < 0.3 * first
    if name not in ("contrast", "boundary"):  # which wants a margin on top
        assert CALLS[name](teacher, teacher).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_is_computed_in_float32(name):
    student, teacher = logits(0), logits(1)
    expected = CALLS[name](student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(CALLS[name](student, teacher), expected)
    large = CALLS[name](300 * student.half(), 300 * teacher.half())
    assert large.dtype == torch.float32
    assert large.isfinite()


@pytest.mark.parametrize("name", ["similarity", "distance", "angle", "probability", "contrast"])
def test_equal_images_have_a_gradient(name):
    student = logits(0)[[0, 0, 1, 2, 3]].requires_grad_()
    CALLS[name](student, logits(1)[[0, 0, 1, 2, 3]]).backward()
    assert student.grad.isfinite().all()
    assert student.grad.any()
