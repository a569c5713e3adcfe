"""What goes through a network is seen, and the network is left as it was."""

from __future__ import annotations

import foreign
import pytest
import torch
from torch import nn

from lightning_compress.core.distill.connectors import Connectors, connect
from lightning_compress.core.distill.taps import CallTap, Point, logits_of, observe
from lightning_compress.core.distill.teacher import Teacher
from lightning_compress.core.surgery import attach_record

X = torch.rand(2, 1, 8, 8)


def test_a_tap_keeps_the_last_call_of_a_training_step():
    network = foreign.Network()
    network.stem.eval()  # frozen
    tap = CallTap(network.stem, network)
    network(X)
    network(2 * X)
    (args, kwargs), output = tap.take()
    assert torch.equal(args[0], 2 * X)
    assert not kwargs
    torch.testing.assert_close(output, network.stem(2 * X))
    tap.take()
    network.eval()(X)  # validation
    assert tap.take() is None
    network.train()(X)
    tap.remove()
    tap.remove()
    assert tap.take() is None
    assert not network.stem._forward_hooks


def test_observes_outputs_and_inputs():
    network = foreign.Network().eval()
    points = [Point("blocks.0"), Point("head", input=True), Point("blocks.1.conv1")]
    output, (block, pooled, conv) = observe(network, points, X)
    torch.testing.assert_close(output, network.head(pooled))
    torch.testing.assert_close(conv, network.blocks[1].conv1(block))
    assert not any(m._forward_hooks for m in network.modules())
    network.unused = nn.Linear(1, 1)
    with pytest.raises(LookupError, match="Network computes without its module 'unused'"):
        observe(network, [Point("unused")], X)
    assert not any(m._forward_hooks for m in network.modules())


def test_what_a_teacher_shows_can_be_learnt_from():
    """Copies, as inference tensors may not be saved for a backward pass."""
    teacher = Teacher(foreign.Network(), channels_last=True)
    output, (block,) = teacher.observe([Point("blocks.0")], X)
    for tensor in (output, block):
        assert not tensor.is_inference()
        assert not tensor.requires_grad
    learnt = torch.ones_like(block, requires_grad=True)
    (learnt * block).sum().backward()
    assert torch.equal(learnt.grad, block)
    torch.testing.assert_close(output, teacher(X))


@pytest.mark.parametrize(
    "output",
    [
        torch.ones(2, 3),
        (torch.ones(2, 3), None),
        {"logits": torch.ones(2, 3), "loss": 0},
        type("Output", (), {"logits": torch.ones(2, 3)})(),
    ],
)
def test_logits(output):
    assert torch.equal(logits_of(output), torch.ones(2, 3))


@pytest.mark.parametrize("output", [torch.ones(2, 3, 4), {"loss": 1}, [], None, "text"])
def test_no_logits(output):
    assert logits_of(output) is None


def test_connectors_are_rebuilt_from_a_state_dict():
    given = {
        "hints_0": ("conv_regressor", 8, 6, (4, 4), (2, 2)),
        "hints_1": ("regressor", 8, 6),
        "contrast_0": ("embeddings", 8, 4, 5),
        "information_0": ("expectation", 8, 6),
        "factors_0": ("factors", 8, 6),
    }
    one, other = foreign.made(), foreign.made()
    attach_record(one).change(one, connect, {"name": "extra", "connectors": given}, by="test", epoch=0)
    assert isinstance(one.extra, Connectors)
    maps = torch.rand(2, 8, 4, 4), torch.rand(2, 6, 2, 2)
    student, teacher = one.extra["hints_0"](*maps)
    assert student.shape == teacher.shape == (2, 6, 2, 2)
    student, teacher, variance = one.extra["information_0"](*maps)
    assert student.shape == teacher.shape == (2, 6, 2, 2)
    assert variance.shape == (6,)
    student, teacher, error = one.extra["factors_0"](*maps)
    assert (student.shape, teacher.shape, error.shape) == ((2, 3, 4, 4), (2, 3, 2, 2), ())
    student, teacher = one.extra["contrast_0"](torch.rand(2, 8, 4, 4), torch.rand(2, 3, 4))
    assert student.shape == teacher.shape == (2, 5)
    attach_record(other)
    other.load_state_dict(one.state_dict())
    foreign.assert_same(other, one)
    attach_record(one).undo_changes(one, by="test")
    assert not hasattr(one, "extra")
