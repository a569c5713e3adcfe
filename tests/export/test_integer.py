"""Files of integers: codes as in the fake-quantised network, what an engine can fuse, and no more than 8 bits."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from foreign import digits, fit, made, make_trainer, no_pictures
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from onnx import numpy_helper
from real_data import real_data
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lightning_compress import export
from lightning_compress.callbacks import QAT, ExportCompressed
from lightning_compress.callbacks.quantization.dgms import DGMS
from lightning_compress.callbacks.quantization.pams import place, quantize
from lightning_compress.core.quant.attach import quantize_input, quantize_weight
from lightning_compress.core.quant.integer import IntegerInput, IntegerWeight
from lightning_compress.core.quant.integer_reference import encode, to_integer
from lightning_compress.core.quant.interval import IntervalInput, IntervalWeight
from lightning_compress.core.quant.lsq import LSQInput, LSQWeight
from lightning_compress.core.quant.observe import observe_inputs
from lightning_compress.core.weights import load_weights
from lightning_compress.datamodules import CIFAR10
from lightning_compress.networks import EDSR, CIFARResNet

LAYERS = (nn.Conv2d, nn.Linear)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def lively(network, x):
    """Batch norms that do something: factors of both signs, shifts, statistics of x."""
    for norm in network.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(norm.weight, 0.8, 0.5)
            nn.init.normal_(norm.bias, 0, 0.3)
    with torch.no_grad():
        for _ in range(20):
            network.train()(x)
    return network.eval()


def quantized(network, x, bits=8, kind="lsq", per_channel=True):
    """The network in eval mode, with quantisers on all layers, whose ranges are those of x."""
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, LAYERS)}
    signs = {name: seen.minimum < 0 for name, seen in observe_inputs(network.eval(), layers, [x]).items()}
    for name, layer in layers.items():
        if kind == "lsq":
            quantize_weight(layer, LSQWeight(layer.weight, bits, per_channel=per_channel))
            quantize_input(layer, LSQInput(bits, signed=signs[name]))
        else:
            quantize_weight(layer, IntervalWeight(layer.weight, bits, per_channel=per_channel))
            quantize_input(layer, IntervalInput(bits))
    observe_inputs(network, {name: layer.input_quantizer for name, layer in layers.items()}, [x])
    return network


def run(path, x, *outputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(list(outputs) or None, {session.get_inputs()[0].name: x.numpy()})
    return [torch.from_numpy(array) for array in found] if outputs else torch.from_numpy(found[0])


def fused(path, tmp_path):
    """How often each operator is in the graph that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


def operators(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def codes_in_file(path, x):
    """The codes of all quantisers of activations, in the order of the graph, without their zero points."""
    model = onnx.load(path)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    names, zeros = [], []
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        readers = [other for other in model.graph.node if node.output[0] in other.input]
        names.append(readers[0].output[0] if readers[0].op_type == "Clip" else node.output[0])
        zeros.append(int(constants[node.input[2]]))
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    onnx.save(model, path.with_suffix(".watched.onnx"))
    found = run(path.with_suffix(".watched.onnx"), x, *names)
    return [codes.int() - zero for codes, zero in zip(found, zeros, strict=True)]


def codes_in_network(network, x, in_file=None):
    """The codes that each layer of the fake-quantised network makes of what the layers before it give.

    Those that have a part in `in_file` get that as their own codes, so that nothing adds up.
    """
    found = []

    def see(quantizer, args, output):
        spec = quantizer.integer()
        found.append(encode(args[0], spec))
        if in_file is not None:
            return in_file[len(found) - 1].view_as(output) * spec.value
        return None

    watched = [m.input_quantizer for m in network.modules() if isinstance(m, LAYERS)]
    hooks = [quantizer.register_forward_hook(see) for quantizer in watched]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return found


def check_types(path):
    """uint8 activations; int8 weights and int32 biases with positive scales; no operator of ours."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} == {""}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert constants[node.input[2]].dtype == np.uint8
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            codes, scale = constants[node.input[0]], constants[node.input[1]]
            assert codes.dtype == (np.int32 if codes.ndim == 1 else np.int8)
            assert scale.shape == codes.shape[:1]
            assert (scale > 0).all()


class Chain(nn.Module):
    """Every operator that may stand between a convolution and the next quantiser."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 24, 1)
        self.bn3 = nn.BatchNorm2d(24)
        self.fc1 = nn.Linear(24 * 16, 20)
        self.fc2 = nn.Linear(20, 10)

    def forward(self, x):
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        x = F.relu6(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x) * 0.5).relu()
        x = self.fc1(F.max_pool2d(x, 2).flatten(1))
        return self.fc2(x)


@pytest.mark.parametrize(("kind", "bits"), [("interval", 2), ("lsq", 4), ("lsq", 8), ("interval", 8)])
def test_codes_are_those_of_the_network_or_their_neighbours(tmp_path, kind, bits):
    x = torch.randn(32, 3, 16, 16)
    network = quantized(lively(Chain(), x), x, bits, kind)
    exported = export(network, tmp_path / "net", x[:1], format="int8")
    assert exported.format == "int8"
    assert exported.dynamic_batch
    assert "(ONNX, int8, " in str(exported)
    found = codes_in_file(exported.path, x)
    found[1] = F.max_pool2d(found[1].float(), 3, 2, 1).int()  # the quantiser went before the pooling
    found[3] = F.max_pool2d(found[3].float(), 2).int()
    for file, eager in zip(found, codes_in_network(network, x, found), strict=True):
        difference = (file.flatten(1) - eager.flatten(1)).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.01
        assert len(eager.unique()) > 2
    with torch.no_grad():
        expected = network(x)
    assert (run(exported.path, x) - expected).square().mean() < 1e-3 * expected.square().mean()
    check_types(exported.path)
    if kind == "lsq" or bits < 8:  # 8-bit weights of the interval quantiser have codes up to 255
        ops = fused(exported.path, tmp_path)
        assert ops["QLinearConv"] == 3
        assert ops["QGemm"] == 2
        assert not {"Conv", "FusedConv", "Gemm", "Relu", "BatchNormalization"} & set(ops)
        if kind == "lsq":
            assert operators(exported.path)["Clip"] == (5 if bits < 8 else 1)  # at 8 bits that of relu6 alone


def test_file_is_a_quarter_of_the_other(tmp_path):
    x = torch.randn(4, 3, 16, 16)
    network = nn.Sequential(nn.Conv2d(3, 128, 3), nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 128, 3, 2))
    floats = 4 * sum(p.numel() for p in network.parameters())
    exported = export(quantized(lively(network, x), x), tmp_path / "net", x[:1], format="int8")
    assert floats / exported.bytes > 3.7
    assert exported.bytes == exported.path.stat().st_size


def test_channels_that_a_batch_norm_turns_round_or_off(tmp_path):
    x = torch.randn(64, 3, 8, 8)
    network = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    network = quantized(lively(network, x), x)
    network[0].parametrizations.weight.original.data[0, 0, 0, 0] = -9.0  # the code -128, which has no opposite
    network[1].weight.data.copy_(torch.tensor([-1.0, 0.0, 1e-9, 1e-30, -0.5, 1.0]))
    network[1].bias.data.copy_(torch.tensor([0.3, 0.7, 0.9, 1.1, 0.0, 0.2]))
    path = export(network, tmp_path / "net", x[:1], format="int8").path
    (_, found), (_, expected) = codes_in_file(path, x), codes_in_network(network, x)
    difference = (found - expected).abs()
    assert difference[:, 1:].max() <= 1
    assert (difference[:, 1:] > 0).float().mean() < 0.01
    assert difference.max() <= 4  # 127 in place of 128, in one weight


def test_offset_of_a_range_goes_into_the_bias(tmp_path):
    """Also below zero, where ReLU leaves only codes above that of zero."""
    x = torch.randn(16, 3, 8, 8)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    network = quantized(nn.Sequential(*layers), x, 4, "interval")
    network[2].input_quantizer.lower.data.fill_(-0.4)
    network[4].input_quantizer.lower.data.fill_(0.3)
    path = export(network, tmp_path / "net", x[:1], format="int8").path
    assert operators(path)["Sub"] == 1  # that of the image
    found = codes_in_file(path, x)
    expected = codes_in_network(network, x, found)
    assert all((file - eager).abs().max() <= 1 for file, eager in zip(found, expected, strict=True))
    assert expected[1].min() == encode(torch.zeros(1), network[2].input_quantizer.integer()) > 0
    assert expected[2].min() == 0


class Shortcut(nn.Module):
    """Residual sums, a quantiser for each of two readers, a layer used twice, a linear layer on three dimensions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.side = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.max_pool2d(self.stem(x).relu(), 2)
        y = self.conv2(self.bn(self.conv1(x)).relu())
        x = (self.side(x) + y).relu()
        x = (x + self.side(x)).relu()
        return self.head(x.flatten(2).transpose(1, 2))


def test_sums_stay_in_floating_point_unless_calibrated(tmp_path):
    x = torch.randn(16, 3, 12, 12)
    network = quantized(lively(Shortcut(), x), x)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    exact = export(network, tmp_path / "exact", x[:1], format="int8")
    fast = export(network, tmp_path / "fast", x[:1], format="int8", calibration=iter([x[:9], x[9:]]))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["exact.onnx", "fast.onnx"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())

    assert operators(exact.path)["QuantizeLinear"] == 6  # the two uses of `side` have one each
    ops = fused(exact.path, tmp_path)
    assert ops["QLinearConv"] == 1
    assert ops["MatMulIntegerToFloat"] == 1
    ops = fused(fast.path, tmp_path)
    assert ops["QLinearConv"] == 5
    assert not ops["Conv"] + ops["FusedConv"]

    with torch.no_grad():
        expected = network(x)
    near, nearer = ((run(e.path, x) - expected).square().mean().sqrt() / expected.std() for e in (fast, exact))
    assert nearer < near < 0.03
    assert fast.max_abs_difference == pytest.approx((run(fast.path, x[:9]) - expected[:9]).abs().max().item(), rel=1e-3)


def test_calibration_of_a_network_with_a_fixed_batch(tmp_path, monkeypatch):
    class Fixed(nn.Sequential):
        def forward(self, x):
            return super().forward(x).reshape(2, -1)

    x = torch.randn(7, 3, 8, 8)
    network = quantized(Fixed(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), x[:2])
    monkeypatch.setattr("lightning_compress.export._ROUNDING", 0.0)
    with pytest.warns(UserWarning, match=r"8 bits tell. On the calibration .* or export without calibration"):
        exported = export(network, tmp_path / "net", x[:2], format="int8", calibration=[x])
    assert not exported.dynamic_batch


def test_weights_alone_and_calibrated_inputs(tmp_path):
    """dgms: codebooks of at most 16 values rounded to 8 bits; activations from calibration images, sums too."""
    x = digits().dataset.tensors[0]
    module = made()
    fit(module, tmp_path, DGMS(weight_bits=4), max_epochs=1)
    exact = export(module, tmp_path / "exact", x[:1], format="int8")
    integers = export(module, tmp_path / "integers", x[:1], format="int8", calibration=[x])
    with torch.no_grad():
        expected = module.eval()(x)
    for exported in (exact, integers):
        assert (run(exported.path, x) - expected).square().mean().sqrt() < 0.05 * expected.std()
    model = onnx.load(exact.path)
    weights = [numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    weights = [codes for codes in weights if codes.ndim > 1]
    assert len(weights) == 4  # neither the first nor the linear layer
    assert all(len(np.unique(np.abs(codes))) <= 16 for codes in weights)  # a batch norm may change a channel's signs
    ops = fused(integers.path, tmp_path)
    assert ops["QLinearConv"] == 4
    assert ops["QLinearAdd"] == 1  # the other ends in floating point, before the mean


def test_pams_with_integer_block_inputs(tmp_path):
    """pams: two quantised convolutions and a sum of two quantised tensors in each block; the PSNR stays."""
    network = EDSR(scale=2, blocks=2, features=8)
    placement = place(network, quantize_block_input=True)
    quantize(network, **placement.arguments(), weight_bits=4, activation_bits=4, measuring={})
    x = F.interpolate(torch.rand(6, 3, 6, 6), scale_factor=4, mode="bicubic").clamp(0, 1) * 255
    with torch.no_grad():
        network.train()(x)
        expected = network.eval()(x)
    path = export(network, tmp_path / "net", x[:1], format="int8").path
    found = run(path, x)
    assert (found - expected).square().mean() < 1e-3 * expected.std() ** 2
    assert fused(path, tmp_path)["QLinearConv"] == 4
    assert operators(path)["QuantizeLinear"] == 6  # block_input, hidden, residual; the layers' own are the same again
    noisy = expected + 3 * torch.randn_like(expected)  # stands for the photograph
    psnr = [10 * torch.log10(255**2 / (image - noisy).square().mean()) for image in (expected, found)]
    assert abs(psnr[0] - psnr[1]) < 0.02


def test_pams_before_any_image_is_seen(tmp_path):
    """Quantisers that were never reached pass their input on, in the file too."""
    network = EDSR(scale=2, blocks=1, features=8)
    quantize(network, **place(network).arguments(), weight_bits=8, activation_bits=8, measuring={})
    path = export(network, tmp_path / "net", (1, 3, 8, 8), format="int8").path
    assert "QuantizeLinear" not in operators(path)


def test_more_than_8_bits_stay_in_floating_point(tmp_path):
    x = torch.randn(8, 3, 8, 8)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    for layer in (network[0], network[2]):
        quantize_weight(layer, LSQWeight(layer.weight, 12))
        quantize_input(layer, LSQInput(12, signed=True))
        layer.input_quantizer.step.data.fill_(0.002)
    exported = export(network, tmp_path / "net", x[:1], format="int8")
    assert exported.max_abs_difference < 0.01
    assert "QuantizeLinear" not in operators(exported.path)


def test_accuracy_of_a_trained_network(tmp_path):
    """4 bits: the file, the integer reference and the network tell the same digits."""
    module = made(lr=0.05)
    with no_pictures:
        make_trainer(tmp_path, max_epochs=1).fit(module, digits(1280, batch_size=32))
        qat = QAT(weight_bits=4, activation_bits=4, quantizer="lsq")
        make_trainer(tmp_path, qat, max_epochs=3).fit(module, digits(1280, batch_size=32))
    images, labels = digits(512, 1280).dataset.tensors
    exported = export(module, tmp_path / "net", images[:1], format="int8")
    with torch.no_grad():
        eager, reference = module.eval()(images), to_integer(module)(images)
    right = [(logits.argmax(1) == labels).float().mean() for logits in (eager, reference, run(exported.path, images))]
    assert right[0] > 0.6
    assert abs(right[0] - right[1]) <= 0.005
    assert abs(right[0] - right[2]) <= 0.005


@pytest.mark.real_data
@pytest.mark.parametrize("bits", [8, 6])
def test_accuracy_on_cifar10(tmp_path, bits):
    """ResNet-20 with public weights, rounded without training: the files do what the network does."""
    root = real_data("cifar10.npz", "weights/resnet20-cifar10.pt")
    network = CIFARResNet(20)
    load_weights(network, root / "weights/resnet20-cifar10.pt")
    data = CIFAR10(root, batch_size=256, num_workers=0)
    data.setup("fit")
    data.setup("test")
    seen = next(iter(data.val_dataloader()))[0]
    images, labels = next(iter(data.test_dataloader()))
    with torch.no_grad():
        real = (network.eval()(images).argmax(1) == labels).float().mean()
        expected = quantized(network, seen, bits)(images)
    exact = export(network, tmp_path / "exact", seen[:1], format="int8")
    fast = export(network, tmp_path / "fast", seen[:1], format="int8", calibration=[seen])
    outputs = [expected, *(run(exported.path, images) for exported in (exact, fast))]
    rounded, *files = ((logits.argmax(1) == labels).float().mean().item() for logits in outputs)
    print(f"{bits} bits: float32 {real:.4f}, fake-quantised {rounded:.4f}, exact and calibrated file {files}")
    assert rounded > real - (0.01 if bits == 8 else 0.05)
    assert all(abs(share - rounded) <= 0.01 for share in files)


class Awkward(nn.Module):
    """A quantiser behind a quantiser with a pooling between, a real weight, a summand that is not of channels."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.rounded = Rounded()
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv3 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv4 = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        x = F.max_pool2d(self.rounded(self.conv1(x)), 2)
        x = (self.conv2(x) + torch.linspace(-1, 1, 3)).relu()
        return self.conv4(self.conv3(x).relu())


def test_what_cannot_be_moved_stays(tmp_path):
    x = torch.randn(32, 3, 8, 8)
    network = quantized(Awkward(), x)
    parametrize.remove_parametrizations(network.conv3, "weight", leave_parametrized=False)
    path = export(network, tmp_path / "net", x[:1], format="int8").path
    image, _, pooled, *others = codes_in_file(path, x)
    found = [image, F.max_pool2d(pooled.float(), 2).int(), *others]
    for file, eager in zip(found, codes_in_network(network, x, found), strict=True):
        assert (file - eager).abs().max() <= 1
        assert (file != eager).float().mean() < 0.01  # a quarter, if ONNX Runtime rounds the real weight to 8 bits


def test_output_that_a_quantiser_gives(tmp_path):
    """A convolution whose output is the network's, and a quantiser at the very end."""
    x = torch.randn(8, 3, 8, 8)
    network = quantized(nn.Sequential(nn.Conv2d(3, 4, 3)), x)
    exported = export(network, tmp_path / "a", x[:1], format="int8", calibration=[x])
    assert exported.max_abs_difference < 1e-5
    network.append(network[0].input_quantizer)
    exported = export(network, tmp_path / "b", x[:1], format="int8")
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["output"]
    assert (run(exported.path, x) - network(x)).abs().max() <= network[0].input_quantizer.integer().step * 1.01


class Wrong(nn.Module):
    """A quantiser that says other codes than it computes with."""

    def forward(self, weight):
        return weight

    def integer(self, weight):
        return IntegerWeight(torch.ones_like(weight, dtype=torch.int16), torch.ones(()), 8)


class Rounded(nn.Module):
    def forward(self, x):
        return (x / 0.1).round() * 0.1

    def integer(self):
        return IntegerInput(0.0, 0.1, 0.1, -128, 127, 8)


def test_bad_arguments_and_wrong_files_are_refused(tmp_path):
    layer = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(MisconfigurationException, match="needs quantised layers, and Sequential has none"):
        export(layer, tmp_path / "net", (1, 6), format="int8")
    with pytest.raises(ValueError, match="calibration is for format='int8', got format='torch'"):
        export(layer, tmp_path / "net", (1, 6), format="torch", calibration=[torch.zeros(1, 6)])
    with pytest.raises(ValueError, match=r"writes '\.onnx' files"):
        export(layer, tmp_path / "net.pt2", (1, 6), format="int8")
    quantize_weight(layer[0], Wrong())
    quantize_input(layer[0], Rounded())
    with pytest.raises(ValueError, match="calibration is empty"):
        export(layer, tmp_path / "net", (1, 6), format="int8", calibration=[])
    with pytest.raises(RuntimeError, match=r"differs from the eager module by .* on random input"):
        export(layer, tmp_path / "net", (1, 6), format="int8")
    assert not list(tmp_path.iterdir())


def test_a_network_that_rounds_may_differ_by_a_code(tmp_path):
    """In float32 files, too: ONNX Runtime adds in another order, and a code may become its neighbour."""
    x = torch.randn(16, 3, 16, 16)
    network = quantized(lively(CIFARResNet(8), x), x, 3)
    path = export(network, tmp_path / "net", x[:1], format="onnx").path
    with torch.no_grad():
        assert (run(path, x) - network(x)).square().mean() < 0.1 * network(x).square().mean()


def test_callback_and_command_line(tmp_path, capsys, monkeypatch):
    from lightning_compress.cli.main import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="num_batches: 0, or with format='int8' more, got 2 and format='auto'"):
        ExportCompressed(num_batches=2)
    data = ["--data", "Digits", "--data.size", "28", "--data.batch_size", "64"]
    command = ["fit", "--model", "ImageClassifier", "--model.network", "lenet5", *data]
    quick = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"]
    quick += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    callbacks = ["--trainer.callbacks+=DGMS", "--trainer.callbacks+=ExportCompressed"]
    callbacks += ["--trainer.callbacks.format", "int8", "--trainer.callbacks.num_batches", "2"]
    main([*command, *quick, *callbacks])
    assert "ONNX, int8" in capsys.readouterr().out
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    (file,) = tmp_path.rglob("*.onnx")
    assert fused(file, tmp_path)["QLinearConv"] == 1  # DGMS leaves the first convolution and linear layers real
    main(["export", str(checkpoint), "--format", "int8", "--output", "fast", "--num-batches", "2", *data])
    assert "ONNX, int8" in capsys.readouterr().out
    assert fused(tmp_path / "fast.onnx", tmp_path)["QLinearConv"] == 1
    with pytest.raises(SystemExit):
        main(["export", str(checkpoint), "--format", "int8", "--num-batches", "2"])
    assert "--num-batches needs data" in capsys.readouterr().err
