"""Every packaged config parses, can be built, says what it is, and costs what the paper printed."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pydoc import locate
from typing import Any

import pytest
import torch
from jsonargparse import _typehints
from lightning.pytorch import Trainer

from lightning_compress import callbacks
from lightning_compress.callbacks.pruning.hrank.callback import stage_order
from lightning_compress.callbacks.pruning.hrank.published import out_only
from lightning_compress.catalog import CARDS, CONFIGS, Row, card, cards, config_names
from lightning_compress.cli.configs import find_config, summary
from lightning_compress.cli.lightning_cli import CompressCLI
from lightning_compress.core.profile import profile
from lightning_compress.core.surgery import ChannelGraph, allocate, apply_cuts
from lightning_compress.modules import CrossModalReID, CycleGAN, ImageClassifier, Pix2Pix, SuperResolution
from lightning_compress.modules.translation.online_teacher import length

NAMES = config_names()
# What a fragment needs beside it to be a whole.
REST = {
    "data": ["model/resnet20"],
    "model": ["data/cifar10"],
    "method": ["data/digits", "model/resnet20"],
    "model/lenet5": ["data/mnist"],
    **{name: ["model/edsr_baseline"] for name in ("data/photographs", "data/div2k")},
    **{name: ["data/photographs"] for name in ("model/edsr_baseline", "model/rdn")},
    **{f"data/{name}": ["model/pix2pix"] for name in ("paired_photographs", "facades", "cityscapes_pairs")},
    "data/edges2shoes": ["model/pix2pix_resnet"],
    **{f"data/{name}": ["model/cycle_gan"] for name in ("unpaired_photographs", "horse2zebra")},
    **{name: ["data/paired_photographs"] for name in ("model/pix2pix", "model/pix2pix_resnet")},
    "model/cycle_gan": ["data/unpaired_photographs"],
    **{name: ["method/cross_modal_reid"] for name in ("data/two_view_digits", "data/sysu_mm01", "data/regdb")},
    "method/cross_modal_reid": ["data/two_view_digits"],
    "method/wavelet_distillation": ["data/paired_photographs", "model/pix2pix"],
    **{name: ["data/unpaired_photographs", "model/cycle_gan"] for name in ("method/dmad", "method/co_attention")},
    "method/dcd": ["data/unpaired_photographs", "model/cycle_gan"],
    "method/crd": ["data/paired_photographs", "model/pix2pix_resnet"],
}


def arguments(name: str) -> list[str]:
    rest = REST.get(name, REST.get(name.split("/")[0], []))
    return [arg for part in (*rest, name) for arg in ("--config", part)]


@cache
def parser() -> Any:
    return CompressCLI([*arguments("quickstart"), "--trainer.logger", "false"], run=False).parser


@cache  # 0.2 s each
def parse(name: str) -> Any:
    listed = cache(_typehints.get_all_subclass_paths)  # all subclasses of nn.Module, for every name of a network
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_typehints, "get_all_subclass_paths", listed)
        return parser().parse_args(arguments(name))


@pytest.mark.parametrize("name", NAMES)
def test_parses(name: str):
    config = parse(name)
    model: Any = locate(config.model.class_path)
    assert issubclass(model, (ImageClassifier, SuperResolution, CrossModalReID, Pix2Pix, CycleGAN))
    if name.startswith("method/") and model is ImageClassifier:  # else the method is the model
        assert len(config.trainer.callbacks) == 1


@pytest.mark.parametrize(
    "name", ["quickstart", "data/cifar100", "data/digits", "data/mnist", "model/densenet40", "model/lenet5"]
)
def test_builds_and_the_model_fits_the_data(name: str):
    cli = CompressCLI([*arguments(name), "--trainer.logger", "false"], run=False)
    assert isinstance(cli.model, ImageClassifier)
    assert cli.model.input_shape == cli.datamodule.input_shape
    assert cli.model.num_classes == cli.datamodule.num_classes
    cli.model(cli.model.example_input_array.repeat(2, 1, 1, 1))


@pytest.mark.parametrize(
    ("name", "scale"), [("super_resolution", 2), ("data/photographs", 2), ("data/div2k", 4), ("model/rdn", 2)]
)
def test_builds_and_enlarges(name: str, scale: int):
    with torch.device("meta"):  # RDN is large
        cli = CompressCLI([*arguments(name), "--trainer.logger", "false"], run=False)
        assert isinstance(cli.model, SuperResolution)
        assert cli.model.scale == cli.datamodule.scale == scale
        assert cli.model.input_shape == cli.datamodule.input_shape
        large = cli.model(torch.zeros(2, *cli.datamodule.input_shape))
    assert large.shape == (2, 3, cli.datamodule.patch_size, cli.datamodule.patch_size)


@pytest.mark.parametrize(
    ("name", "size", "fakes"),
    [
        ("recipes/pix2pix/quick", 64, 1),
        ("recipes/cycle_gan/quick", 64, 6),
        ("recipes/pix2pix/cityscapes", 256, 1),
        ("recipes/cycle_gan/summer2winter", 256, 6),
        ("model/pix2pix_resnet", 64, 1),
        ("data/edges2shoes", 256, 1),
        ("data/facades", 256, 1),
        ("data/horse2zebra", 256, 6),
    ],
)
def test_builds_and_translates(name: str, size: int, fakes: int):
    with torch.device("meta"):  # where metrics would look at their features
        cli = CompressCLI([*arguments(name), "--trainer.logger", "false", "--model.metrics", "null"], run=False)
        assert isinstance(cli.model, (Pix2Pix, CycleGAN))
        assert cli.model.input_shape == cli.datamodule.input_shape == (3, size, size)
        made = cli.model.compute_fakes({kind: torch.zeros(1, 3, size, size) for kind in "ab"})
    assert {image.shape for image in made.values()} == {(1, 3, size, size)}
    assert cli.trainer.max_epochs == cli.model.n_epochs + cli.model.n_epochs_decay


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name: str):
    lines = find_config(name).read_text(encoding="utf-8").splitlines()
    comment = [line for line in lines if line.startswith("#")]
    assert lines[: len(comment)] == comment, "the comment stands on top"
    assert 20 < len(summary(name)) < 120
    assert max(map(len, lines)) <= 120
    if name.startswith(("method/", "recipes/")):
        assert "arXiv:" in "".join(comment)
    if name.startswith("recipes/"):
        assert "data" in "".join(comment).lower()
        assert "minute" in "".join(comment) or "epochs" in "".join(comment)


def test_no_config_is_empty_or_elsewhere():
    assert {p.suffix for p in CONFIGS.rglob("*") if p.is_file()} == {".yaml"}
    slugs = {card.slug for card in CARDS}
    assert {n.split("/")[1] for n in NAMES if n.startswith(("recipes/", "method/"))} <= slugs


# ---- cost of the papers' rows


@pytest.mark.parametrize(
    ("row", "part"),
    [
        pytest.param(row, part, id=row.config)
        for slug, part in (
            ("cycle_gan", "generator_ab"),
            ("pix2pix", "generator"),
            ("dcd", "student"),
            ("crd", "student"),
        )
        for row in card(slug).published
    ],
)
def test_a_generators_recipe_costs_what_the_paper_printed(row: Row, part: str):
    network = parse(row.config).model.init_args[part]
    with torch.device("meta"):
        generator = locate(network.class_path)(**network.init_args.as_dict())  # type: ignore[operator]
    cost = profile(generator, (1, 3, 256, 256), convention="gan")
    assert cost.cost == pytest.approx(row.result["macs"], rel=0.001)
    assert cost.params == pytest.approx(row.result["params"], rel=0.005)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(("recipes/dcd", "recipes/crd", "method/dcd"))])
def test_a_recipe_in_turns_is_as_long_as_it_must_be(name: str):
    config = parse(name)
    model = config.model.init_args
    epochs = model.n_epochs + model.n_epochs_decay
    turns = config.model.class_path.endswith("CycleGAN")
    assert config.trainer.max_epochs == (length(epochs, model.phase_epochs, model.student_ratio) if turns else epochs)
    assert not turns or model.phase_epochs % config.trainer.check_val_every_n_epoch == 0


@cache
def dense(network: str | tuple[Any, ...], num_classes: int, input_shape: tuple[int, ...]) -> ImageClassifier:
    built: Any = network if isinstance(network, str) else locate(network[0])(**dict(network[1:]))  # type: ignore[operator]
    return ImageClassifier(built, num_classes=num_classes, input_shape=input_shape)  # type: ignore[arg-type]


@cache
def trace(kind: type, *where: Any) -> ChannelGraph:
    return kind().trace(Trainer(logger=False, barebones=True), dense(*where))


def pruner_and_network(row: Row) -> tuple[Any, tuple[Any, ...]]:
    """The callback of a row's recipe, and the arguments of `dense`."""
    config = parse(row.config)
    method, model = config.trainer.callbacks[0], config.model.init_args
    pruner = getattr(callbacks, method.class_path.rpartition(".")[2])(**method.init_args.as_dict())
    network = model.network
    if not isinstance(network, str):  # something to hash
        network = (network.class_path, *network.init_args.as_dict().items())
    return pruner, (network, model.num_classes, tuple(model.input_shape))


def rows(sequential: bool) -> list[Row]:
    stated = [card for card in cards("ready") if hasattr(getattr(callbacks, card.name, None), "ratios")]
    found = [row for card in stated for row in card.published]
    return [row for row in found if row.setting.startswith("sequential") == sequential]


@pytest.mark.parametrize("row", rows(sequential=False), ids=lambda row: row.config.removeprefix("recipes/"))
def test_recipe_costs_what_the_paper_printed(row: Row):
    if row.config.endswith("published_list"):
        pytest.skip("the printed list does not give the printed cost; the config says so")
    pruner, where = pruner_and_network(row)
    module, graph = deepcopy(dense(*where)), trace(type(pruner), *where)
    ratios = pruner.ratios(module, graph)
    scores = {name: module.get_submodule(name).weight.detach().flatten(1).sum(1) for name in ratios}
    apply_cuts(module, allocate(graph, scores, ratios, width=pruner.width).cuts(graph))
    cost = profile(module, (1, *where[2]))
    # The papers count batch norms 0, 2 or 4 times; some print no more than two digits.
    counted = [cost.paper_macs(bn_ops=0, conv_bias=False), cost.paper_macs(), cost.paper_macs(bn_ops=4)]
    assert min(abs(macs / row.result["macs"] - 1) for macs in counted) < 0.006
    assert abs(cost.params - row.result["params"]) <= 12_000  # some are rounded down


@pytest.mark.parametrize("row", rows(sequential=True), ids=lambda row: row.config.removeprefix("recipes/"))
def test_sequential_recipe_has_the_papers_length_and_count(row: Row):
    pruner, where = pruner_and_network(row)
    module, graph = dense(*where), trace(type(pruner), *where)
    ratios = pruner.ratios(module, graph)
    stages = parse(row.config).trainer.callbacks[0].init_args.stage_layers or stage_order(module, ratios)
    assert parse(row.config).trainer.max_epochs == 30 * len(stages)
    by_layer = {name.removeprefix("network."): ratio for name, ratio in ratios.items()}
    if row.network == "VGG-16":  # printed with fractional widths, and the last layer narrowed, which it never is
        by_layer["features.conv13"] = 0.8
    cost = profile(module.network, (1, *where[2]))
    macs, params = out_only(module.network, cost, by_layer, fractional=row.network == "VGG-16")
    assert macs == pytest.approx(row.result["macs"], rel=0.001)
    assert params == pytest.approx(row.result["params"], abs=15_000)
