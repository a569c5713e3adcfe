"""Batch norms in the weights before them: the same function, in fewer layers, and back."""

from __future__ import annotations

import copy

import pytest
import torch
from foreign import Network, assert_same, fit, made
from torch import nn
from torchvision.models import resnet18

from lightning_compress import load
from lightning_compress.callbacks import QAT
from lightning_compress.core.quant.fold_norms import fold_norms, folded
from lightning_compress.core.quant.layers import choose_quantized
from lightning_compress.core.quant.norm_behind import norms_behind


def alive(network):
    """With statistics that are not those of a fresh norm."""
    torch.manual_seed(0)
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.normal_(1, 0.3)
        norm.bias.data.normal_()
    return network.eval()


@pytest.mark.parametrize(("build", "shape", "count"), [(Network, (1, 8, 8), 5), (resnet18, (3, 64, 64), 20)])
def test_the_function_stays(build, shape, count):
    network = alive(build())
    x = torch.randn(2, *shape)
    expected = network(x)
    dense = copy.deepcopy(network)
    norms = norms_behind(network, choose_quantized(network)[0], x)
    assert len(norms) == count
    undo = fold_norms(network, norms)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    torch.testing.assert_close(network(x), expected, atol=1e-4, rtol=1e-4)
    undo(network)
    assert list(network.state_dict()) == list(dense.state_dict())
    network.load_state_dict(dense.state_dict())
    assert torch.equal(network(x), expected)


def test_norms_without_parameters():
    layer, norm = nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3, affine=False).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 2, 5)
    weight, bias = folded(layer, norm)
    torch.testing.assert_close(nn.functional.conv1d(x, weight, bias), norm(layer(x)))


def test_quantisation_without_norms(tmp_path):
    module = made()
    trainer = fit(module, tmp_path, QAT(8, 8, quantizer="lsq", fold_batch_norms=True, range_lr=1e-4), max_epochs=1)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    assert module.net.blocks[0].conv1.bias is not None
    trainer.save_checkpoint(tmp_path / "whole.ckpt", weights_only=True)
    assert_same(load(type(module), tmp_path / "whole.ckpt"), module)
    with pytest.raises(ValueError, match=r"QAT\(fold_batch_norms=True\): quantizer='interval' maps weights"):
        QAT(fold_batch_norms=True)
