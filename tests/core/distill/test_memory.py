"""The contrast with images of the whole data set, against a loop over images and rivals."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_compress.core.distill.losses import noise_contrast
from lightning_compress.core.distill.memory import ContrastMemory

N, DIM, K, T = 12, 4, 5, 0.07
ROWS, LABELS = torch.tensor([3, 0, 7]), torch.tensor([1, 0, 1])


def vectors(seed: int, count: int = 3) -> torch.Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def made(**options) -> ContrastMemory:
    memory = ContrastMemory(N, DIM, **{"negatives": K, **options})
    memory.classes = torch.arange(N) % 2
    return memory


def unit(v):
    return v / v.norm()


def test_noise_contrast_by_hand():
    own, others = torch.tensor([2.0, 1.0]), torch.tensor([[1.0, 0.5], [3.0, 1.0]])
    c = 2 / 10
    expected = [
        -math.log(o / (o + c)) - sum(math.log(c / (k + c)) for k in rest)
        for o, rest in ((2.0, (1.0, 0.5)), (1.0, (3.0, 1.0)))
    ]
    assert noise_contrast(own, others, 10).item() == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_the_loss_against_a_loop():
    memory = made()
    drawn = memory.draw(LABELS)
    student, teacher = vectors(0), vectors(1)
    for batch in range(2):
        scores = []
        for new, kept in ((student, memory.teacher), (teacher, memory.student)):
            rows = [
                [math.exp(float(kept[j] @ unit(v)) / T) for j in (ROWS[i].item(), *drawn[i].tolist())]
                for i, v in enumerate(new)
            ]
            scores.append(torch.tensor(rows, dtype=torch.float64))
        if batch == 0:
            scale = [float(s.mean()) * N for s in scores]
        expected = 0.0
        for s, z in zip(scores, scale, strict=True):
            for first, *rest in (s / z).tolist():
                expected -= math.log(first / (first + K / N)) + sum(math.log(K / N / (r + K / N)) for r in rest)
        value = memory.loss(student, teacher, ROWS, LABELS)
        assert value.item() == pytest.approx(expected / 3, rel=1e-4)
        memory.update(student, teacher, ROWS, LABELS)
        assert memory.batches == batch + 1
        drawn = memory.draw(LABELS)  # others in every batch, compared by the scale of the first
    assert memory.scale.tolist() == pytest.approx(scale, rel=1e-4)


def test_rivals_are_of_other_classes_and_differ():
    memory = made()
    for _ in range(20):
        drawn = memory.draw(LABELS)
        assert drawn.shape == (3, K)
        assert (memory.classes[drawn] != LABELS[:, None]).all()
        assert all(len(row.unique()) == K for row in drawn)
        memory.batches += 1
    # seven of six others: some come twice
    assert made(negatives=7).draw(LABELS).shape == (3, 7)
    assert not torch.equal(memory.draw(LABELS), memory.draw(LABELS, rank=1))
    alone = made()
    alone.classes[:] = 1
    assert alone.draw(LABELS).shape == (3, K)


def test_every_rival_is_as_likely():
    memory = made(negatives=2)
    counts = torch.zeros(3, N)
    for _ in range(1000):
        counts += torch.zeros(3, N).scatter_add(1, memory.draw(LABELS), torch.ones(3, 2))
        memory.batches += 1
    expected = (memory.classes != LABELS[:, None]) * 1000 * 2 / 6  # standard deviation: 15
    assert (counts - expected).abs().max() < 60
    assert not torch.equal(counts[0], counts[2])  # of one class, with other rivals


def test_images_not_seen_are_anybodys_rivals():
    memory = ContrastMemory(N, DIM, negatives=N - 1)
    assert (memory.classes == -1).all()
    memory.update(vectors(0), vectors(1), ROWS, LABELS)
    assert memory.classes[ROWS].tolist() == LABELS.tolist()
    drawn = memory.draw(torch.tensor([1]))
    assert not {3, 7} & set(drawn.flatten().tolist())


def test_memory_moves_half_way_on_the_sphere():
    memory = made()
    before = memory.student.clone(), memory.teacher.clone()
    limit = 1 / math.sqrt(DIM / 3)
    assert max(float(x.abs().max()) for x in before) <= limit
    student, teacher = 5 * vectors(0), vectors(1)
    memory.update(student, teacher, ROWS, LABELS)
    for kept, old, new in zip((memory.student, memory.teacher), before, (student, teacher), strict=True):
        for row, v in zip(ROWS, new, strict=True):
            torch.testing.assert_close(kept[row], unit(0.5 * old[row] + 0.5 * unit(v)))
        others = torch.ones(N, dtype=torch.bool).scatter(0, ROWS, False)
        assert torch.equal(kept[others], old[others])


def test_state_continues_where_it_was():
    one, other = made(), made()
    for step in range(4):
        if step == 2:
            other.load_state_dict(one.state_dict())
        for memory in (one, other) if step >= 2 else (one,):
            memory.loss(vectors(step), vectors(step + 9), ROWS, LABELS)
            memory.update(vectors(step), vectors(step + 9), ROWS, LABELS)
    for name, value in one.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(getattr(other, name)))
    with pytest.raises(ValueError, match=r"checkpoint has the shape \(12, 4\).* this one \(13, 4\)"):
        ContrastMemory(N + 1, DIM).load_state_dict(one.state_dict())


def test_pulls_an_image_to_itself_and_from_its_rivals():
    torch.manual_seed(0)
    memory = made()
    student = vectors(0).requires_grad_()
    teacher = memory.teacher[ROWS].clone()
    optimizer = torch.optim.Adam([student], lr=0.05)
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        memory.batches = 0  # the same rivals
        loss = memory.loss(student, teacher, ROWS, LABELS)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.8 * values[0]


def test_computes_in_float32():
    expected = made().loss(vectors(0), vectors(1), ROWS, LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(made().loss(vectors(0), vectors(1), ROWS, LABELS), expected)
