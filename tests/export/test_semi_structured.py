"""2:4 weights on sparse tensor cores; what needs no GPU is checked without one."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_compress.core.sparse.nm import top_of_groups
from lightning_compress.export import semi_structured
from lightning_compress.export.semi_structured import PointwiseLinear, convert, to_semi_structured, why_dense


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 96, 1, stride=2), nn.ReLU(), nn.Conv2d(96, 32, 1, bias=False),
        nn.Flatten(), nn.Linear(32 * 16, 128), nn.Linear(128, 10),
    )  # fmt: skip
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.weight *= top_of_groups(layer.weight.abs(), 2, 4)
    return net


@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_pointwise_convolution_is_a_matrix_product(stride, bias):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(8, 12, 1, stride=stride, bias=bias), torch.randn(2, 8, 7, 6)
    torch.testing.assert_close(PointwiseLinear(conv)(x), conv(x))


def test_which_layers_can():
    net = network()
    reasons = [why_dense(layer) for layer in net if hasattr(layer, "weight")]
    assert reasons == [
        "is no plain 1x1 convolution", None, "is 32 x 96; the kernels take multiples of 32 x 64", None,
        "is 10 x 128; the kernels take multiples of 32 x 64",
    ]  # fmt: skip
    assert why_dense(nn.Linear(64, 32)) == "is not 2:4 sparse"
    assert why_dense(nn.Conv2d(64, 32, 1, padding=1)) == "is no plain 1x1 convolution"


def test_conversion_replaces_the_layers(monkeypatch):
    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", lambda weight: weight)
    net, x = network().eval(), torch.randn(2, 64, 8, 8)
    expected = net(x)
    for name in ("1", "5"):
        convert(net, name)
    assert isinstance(net[1], PointwiseLinear)
    torch.testing.assert_close(net(x), expected)


def test_without_such_a_gpu_it_is_refused():
    with pytest.raises(MisconfigurationException, match="is on 'cpu'; 2:4 weights need a GPU"):
        to_semi_structured(network())
    with pytest.raises(ValueError, match="dtype: expected torch"):
        to_semi_structured(network(), torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_sparse_tensor_cores():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no sparse tensor cores")
    net, x = network().cuda(), torch.randn(2, 64, 8, 8, device="cuda")
    sparse, dense = to_semi_structured(net)
    assert set(dense) == {"0", "3", "6"}
    with torch.no_grad():
        torch.testing.assert_close(sparse(x.half()).float(), net(x), atol=2e-2, rtol=2e-2)
    with pytest.raises(MisconfigurationException, match="finds no 2:4 layer"):
        to_semi_structured(nn.Linear(64, 64).cuda())
