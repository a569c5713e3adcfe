"""What is learnt between two features: shapes, starting values, and who learns what."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.core.distill.connectors import ConvRegressor, Expectation, Factors


def maps(channels, *size):
    return torch.rand(2, channels, *size)


@pytest.mark.parametrize(
    ("size", "target", "kind", "kernel", "shape"),
    [
        ((8, 8), (4, 4), nn.Conv2d, (3, 3), (4, 4)),
        ((4, 4), (8, 8), nn.ConvTranspose2d, (4, 4), (8, 8)),
        ((8, 8), (8, 8), nn.Conv2d, (1, 1), (8, 8)),
        ((7, 7), (5, 5), nn.Conv2d, (3, 3), (5, 5)),
        ((7, 5), (5, 5), nn.Conv2d, (3, 1), (5, 5)),
        ((4, 4), (6, 6), nn.Conv2d, (1, 1), (4, 4)),  # then the teacher's are averaged down
    ],
)
def test_a_convolution_for_every_size(size, target, kind, kernel, shape):
    regressor = ConvRegressor(3, 5, size, target)
    assert type(regressor.layer) is kind
    assert regressor.layer.kernel_size == kernel
    assert regressor.layer.bias is not None
    student, teacher = regressor(maps(3, *size), maps(5, *target))
    assert student.shape == teacher.shape == (2, 5, *shape)
    assert student.min() == 0  # an activation
    assert ConvRegressor(3, 5, size, target, relu=False)(maps(3, *size), maps(5, *target))[0].min() < 0


def test_expectation_begins_with_a_variance_of_five():
    connector = Expectation(3, 5)
    torch.testing.assert_close(connector.raw.detach(), torch.full((5,), 4.993229), rtol=0, atol=1e-5)
    mean, teacher, variance = connector(maps(3, 4, 4), maps(5, 2, 2))
    assert mean.shape == teacher.shape == (2, 5, 2, 2)
    torch.testing.assert_close(variance, torch.full((5,), 5.0))
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.bias) for c in connector.mean[::2]] == [
        (3, 5, (1, 1), None), (5, 5, (1, 1), None), (5, 5, (1, 1), None)
    ]  # fmt: skip


def test_factors_are_half_the_channels_and_only_the_paraphraser_restores():
    connector = Factors(3, 6)
    student = maps(3, 4, 4).requires_grad_()
    own, theirs, error = connector(student, maps(6, 4, 4))
    assert own.shape == theirs.shape == (2, 3, 4, 4)
    assert not theirs.requires_grad
    error.backward()
    assert student.grad is None
    assert all(p.grad is None for p in connector.translator.parameters())
    assert all(p.grad is not None for p in connector.paraphraser.parameters())
    assert all(p.grad is not None for p in connector.restorer.parameters())


def test_a_paraphraser_learns_to_restore():
    torch.manual_seed(0)
    connector = Factors(3, 4)
    # features of two dimensions only, so that as many factors say it all
    features = (torch.randn(4, 2) @ torch.randn(2, 8 * 16)).view(4, 8, 4, 4).transpose(0, 1)
    optimizer = torch.optim.Adam(connector.parameters(), lr=0.01)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        _, _, error = connector(maps(3, 4, 4), features)
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.5 * errors[0]
