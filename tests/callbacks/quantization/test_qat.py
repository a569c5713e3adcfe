"""QAT: which layers, which bits, where ranges start and how they are trained, and what else may be in the Trainer."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from foreign import Network, assert_same, digits, fit, made, make_trainer, no_pictures
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v2, resnet18

from lightning_compress import load
from lightning_compress.callbacks import LBC, LTS, QAT, L1Norm, MagnitudePruning
from lightning_compress.callbacks.quantization.qat import attach_quantizers, detach_quantizers
from lightning_compress.catalog import card
from lightning_compress.core.profile import profile
from lightning_compress.core.quant.attach import input_quantizer, quantized_layers, real_weight, weight_quantizer
from lightning_compress.core.quant.integer import integer_input, integer_weight
from lightning_compress.core.quant.integer_reference import IntegerLayer
from lightning_compress.core.quant.layers import choose_quantized
from lightning_compress.core.quant.observe import observe_inputs
from lightning_compress.core.report import Account
from lightning_compress.networks import resnet20


class Steps(Callback):
    """The ranges after every step, and the gradients that made them."""

    def __init__(self):
        self.values, self.gradients, self.rates = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append({n: p.grad.clone() for n, p in ranges(pl_module).items()})
        self.rates.append(optimizer.param_groups[-1]["lr"])
        self.values.append({n: p.detach().clone() for n, p in ranges(pl_module).items()})

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.last = {n: p.detach().clone() for n, p in ranges(pl_module).items()}


def ranges(module):
    return {n: p for n, p in module.named_parameters() if n.endswith((".lower", ".upper", ".step"))}


def all_layers(module, bits=4, activation_bits=4, signed=False):
    names, _ = choose_quantized(module)
    return {name: {"weight_bits": bits, "activation_bits": activation_bits, "signed": signed} for name in names}


# ---- what is quantised


@pytest.mark.parametrize(("classes", "weights", "trainable"), [(10, 270_896, 272_562), (100, 276_656, 278_412)])
def test_the_papers_resnet20(classes, weights, trainable):
    """22 layers with 4 range scalars each."""
    network = resnet20(classes, shortcut="projection")
    attach_quantizers(network, all_layers(network, 2, 2), "interval", False)
    layers = quantized_layers(network)
    assert len(layers) == 22
    assert sum(real_weight(layer).numel() for layer in layers.values()) == weights
    assert sum(p.numel() for p in network.parameters()) == trainable
    assert weights / trainable == pytest.approx(0.994, abs=5e-4)


@pytest.mark.parametrize("row", card("QAT").published + card("LTS").published, ids=lambda r: f"{r.network} {r.setting}")
def test_published_networks(row):
    """Esser et al. (LSQ) and Zhong et al. (LTS): our count of MACs and parameters, and of bits."""
    networks = {"ResNet-18": resnet18, "MobileNet-V2": mobilenet_v2}
    with torch.device("meta"):
        network = networks[row.network]()
    dense = profile(network, (1, 3, 224, 224))
    assert (dense.macs, dense.params) == (row.result["macs"], row.result["params"])


def test_mobilenet_of_the_paper_has_relu():
    network = timm.create_model("mobilenetv2_100", act_layer="relu")
    kinds = {type(m) for m in network.modules()}
    assert nn.ReLU in kinds
    assert nn.ReLU6 not in kinds
    names, reasons = choose_quantized(network)
    assert not reasons
    assert len(names) == 53


def test_bits_by_layer_and_of_the_ends(tmp_path):
    module = made()
    callback = QAT({"*": 3, "*head": 4, "*conv2": 2}, {"*conv*": 5, "*stem": 6}, first_last_bits=8)
    fit(module, tmp_path, callback, max_epochs=1)
    found = {
        name.removeprefix("net."): [q and q.bits for q in (weight_quantizer(layer), input_quantizer(layer))]
        for name, layer in callback.layers(module).items()
    }
    assert found == {
        "stem": [8, 8], "head": [8, None],
        "blocks.0.conv1": [3, 5], "blocks.0.conv2": [2, 5], "blocks.1.conv1": [3, 5], "blocks.1.conv2": [2, 5],
    }  # fmt: skip
    account = Account.load(tmp_path)
    rows = {row.name: row for row in account.after.rows}
    assert rows["net.stem"].bytes == 72 + 4 * 8
    assert rows["net.blocks.0.conv2"].bytes == 864 * 2 / 8
    bits = {row.name: row.bits for row in account.after.rows if row.kind in ("conv", "linear")}
    assert bits == {f"net.{name}": both[0] for name, both in found.items()}


def test_weights_alone_and_what_is_left(tmp_path):
    module = made()
    callback = QAT({"*conv1": 4}, None, exclude=["*blocks.1*"])
    fit(module, tmp_path, callback, max_epochs=1)
    assert list(callback.layers(module)) == ["net.blocks.0.conv1"]
    assert input_quantizer(module.net.blocks[0].conv1) is None
    account = Account.load(tmp_path)
    reasons = dict(account.left_alone)
    assert reasons["net.stem"] == "has no number in `weight_bits` or `activation_bits`"
    assert reasons["net.blocks.1.conv1"] == "is left out by `exclude`"
    assert "1 layers, whose inputs have full precision" in account.notes[0]


def test_attached_and_detached():
    network, plain = Network(), Network()
    plain.load_state_dict(network.state_dict())
    undo = attach_quantizers(network, all_layers(network, signed=True), "lsq", True)
    undo(network)
    assert list(network.state_dict()) == list(plain.state_dict())
    detach_quantizers(network, [])
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(network(x), plain(x))


# ---- where ranges start


def test_ranges_start_from_weights_and_a_batch(tmp_path):
    """... layer by layer, each reading what those before it quantise; batch norms learn once."""
    module, twin = made(), made()
    steps = Steps()
    fit(module, tmp_path, QAT(3, 3), steps, max_epochs=1, limit_train_batches=1)
    first = {n.removeprefix("net."): v for n, v in steps.values[0].items()}
    stem = twin.net.stem.weight
    assert first["stem.parametrizations.weight.0.upper"].item() == pytest.approx(3 * stem.std().item())
    batch = torch.cat([images for images, _ in digits()])  # 64 images, fewer than a batch of 128
    assert first["stem.input_quantizer.lower"].item() == batch.min().item()
    assert first["stem.input_quantizer.upper"].item() == pytest.approx(4.97669 * batch.std().item(), rel=1e-4)
    with torch.no_grad():  # the next layer reads the quantised stem
        lower, upper = first["stem.input_quantizer.lower"], first["stem.input_quantizer.upper"]
        x = ((batch - lower) / (upper - lower) * 7).round().clamp(0, 7) / 7
        bound = 3 * stem.std()
        w = 2 * (((stem + bound) / (2 * bound)).clamp(0, 1) * 7).round() / 7 - 1
        y = F.relu(twin.net.bn(F.conv2d(x, w, twin.net.stem.bias, padding=1)))
    assert first["blocks.0.conv1.input_quantizer.upper"].item() == pytest.approx(4.97669 * y.std().item(), rel=1e-3)
    assert module.net.bn.num_batches_tracked == 2  # once more than training steps
    assert steps.rates == [1e-4]


def test_lsq_looks_for_signs(tmp_path):
    """Inputs behind a ReLU are unsigned, others are not."""
    callback, module = QAT(quantizer="lsq"), made()
    shifted = [(images - 0.5, labels) for images, labels in digits()]
    trainer = make_trainer(tmp_path, callback, max_epochs=1)
    with no_pictures:
        trainer.fit(module, torch.utils.data.DataLoader(shifted, None))
    lowest = {n.removeprefix("net."): input_quantizer(m).lowest for n, m in callback.layers(module).items()}
    assert lowest.pop("stem") == -8
    assert set(lowest.values()) == {0}
    trainer.save_checkpoint(tmp_path / "whole.ckpt", weights_only=True)
    again = load(type(module), tmp_path / "whole.ckpt")
    assert again.net.stem.input_quantizer.lowest == -8
    assert again.net.head.input_quantizer.lowest == 0


def test_a_layer_that_images_do_not_reach_is_told(tmp_path):
    class Spare(Network):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(8, 8)

    with pytest.warns(UserWarning, match=r"net\.spare got no input"):
        fit(made(Spare), tmp_path, QAT(), max_epochs=1)


def test_several_batches_are_one_sample(tmp_path):
    one, two = Steps(), Steps()
    fit(made(), tmp_path, QAT(num_batches=1), one, max_epochs=1)
    callback = QAT(num_batches=2)
    trainer = make_trainer(tmp_path, callback, two, max_epochs=1)
    with no_pictures:
        trainer.fit(made(), digits(256))
    name = "net.stem.input_quantizer.upper"
    images = torch.cat([images for images, _ in digits(256)])
    assert two.values[0][name].item() == pytest.approx(4.97669 * images.std().item(), rel=1e-4)
    assert one.values[0][name].item() != two.values[0][name].item()


# ---- how ranges train


def test_ranges_have_adam(tmp_path):
    """... at 1e-4, on the weights' schedule, without weight decay or the momentum of the optimiser that holds them."""
    steps = Steps()
    module = made()
    fit(module, tmp_path, QAT(), steps, max_epochs=2)
    own = {n: p.clone().requires_grad_() for n, p in steps.values[0].items()}
    adam = torch.optim.Adam(own.values(), lr=1e-4)
    for rate, gradients, after in zip(steps.rates, steps.gradients, [*steps.values[1:], steps.last], strict=True):
        for name, parameter in own.items():
            parameter.grad = gradients[name]
        adam.param_groups[0]["lr"] = rate
        adam.step()
        for name, parameter in own.items():
            assert torch.equal(parameter, after[name]), name
    assert steps.rates == [1e-4] * 4 + [pytest.approx(0.9e-4)] * 4


@pytest.mark.parametrize(("range_lr", "rate"), [(None, 0.1), (0.003, 0.003)])
def test_ranges_of_lsq_train_with_the_weights(range_lr, rate, tmp_path):
    module, callback = made(), QAT(quantizer="lsq", range_lr=range_lr)
    trainer = fit(module, tmp_path, callback, max_epochs=1)
    *others, own = trainer.optimizers[0].param_groups
    assert {id(p) for p in own["params"]} == {id(p) for p in ranges(module).values()}
    assert not {id(p) for group in others for p in group["params"]} & {id(p) for p in own["params"]}
    assert own["weight_decay"] == 0
    assert own["initial_lr"] == rate
    assert callback.state_dict() == {"adam": []}


def test_all_ranges_have_a_group_of_their_own(tmp_path):
    module = made()
    trainer = fit(module, tmp_path, QAT(per_channel=True), max_epochs=1)
    own = trainer.optimizers[0].param_groups[-1]
    assert {id(p) for p in own["params"]} == {id(p) for p in ranges(module).values()}
    assert len(own["params"]) == 24


class Manual(LightningModule):
    """Two optimisers, stepped by hand, as a GAN's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = Network(), Network()
        self.automatic_optimization = False

    def forward(self, x):
        return self.one(x) + self.two(x)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.01) for net in (self.one, self.two)]


def test_optimisers_that_step_by_hand(tmp_path):
    module, lts = Manual(), LTS(warmup_epochs=1)
    before = {n: p.clone() for n, p in module.named_parameters()}
    trainer = make_trainer(tmp_path, QAT(), lts, max_epochs=3)
    with no_pictures:
        trainer.fit(module, digits())
    assert {ticket.step for ticket in lts.tickets.values()} == {11}  # each network has its own steps
    assert lts.frozen_share > 0
    assert not torch.equal(module.two.bn.weight, before["two.bn.weight"])
    moved = {n: p for n, p in ranges(module).items() if p.grad is not None and p.grad.abs().max() > 0}
    assert {n[:3] for n in moved} == {"one", "two"}


@pytest.mark.parametrize("arguments", [{}, {"quantizer": "lsq"}], ids=["interval", "lsq"])
def test_a_trained_network_keeps_its_accuracy(arguments, tmp_path):
    """... with 4 bits, after a short training; from the same weights without any it would lose it."""
    module, data = made(), digits(512, batch_size=32)

    @torch.no_grad()
    def accuracy():
        images, labels = next(iter(digits(256, 512, batch_size=256)))
        return (module.eval()(images).argmax(1) == labels).float().mean().item()

    with no_pictures:
        make_trainer(tmp_path, max_epochs=8, limit_val_batches=0).fit(module, data)
        dense = accuracy()
        module.train()
        module.lr = 0.01
        make_trainer(tmp_path, QAT(**arguments), max_epochs=3, limit_val_batches=0).fit(module, data)
    assert dense > 0.65
    assert accuracy() > dense - 0.08


# ---- with others


def test_a_quantised_network_is_trained_on(tmp_path):
    callback, module = QAT(2, 2), made()
    trainer = fit(module, tmp_path, callback, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    again = load(type(module), tmp_path / "whole.ckpt")
    before = copy.deepcopy(ranges(again))
    steps = Steps()
    fit(again, tmp_path, QAT(2, 2), steps, max_epochs=1)
    assert len(callback.layers(again)) == 6
    for name, value in before.items():
        assert torch.equal(steps.values[0][name], value)  # not started anew


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    fit(made(), tmp_path, ModelCheckpoint(tmp_path, "plain"), max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"written by a run without QAT.*changed by nothing"):
        fit(made(), tmp_path, QAT(), ckpt_path=tmp_path / "plain.ckpt")


def test_two_instances_may_not_share_a_layer(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"QAT finds no layer.*IntervalWeight already"):
        fit(made(), tmp_path, QAT(4, 4), QAT(2, 2))


@pytest.mark.parametrize("first", ["mask", "qat"])
def test_zeros_stay(first, tmp_path):
    """Fixed masks act on real weights, and learnt ones; a quantiser with a level at zero keeps them zero."""
    for mask in (MagnitudePruning(0.5), LBC(2, 4, end_epoch=1)):
        module, qat = made(), QAT(quantizer="lsq")
        callbacks = [mask, qat] if first == "mask" else [qat, mask]
        fit(module, tmp_path, *callbacks, max_epochs=2)
        layer = module.net.blocks[0].conv1
        real = real_weight(layer)
        assert 0.4 < (real == 0).float().mean() < 0.6
        assert layer.weight[real == 0].count_nonzero() == 0


def test_channels_go_before(tmp_path):
    module = made()
    fit(module, tmp_path, L1Norm(0.5), QAT(), max_epochs=1)
    assert module.net.blocks[0].conv1.weight.shape[0] == 6
    for order in ([QAT(), L1Norm(0.5)], [L1Norm(0.5, start_epoch=1), QAT()]):
        with pytest.raises(MisconfigurationException, match="QAT and L1Norm: ranges that were found for some channels"):
            fit(made(), tmp_path, *order)


def test_half_precision_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"QAT learns ranges, which need float32; .* Take 'bf16-mixed'"):
        fit(made(), tmp_path, QAT(), precision="bf16-true")


def test_an_optimiser_that_leaves_ranges_out_is_refused(tmp_path):
    module = made()
    module.configure_optimizers = lambda: torch.optim.SGD(
        [p for n, p in module.named_parameters() if not n.endswith("lower")], lr=0.1
    )
    with pytest.raises(MisconfigurationException, match=r"QAT: no optimiser holds lower of the weight of net\.stem"):
        fit(module, tmp_path, QAT())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_bits": 9}, r"QAT\(weight_bits=9\): give whole numbers from 1 to 8"),
        ({"weight_bits": 1, "quantizer": "lsq"}, r"QAT\(weight_bits=1\): give whole numbers from 2 to 8"),
        ({"first_last_bits": 1, "quantizer": "lsq"}, r"QAT\(first_last_bits=1\)"),
        ({"quantizer": "LSQ"}, r"QAT\(quantizer='LSQ'\): choose 'interval' or 'lsq'"),
        ({"range_optimizer": "sgd"}, r"QAT\(range_optimizer='sgd'\)"),
        ({"range_lr": -1.0}, r"QAT\(range_lr=-1.0\)"),
        ({"num_batches": 0}, r"QAT\(num_batches=0\)"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        QAT(**arguments)


def test_steps_of_channels_are_counted(tmp_path):
    fit(made(), tmp_path, QAT(quantizer="lsq", per_channel=True), max_epochs=1)
    rows = {row.name: row for row in Account.load(tmp_path).after.rows}
    assert rows["net.blocks.0.conv1"].bytes == 864 / 2 + 4 * 12


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("quantizer", ["interval", "lsq"])
def test_integers_are_exact(quantizer, bits):
    """Sums of codes are those of the quantised values in float64; padding is the code 0, whatever the lower bound."""
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 7, 3, padding=1, bias=False)
    spec = {"weight_bits": bits, "activation_bits": bits, "signed": False}
    attach_quantizers(layer_in := nn.Sequential(layer), {"0": spec}, quantizer, False)
    observe_inputs(layer_in, {"0": layer.input_quantizer}, [torch.rand(3, 5, 6, 6) - 0.2])
    x = torch.rand(2, 5, 6, 6) - 0.2
    integer = IntegerLayer(layer, integer_weight(layer), integer_input(layer))
    found = integer.accumulate(x)
    assert found.dtype == torch.int32
    unit = float(integer_weight(layer).scale) * integer_input(layer).value
    wide = F.conv2d(layer.input_quantizer(x).double(), layer.weight.double(), padding=1)
    assert torch.equal(found.double(), (wide / unit).round())
    if quantizer == "interval":
        assert unit == pytest.approx((2**bits - 1) ** -2)
    torch.testing.assert_close(integer(x), layer(x), atol=1e-5, rtol=1e-5)


def test_one_bit_of_the_interval_quantiser(tmp_path):
    module = made()
    fit(module, tmp_path, QAT(1, 1), max_epochs=1)
    assert set(module.net.stem.weight.unique().tolist()) == {-1.0, 1.0}


def test_resumes_in_the_middle_of_adam(tmp_path):
    def run(root, **kwargs):
        module = made()
        fit(module, root, QAT(2, 2), ModelCheckpoint(root, "{epoch}", save_top_k=-1), max_epochs=3, **kwargs)
        return module

    whole = run(tmp_path / "whole")
    assert_same(run(tmp_path / "again", ckpt_path=tmp_path / "whole" / "epoch=0.ckpt"), whole)
