from __future__ import annotations

import copy
import io
import json
import pickle
import time

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.utils import parametrize

from lightning_compress.core.profile import measure_latency, profile
from lightning_compress.networks import resnet20


class Mixing(nn.Module):
    """Multiplies its two inputs as batches of matrices."""

    def forward(self, a, b):
        return torch.einsum("bij,bjk->bik", a, b)


class SelfAttention(nn.Module):
    """Functional attention: no module of its own holds the products."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


ENCODER_LAYER = 5 * 8 * 24 + 2 * 5 * 5 * 8 + 5 * 8 * 8 + 2 * 5 * 8 * 16  # qkv, two products, out, two of the MLP


@pytest.mark.parametrize(
    ("module", "example_input", "expected"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (1, 4, 5, 7), 5 * 7 * 6 * 2 * 9),
        (nn.Conv2d(4, 6, 3, stride=2), (1, 4, 9, 9), 4 * 4 * 6 * 4 * 9),
        (nn.Conv1d(2, 3, 5, padding="same"), (1, 2, 11), 11 * 3 * 2 * 5),
        (nn.Conv3d(2, 3, 3), (1, 2, 4, 5, 6), 2 * 3 * 4 * 3 * 2 * 27),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (1, 4, 5, 5), 5 * 5 * 4 * 3 * 9),
        (nn.Linear(4, 6), (1, 3, 4), 3 * 4 * 6),
        (nn.Linear(4, 6, bias=False), (1, 4), 4 * 6),
        (nn.BatchNorm2d(4), (1, 4, 5, 5), 0),
        (Mixing(), (torch.zeros(2, 3, 4), torch.zeros(2, 4, 5)), 3 * 4 * 5),
        (Mixing(), {"a": torch.zeros(2, 3, 4), "b": torch.zeros(2, 4, 5)}, 3 * 4 * 5),
        (SelfAttention(), (1, 5, 8), 5 * 8 * 24 + 2 * 5 * 5 * 8),
        (nn.LSTM(4, 6, 2, batch_first=True), (1, 7, 4), 7 * 4 * 6 * (4 + 6 + 6 + 6)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (1, 5, 8), ENCODER_LAYER),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_macs_by_hand(module, example_input, expected):
    assert profile(module, example_input).macs == expected


def test_batch_is_divided_out():
    net = resnet20()
    assert profile(net, torch.zeros(7, 3, 32, 32)).to_dict() == profile(net, (1, 3, 32, 32)).to_dict()


def test_conventions():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1, bias=False))
    macs, places = 36 * (4 * 27 + 5 * 4), 36  # 6x6 outputs
    assert profile(net, (1, 3, 8, 8)).cost == macs
    assert profile(net, (1, 3, 8, 8), convention="flops").cost == 2 * macs
    paper = profile(net, (1, 3, 8, 8), convention="paper")
    assert paper.cost == paper.paper_macs() == macs + 2 * 4 * places + 4 * places
    assert paper.paper_macs(bn_ops=4, conv_bias=False) == macs + 4 * 4 * places
    assert paper.macs == macs
    assert profile(net, (1, 3, 8, 8), convention="gan").cost == macs


@pytest.mark.parametrize(
    ("layer", "out"),
    [
        (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), 10 * 10),
        (nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, groups=2), 10 * 10),
        (nn.ConvTranspose2d(4, 6, 3, stride=1), 7 * 7),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), 11),
    ],
)
def test_papers_on_gans_count_the_places_of_the_output(layer: nn.Module, out: int):
    """Of a transposed convolution; what is computed are those of the input."""
    shape = (3, 4, 5, 5) if isinstance(layer, nn.ConvTranspose2d) else (3, 4, 5)
    found = profile(layer, shape, convention="gan")
    assert found.cost == out * layer.weight.numel()
    assert found.macs == (25 if len(shape) == 4 else 5) * layer.weight.numel()
    assert "MACs (GAN)" in str([column.header for column in found.table().columns])


def test_layers_in_the_order_of_execution():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.unused, self.first = nn.Linear(3, 2), nn.Linear(9, 9), nn.Linear(4, 3)
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.last(self.first(x)) * self.scale

    layers = profile(Backwards(), (1, 4)).layers
    assert [(x.name, x.macs, x.params, x.outputs) for x in layers] == [
        ("", 0, 2, 2),
        ("first", 12, 15, 3),
        ("last", 6, 8, 2),
        ("unused", 0, 90, 0),
    ]


def test_kinds_and_attribution():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.norm = nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.LayerNorm(8)
            self.attention, self.fused = SelfAttention(), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x = self.norm(self.bn(self.conv(x)).transpose(1, 2))
            return self.fused(*3 * (self.attention(x),))[0] @ x.transpose(1, 2)

    kinds = {x.name: (x.kind, x.shape) for x in profile(Net(), (1, 3, 5)).layers}
    assert kinds == {
        "": ("matmul", (5, 5)),
        "conv": ("conv", (8, 5)),
        "bn": ("batchnorm", (8, 5)),
        "norm": ("norm", (5, 8)),
        "attention": ("attention", (5, 8)),
        "attention.qkv": ("linear", (5, 24)),
        "fused": ("attention", (5, 8)),  # with its out_proj
    }


def test_shared_parameters_count_once():
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    counts = profile(nn.Sequential(embedding, head, nn.ReLU()), torch.zeros(1, 3, dtype=torch.long))
    assert (counts.params, counts.macs) == (40, 3 * 4 * 10)
    twice = nn.Linear(4, 4)
    counts = profile(nn.Sequential(twice, twice), (1, 4))
    assert (counts.params, counts.macs, len(counts.layers)) == (20, 32, 1)


def test_parametrisation_is_part_of_its_layer_and_costs_nothing():
    class Factors(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.eye(8))

        def forward(self, weight):
            return (self.factor @ weight.flatten(1)).view_as(weight)

    conv = nn.Conv2d(3, 8, 3)
    parametrize.register_parametrization(conv, "weight", Factors())
    (layer,) = profile(conv, (1, 3, 8, 8)).layers
    assert (layer.kind, layer.macs, layer.params) == ("conv", 36 * 8 * 27, 8 * 27 + 8 + 64)


def test_module_is_left_as_it_was():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm, self.grid, self.calls = nn.Linear(4, 4), nn.BatchNorm1d(4), None, 0
            self.norm.eval()

        def forward(self, x):
            self.calls += 1
            if self.grid is None:
                self.grid = torch.arange(4, device=x.device)
                self.register_buffer("seen", x.clone())
            return self.norm(self.linear(x + self.grid))

        def train(self, mode=True):
            raise AssertionError("a mode switch may do work, such as merging weights")

    module = Caching()
    before = copy.deepcopy(module.state_dict())
    assert profile(module, (4, 4)).macs == 16
    assert (module.grid, module.calls, module.training, module.norm.training) == (None, 0, True, False)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert module.linear.weight.device.type == "cpu"
    assert module(torch.zeros(2, 4)).shape == (2, 4)


def test_module_that_meta_tensors_do_not_suit_runs_on_its_device():
    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.scale = nn.LSTM(4, 6, batch_first=True), torch.ones(4)

        def forward(self, x):
            return x if float((x * self.scale).sum()) > 1e9 else self.rnn(x)[0]

    assert profile(Looking(), (2, 7, 4)).macs == 7 * 24 * (4 + 6)


def test_fused_kernels_and_inference_mode_hide_nothing():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    with torch.inference_mode():
        assert profile(encoder, torch.zeros(2, 5, 8)).macs == 2 * ENCODER_LAYER
    assert torch.backends.mha.get_fastpath_enabled()


def test_low_precision_compiled_and_meta_modules():
    expected = profile(resnet20(), (1, 3, 32, 32)).macs
    assert profile(resnet20().bfloat16(), (1, 3, 32, 32)).macs == expected
    assert profile(torch.compile(resnet20()), (1, 3, 32, 32)).macs == expected
    with torch.device("meta"):
        assert profile(resnet20(), (1, 3, 32, 32)).macs == expected


def test_profiled_module_pickles_and_copies():
    net = resnet20()
    profile(net, (1, 3, 32, 32))
    x = torch.randn(2, 3, 32, 32)
    net.eval()
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), copy.deepcopy(net)(x))


def test_table_and_dict():
    counts = profile(resnet20(), (1, 3, 32, 32))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(counts.table())
    text = console.export_text()
    assert "40,551,040" in text
    assert "layer3.2.conv2" in text
    data = json.loads(json.dumps(counts.to_dict()))
    assert (data["macs"], data["params"], data["layers"][0]["name"]) == (40_551_040, 269_722, "conv1")


def test_errors():
    with pytest.raises(ValueError, match=r"convention must be one of macs, flops, paper, gan, got 'tp'"):
        profile(resnet20(), (1, 3, 32, 32), convention="tp")
    with pytest.raises(ValueError, match=r"example_input does not suit CIFARResNet: .* \[\(1, 4, 32, 32\)\]"):
        profile(resnet20(), (1, 4, 32, 32))
    with pytest.raises(ValueError, match=r"no layer 'layer1.0.conv'\. Did you mean 'layer1.0.conv\d'"):
        profile(resnet20(), (1, 3, 32, 32)).layer("layer1.0.conv")
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measure_latency(nn.Linear(2, 2), (1, 2), repeats=0)


def test_resnet50_takes_less_than_a_fifth_of_a_second():
    from torchvision.models import resnet50

    net = resnet50()
    times = []
    for _ in range(3):
        start = time.process_time()
        profile(net, (1, 3, 224, 224))
        times.append(time.process_time() - start)
    assert min(times) < 0.2


def test_latency():
    calls = []

    class Waiting(nn.Module):
        def forward(self, x):
            calls.append((self.training, torch.is_inference_mode_enabled(), torch.get_num_threads(), len(x)))
            time.sleep(0.1 if len(calls) in (1, 4) else 0.002)
            return x

    module, threads = Waiting(), torch.get_num_threads()
    latency = measure_latency(module, (3, 1), repeats=5, warmup=1, threads=1)
    assert calls == [(False, True, 1, 3)] * 6
    assert 2 <= latency.median_ms < 20  # neither the warm-up nor one slow pass counts
    assert (latency.batch, latency.threads, module.training) == (3, 1, True)
    assert torch.get_num_threads() == threads
    assert latency.device_name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_latency_and_profile_on_gpu():
    net = resnet20().cuda()
    latency = measure_latency(net, (64, 3, 32, 32))
    assert latency.device_name == torch.cuda.get_device_name()
    assert 0 < latency.median_ms < 1000
    assert profile(net, (1, 3, 32, 32)).macs == 40_551_040
