"""ABCPruner on networks: widths and sizes of the paper, what is inherited, and a search that survives."""

from __future__ import annotations

import random
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from foreign import Foreign, Network, assert_same, digits, fit, made, make_trainer, no_pictures, widths
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.progress import Progress
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import mobilenet_v2, resnet18, resnet34, resnet50, resnet101, resnet152

from lightning_compress import profile
from lightning_compress.callbacks import ABCPruner, RandomChannels
from lightning_compress.callbacks.pruning.abc_pruner import kept_width, published_macs
from lightning_compress.callbacks.pruning.abc_pruner.inherit import (
    coded_layers,
    filter_scores,
    inherited_filters,
    width_of_ratio,
)
from lightning_compress.callbacks.pruning.abc_pruner.search import Fitness, PlanFile
from lightning_compress.catalog import CONFIGS
from lightning_compress.cli.lightning_cli import CompressCLI
from lightning_compress.core.surgery import apply_cuts, attach_record, channel_graph
from lightning_compress.datamodules import Digits
from lightning_compress.modules import ImageClassifier
from lightning_compress.networks import densenet40, googlenet_cifar, resnet20, resnet56, resnet110, vgg16_cifar

IMAGENET = (resnet18, resnet34, resnet50, resnet101, resnet152)


def vgg16():
    """The paper's, with a single linear layer."""
    return vgg16_cifar(classifier="linear")


def shape(build) -> tuple[int, int, int, int]:
    return (1, 3, 224, 224) if build in IMAGENET else (1, 3, 32, 32)


def narrowed(build, code, rule="random_pretrain", seed=0):
    torch.manual_seed(seed)
    network = build()
    graph = channel_graph(network, shape(build))
    generator = torch.Generator().manual_seed(seed)
    plan = inherited_filters(network, graph, coded_layers(network, graph), code, rule, generator)
    apply_cuts(network, plan.cuts(graph))
    return network


def channels(network: nn.Module) -> int:
    """As the paper's tables count: outputs of all convolutions, shortcuts too."""
    return sum(len(m.weight) for m in network.modules() if isinstance(m, nn.Conv2d))


# ---- widths and sizes


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (16, [1, 3, 4, 6, 8, 9, 11, 12, 14]),
        (32, [3, 6, 9, 12, 16, 19, 22, 25, 28]),
        (64, [6, 12, 19, 25, 32, 38, 44, 51, 57]),
        (5, [1, 1, 1, 2, 2, 3, 3, 4, 4]),
    ],
)
def test_width_rule(width, expected):
    assert [kept_width(width, code) for code in range(1, 10)] == expected
    assert [width_of_ratio(width, 1 - code / 10) for code in range(1, 10)] == expected
    assert kept_width(width, 10) == width


@pytest.mark.parametrize(
    ("build", "numbers", "params", "macs", "outputs", "published"),
    [
        pytest.param(vgg16, 13, 14_728_266, 313.20e6, 4224, 314.59e6, id="abcpruner-dense-vgg16"),
        pytest.param(resnet56, 27, 853_018, 125.49e6, 2032, 127.62e6, id="abcpruner-dense-resnet56"),
        pytest.param(resnet110, 54, 1_727_962, 252.89e6, 4048, 257.08e6, id="abcpruner-dense-resnet110"),
        pytest.param(googlenet_cifar, 9, 6_166_250, 1521.76e6, 7904, 1534.54e6, id="abcpruner-dense-googlenet"),
        pytest.param(resnet18, 8, 11_689_512, None, 4800, None, id="abcpruner-dense-resnet18"),
        pytest.param(resnet34, 16, 21_797_672, None, 8512, None, id="abcpruner-dense-resnet34"),
        pytest.param(resnet50, 16, 25_557_032, None, 26_560, 4135.7e6, id="abcpruner-dense-resnet50"),
    ],
)
def test_dense_sizes(build, numbers, params, macs, outputs, published):
    network = build()
    cost = profile(network, shape(build))
    assert (cost.params, channels(network)) == (params, outputs)
    assert macs is None or cost.macs == pytest.approx(macs, abs=5e3)
    assert published is None or published_macs(cost) == pytest.approx(published, abs=5e3 if published < 2e9 else 5e4)
    assert len(coded_layers(network, channel_graph(network, shape(build)))) == numbers


@pytest.mark.parametrize(("build", "numbers"), [(resnet101, 33), (resnet152, 50), (densenet40, 36), (resnet20, 9)])
def test_length_of_a_code(build, numbers):
    network = build()
    layers = coded_layers(network, channel_graph(network, shape(build)))
    assert len(layers) == numbers
    assert {len(names) for names in layers} == {2 if build in IMAGENET else 1}


RESNET56 = [4, 3, 5, 5, 6, 8, 7, 6, 2, 3, 4, 1, 2, 1, 2, 6, 8, 8, 3, 7, 2, 6, 7, 3, 8, 6, 2]


@pytest.mark.parametrize(
    ("build", "code", "params", "macs", "outputs"),
    [
        pytest.param(
            vgg16, [8, 8, 8, 6, 3, 8, 2, 3, 2, 3, 8, 2, 1], 1_768_399, 83_037_426, 1581, id="abcpruner-code-vgg16"
        ),
        pytest.param(vgg16, [5] * 13, 3_686_954, 78_744_064, 2112, id="abcpruner-code-vgg16-half"),
        pytest.param(resnet56, RESNET56, 398_744, 56_752_768, 1479, id="abcpruner-code-resnet56"),
        pytest.param(
            googlenet_cifar, [2, 1, 1, 1, 2, 2, 2, 1, 1], 2_086_376, 452_581_120, 5981, id="abcpruner-code-googlenet"
        ),
    ],
)
def test_sizes_of_codes(build, code, params, macs, outputs):
    network = narrowed(build, code)
    cost = profile(network, shape(build))
    assert (cost.params, cost.macs, channels(network)) == (params, macs, outputs)


@pytest.mark.parametrize(
    ("build", "config", "macs", "params", "outputs"),
    [
        pytest.param(vgg16, "vgg16_cifar10_83m", 82.81, 1.67, 1639, id="abcpruner-table-vgg16-80%"),
        pytest.param(resnet56, "resnet56_cifar10_59m", 58.54, 0.39, 1482, id="abcpruner-table-resnet56-70%"),
        pytest.param(resnet110, "resnet110_cifar10_90m", 89.87, 0.56, 2701, id="abcpruner-table-resnet110-60%"),
        pytest.param(googlenet_cifar, "googlenet_cifar10_513m", 513.18, 2.46, 6150, id="abcpruner-table-googlenet-30%"),
        pytest.param(resnet18, "resnet18_imagenet_1006m", 1005.71, 6.60, 3894, id="abcpruner-table-resnet18-70%"),
        pytest.param(resnet50, "resnet50_imagenet_945m", 944.83, 7.35, 20_576, id="abcpruner-table-resnet50-30%"),
    ],
)
def test_published_rows(build, config, macs, params, outputs):
    """The codes of our configs cost what the paper prints; GoogLeNet 513.19M, for which no code exists, and 944.85M."""
    recipe = yaml.safe_load((CONFIGS / "recipes" / "abc_pruner" / f"{config}.yaml").read_text())
    network = narrowed(build, recipe["trainer"]["callbacks"][0]["init_args"]["fixed_code"])
    cost = profile(network, shape(build))
    printed = round(published_macs(cost) / 1e6, 2), round(cost.params / 1e6, 2), channels(network)
    assert printed == (macs, params, outputs)


@pytest.mark.parametrize(("build", "n"), [(resnet56, 9), (resnet110, 18)])
def test_closed_forms_of_cifar_resnets(build, n):
    code = [random.Random(n).randint(1, 9) for _ in range(3 * n)]
    kept = [
        [int(w * c / 10) or 1 for c in code[s * n : (s + 1) * n]] for s, w in enumerate((16, 32, 64))
    ]  # fmt: skip
    s1, s2, s3 = map(sum, kept)
    m2, m3 = kept[1][0], kept[2][0]
    network = narrowed(build, code)
    cost = profile(network, (1, 3, 32, 32))
    assert channels(network) == 16 + 112 * n + s1 + s2 + s3
    assert cost.macs == 442_368 + 640 + 9 * 32 * 1024 * s1 + 9 * 256 * (64 * s2 - 16 * m2) + 9 * 64 * (
        128 * s3 - 32 * m3
    )
    assert cost.params == 432 + 32 + 650 + 9 * (32 * s1 + 64 * s2 - 16 * m2 + 128 * s3 - 32 * m3) + 2 * (
        s1 + s2 + s3 + 112 * n
    )


def test_densenet_narrows_the_growth():
    network = narrowed(densenet40, [1, 5, 9] * 12)
    assert [len(network.dense2[i].conv.weight) for i in range(3)] == [1, 6, 10]
    assert network.dense1[3].conv.in_channels == 24 + 1 + 6 + 10
    assert (len(network.conv1.weight), len(network.trans1.conv.weight)) == (24, 168)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_googlenet_narrows_inside_of_inceptions():
    network = narrowed(googlenet_cifar, [3] * 9)
    inception = network.a3
    assert len(inception.branch3x3.reduce.conv.weight) == 28
    assert len(inception.branch5x5.reduce.conv.weight) == 4
    assert len(inception.branch5x5.mid.conv.weight) == 9
    assert network.linear.in_features == 1024


# ---- networks that the paper does not know


def test_layers_that_share_no_channels_have_a_number():
    network = Network()
    assert coded_layers(network, channel_graph(network, (1, 1, 8, 8))) == [("blocks.0.conv1",), ("blocks.1.conv1",)]


def test_depthwise_convolutions_follow():
    network = mobilenet_v2()
    graph = channel_graph(network, (1, 3, 64, 64))
    layers = coded_layers(network, graph)
    assert ("features.2.conv.0.0",) in layers  # it expands, features.2.conv.1.0 is depthwise, conv.2 is added
    assert not any(name.endswith((".conv.1.0", "conv.2")) for (name,) in layers[:6])
    plan = inherited_filters(network, graph, layers, [5] * len(layers), "random_pretrain", torch.Generator())
    apply_cuts(network, plan.cuts(graph))
    assert network.features[2].conv[1][0].groups == network.features[2].conv[0][0].out_channels == 48
    network(torch.zeros(2, 3, 64, 64))


def test_without_convolutions_linear_layers_have_numbers():
    mlp = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3))
    assert coded_layers(mlp, channel_graph(mlp, (1, 4))) == [("0",), ("2",)]
    hidden = vgg16_cifar()
    assert ("classifier.fc1",) not in coded_layers(hidden, channel_graph(hidden, (1, 3, 32, 32)))


# ---- what is inherited


def test_whole_layers_inherit_everything():
    torch.manual_seed(0)
    dense = resnet20().state_dict()
    whole = narrowed(resnet20, [10] * 9)
    assert all(torch.equal(dense[name], value) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("rule", ["random_pretrain", "l1_pretrain"])
def test_slices_follow_each_other(rule):
    torch.manual_seed(0)
    dense = resnet20()
    graph = channel_graph(dense, (1, 3, 32, 32))
    layers = coded_layers(dense, graph)
    plan = inherited_filters(dense, graph, layers, [3] * 9, rule, torch.Generator().manual_seed(0))
    narrow = narrowed(resnet20, [3] * 9, rule)
    for (name,) in layers:
        kept, block = plan.kept[name], name.removesuffix(".conv1")
        assert kept.tolist() == sorted(set(kept.tolist()))
        one, two = (dense.get_submodule(f"{block}.{conv}").weight for conv in ("conv1", "conv2"))
        assert torch.equal(narrow.get_submodule(name).weight, one[kept])
        assert torch.equal(narrow.get_submodule(f"{block}.conv2").weight, two[:, kept])
        if rule == "l1_pretrain":
            sums = one.abs().flatten(1).sum(1)
            assert set(kept.tolist()) == set(sums.topk(len(kept)).indices.tolist())


def test_a_whole_layer_next_to_a_narrow_one():
    """The authors' loader copies the former unsliced."""
    torch.manual_seed(0)
    dense = vgg16()
    narrow = narrowed(vgg16, [5, 10, 10] + [3] * 10)
    assert narrow.features.conv2.weight.shape == (64, 32, 3, 3)
    assert torch.equal(narrow.features.conv3.weight, dense.features.conv3.weight)
    assert narrow(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_among_equal_norms_the_lower_index_is_kept():
    weight = torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0]).view(5, 1, 1, 1)
    scores = filter_scores(weight, "l1_pretrain", torch.Generator())
    assert scores.argsort(descending=True).tolist() == [1, 2, 4, 0, 3]


def test_the_last_filter_can_be_drawn_or_not():
    weight, generator = torch.zeros(5, 2), torch.Generator().manual_seed(0)
    highest = {
        last: [int(filter_scores(weight, "random", generator, last).argmax()) for _ in range(200)]
        for last in (True, False)
    }
    assert set(highest[True]) == set(range(5))
    assert set(highest[False]) == set(range(4))
    assert all(filter_scores(weight, "random", generator, False)[-1] == 0 for _ in range(20))
    assert sorted(filter_scores(weight, "random", generator).tolist()) == [0, 1, 2, 3, 4]


def fitted(tmp_path: Path, network=Network, **arguments) -> Foreign:
    """A module right after the cut."""
    module = made(network)
    fit(module, tmp_path, ABCPruner(**{"fixed_code": [5, 5], **arguments}), max_epochs=0)
    return module


def trained_norms():
    network = Network()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 3
            nn.init.constant_(module.weight, 0.5)
    return network


def test_batch_norms_and_biases_are_inherited_or_start_afresh(tmp_path):
    inherits = fitted(tmp_path, trained_norms).net
    assert inherits.bn.running_mean.min() == 3
    assert inherits.blocks[0].bn1.running_mean.tolist() == [3] * 6
    assert inherits.stem.bias.abs().min() > 0
    afresh = fitted(tmp_path, trained_norms, inherit_bn=False).net
    for norm in (afresh.bn, afresh.blocks[0].bn1, afresh.blocks[1].bn2):
        assert norm.running_mean.abs().max() == 0
        assert norm.weight.min() == 1
    assert afresh.stem.bias.abs().max() == 0
    assert torch.equal(afresh.stem.weight, inherits.stem.weight)
    assert torch.equal(afresh.head.weight, inherits.head.weight)  # it lost no inputs


def test_a_classifier_that_loses_inputs_starts_afresh_in_the_authors_code(tmp_path):
    def build():
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

    dense = made(build).net
    kept = {}
    for inherit in (True, False):
        head = fitted(tmp_path, build, fixed_code=[5], inherit_bn=inherit).net[4]
        kept[inherit] = torch.isin(head.weight, dense[4].weight).float().mean()
    assert kept == {True: 1, False: 0}


def test_no_inheritance_starts_everything_afresh(tmp_path):
    module, dense = fitted(tmp_path, random_rule="random", seed=5), made()
    assert widths(module)["net.blocks.0.conv1"] == 6
    assert not torch.isin(module.net.stem.weight, dense.net.stem.weight).any()
    assert not torch.isin(module.net.head.weight, dense.net.head.weight).any()
    assert_same(module, fitted(tmp_path, random_rule="random", seed=5))
    assert not torch.equal(module.net.stem.weight, fitted(tmp_path, random_rule="random", seed=6).net.stem.weight)


# ---- the search

QUICK: dict[str, Any] = {
    "monitor": "val_acc", "food_number": 2, "max_cycle": 1, "food_limit": 1, "calfitness_epoch": 1, "fitness_batches": 2
}  # fmt: skip
NETWORKS = 7  # two sources, two employed bees, two onlookers, a scout


def searched(root: Path, module: Any = None, **arguments) -> tuple[Foreign, ABCPruner]:
    module, pruner = module or made(), ABCPruner(**{**QUICK, **arguments})
    fit(module, root, pruner, max_epochs=0)
    return module, pruner


def plan_of(root: Path) -> tuple[Path, PlanFile]:
    (path,) = root.glob("abc_pruner-*.pt")
    return path, PlanFile.load(path)


def test_code_fitness_filters_and_weights_belong_together(tmp_path):
    """The network that the fit starts with reaches, untrained, the fitness that its code was chosen for."""
    for seed in range(2):
        root = tmp_path / str(seed)
        module, pruner = searched(root, seed=seed)
        _, plan = plan_of(root)
        best = max(fitness for _, fitness in plan.colony["history"])
        assert plan.found.fitness == pruner.found.fitness == best
        assert (tuple(plan.found.code), best) in [(tuple(c), f) for c, f in plan.colony["history"]]
        assert [widths(module)[f"net.blocks.{i}.conv1"] for i in (0, 1)] == [kept_width(12, c) for c in plan.found.code]
        trainer = make_trainer(root)
        trainer.validate(module, digits(32, 64), verbose=False)
        assert float(trainer.callback_metrics["val_acc"]) == pytest.approx(best)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Foreign, PlanFile, Path]:
    """A search without interruption: the module, its file, and where that is."""
    root = tmp_path_factory.mktemp("whole")
    module, _ = searched(root)
    path, plan = plan_of(root)
    return module, plan, path


@pytest.mark.parametrize("after", [0, 1, 3, 5, 6])
def test_a_killed_search_continues_with_the_same_command(after, whole, tmp_path, monkeypatch):
    """... among the first sources, the employed bees, the onlookers and before the scout: equal bit for bit."""
    judge, done = Fitness.__call__, []

    def dying(self, network, seed):
        if len(done) == after:
            raise Killed
        done.append(seed)
        return judge(self, network, seed)

    monkeypatch.setattr(Fitness, "__call__", dying)
    with pytest.raises(Killed):
        searched(tmp_path)
    monkeypatch.setattr(Fitness, "__call__", judge)
    if after:
        _, plan = plan_of(tmp_path)
        assert len(plan.colony["history"]) == after
        assert not plan.finished
    module, plan, _ = whole
    again, _ = searched(tmp_path)
    assert_same(again, module)
    assert plan_of(tmp_path)[1].colony == plan.colony
    assert len(plan.colony["history"]) == NETWORKS


def test_a_finished_search_is_not_repeated(whole, tmp_path, monkeypatch):
    first, _, path = whole
    monkeypatch.setattr(Fitness, "_fit", lambda *_: pytest.fail("it trains"))
    again, _ = searched(path.parent)
    assert_same(again, first)
    other = Foreign()  # other weights, other settings: the file is used as it is
    elsewhere, _ = searched(tmp_path, other, plan_file=str(path), max_cycle=9)
    assert_same(elsewhere, first)


def test_the_structure_is_saved_as_a_config(tmp_path):
    _, pruner = searched(tmp_path, include=["net.blocks.*"])
    (path,) = tmp_path.glob("*.yaml")
    text = path.read_text()
    assert text.startswith("# ABCPruner: the best of ")
    written = yaml.safe_load(text)["trainer"]["callbacks+"][0]["init_args"]
    assert (written["fixed_code"], written["include"]) == (pruner.found.code, ["net.blocks.*"])
    cli = CompressCLI(["--config", "data/digits", "--config", "model/resnet20", "--config", str(path)], run=False)
    (made_of_it,) = (c for c in cli.trainer.callbacks if isinstance(c, ABCPruner))
    assert made_of_it.fixed_code == pruner.found.code


def test_randomness_of_the_run_is_untouched(tmp_path):
    """The fit after a search draws what it draws without one; loaders with a generator of their own as well."""
    drawn = []
    for arguments in (QUICK, {"fixed_code": [5, 5]}):
        seed_everything(3, verbose=False)
        generator = torch.Generator().manual_seed(7)
        loader = DataLoader(digits().dataset, 16, shuffle=True, generator=generator)
        trainer = make_trainer(tmp_path / str(len(drawn)), ABCPruner(**arguments), max_epochs=0)
        with no_pictures:
            trainer.fit(made(), loader, digits(32, 64))
        drawn.append((random.random(), torch.rand(3).tolist(), torch.rand(3, generator=generator).tolist()))
    assert drawn[0] == drawn[1]


class Watched(Foreign):
    """Notes the learning rates that it is trained with; its schedule begins with a warm-up from nothing."""

    rates: list[float] = []

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.25)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: epoch / 5)]

    def configure_callbacks(self):
        return [] if self.trainer.max_epochs == 0 else pytest.fail("callbacks in a short training")

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_the_rate_is_constant_in_short_trainings(tmp_path):
    Watched.rates.clear()
    searched(tmp_path, Watched(), calfitness_epoch=3, fitness_batches=1, max_cycle=0)
    assert Watched.rates == [0.25] * (2 * 3 + 1)  # two networks, three epochs, and the rehearsal


def test_settings_of_the_outer_trainer_hold_inside(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Foreign,
        "on_train_start",
        lambda self: seen.append((t := self.trainer).precision and (
            t.precision, t.accumulate_grad_batches, t.gradient_clip_val, t.num_training_batches, t.world_size
        )),
        raising=False,
    )  # fmt: skip
    pruner = ABCPruner(**{**QUICK, "max_cycle": 0})
    outer = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_epochs": 0}
    fit(made(), tmp_path, pruner, **outer)
    assert seen == [("bf16-mixed", 2, 0.5, 1, 1)] + [("bf16-mixed", 2, 0.5, 2, 1)] * 2


def test_loaders_are_made_once_and_hooks_of_the_datamodule_run(tmp_path):
    made_loaders, transferred = [], []

    class Data(LightningDataModule):
        def train_dataloader(self):
            made_loaders.append("train")
            return digits()

        def val_dataloader(self):
            made_loaders.append("val")
            return digits(32, 64)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            transferred.append(self.trainer)
            return batch

    data, module = Data(), made()
    module.example_input_array = torch.zeros(1, 1, 8, 8)
    trainer = make_trainer(tmp_path, ABCPruner(**QUICK), max_epochs=0)
    with no_pictures:
        trainer.fit(module, data)
    assert made_loaders == ["train", "val", "train"]  # the last are the outer fit's
    assert len(transferred) >= NETWORKS * (2 + 2)
    assert data.trainer is trainer


def test_metrics_of_a_short_training_are_its_own(tmp_path, monkeypatch):
    """With several processes a torchmetric would add up over networks that differ."""
    seen = []
    monkeypatch.setattr(
        ImageClassifier, "on_train_start",
        lambda self: seen.append([m.distributed_available_fn() for m in (self.train_acc, self.val_acc)]),
    )  # fmt: skip
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    module = ImageClassifier(Network(), input_shape=(1, 8, 8))
    fit(module, tmp_path, ABCPruner(**{**QUICK, "monitor": "val/acc", "max_cycle": 0}), max_epochs=0)
    assert seen == [[False, False]] * 3


def test_a_code_seen_before_can_keep_its_fitness(tmp_path, monkeypatch):
    judged, judge = [], Fitness.__call__
    monkeypatch.setattr(Fitness, "__call__", lambda *a: judged.append(a[2]) or judge(*a))
    for name, reuse in (("no", False), ("yes", True)):
        judged.clear()
        searched(tmp_path / name, max_preserve=1, cache=reuse)
        _, plan = plan_of(tmp_path / name)
        history = plan.colony["history"]
        assert len(judged) == (1 if reuse else len(history))
        assert len(history) == NETWORKS


def test_a_dry_run_is_short_and_writes_nothing(tmp_path):
    module = made()
    fit(module, tmp_path, ABCPruner(monitor="val_acc"), fast_dev_run=True, max_epochs=None)
    assert widths(module)["net.blocks.0.conv1"] < 12
    assert not list(tmp_path.glob("abc_pruner*"))


def test_the_bar_tells_cycle_best_and_how_many(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Progress, "update", lambda self, task, **shown: told.append((self.disable, shown)))
    fit(made(), tmp_path, ABCPruner(**QUICK), max_epochs=0, enable_progress_bar=True)
    disabled, shown = zip(*told, strict=True)
    assert not any(disabled)
    assert [update["completed"] for update in shown] == list(range(1, NETWORKS + 1))
    assert shown[0]["total"] == 6
    assert [update["description"].split(",")[0] for update in shown] == ["first sources"] + ["cycle 1 of 1"] * 6
    best = [float(update["description"].split()[-1]) for update in shown]
    assert best == sorted(best)


def test_a_picture_of_the_search(tmp_path):
    pytest.importorskip("matplotlib")
    trainer = make_trainer(tmp_path, ABCPruner(**QUICK), max_epochs=0)
    trainer.fit(made(), digits(), digits(32, 64))
    assert (tmp_path / "abc_pruner_search.png").exists()


def test_a_resumed_fit_does_not_search(tmp_path, monkeypatch):
    from lightning.pytorch.callbacks import ModelCheckpoint

    module = made()
    fit(module, tmp_path, ABCPruner(**QUICK), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1))
    for file in tmp_path.glob("abc_pruner*"):
        file.unlink()
    monkeypatch.setattr(Fitness, "_fit", lambda *_: pytest.fail("it trains"))
    again = made()
    fit(again, tmp_path, ABCPruner(**QUICK), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(again, module)


def test_the_account_names_the_code_and_what_was_left_alone(tmp_path):
    from lightning_compress.core.report import Account

    _, pruner = searched(tmp_path)
    account = Account.load(tmp_path / "compression.json")
    assert any(str(pruner.found.code) in note for note in account.notes)
    reasons = dict(account.left_alone)
    assert "other layers" in reasons["net.stem"]
    assert "net.blocks.0.conv1" not in reasons


# ---- refusals


def refuse(tmp_path, message, *, data=None, module=None, **arguments):
    module, data = module or made(), data or (digits(), digits(32, 64))

    def attempt():
        make_trainer(tmp_path, ABCPruner(**{**QUICK, **arguments})).fit(module, *data)

    with pytest.raises((ValueError, MisconfigurationException), match=message):
        attempt()
    assert not attach_record(module).steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"monitor": "val_ac"}, r"monitor='val_ac'\): validation logs no such metric.*Did you mean 'val_acc'"),
        ({"monitor": "val/loss"}, "monitor='val/loss'.*high values"),
        ({"calfitness_epoch": 0}, "calfitness_epoch=0"),
        ({"fitness_batches": 0}, "fitness_batches=0"),
        ({"random_rule": "l1"}, "random_rule='l1'"),
        ({"fixed_code": [3, 11]}, r"fixed_code=\[3, 11\]"),
        ({"fixed_code": [3]}, r"fixed_code=\[3\]\) has 1 numbers, but there are 2 layers.*net.blocks.0.conv1"),
        ({"exclude": ["*.conv1"]}, "no layer of Foreign whose channels no other layer writes"),
    ],
)
def test_impossible_arguments_are_named(arguments, message, tmp_path):
    refuse(tmp_path, message, **arguments)


def test_without_validation_data_there_is_no_fitness(tmp_path):
    refuse(tmp_path, "give `val_dataloaders`", data=(digits(),))


def test_files_that_do_not_belong_here_are_refused(whole, tmp_path):
    path = tmp_path / "plan.pt"
    plan = deepcopy(whole[1])
    plan.save(path)
    refuse(tmp_path, "search with other layers", module=made(WideNetwork), plan_file=str(path))
    plan.colony["phase"] = "employed"
    plan.save(path)
    refuse(tmp_path, "an unfinished search with other food_limit: 1, here 4", plan_file=str(path), food_limit=4)
    refuse(tmp_path, "unfinished search with other weights", module=Foreign(), plan_file=str(path))
    path.write_bytes(path.read_bytes()[:1000])
    refuse(tmp_path, "cannot be read as a search", plan_file=str(path))


class WideNetwork(Network):
    def __init__(self):
        super().__init__()
        self.blocks[0].conv1 = nn.Conv2d(8, 14, 3, padding=1, bias=False)
        self.blocks[0].bn1 = nn.BatchNorm2d(14)
        self.blocks[0].conv2 = nn.Conv2d(14, 8, 3, padding=1, bias=False)


def test_a_remote_folder_needs_a_local_file(tmp_path):
    pruner = ABCPruner(**QUICK)

    class Remote:
        default_root_dir = "s3://bucket/runs"

    with pytest.raises(MisconfigurationException, match="name a local file"):
        pruner._path(Remote(), {}, {})
    assert ABCPruner(plan_file="a/b.pt")._path(Remote(), {}, {}) == Path("a/b.pt")


# ---- does it help


def on_digits(root: Path, *callbacks, weights=None, epochs: int, seed: int) -> tuple[ImageClassifier, Trainer]:
    """ResNet-20 on scans of 8x8."""
    seed_everything(seed, verbose=False)
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs)
    module = ImageClassifier("resnet20", input_shape=(1, 8, 8), optimizer=optimizer, lr_scheduler=schedule)
    if weights is not None:
        module.network.load_state_dict(weights)
    trainer = make_trainer(root, *callbacks, max_epochs=epochs)
    with no_pictures:
        trainer.fit(module, Digits(size=8, seed=seed))
    return module, trainer


@pytest.mark.slow
def test_a_found_structure_is_no_worse_than_a_uniform_one(tmp_path):
    """Of equal MACs, with as many epochs from the same trained network, on images held out twice; mean of 3 seeds."""
    found, uniform = [], []
    for seed in range(3):
        dense, _ = on_digits(tmp_path, epochs=6, seed=seed)
        weights = {name: value.clone() for name, value in dense.network.state_dict().items()}
        pruner = ABCPruner(3, food_number=5, max_cycle=3, calfitness_epoch=1, seed=seed)
        narrow, trainer = on_digits(tmp_path / f"{seed}", pruner, weights=weights, epochs=3, seed=seed)
        found.append(trainer.test(narrow, Digits(size=8, seed=seed), verbose=False)[0]["test/acc"])
        cost = [profile(module, (1, 1, 8, 8)).macs for module in (narrow, dense)]
        blind = RandomChannels(target_macs=cost[0] / cost[1], include=["*.conv1"], exclude=["network.conv1"], seed=seed)
        blind_module, trainer = on_digits(tmp_path / f"{seed}u", blind, weights=weights, epochs=3, seed=seed)
        uniform.append(trainer.test(blind_module, Digits(size=8, seed=seed), verbose=False)[0]["test/acc"])
        print(seed, pruner.found.code, cost[0] / cost[1], found, uniform)
    assert sum(found) >= sum(uniform) - 3 / 250  # an image per seed is noise
