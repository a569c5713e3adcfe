from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from lightning_compress.modules.translation import ImagePool


def pool(size: int) -> ImagePool:
    return ImagePool(size, torch.Generator().manual_seed(0))


def images(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).clone()


def test_it_gives_back_what_it_gets_until_it_is_full() -> None:
    memory = pool(2)
    for value in (1.0, 2.0):
        assert torch.equal(memory.query(images(value)), images(value))
    seen = {1.0, 2.0}
    for value in range(3, 200):
        given = memory.query(images(value))
        assert given.unique().numel() == 1
        seen.add(float(value))
        assert given[0, 0, 0, 0].item() in seen
        assert len(memory.images) == 2


def test_half_of_the_images_given_are_new() -> None:
    memory = pool(50)
    memory.query(images(*range(-50, 0)))
    fresh = sum(memory.query(images(i)).mean().item() == i for i in range(10_000))
    assert fresh / 10_000 == pytest.approx(0.5, abs=0.02)


def test_it_does_what_the_loop_does() -> None:
    """Image by image, in the order of the batch, whatever the batch size; what is given is a copy."""
    rng = torch.Generator().manual_seed(0)
    held: list[float] = []

    def reference(value: float) -> float:
        if len(held) < 3:
            held.append(value)
            return value
        if torch.rand((), generator=rng) > 0.5:
            place = int(torch.randint(3, (), generator=rng))
            old, held[place] = held[place], value
            return old
        return value

    memory = pool(3)
    order = random.Random(0)
    start = 0
    for _ in range(40):
        batch = range(start, start := start + order.randint(1, 7))
        given = memory.query(images(*batch))
        assert given[:, 0, 0, 0].tolist() == [reference(value) for value in batch]
        given.fill_(-1)
    assert memory.images[:, 0, 0, 0].tolist() == held


def test_without_a_memory_all_images_pass() -> None:
    memory = pool(0)
    batch = images(1, 2).requires_grad_()
    given = memory.query(batch)
    assert torch.equal(given, batch)
    assert not given.requires_grad
    assert memory.state_dict() == {"images": None}


def test_what_it_holds_has_no_graph() -> None:
    memory = pool(1)
    batch = images(1, 2, 3).requires_grad_()
    assert not memory.query(2 * batch).requires_grad
    assert not memory.images.requires_grad


def test_its_state_continues_it() -> None:
    one, other = pool(3), pool(3)
    one.query(images(*range(10)))
    other.load_state_dict(one.state_dict())
    other.generator.set_state(one.generator.get_state())
    for i in range(10, 30):
        assert torch.equal(one.query(images(i)), other.query(images(i)))


def test_images_of_another_size_are_refused() -> None:
    memory = pool(2)
    memory.query(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"holds images of shape \(3, 2, 2\), got \(3, 4, 4\)"):
        memory.query(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="pool_size: expected 0 or more images, got -1"):
        pool(-1)
