"""Exported files compute what the eager module computes, and exporting leaves no trace on it."""

from __future__ import annotations

import copy

import onnxruntime
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import lightning_compress
from lightning_compress import export
from lightning_compress.export import Exported
from lightning_compress.networks import CIFARResNet


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.bn(self.conv(x)).relu().mean((2, 3)))


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def run(exported: Exported, *inputs: Tensor) -> Tensor:
    """The first output of a file, by the runtime's own interface."""
    if exported.format == "torch":
        return torch.export.load(exported.path).module()(*inputs)
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    feed = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("format", "suffix"), [("onnx", ".onnx"), ("torch", ".pt2")])
def test_file_equals_eager_at_any_batch_size(tmp_path, capfd, format, suffix):
    network = CIFARResNet(8)
    network(torch.randn(8, 3, 32, 32))  # statistics of batch norm that are not the initial ones
    exported = export(network, tmp_path / "net", torch.zeros(1, 3, 32, 32), format=format)
    assert capfd.readouterr() == ("", "")
    assert exported.path == tmp_path / f"net{suffix}"
    assert exported.bytes == exported.path.stat().st_size
    assert exported.dynamic_batch
    assert exported.max_abs_difference < 1e-4
    assert exported.bytes < 1.4 * 4 * sum(p.numel() for p in network.parameters())
    assert b"resnet_cifar.py" not in exported.path.read_bytes()
    assert network.training
    x = torch.randn(5, 3, 32, 32)
    expected = network.eval()(x)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(run(exported, x), expected, atol=1e-4, rtol=1e-4)
    assert str(exported.path) in str(exported)


def test_onnx_names_and_batch_dimension(tmp_path):
    path = export(Net(), tmp_path / "net.onnx", (1, 3, 8, 8)).path
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("x", ["batch", 3, 8, 8])]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("output", ["batch", 4])]


def test_package_is_the_function(tmp_path):
    assert lightning_compress.export is export
    assert export.export(Net(), tmp_path / "a.pt2", (1, 3, 8, 8)).format == "torch"


def test_nothing_of_the_module_changes(tmp_path):
    module = Module()
    module.network.bn.eval()
    before = copy.deepcopy(module.state_dict())
    modes = [m.training for m in module.modules()]
    generator = torch.get_rng_state()
    export(module, tmp_path / "net", (1, 3, 8, 8), format="torch")
    assert [m.training for m in module.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.requires_grad for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def test_attached_module_with_hooks_of_callbacks(tmp_path):
    module = Module()
    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.strategy.connect(module)
    module._trainer = trainer
    trainer.uncopyable = (n for n in range(3))  # deepcopy of a generator raises
    seen = []
    module.network.conv.register_forward_hook(lambda m, i, o: seen.append(o.sum().item()))  # fails in a trace
    exported = export(module, tmp_path / "net", (1, 3, 8, 8), format="torch")
    assert module.trainer is trainer
    assert len(module.network.conv._forward_hooks) == 1
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(run(exported, x), module.eval()(x))


def test_hook_that_changes_the_function_is_refused(tmp_path):
    net = Net()
    net.linear.register_forward_hook(lambda m, i, o: o + 3)
    with pytest.raises(RuntimeError, match=r"forward hooks of Net change its output by 3.*parametrization"):
        export(net, tmp_path / "net", (1, 3, 8, 8), format="torch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_exported_as_float32(tmp_path, dtype):
    net = Net().to(dtype)
    exported = export(net, tmp_path / "net", (1, 3, 8, 8), format="torch")
    assert net.conv.weight.dtype is dtype
    out = run(exported, torch.randn(2, 3, 8, 8))
    assert out.dtype is torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_module_on_a_gpu(tmp_path, format):
    net = Net().cuda()
    exported = export(net, tmp_path / "net", torch.zeros(1, 3, 8, 8, device="cuda"), format=format)
    assert net.conv.weight.is_cuda
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(run(exported, x), net.cpu().eval()(x), atol=1e-4, rtol=1e-4)


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_parametrised_weights_are_exported_as_their_values(tmp_path):
    net = Net()
    parametrize.register_parametrization(net.conv, "weight", Half())
    prune.l1_unstructured(net.linear, "weight", 0.5)
    x = torch.randn(2, 3, 8, 8)
    net(x).sum().backward()  # prune leaves a weight with a history, which torch does not copy
    exported = export(net, tmp_path / "net", (1, 3, 8, 8), format="torch")
    torch.testing.assert_close(run(exported, x), net.eval()(x))
    assert parametrize.is_parametrized(net.conv)
    names = torch.export.load(exported.path).state_dict
    assert "conv.weight" in names
    assert not any("parametrizations" in name for name in names)


def test_parameters_that_are_not_used_stay_behind(tmp_path):
    module = Module()
    plain = export(module, tmp_path / "plain", (1, 3, 8, 8), format="torch").bytes
    module.teacher = nn.Linear(500, 500)  # 1 MB
    module.tied = module.network.linear
    exported = export(module, tmp_path / "net", (1, 3, 8, 8), format="torch")
    assert exported.bytes < plain + 4000
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(run(exported, x), module.eval()(x))


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1) * 2


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_network_that_fixes_its_batch(tmp_path, format):
    exported = export(FixedBatch(), tmp_path / "net", torch.zeros(2, 3), format=format)
    assert not exported.dynamic_batch
    x = torch.randn(2, 3)
    torch.testing.assert_close(run(exported, x), 2 * x)


def test_channels_that_are_zero_are_not_exported(tmp_path):
    net = Net()
    with torch.no_grad():
        for tensor in (net.conv.weight, net.conv.bias, net.bn.weight, net.bn.bias):
            tensor[2:] = 0
    exported = export(net, tmp_path / "net.pt2", (1, 3, 8, 8))
    assert torch.export.load(exported.path).state_dict["conv.weight"].shape == (2, 3, 3, 3)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(run(exported, x), net.eval()(x))


def test_fixed_batch_on_request(tmp_path):
    exported = export(Net(), tmp_path / "net.onnx", (4, 3, 8, 8), dynamic_batch=False)
    assert not exported.dynamic_batch
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [4, 3, 8, 8]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)

    def forward(self, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
        return {"sum": x + self.embed(ids), "x": 2 * x}


@pytest.mark.parametrize(("kind", "format"), [("tuple", "torch"), ("dict", "onnx")])
def test_several_inputs_and_outputs(tmp_path, kind, format):
    x, ids = torch.randn(2, 4), torch.tensor([3, 7])
    example = (x, ids) if kind == "tuple" else {"x": x, "ids": ids}
    exported = export(TwoInputs(), tmp_path / "net", example, format=format)
    assert exported.dynamic_batch
    assert exported.max_abs_difference < 1e-6


def test_compiled_network(tmp_path):
    module = Module()
    module.network = torch.compile(module.network)
    exported = export(module, tmp_path / "net", (1, 3, 8, 8), format="torch")
    assert "network.conv.weight" in torch.export.load(exported.path).state_dict


def test_difference_above_atol_removes_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_compress.export.run_onnx", lambda *_: [torch.full((3, 4), 0.5)])
    with pytest.raises(RuntimeError, match=r"Net differs from the eager module by 0\.\d+ on random input; atol"):
        export(Net(), tmp_path / "net.onnx", (1, 3, 8, 8))
    assert list(tmp_path.iterdir()) == []


def test_not_a_number_is_a_difference(tmp_path):
    net = Net()
    nn.init.constant_(net.linear.weight, float("nan"))
    with pytest.raises(RuntimeError, match="by nan"):
        export(net, tmp_path / "net.pt2", (1, 3, 8, 8))


class LooksAtValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_network_that_cannot_be_captured(tmp_path):
    with pytest.raises(RuntimeError, match=r"torch.export cannot capture LooksAtValues: \w+"):
        export(LooksAtValues(), tmp_path / "net.pt2", (1, 3))


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="format must be 'auto', 'onnx', 'torch', 'int8' or 'codebook', got 'tflite'"):
        export(Net(), tmp_path / "net", (1, 3, 8, 8), format="tflite")
    with pytest.raises(ValueError, match=r"format='torch' writes '\.pt2' files, got path='.*net\.onnx'"):
        export(Net(), tmp_path / "net.onnx", (1, 3, 8, 8), format="torch")


def test_without_the_extra(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("lightning_compress.export.missing", lambda: ["onnxruntime"])
    with pytest.raises(
        MisconfigurationException, match=r"needs onnxruntime: pip install 'lightning-compress\[export\]'"
    ):
        export(Net(), tmp_path / "net", (1, 3, 8, 8), format="onnx")
    with pytest.raises(MisconfigurationException, match="needs onnxruntime"):
        export(Net(), tmp_path / "net.onnx", (1, 3, 8, 8))
    with caplog.at_level("INFO"):
        exported = export(Net(), tmp_path / "net", (1, 3, 8, 8))
    assert exported.format == "torch"
    assert "lightning-compress[export]" in caplog.text
