"""Binary networks in bits: the same function, the sizes of the papers, files that come back whole or say why not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foreign import Foreign, fit, made
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from real_data import real_data
from torch import nn

import lightning_compress
from lightning_compress import binary_network, load_packed, save_packed
from lightning_compress.callbacks import RBNN
from lightning_compress.callbacks.quantization.rbnn import rotate_and_binarize
from lightning_compress.core.quant.binary import downsamples
from lightning_compress.export.packed import packed_size
from lightning_compress.networks import (
    binary_resnet18,
    binary_resnet20,
    binary_resnet34,
    load_weights,
    resnet20,
    vgg_small,
)
from lightning_compress.ops.binary_conv2d import BinaryConv2d


def binarised(network, activation_bits=1):
    """With statistics and scales as after training, of either sign."""
    torch.manual_seed(0)
    for norm in network.modules():
        if isinstance(norm, (nn.BatchNorm2d, nn.BatchNorm1d)):
            norm.weight.data.uniform_(0.5, 1.5).mul_(torch.randn(norm.num_features).sign())
            norm.bias.data.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    names, _ = RBNN(exclude=downsamples(network)).choose(network)
    rotate_and_binarize(network, names, activation_bits, False, 0)
    for name in names:
        network.get_submodule(name).output_scale.alpha.data.normal_()
    return network.eval()


@pytest.mark.parametrize("channels", [16, 32, 64, 96])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 1), (2, 0), (2, 1)])
@pytest.mark.parametrize("start", ["random", "ones"])
@torch.no_grad()
def test_a_layer_in_bits_is_the_layer(channels, stride, padding, start):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(channels, 24, 3, stride, padding, bias=channels == 32))
    rotate_and_binarize(network, ["0"], 1, False, 0)
    network[0].output_scale.alpha.data.normal_()
    x = torch.ones(2, channels, 9, 9) if start == "ones" else torch.randn(2, channels, 9, 9)
    packed = binary_network(network.eval())
    assert isinstance(packed[0], BinaryConv2d)
    if channels == 32:  # a bias is added before the scale in one, after it in the other
        torch.testing.assert_close(packed(x), network(x))
    else:
        assert torch.equal(packed(x), network(x))


def test_grouped_convolutions():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)).eval()
    rotate_and_binarize(network, ["0"], 1, False, 0)
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        assert torch.equal(binary_network(network)(x), network(x))


@pytest.mark.parametrize(
    ("make", "size", "bytes_"),
    [
        pytest.param(binary_resnet18, 224, 1_373_184, id="RBNN-ResNet-18"),
        pytest.param(binary_resnet34, 64, 2_635_776, id="RBNN-ResNet-34"),
    ],
)
@torch.no_grad()
def test_networks_of_the_papers(make, size, bytes_, tmp_path):
    network, x = binarised(make()), torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    packed = binary_network(network, (1, 3, size, size))
    assert packed_size(packed) == bytes_
    assert not any(
        isinstance(m, nn.BatchNorm2d) and "stages" in n for n, m in packed.named_modules() if "shortcut" not in n
    )
    expected = network(x)
    assert (packed(x) - expected).abs().max() < 1e-4 * expected.abs().max()
    path = save_packed(network, tmp_path / "network.bits", x)
    real = sum(p.numel() * 4 for n, p in network.named_parameters() if p.ndim == 2 or n in ("conv1.weight",))
    real += sum(m.weight.numel() * 4 for n, m in network.named_modules() if n in downsamples(network))
    assert bytes_ + real < path.stat().st_size < bytes_ + real + 150_000  # norms, scales, names
    assert torch.equal(load_packed(make(), path)(x), packed(x))


@torch.no_grad()
def test_without_an_example_norms_stay_and_nothing_is_rounded():
    for network, size in ((binarised(binary_resnet20()), 32), (binarised(vgg_small()), 32)):
        x = torch.randn(2, 3, size, size)
        packed = binary_network(network)
        assert torch.equal(packed(x), network(x))
        assert sum(isinstance(m, nn.BatchNorm2d) for m in packed.modules()) == sum(
            isinstance(m, nn.BatchNorm2d) for m in network.modules()
        )


@torch.no_grad()
def test_a_norm_behind_a_pooling_stays():
    packed = binary_network(binarised(vgg_small()), (1, 3, 32, 32))
    assert [n for n, m in packed.features.named_children() if isinstance(m, nn.BatchNorm2d)] == [
        "bn0",
        "bn1",
        "bn3",
        "bn5",
    ]


@torch.no_grad()
def test_real_inputs_keep_a_convolution_of_signs(tmp_path):
    def make():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 64, 3, padding=1), nn.BatchNorm2d(64), nn.Linear(6, 2))

    network, x = binarised(make(), activation_bits=32), torch.randn(2, 3, 8, 8)
    path = save_packed(network, tmp_path / "a.bits", (1, 3, 8, 8))
    loaded = load_packed(make(), path)
    assert not packed_size(loaded)
    assert isinstance(loaded[1], nn.Conv2d)
    torch.testing.assert_close(loaded(x), network(x), atol=1e-5, rtol=1e-5)


def test_a_trained_lightning_module(tmp_path):
    module = made()
    fit(module, tmp_path, RBNN(), max_epochs=1)
    x = torch.rand(3, 1, 8, 8)
    before = {k: v.clone() for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)}
    packed = lightning_compress.binary_network(module)
    with torch.no_grad():
        assert torch.equal(packed(x), module.eval()(x))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items() if k in before)
    path = save_packed(module, tmp_path / "sub" / "module.bits")
    loaded = load_packed(Foreign(), path)
    with torch.no_grad():
        assert torch.equal(loaded(x), module(x))
    assert not loaded.training


def test_what_cannot_be_packed_or_read(tmp_path):
    with pytest.raises(MisconfigurationException, match="no layer of one-bit weights"):
        binary_network(binary_resnet20())
    with pytest.raises(FileNotFoundError, match="no file at"):
        load_packed(binary_resnet20(), tmp_path / "nothing")
    path = save_packed(binarised(binary_resnet20()), tmp_path / "a.bits")
    (tmp_path / "short").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut short"):
        load_packed(binary_resnet20(), tmp_path / "short")
    torch.save({"state_dict": {}}, tmp_path / "other")
    with pytest.raises(ValueError, match="is no packed network"):
        load_packed(binary_resnet20(), tmp_path / "other")
    with pytest.raises(ValueError, match=r"no convolution 'stages\.0\.0\.conv1'"):
        load_packed(vgg_small(), path)
    with pytest.raises(ValueError, match="has a weight of shape"):
        load_packed(binary_resnet18(), path)
    with pytest.raises(ValueError, match=r"the file lacks \['stages"):
        load_packed(binary_resnet20(activation="prelu"), path)


@torch.no_grad()
def test_onnx_keeps_the_bits(tmp_path):
    """Of larger layers; operators of ONNX unpack them."""
    onnx = pytest.importorskip("onnx")
    network = nn.Sequential(nn.Conv2d(3, 128, 3), nn.Conv2d(128, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128))
    packed = binary_network(binarised(nn.Sequential(*network, nn.Flatten(), nn.Linear(128 * 16, 2))), (1, 3, 6, 6))
    exported = lightning_compress.export(packed, tmp_path / "a.onnx", (1, 3, 6, 6))
    assert exported.max_abs_difference < 1e-3
    stored = {x.name: x for x in onnx.load(exported.path).graph.initializer}
    bits = next(x for name, x in stored.items() if "packed" in name)
    assert (bits.data_type, list(bits.dims)) == (onnx.TensorProto.UINT8, [128, 144])
    assert not any(list(x.dims) == [128, 128, 3, 3] for x in stored.values())
    again = lightning_compress.export(packed, tmp_path / "a.pt2", (1, 3, 6, 6))
    assert again.max_abs_difference == 0


@pytest.mark.real_data
@torch.no_grad()
def test_the_public_resnet20_with_one_bit():
    """Real weights and images: bits and floats agree in every logit."""
    data = real_data("cifar10.npz", "weights/resnet20-cifar10.pt")
    network = resnet20()
    load_weights(network, data / "weights" / "resnet20-cifar10.pt")
    names, _ = RBNN().choose(network)
    rotate_and_binarize(network.eval(), names, 1, False, 0)
    with np.load(data / "cifar10.npz") as file:
        images = torch.from_numpy(file["x_test"][:64]).permute(0, 3, 1, 2).float() / 255
    expected = network(images)
    torch.testing.assert_close(
        binary_network(network)(images), expected, atol=1e-4, rtol=1e-5
    )  # pooled in another order
    folded = binary_network(network, (1, 3, 32, 32))(images)
    same = (folded - expected).abs().amax(1) < 1e-4 * expected.abs().max()
    assert same.float().mean() > 0.9  # a sum next to a threshold may turn, and with it the rest of its image
