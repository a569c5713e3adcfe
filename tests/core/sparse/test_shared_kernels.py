"""Convolutions with shared kernels: their weight and its gradient, their size, their file, their faster form."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from foreign import Network, assert_same, made
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.core.profile import profile
from lightning_compress.core.sparse.shared_kernels import (
    SharedKernelConv2d,
    SharedKernels,
    load_packed,
    originals,
    save_packed,
    set_kernels,
    share_kernels,
    shared_convolutions,
    with_fewer_kernels,
)
from lightning_compress.core.surgery import attach_record

LEVELS = [0, 2, 1, 3, 1, 3, 2, 0, 1]
BUDGETS = [0, 2, 3, 8]


def shared(conv: nn.Conv2d | None = None, levels: list[int] = LEVELS, budgets: list[int] = BUDGETS, seed: int = 0):
    """A convolution (9 inputs, 8 outputs) with random indices, its dense weight before, and its parametrisation."""
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(9, 8, 3, padding=1) if conv is None else conv
    before = conv.weight.detach().clone()
    share_kernels(conv, {"": {"levels": levels, "budgets": budgets}})
    form = conv.parametrizations.weight[0]
    indices = [torch.randint(q, index.shape, generator=generator) for q, _, index in form.shared]
    set_kernels(conv, indices, before)
    return conv, before, form


# ---- the weight


def test_the_weight_is_gathered_into_the_channels_own_order():
    conv, before, form = shared()
    for c, level in enumerate(LEVELS):
        kernels = conv.weight[:, c].detach()
        if level == 0:
            assert not kernels.any()
        elif level == 3:
            assert torch.equal(kernels, before[:, c])
        else:
            _, channels, index = form.shared[level - 1]
            own = index[:, channels.tolist().index(c)].long()
            for j in range(BUDGETS[level]):  # kernels that share an index are their mean
                if (own == j).any():
                    mean = before[own == j, c].mean(0)
                    torch.testing.assert_close(kernels[own == j], mean.expand(int((own == j).sum()), 3, 3))


def test_only_the_kernels_that_differ_are_parameters():
    conv, _, form = shared()
    parameters = dict(conv.named_parameters())
    assert {n: tuple(p.shape) for n, p in parameters.items()} == {
        "bias": (8,),
        "parametrizations.weight.original0": (8, 2, 3, 3),
        "parametrizations.weight.original1": (2, 3, 3, 3),
        "parametrizations.weight.original2": (3, 2, 3, 3),
    }
    assert [tuple(p.shape) for p in originals(conv)] == [(8, 2, 3, 3), (2, 3, 3, 3), (3, 2, 3, 3)]
    assert form.kernels == 2 * 8 + 3 * 2 + 2 * 3
    assert sum(p.numel() for p in originals(conv)) == form.kernels * 9
    assert isinstance(conv, nn.Conv2d)
    assert all(not b.is_floating_point() for b in conv.buffers())


def test_the_gradient_of_a_kernel_is_the_sum_over_those_it_stands_for():
    conv, _, form = shared()
    x = torch.randn(2, 9, 5, 5, generator=torch.Generator().manual_seed(1))
    dense = nn.Parameter(conv.weight.detach().clone())
    torch.nn.functional.conv2d(x, dense, conv.bias, padding=1).square().sum().backward()
    conv(x).square().sum().backward()
    full, *parts = originals(conv)
    assert torch.allclose(full.grad, dense.grad[:, [3, 5]], rtol=1e-5)
    for part, (q, channels, index) in zip(parts, form.shared, strict=True):
        for i, c in enumerate(channels):
            for j in range(q):
                expected = dense.grad[index[:, i] == j, c].sum(0)
                torch.testing.assert_close(part.grad[j, i], expected, rtol=1e-4, atol=1e-4)


def test_equal_budgets_are_one_group():
    form = SharedKernels([1, 2, 3, 4, 4], [0, 1, 1, 2, 8])
    assert [(q, channels.tolist()) for q, channels, _ in form.shared] == [(1, [0, 1]), (2, [2])]
    assert form.index_bits == 8  # one kernel needs no index


def test_without_levels_between_there_is_no_index():
    conv, before, _ = shared(levels=[0, 1, 1, 0, 1, 0, 0, 0, 1], budgets=[0, 8])
    assert list(conv.state_dict()) == ["bias", "parametrizations.weight.original0"]
    kept = [1, 2, 4, 8]
    x = torch.randn(2, 9, 5, 5)
    restricted = torch.nn.functional.conv2d(x[:, kept], before[:, kept], conv.bias, padding=1)
    assert torch.allclose(conv(x), restricted, atol=1e-6)


def test_indices_take_as_few_bytes_as_they_can():
    assert SharedKernels([1], [0, 256, 600]).index1.dtype == torch.uint8
    assert SharedKernels([1], [0, 257, 600]).index1.dtype == torch.int16


def test_it_trains_in_half_precision_and_converts():
    conv, _, form = shared()
    x = torch.randn(2, 9, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        conv(x).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in conv.parameters())
    before = form.index1.clone()
    conv.to(torch.bfloat16)
    assert torch.equal(form.index1, before)
    assert conv.weight.dtype == torch.bfloat16


def test_another_parametrisation_stacks_on_it():
    class Halved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    conv, _, _ = shared()
    before = conv.weight.detach().clone()
    parametrize.register_parametrization(conv, "weight", Halved())
    assert torch.equal(conv.weight, before / 2)


def test_it_copies_and_pickles():
    conv, _, _ = shared()
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert_same(other, conv)
        assert torch.equal(other.weight, conv.weight)
        assert next(shared_convolutions(other))[2].levels == LEVELS


def test_frozen_stays_frozen():
    conv, _, _ = shared(nn.Conv2d(9, 8, 3).requires_grad_(False))
    assert not any(p.requires_grad for p in conv.parameters())


# ---- on a network


def network() -> nn.Module:
    """The network of the tests, three of its convolutions with shared kernels."""
    torch.manual_seed(3)
    module = Network()
    generator = torch.Generator().manual_seed(3)
    layers = {
        "blocks.0.conv1": {"levels": [0, 1, 2, 3, 1, 2, 3, 3], "budgets": [0, 1, 6, 12]},
        "blocks.0.conv2": {"levels": [1, 1, 2, 2, 3, 0, 3, 0, 2, 1, 1, 1], "budgets": [0, 3, 5, 8]},
        "blocks.1.conv1": {"levels": [0, 1, 1, 0, 1, 0, 0, 1], "budgets": [0, 12]},
    }
    dense = {name: module.get_parameter(f"{name}.weight").detach().clone() for name in layers}
    attach_record(module).change(module, share_kernels, {"layers": layers}, by="test", epoch=0)
    for name, conv, form in shared_convolutions(module):
        set_kernels(conv, [torch.randint(q, i.shape, generator=generator) for q, _, i in form.shared], dense[name])
    return module


def test_a_state_dict_is_enough():
    module, fresh = network(), Network()
    attach_record(fresh)
    fresh.load_state_dict(module.state_dict())
    assert_same(fresh, module)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(fresh.eval()(x), module.eval()(x))


def test_a_dense_state_dict_makes_it_dense_again():
    module, fresh = network(), Network()
    module.load_state_dict(fresh.state_dict())
    assert_same(module, fresh)
    assert type(module.blocks[0].conv1) is nn.Conv2d
    assert not module._ddp_params_and_buffers_to_ignore


def test_ddp_leaves_the_indices_alone():
    buffers = {name for name, _ in network().named_buffers() if "parametrizations" in name}
    assert set(network()._ddp_params_and_buffers_to_ignore) == buffers
    assert len(buffers) == 3 + 2 + 2  # the places of the channels, and the indices


def test_an_inference_copy_is_the_dense_equivalent():
    module = network().eval()
    plain = inference_copy(module)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(plain(x), module(x))
    assert type(plain.blocks[0].conv1) is nn.Conv2d
    assert profile(plain, (1, 1, 8, 8)).params == profile(Network(), (1, 1, 8, 8)).params


# ---- size


def test_the_worked_size():
    """64 inputs and outputs, 3x3, level counts (4, 10, 20, 30)."""
    levels = [0] * 4 + [1] * 10 + [2] * 20 + [3] * 30
    form = SharedKernels(levels, [0, 16, 32, 64])
    assert form.kernels == 2720
    assert form.index_bits == 8960
    assert form.compression(9) == pytest.approx(36_864 / 24_760)
    assert form.acceleration == pytest.approx(4096 / 2720)


def test_the_file_holds_the_network_and_few_bits_for_indices(tmp_path):
    module = network()
    path = save_packed(module, tmp_path / "folder" / "packed.pt")
    content = torch.load(path, weights_only=True)
    stored = {key: bits for key, _, _, bits in content["tensors"] if bits is not None}
    # 8 x 5 indices of 2 bits, 8 x 3 of 3 bits, 12 x 2 of none and of 3 bits
    assert sorted(stored.values()) == [0, 2, 3, 3]
    others = [v for k, v in module.state_dict().items() if isinstance(v, Tensor) and k not in stored]
    plain = sum(v.numel() * v.element_size() for v in others)
    assert content["bytes"].numel() == plain + 8 * 5 * 2 // 8 + 8 * 3 * 3 // 8 + 12 * 2 * 3 // 8
    fresh = Network()
    load_packed(fresh, path)
    assert_same(fresh, module)  # the biases too
    assert torch.equal(fresh.stem.bias, module.stem.bias)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(fresh.eval()(x), module.eval()(x))


def test_a_file_of_a_single_convolution(tmp_path):
    conv, _, _ = shared()
    fresh = nn.Conv2d(9, 8, 3, padding=1)
    load_packed(fresh, save_packed(conv, tmp_path / "conv.pt"))
    assert_same(fresh, conv)


def test_files_that_are_not(tmp_path):
    with pytest.raises(ValueError, match="no convolution of Network shares kernels"):
        save_packed(Network(), tmp_path / "dense.pt")
    with pytest.raises(FileNotFoundError):
        load_packed(Network(), tmp_path / "nowhere.pt")
    whole = save_packed(network(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cut\.pt' is not a whole file of packed kernels"):
        load_packed(Network(), tmp_path / "cut.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt' is not a whole file of packed kernels"):
        load_packed(Network(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"whole\.pt' does not fit Foreign"):
        load_packed(made(), whole)


# ---- the form that computes with fewer kernels


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(9, 8, 3, padding=1),
        nn.Conv2d(9, 8, 3, stride=2, padding=(1, 2), dilation=2, bias=False),
        nn.Conv2d(9, 8, 1, bias=False),
        nn.Conv2d(9, 8, (1, 5), padding="same", padding_mode="reflect"),
    ],
    ids=["3x3", "stride", "1x1", "reflect"],
)
def test_two_steps_compute_the_same(conv: nn.Conv2d):
    conv, _, form = shared(copy.deepcopy(conv))
    split = SharedKernelConv2d(conv)
    x = torch.randn(3, 9, 12, 12)
    torch.testing.assert_close(split(x), conv(x), atol=1e-5, rtol=0)
    places = conv(x[:1])[0, 0].numel()
    assert profile(split, x[:1]).macs == places * conv.kernel_size[0] * conv.kernel_size[1] * form.kernels


def test_a_network_with_fewer_kernels():
    module = network().eval()
    fewer = with_fewer_kernels(module)
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(fewer(x), module(x), atol=1e-5, rtol=0)
    assert sum(isinstance(m, SharedKernelConv2d) for m in fewer.modules()) == 3
    assert profile(fewer, (1, 1, 8, 8)).macs < profile(Network(), (1, 1, 8, 8)).macs
