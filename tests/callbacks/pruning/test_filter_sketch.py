"""FilterSketch: the sketch itself, what is sketched in which network, every published size, and the callback."""

from __future__ import annotations

import copy

import pytest
import torch
from foreign import Foreign, digits, fit, made, make_trainer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torchvision.models import resnet50

from lightning_compress import parse_ratio, profile
from lightning_compress.callbacks import FilterSketch
from lightning_compress.callbacks.pruning.filter_sketch import (
    block_layers,
    block_ratios,
    chains,
    frequent_directions,
    sketch_conv,
    sketch_weights,
    sketch_width,
)
from lightning_compress.core.surgery import ChannelPlan, apply_cuts, channel_graph
from lightning_compress.networks import (
    CIFARResNet,
    densenet40,
    googlenet_cifar,
    resnet20,
    resnet56,
    resnet110,
    vgg16_cifar,
)

SHAPE = {resnet50: (1, 3, 224, 224)}
SMALL = torch.tensor(
    [
        [4.0, 0, 0, 0, 0, 0],
        [0, 3, 0, 0, 0, 0],
        [0, 0, 2, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 2, 0],
    ]
)


def diagonal(sketch):
    return (sketch.T @ sketch).diagonal().tolist()


# ---- Frequent Directions


def test_a_sketch_of_all_rows_is_the_matrix_itself():
    matrix = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(frequent_directions(matrix, 12), matrix)


def test_one_shrink():
    sketch = frequent_directions(SMALL, 4)
    assert diagonal(sketch) == pytest.approx([13, 6, 0, 0, 4, 0], abs=1e-5)
    # The two rows that shrank have length sqrt(16 - 4 ...) = sqrt(12) and sqrt(9 - 4); rows 4 and 5 stand behind.
    assert sketch.norm(dim=1)[:2].tolist() == pytest.approx([3.4641, 2.2361], abs=1e-4)
    assert torch.equal(sketch[2:], SMALL[4:])


def test_two_shrinks_leave_a_zero_row():
    sketch = frequent_directions(SMALL, 3)
    assert diagonal(sketch) == pytest.approx([7.0027, 0.1374, 0, 0, 4, 0], abs=1e-4)
    assert sketch[2].abs().max() == 0


def test_the_tail_is_dropped_or_not():
    dropped = frequent_directions(SMALL, 5)
    assert torch.equal(dropped, SMALL[:5])
    assert diagonal(dropped) == [17, 10, 4, 1, 0, 0]
    assert diagonal(frequent_directions(SMALL, 5, drop_tail=False))[4] == pytest.approx(4)


def test_a_single_row_is_the_last_one_and_warns():
    with pytest.warns(UserWarning, match="single row"):
        assert torch.equal(frequent_directions(SMALL, 1), SMALL[-1:])


@pytest.mark.parametrize("l", [6, 19, 38, 57])
@pytest.mark.parametrize("drop_tail", [True, False])
def test_guarantee(l, drop_tail):  # noqa: E741
    matrix = torch.randn(64, 288, generator=torch.Generator().manual_seed(l), dtype=torch.float64)
    sketch = frequent_directions(matrix, l, drop_tail=drop_tail)
    error = torch.linalg.matrix_norm(matrix.T @ matrix - sketch.T @ sketch, 2)
    lost = matrix[64 - dropped_rows(64, l) :].square().sum() if drop_tail else 0
    assert error <= 2 * matrix.square().sum() / l + lost


def dropped_rows(n, l):  # noqa: E741
    left = n - l
    while left >= l // 2 and left > 0:
        left -= min(left, l - l // 2)
    return left


@pytest.mark.parametrize("l", [2, 6, 19, 38, 57])
def test_singular_values_never_grow(l):  # noqa: E741
    matrix = torch.randn(64, 288, generator=torch.Generator().manual_seed(l))
    before, after = torch.linalg.svdvals(matrix), torch.linalg.svdvals(frequent_directions(matrix, l))
    assert (after <= before[:l] + 1e-5).all()


@pytest.mark.parametrize("l", [2, 5, 9, 16])
def test_equals_the_row_by_row_algorithm_with_svd(l):  # noqa: E741
    matrix = torch.randn(21, 27, generator=torch.Generator().manual_seed(l))
    expected, sketch = row_by_row(matrix.double(), l), frequent_directions(matrix, l).double()
    torch.testing.assert_close(sketch.T @ sketch, expected.T @ expected, atol=1e-4, rtol=0)


def row_by_row(rows, l):  # noqa: E741
    """The paper's loop: one row at a time, an SVD whenever the buffer is full."""
    buffer, filled, half = torch.zeros(l, rows.shape[1], dtype=rows.dtype), 0, l // 2
    for i, row in enumerate(rows):
        if filled == l:
            if len(rows) - i < half:
                break
            u, sigma, _ = torch.linalg.svd(buffer.T, full_matrices=False)
            buffer = torch.diag((sigma**2 - sigma[half] ** 2).clamp(min=0).sqrt()) @ u.T
            filled = half
        buffer[filled] = row
        filled += 1
    return buffer


def test_more_rows_than_columns_and_rank_deficient_rows():
    matrix = torch.ones(20, 3)
    sketch = frequent_directions(matrix, 8, drop_tail=False)
    assert torch.isfinite(sketch).all()
    torch.testing.assert_close(sketch.T @ sketch, matrix.T @ matrix)  # rank one: no shrink takes anything away


def test_half_precision_is_computed_in_double():
    matrix = torch.randn(16, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    sketch = frequent_directions(matrix, 8)
    assert sketch.dtype == torch.bfloat16
    torch.testing.assert_close(sketch.float(), frequent_directions(matrix.double(), 8).float(), atol=0.05, rtol=0.01)


@pytest.mark.parametrize(("matrix", "l"), [(SMALL, 0), (SMALL, 7), (SMALL[0], 1)])
def test_bad_sketch_arguments(matrix, l):  # noqa: E741
    with pytest.raises(ValueError, match=r"must be (a matrix|between 1 and the 6 rows)"):
        frequent_directions(matrix, l)


# ---- weights


def test_every_sketched_tensor_has_norm_one():
    weight = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    for layout in ("flat", "permute"):
        first = sketch_conv(weight, 6, 0, layout)
        both = sketch_conv(first, 5, 1, layout)
        whole = sketch_conv(weight, 16, 0, layout)
        assert (first.shape, both.shape) == ((6, 8, 3, 3), (6, 5, 3, 3))
        for tensor in (first, both, whole):
            assert tensor.norm().item() == pytest.approx(1, abs=1e-6)
    assert sketch_conv(weight, 6, 0, norm=None).norm() > 2
    assert sketch_conv(torch.zeros(4, 2, 3, 3), 2, 0).abs().max() == 0


def test_layouts_agree_for_one_filter_or_one_channel_only():
    generator = torch.Generator().manual_seed(0)

    def grams(n, c, l):  # noqa: E741
        weight = torch.randn(n, c, 3, 3, generator=generator)
        flat, permuted = (sketch_conv(weight, l, 1, layout, norm=None) for layout in ("flat", "permute"))
        assert flat.shape == permuted.shape == (n, l, 3, 3)
        return [t.transpose(0, 1).reshape(l, -1).T @ t.transpose(0, 1).reshape(l, -1) for t in (flat, permuted)]

    torch.testing.assert_close(*grams(1, 8, 4))
    torch.testing.assert_close(*grams(8, 1, 1))
    flat, permuted = grams(4, 8, 4)
    assert not torch.allclose(flat, permuted, atol=0.1)


def test_permute_keeps_the_covariance_of_input_channels():
    weight = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[:, 4:] = 0  # two dead channels cost a sketch of four nothing
    sketch = sketch_conv(weight, 5, 1, "permute", norm=None)
    rows, dense = sketch.transpose(0, 1).reshape(5, -1), weight.transpose(0, 1).reshape(6, -1)
    torch.testing.assert_close(rows.T @ rows, dense.T @ dense)


def test_linear_layers_are_sketched_as_well():
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    assert sketch_conv(weight, 7, 0).shape == (7, 12)
    assert sketch_conv(weight, 7, 1, "permute").shape == (20, 7)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dim": 2}, "dim must be 0 or 1"),
        ({"layout": "transposed"}, "layout must be 'flat' or 'permute'"),
        ({"norm": "l1"}, "norm must be 'l2' or None"),
        ({"l": 9}, "l must be between 1 and the 8 rows"),
    ],
)
def test_bad_weight_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        sketch_conv(torch.randn(8, 4, 3, 3), **{"l": 4, "dim": 0, **kwargs})


@pytest.mark.parametrize("tenths", range(1, 11))
@pytest.mark.parametrize("n", [16, 32, 64, 96, 512])
def test_width_is_the_official_int_of_the_share_kept(n, tenths):
    share = tenths / 10
    assert sketch_width(n, 1 - share) == max(1, int(share * n))


def test_width_forgives_binary_fractions():
    assert int(0.29 * 100) == 28
    assert sketch_width(100, 0.71) == 29
    assert sketch_width(8, 0.99) == 1


# ---- networks


@pytest.mark.parametrize(
    ("build", "plain"), [(resnet56, []), (googlenet_cifar, []), (resnet50, []), (densenet40, [()])]
)
def test_the_graph_finds_what_the_authors_sketch(build, plain):
    network = build()
    assert set(chains(channel_graph(network, SHAPE.get(build, (1, 3, 32, 32))))) == {
        name for block in block_layers(network) for name in block
    }


def test_chains_of_plain_networks():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
            self.mlp = nn.Sequential(nn.Linear(8, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 2))

        def forward(self, x):
            x = self.two(self.one(x).relu()).relu()
            return self.mlp(torch.cat([self.left(x), self.right(x)], 1).mean((2, 3)))

    network = Split()
    assert chains(channel_graph(network, (1, 3, 8, 8))) == {"one": "two", "mlp.0": "mlp.3"}
    assert len(chains(channel_graph(vgg16_cifar(), (1, 3, 32, 32)))) == 14
    flattened = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))
    assert chains(channel_graph(flattened, (1, 3, 8, 8))) == {}


def test_lists_start_at_start_conv():
    network = resnet20()
    ratios = block_ratios(network, [0.1 * i for i in range(1, 8)], start_conv=3)
    assert list(ratios) == [name for (name,) in block_layers(network)[2:]]
    assert ratios["layer1.2.conv1"] == 0.1
    with pytest.raises(ValueError, match=r"pruning_ratio has 9 numbers, but there are 7 blocks from start_conv=3"):
        block_ratios(network, [0.5] * 9, start_conv=3)
    with pytest.raises(ValueError, match=r"start_conv must be between 1 and the number of blocks, 9; got 10"):
        block_ratios(network, [0.5], start_conv=10)


def test_sketches_of_a_bottleneck_go_both_ways():
    network = resnet50()
    weights = {name: module.weight for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    widths = dict.fromkeys(block_layers(network)[0], 20)
    consumers = {"layer1.0.conv1": "layer1.0.conv2", "layer1.0.conv2": "layer1.0.conv3"}
    sketched = sketch_weights(weights, consumers, widths)
    assert {name: tuple(w.shape) for name, w in sketched.items()} == {
        "layer1.0.conv1": (20, 64, 1, 1),
        "layer1.0.conv2": (20, 20, 3, 3),
        "layer1.0.conv3": (256, 20, 1, 1),
    }
    expected = sketch_conv(sketch_conv(weights["layer1.0.conv2"], 20, 0), 20, 1)
    torch.testing.assert_close(sketched["layer1.0.conv2"], expected)


# ---- sizes


def case(build, ratios, params, macs, with_bn):
    return pytest.param(build, ratios, params, macs, with_bn, id=f"filtersketch-{build.__name__}-{ratios}")


@pytest.mark.parametrize(
    ("build", "ratios", "params", "macs", "with_bn"),
    [
        case(resnet56, "[0.0]*27", 853_018, 125_485_696, 126_550_656),
        case(resnet56, "[0.9]*27", 81_502, 10_838_656, 11_426_688),
        case(resnet56, "[0.8]*27", 162_484, 23_888_512, 24_534_144),
        case(resnet56, "[0.7]*27", 250_954, 34_929_280, 35_615_232),
        case(resnet56, "[0.6]*27", 331_936, 47_979_136, 48_722_688),
        case(resnet56, "[0.5]*27", 428_074, 62_964_352, 63_771_264),
        case(resnet56, "[0.4]*27", 506_446, 73_360_000, 74_206_080),
        case(resnet56, "[0.3]*27", 587_428, 86_409_856, 87_313_536),
        case(resnet56, "[0.1]*27", 756_880, 110_500_480, 111_502_080),
        case(resnet56, "[0.1]*3+[0.9]*20+[0.4]*4", 240_524, 31_777_408, 32_461_696),
        case(resnet56, "[0.3]*3+[0.6]*20+[0.1]*4", 483_998, 61_840_000, 62_630_656),
        case(resnet110, "[0.0]*54", 1_727_962, 252_887_680, 254_984_832),
        case(resnet110, "[0.1]*3+[0.6]*24+[0.7]*24+[0.1]*3", 671_692, 100_067_968, 101_558_400),
        case(googlenet_cifar, "[0.75]*9", 2_607_086, 581_220_352, 587_209_984),
        case(resnet50, "[0.8]*16", 7_177_694, 896_462_052, 913_389_592),
        case(resnet50, "[0.4]*16", 14_532_769, 2_187_045_563, 2_206_611_753),
        case(resnet50, "[0.3]*16", 16_945_246, 2_601_392_356, 2_621_606_424),
    ],
)
def test_sizes(build, ratios, params, macs, with_bn):
    left = narrowed(build(), ratios, SHAPE.get(build, (1, 3, 32, 32)))
    assert (left.params, left.macs, left.paper_macs()) == (params, macs, with_bn)


@pytest.mark.parametrize(("ratios", "published"), [("[0.8]*16", 0.93), ("[0.4]*16", 2.23), ("[0.3]*16", 2.64)])
def test_resnet50_rows_are_printed_with_four_operations_per_batch_norm_output(ratios, published):
    assert round(narrowed(resnet50(), ratios, (1, 3, 224, 224)).paper_macs(bn_ops=4) / 1e9, 2) == published


def test_the_list_published_for_resnet110_is_not_that_of_its_budget():
    left = narrowed(resnet110(), "[0.5]+[0.6]*18+[0.7]*31+[0.1]*4", (1, 3, 32, 32))
    assert (left.macs, left.params) == (92_842_624, 695_292)
    swapped = narrowed(resnet110(), "[0.1]*3+[0.7]*24+[0.6]*24+[0.1]*3", (1, 3, 32, 32))
    assert (round(swapped.macs / 1e6, 2), round(swapped.params / 1e6, 3)) == (97.86, 0.766)


def narrowed(network, ratios, shape):
    """Profile of the network with the widths that a list asks for."""
    graph = channel_graph(network, shape)
    by_layer = block_ratios(network, parse_ratio(ratios))
    kept = {name: torch.arange(sketch_width(graph.width(name), ratio)) for name, ratio in by_layer.items()}
    apply_cuts(network, ChannelPlan(kept).cuts(graph))
    return profile(network, shape)


# ---- the callback


class Start(Callback):
    """Remembers the module as the first step, or that of a later epoch, finds it."""

    def __init__(self, epoch=0):
        self.epoch = epoch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 0:
            self.state = copy.deepcopy(pl_module.state_dict())
            self.momenta = {n: p in trainer.optimizers[0].state for n, p in pl_module.named_parameters()}


def trained_norms(module):
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                for tensor in (m.weight, m.bias, m.running_mean, m.running_var):
                    tensor.uniform_(0.5, 1.5)
    return module


def test_the_fit_starts_from_the_sketch(tmp_path):
    module = trained_norms(made())
    dense, start = copy.deepcopy(module.state_dict()), Start()
    fit(module, tmp_path, FilterSketch(0.5), start, max_epochs=1)
    for block in ("net.blocks.0", "net.blocks.1"):
        first, second = dense[f"{block}.conv1.weight"], dense[f"{block}.conv2.weight"]
        assert torch.equal(start.state[f"{block}.conv1.weight"], sketch_conv(first, 6, 0))
        assert torch.equal(start.state[f"{block}.conv2.weight"], sketch_conv(second, 6, 1))
        fresh = [start.state[f"{block}.bn1.{key}"] for key in ("weight", "bias", "running_mean", "running_var")]
        assert [t.tolist() for t in fresh] == [[1.0] * 6, [0.0] * 6, [0.0] * 6, [1.0] * 6]
        for key in ("weight", "bias", "running_mean", "running_var"):  # the last norm of a block is kept as it is
            assert torch.equal(start.state[f"{block}.bn2.{key}"], dense[f"{block}.bn2.{key}"])
    assert torch.equal(start.state["net.stem.weight"], dense["net.stem.weight"])


def test_options(tmp_path):
    module = trained_norms(made())
    dense, start = copy.deepcopy(module.state_dict()), Start()
    sketch = FilterSketch(0.5, bn="copy_slice", weight_norm_method=None, channel_layout="permute")
    fit(module, tmp_path, sketch, start, max_epochs=1)
    name = "net.blocks.0"
    assert torch.equal(start.state[f"{name}.bn1.running_var"], dense[f"{name}.bn1.running_var"][:6])
    expected = sketch_conv(dense[f"{name}.conv2.weight"], 6, 1, "permute", None)
    assert torch.equal(start.state[f"{name}.conv2.weight"], expected)


def test_biases_of_sketched_layers_start_at_zero(tmp_path):
    convs = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3))
    network = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
    start = Start()
    fit(made(lambda: network), tmp_path, FilterSketch({"net.0": 0.5}), start, max_epochs=1)
    assert start.state["net.0.bias"].tolist() == [0.0] * 4
    assert start.state["net.3.bias"].tolist() == [0.0] * 6
    assert start.state["net.6.bias"].abs().min() > 0


def test_recalibrated_norms_fit_the_new_weights(tmp_path):
    images = digits(64, batch_size=64).dataset.tensors[0]

    def off(**kwargs):
        """How far the statistics of the last norm are from those of its inputs."""
        module, seen = trained_norms(made()), []
        fit(module, tmp_path, FilterSketch(0.5, **kwargs), max_epochs=0)
        norm = module.net.blocks[1].bn2
        norm.register_forward_hook(lambda m, args, out: seen.append(args[0].mean((0, 2, 3))))
        with torch.no_grad():
            module.eval()(images)
        return (seen[0] - norm.running_mean).abs().max()

    assert off() > 0.1
    assert off(recalibrate_bn=1) < 1e-3


def test_in_mid_fit_momentum_of_sketched_layers_is_forgotten(tmp_path):
    start = Start(epoch=1)
    fit(made(), tmp_path, FilterSketch(0.5, start_epoch=1), start, max_epochs=2)
    assert start.state["net.blocks.0.conv1.weight"].shape[0] == 6
    forgotten = {name for name, known in start.momenta.items() if not known}
    assert forgotten == {
        f"net.blocks.{i}.{n}" for i in (0, 1) for n in ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight")
    }


def test_lists_count_blocks(tmp_path):
    module = Foreign(nn.Sequential(nn.Conv2d(1, 3, 1), resnet20(num_classes=10)))
    fit(module, tmp_path, FilterSketch("[0.5]*2+[0.75]*6", start_conv=2), max_epochs=0)
    widths = [module.get_submodule(f"net.1.layer{s}.{i}.conv1").out_channels for s in (1, 2, 3) for i in range(3)]
    assert widths == [16, 8, 8, 8, 8, 8, 16, 16, 16]
    with pytest.raises(ValueError, match="pruning_ratio has 5 numbers, but there are 9 blocks"):
        fit(Foreign(resnet20(in_channels=1)), tmp_path, FilterSketch([0.5] * 5), max_epochs=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight_norm_method": "l1"}, "weight_norm_method='l1'"),
        ({"channel_layout": "other"}, "channel_layout='other'"),
        ({"bn": "fresh"}, "bn='fresh'"),
        ({"start_conv": 0}, "start_conv=0"),
        ({"recalibrate_bn": -1}, "recalibrate_bn=-1"),
    ],
)
def test_bad_callback_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FilterSketch(**kwargs)


def test_a_network_without_chains_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="FilterSketch finds no layer of Foreign that a single other"):
        fit(Foreign(densenet40(in_channels=1)), tmp_path, FilterSketch(0.5), max_epochs=0)


@pytest.mark.parametrize("seed", [0, 2])
def test_fine_tuning_from_the_sketch_beats_random_weights_of_the_same_widths(tmp_path, seed):
    train, test = digits(1200, batch_size=40), digits(500, 1200, batch_size=500)

    def accuracy_after(epochs, lr, module, *callbacks):
        module.lr = lr
        runner = make_trainer(tmp_path, *callbacks, max_epochs=epochs)
        runner.fit(module, train)
        return runner.validate(module, test, verbose=False)[0]["val_acc"]

    torch.manual_seed(seed)
    module, random = (Foreign(CIFARResNet(8, in_channels=1)) for _ in range(2))
    assert accuracy_after(6, 0.02, module) > 0.9
    fit(random, tmp_path, FilterSketch(0.5), max_epochs=0)
    for layer in random.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    assert accuracy_after(4, 0.003, module, FilterSketch(0.5)) > accuracy_after(4, 0.003, random) + 0.01
