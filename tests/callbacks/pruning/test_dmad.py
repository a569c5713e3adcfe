"""DMAD: its masks against numbers by hand, its folds and its cut against the generator that they must not change."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import assert_same, no_pictures
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.autograd import gradcheck
from translation import Identity, noise, small_cycle_gan, small_pix2pix, trainer

import lightning_compress
from lightning_compress.callbacks import DMAD
from lightning_compress.callbacks.pruning.dmad.layout import Layout, layout_of
from lightning_compress.callbacks.pruning.dmad.masks import (
    BandMask,
    band_at,
    band_mask,
    bound_loss,
    group_loss,
    group_weights,
    relu_loss,
    uprelu_loss,
)
from lightning_compress.callbacks.pruning.dmad.removal import (
    alive,
    attach_masks,
    detach_masks,
    freeze,
    masks_of,
    narrow_band,
    plan_removal,
    remove_blocks,
    settle,
    silence,
    survivors,
    union,
)
from lightning_compress.catalog import cards
from lightning_compress.core.profile import profile
from lightning_compress.core.surgery import apply_cuts
from lightning_compress.networks import PatchDiscriminator, ResNetGenerator, UNetGenerator

W = torch.tensor([-1.5, -1, -0.5, -0.25, 0, 0.25, 0.5, 1, 1.5])
ONE = torch.tensor(1.0)


@pytest.fixture(autouse=True)
def _no_pictures() -> Iterator[None]:
    with no_pictures:
        yield


# ---- the masks


@pytest.mark.parametrize("band", [1.0, 0.3])
def test_mask_and_its_slope(band: float) -> None:
    w = (W * band).requires_grad_()
    m = band_mask(w, torch.tensor(band))
    torch.testing.assert_close(m, torch.tensor([0, 0, 0.125, 0.28125, 0.5, 0.71875, 0.875, 1, 1]))
    (slope,) = torch.autograd.grad(m.sum(), w)
    torch.testing.assert_close(slope, torch.tensor([0, 0, 0.5, 0.75, 1, 0.75, 0.5, 0, 0]) / band)


def test_a_closed_band_is_a_step_without_slope() -> None:
    w = torch.tensor([-1e-6, 0.0, 1e-6], requires_grad=True)
    m = band_mask(w, torch.tensor(0.0))
    assert m.tolist() == [0, 0, 1]
    (slope,) = torch.autograd.grad(m.sum(), w)
    assert slope.tolist() == [0, 0, 0]


def test_gradients_of_a_masked_feature() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.tensor([-0.55, -0.31, -0.07, 0.11, 0.29, 0.56, 0.8], dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 7, 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    band = torch.tensor(0.6, dtype=torch.float64)
    assert gradcheck(lambda x, w: x * band_mask(w, band).view(-1, 1, 1), (x, w))
    mask = BandMask(w.detach()).double()
    mask.band.fill_(0.6)
    out = mask(x)
    g = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    out.backward(g)
    slope = ((0.6 - w.abs()) / 0.36).clamp(min=0)
    torch.testing.assert_close(mask.weight.grad, (g * x).sum((0, 2, 3)) * slope)
    torch.testing.assert_close(x.grad, g * mask.values().view(-1, 1, 1))


@pytest.mark.parametrize(
    ("seen", "band"),
    [(0, 1), (1, 0.889936), (10, 0.762874), (100, 0.489127), (300, 0.263194), (500, 0.12642), (700, 0.022735),
     (750, 0), (751, 0), (1000, 0)],
)  # fmt: skip
def test_schedule_of_the_band(seen: int, band: float) -> None:
    assert band_at(seen, 1000) == pytest.approx(band, abs=1e-6)
    if seen >= 750:
        assert band_at(seen, 1000) == 0


def test_double_rule_is_the_square_root() -> None:
    assert band_at(250, 2000, 0.5, "double") == pytest.approx(0.5)


def test_sparsity_losses() -> None:
    assert relu_loss(W, ONE) == pytest.approx(5.0)
    assert bound_loss(W, ONE) == pytest.approx(1.620185, abs=1e-6)
    assert uprelu_loss(W, ONE) == pytest.approx(5.0)
    assert uprelu_loss(W[5:], ONE) == pytest.approx(1.25)
    rho = torch.tensor([1.0, 0.0, 2.0])  # of the columns
    assert group_loss(W.view(3, 3), ONE, rho) == pytest.approx((0.75 + 1.5) + 2 * (0.5 + 1.25))


@pytest.mark.parametrize("loss", [relu_loss, bound_loss, uprelu_loss])
def test_nothing_is_pushed_outside_the_band(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    for w, band in ((torch.tensor([-1.0, 1.0, 2.0]), 1.0), (torch.tensor([-1.0, 0.0, 1.0]), 0.0)):
        w.requires_grad_()
        value = loss(w, torch.tensor(band))
        (slope,) = torch.autograd.grad(value, w)
        assert value == 0
        assert slope.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("dead", "passed", "rho"), [(0, 0, 1), (5, 0, 2), (9, 0, 10), (10, 0, 0), (3, 1, 0)], ids=str)
def test_weight_of_a_group(dead: int, passed: int, rho: float) -> None:
    w = torch.cat([torch.full((dead,), -0.9), torch.full((passed,), 0.9), torch.zeros(10 - dead - passed)])
    assert group_weights(w[:, None], torch.tensor(0.5), 1.0).tolist() == [rho]
    assert group_weights(w[:, None], torch.tensor(0.5), 5.0).tolist() == [5 * rho]


# ---- what masks do to a generator


def masked(generator: nn.Module, seed: int = 0) -> tuple[nn.Module, Layout]:
    layout = layout_of(generator, "ab")
    attach_masks(generator, [(site.at, layout.channels[site.conv.writes]) for site in layout.sites], seed)
    return generator.eval(), layout


def resnet(**arguments: Any) -> ResNetGenerator:
    torch.manual_seed(0)
    return ResNetGenerator(**{"ngf": 6, "blocks": 3, **arguments})


def unet(**arguments: Any) -> UNetGenerator:
    torch.manual_seed(0)
    return UNetGenerator(**{"ngf": 4, "downs": 5, **arguments})


def lively(generator: nn.Module) -> nn.Module:
    """With biases and statistics of norms that are no zeros and ones."""
    rng = torch.Generator().manual_seed(1)
    for layer in generator.modules():
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(layer, name, None)
            if isinstance(tensor, Tensor) and not isinstance(layer, BandMask):
                drawn = torch.randn(tensor.shape, generator=rng)
                tensor.data = 0.2 * drawn if tensor.ndim > 1 else 1 + 0.3 * drawn.clamp(-2, 2)
    return generator


GENERATORS = {
    "resnet": lambda: resnet(),
    "resnet, dropout": lambda: resnet(dropout=0.5),
    "resnet, batch norm": lambda: resnet(norm="batch"),
    "separable": lambda: resnet(separable=True),
    "unet": lambda: unet(),
    "unet, instance norm": lambda: unet(norm="instance", downs=4, dropout=0.0),
    "unet, grey": lambda: unet(in_channels=1, out_channels=2),
}
each = pytest.mark.parametrize("kind", GENERATORS)


def image(generator: nn.Module) -> Tensor:
    channels = next(layer for layer in generator.modules() if isinstance(layer, nn.Conv2d)).in_channels
    return torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("blocks", "count"), [(9, 23), (3, 11)])
def test_masks_of_a_residual_generator(blocks: int, count: int) -> None:
    layout = layout_of(ResNetGenerator(ngf=2, blocks=blocks), "ab")
    assert len(layout.sites) == count
    assert [site.kind for site in layout.sites] == [
        "sampling", "sampling", "stream", *["inner", "stream"] * blocks, "sampling", "sampling"
    ]  # fmt: skip
    assert not any(site.conv.writes == "" for site in layout.sites), "the last convolution makes the image"


def test_masks_of_a_unet() -> None:
    with torch.device("meta"):
        layout = layout_of(UNetGenerator(), "ab")
    assert [site.conv.writes for site in layout.sites] == list(layout.channels)
    assert len(layout.sites) == 15
    assert {site.kind for site in layout.sites} == {"inner"}


@each
def test_open_masks_multiply_what_each_layer_makes(kind: str) -> None:
    """Before the activation, behind the norm: with all masks a half, as with scaled norms and layers."""
    generator, layout = masked(lively(GENERATORS[kind]()))
    seen: dict[str, Tensor] = {}
    for site in layout.sites:
        last = generator.get_submodule(site.conv.norm or site.conv.name)
        last.register_forward_hook(lambda m, a, out, key=site.at: seen.__setitem__(key, out))
        mask = generator.get_submodule(f"{site.at}.mask")
        mask.register_forward_hook(lambda m, args, out, key=site.at: seen.__setitem__(f"{key} mask", (args[0], out)))
    generator(image(generator))
    for site, mask in zip(layout.sites, masks_of(generator, layout), strict=True):
        given, out = seen[f"{site.at} mask"]
        torch.testing.assert_close(given, seen[site.at], rtol=0, atol=0, msg=site.at)
        torch.testing.assert_close(out, given * band_mask(mask.weight, ONE).view(-1, 1, 1))


def shrunk(generator: nn.Module, layout: Layout) -> nn.Module:
    """What remains of a generator whose masks have settled."""
    holder = nn.ModuleDict({"g": copy.deepcopy(generator)})
    places = [(f"g.{site.at}", 0) for site in layout.sites]
    lives = alive(layout, [mask.weight for mask in masks_of(generator, layout)], 0.0)
    removal = plan_removal(generator, layout, lives, "g")
    silence(holder, removal.zeros)
    detach_masks(holder, places)
    remove_blocks(holder, removal.blocks)
    apply_cuts(holder, removal.cuts)
    return holder["g"]


@each
def test_the_cut_generator_equals_the_masked_one(kind: str) -> None:
    """... with a block that is dead, and channels of the stream that only some blocks write."""
    generator, layout = masked(lively(GENERATORS[kind]()), seed=3)
    masks = masks_of(generator, layout)
    with torch.no_grad():
        for site, mask in zip(layout.sites, masks, strict=True):
            mask.band.zero_()
            if site.conv.writes == "block 2":
                mask.weight.fill_(-1)
            if site.conv.writes == "quarter":
                mask.weight[:2] = -1
    settle(generator, layout, 0.0, "exact")
    generator = generator.double()
    small = shrunk(generator, layout)
    x = image(generator).double()
    with torch.no_grad():
        torch.testing.assert_close(small(x), generator(x), atol=1e-9, rtol=0)
    counts = survivors(layout, alive(layout, [mask.weight for mask in masks], 0.0))
    assert small.widths == tuple(counts.values())
    assert sum(small.widths) < sum(layout.channels.values())
    if kind == "resnet, batch norm":  # a dead block adds what its norm makes of zeros
        assert small.widths[4] == 1
    elif isinstance(small, ResNetGenerator):
        assert small.widths[4] == 0
        assert isinstance(small.model[11], nn.Identity)
        assert small.widths[2] <= 22
    # the closed form that decides when it is small enough
    expected = profile(small, x[:1], convention="gan").cost
    assert layout.macs(counts, 32 * 32) == expected
    # built anew from its widths, and described once more
    arguments = {"norm": "batch"} if "batch" in kind else {"separable": True} if kind == "separable" else {}
    if kind in ("resnet", "resnet, batch norm", "separable"):
        fresh = ResNetGenerator(blocks=3, widths=small.widths, **arguments).double()
        fresh.load_state_dict(small.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(fresh.eval()(x), small(x))
    assert layout_of(small, "ab").macs(dict(zip(layout.channels, small.widths, strict=True)), 32 * 32) == expected


def set_masks(generator: nn.Module, layout: Layout, values: Sequence[float], stream: float, band: float) -> None:
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for site, mask in zip(layout.sites, masks_of(generator, layout), strict=True):
            at = torch.randint(len(values), mask.weight.shape, generator=rng)
            drawn = torch.tensor(values)[at]
            drawn[0] = values[0]
            mask.weight.copy_(torch.full_like(drawn, stream) if site.kind == "stream" else drawn)
            mask.band.fill_(band)


@pytest.mark.parametrize("kind", [kind for kind in GENERATORS if kind != "separable"])
@pytest.mark.parametrize("stop", [False, True], ids=["update", "early stop"])
def test_an_exact_fold_changes_nothing(kind: str, stop: bool) -> None:
    """What leaves the band upwards takes its factor along, as it does when the masks settle early."""
    generator, layout = masked(lively(GENERATORS[kind]()))
    inside = [-0.3, -0.1, 0.05, 0.25, 0.39] if stop else [0.39, 0.35, 0.31]
    set_masks(generator, layout, [*inside, -0.9, 0.9], 2.0, 0.4)
    generator = generator.double()
    x = image(generator).double()
    with torch.no_grad():
        before = generator(x)
        settle(generator, layout, -0.4, "exact") if stop else narrow_band(generator, layout, 0.3, "exact")
        after = generator(x)
    assert all(bool(((m.values() == 0) | (m.values() == 1)).all()) for m in masks_of(generator, layout))
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


def test_the_official_fold_jumps_where_an_instance_norm_takes_the_factor_away() -> None:
    generator, layout = masked(lively(resnet()))
    set_masks(generator, layout, [0.39, 0.31, 0.9], 2.0, 0.4)
    x = image(generator)
    unmasked = copy.deepcopy(generator)
    settle(unmasked, layout, -9.0, "official")  # all masks 1, and the convolutions scaled
    plain = lively(resnet()).eval()
    with torch.no_grad():
        torch.testing.assert_close(unmasked(x), plain(x), atol=1e-4, rtol=0)
        before = generator(x)
        narrow_band(generator, layout, 0.3, "official")
        assert (generator(x) - before).abs().max() > 1e-4


def test_the_official_fold_is_exact_before_a_batch_norm_with_weights() -> None:
    generator, layout = masked(lively(unet()))
    set_masks(generator, layout, [0.39, 0.31, 0.9], 2.0, 0.4)
    x = image(generator)
    with torch.no_grad():
        before = generator(x)
        narrow_band(generator, layout, 0.3, "official")
        torch.testing.assert_close(generator(x), before, atol=1e-5, rtol=0)


def test_a_layer_of_a_unet_freezes_alone() -> None:
    generator, layout = masked(unet())
    set_masks(generator, layout, [0.1], 0.0, 0.4)
    masks = masks_of(generator, layout)
    with torch.no_grad():
        masks[1].weight[:] = -0.9  # 7 of 8 are dead, the last is not
        masks[1].weight[3] = -0.2
        masks[2].weight[:] = -0.9  # all are: the largest lives on
        masks[2].weight[5] = -0.8
    freeze(generator, layout, 0.85, "exact")
    assert masks[1].weight.tolist() == [1.0 if i == 3 else -1.0 for i in range(8)]
    assert masks[2].weight.tolist() == [1.0 if i == 5 else -1.0 for i in range(16)]
    assert all(bool((mask.weight == 0.1).all()) for i, mask in enumerate(masks) if i not in (1, 2))
    assert float(masks[1].band) == pytest.approx(0.4)
    assert masks[1].values().tolist() == [float(i == 3) for i in range(8)]


def test_survivors_are_a_union_and_at_least_one() -> None:
    layout = layout_of(resnet(blocks=2), "ab")
    w = [torch.full((layout.channels[site.conv.writes],), -1.0) for site in layout.sites]
    w[4][3] = 1.0  # the first block alone keeps one channel of the stream
    w[0][2] = -0.5
    lives = alive(layout, w, 0.0)
    assert survivors(layout, lives) == {
        "first": 1, "half": 1, "quarter": 1, "block 1": 0, "block 2": 0, "back to half": 1, "back to full": 1
    }  # fmt: skip
    assert union(layout, lives)["first"].nonzero().tolist() == [[2]]
    assert union(layout, lives)["quarter"].nonzero().tolist() == [[3]]


# ---- numbers of the paper


def test_macs_and_parameters_of_a_list_of_widths() -> None:
    widths = [16, 24, 48, *[24] * 9, 32, 16]
    with torch.device("meta"):
        small, dense = ResNetGenerator(widths=widths), ResNetGenerator()
    layout = layout_of(dense, "ab")
    assert layout.macs(dict(zip(layout.channels, widths, strict=True)), 256**2) / 1e9 == pytest.approx(
        1.700266, abs=5e-7
    )
    assert layout.macs(layout.channels, 256**2) / 1e9 == pytest.approx(56.799265, abs=5e-7)
    assert sum(p.numel() for p in small.parameters()) == 224_371
    assert sum(p.numel() for p in dense.parameters()) == 11_378_179


PUBLISHED = [
    (row, f"{row.network}, {row.data}, {row.setting}")
    for card in cards()
    if card.slug == "dmad"
    for row in card.published
]


@pytest.mark.parametrize("row", [row for row, _ in PUBLISHED], ids=[name for _, name in PUBLISHED])
def test_published_share_of_the_macs(row: Any) -> None:
    """arXiv:2011.08382, tables of results: the ratios that it prints are those to our dense generators."""
    with torch.device("meta"):
        dense = UNetGenerator() if row.network.startswith("Pix2Pix") else ResNetGenerator()
    layout = layout_of(dense, "ab")
    ratio = float(row.setting.rpartition(" ")[2].removesuffix("x"))
    # the paper's profiler counts 18.60 G for the U-Net, 2.5 % more than its convolutions have
    tolerance = 0.03 if isinstance(dense, UNetGenerator) else 0.003
    assert layout.macs(layout.channels, 256**2) / row.result["macs"] == pytest.approx(ratio, rel=tolerance)


# ---- in a fit


def learning(**arguments: Any) -> DMAD:
    return DMAD(**{"target_macs": 0.3, "upconv_coeff": 1.0, "mask_weight_decay": 0.1, **arguments})


def test_masks_settle_and_the_generator_shrinks(tmp_path: Path) -> None:
    module, callback = small_pix2pix(generator=resnet(ngf=6, blocks=2)), learning(target_macs=0.1)
    macs: list[float] = []

    class Watching(ModelCheckpoint):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if callback._layouts:
                macs.append(trainer.progress_bar_metrics["dmad/macs"])

    with pytest.warns(UserWarning, match="more than the target"):
        trainer(callback, Watching(tmp_path), root=tmp_path, max_epochs=4).fit(module, noise(8))
    # 16 batches, the band is closed after 12, the cut at the start of the next epoch
    assert macs == sorted(macs, reverse=True)
    assert len(macs) == 12
    widths = json.loads((tmp_path / "widths.json").read_text())["ab"]
    assert module.generator.widths == tuple(widths)
    assert 0.05 < profile(module.generator, (1, 3, 16, 16), convention="gan").cost / 1e9 / macs[0] < 0.6
    assert not any(isinstance(layer, BandMask) for layer in module.modules())
    assert not module.generator_loss_terms
    assert "settled after 12 batches, when the band was closed" in callback._notes[0]


def test_a_met_target_settles_the_masks_early_and_each_generator_by_itself(tmp_path: Path) -> None:
    module, callback = small_cycle_gan(), learning(target_macs={"ab": 0.9, "ba": 0.22})
    bands: list[tuple[float, float]] = []

    class Watching(ModelCheckpoint):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            bands.append((callback._bands["ab"], callback._bands["ba"]))

    with pytest.warns(UserWarning, match="direction ba keeps"):
        trainer(callback, Watching(tmp_path), root=tmp_path, max_epochs=2).fit(module, noise(20))
    closed = [[band[i] == 0 for band in bands].index(True) for i in (0, 1)]
    assert closed[0] < closed[1] == 14  # 15 of 20 batches
    assert bands[0][1] == pytest.approx(band_at(1, 20))
    assert module.generator_ab.widths != module.generator_ba.widths
    assert "as the target was met" in callback._notes[0]


def test_masks_that_settle_in_the_last_epoch_are_cut_at_its_end(tmp_path: Path) -> None:
    module = small_pix2pix(generator=resnet(ngf=6, blocks=2))
    method = learning(target_macs=0.1, band_end=1.0, band_updates=3)  # 3 does not divide 8
    trainer(method, root=tmp_path, max_epochs=1).fit(module, noise(16))
    assert not any(isinstance(layer, BandMask) for layer in module.modules())
    assert sum(module.generator.widths) < 108


def test_without_time_to_settle_the_masks_stay(tmp_path: Path) -> None:
    module = small_pix2pix()
    with pytest.warns(UserWarning, match="ended before the masks settled"):
        trainer(learning(target_macs=0.3), root=tmp_path, max_epochs=1, max_steps=4).fit(module, noise(16))
    assert sum(isinstance(layer, BandMask) for layer in module.modules()) == 7


def test_a_separable_generator_of_pix2pix_is_pushed_down_in_its_second_layer() -> None:
    band, values = 0.5, {}
    for separable in (False, True):
        module = small_pix2pix(generator=resnet(ngf=2, blocks=1, separable=separable))
        callback, layout = learning(upconv_coeff=7.0), layout_of(module.generator, "ab")
        masked(module.generator)
        callback._layouts = {"ab": layout}
        set_masks(module.generator, layout, [0.1, -0.2], 0.3, band)
        masks = {
            site.conv.name: mask.weight
            for site, mask in zip(layout.sites, masks_of(module.generator, layout), strict=True)
        }
        down = masks.pop("model.4")
        values[separable] = callback._sparsity(module, module.directions[0]), down
    for separable, (value, down) in values.items():
        own = relu_loss(down, torch.tensor(band)) if separable else 7 * bound_loss(down, torch.tensor(band))
        rest = value - own
        values[separable] = rest, down
    torch.testing.assert_close(values[True][0], values[False][0])


def test_the_stream_is_pushed_by_its_group(tmp_path: Path) -> None:
    module = small_pix2pix(generator=resnet(ngf=2, blocks=2))
    callback, layout = learning(upconv_coeff=0.0, lambda_update_coeff=2.0), layout_of(module.generator, "ab")
    masked(module.generator)
    callback._layouts = {"ab": layout}
    set_masks(module.generator, layout, [2.0], 0.1, 0.5)
    assert callback._sparsity(module, module.directions[0]).item() == pytest.approx(3 * 8 * 0.6)
    callback._rho["ab"] = torch.tensor([2.0, *[0.0] * 7])
    assert callback._sparsity(module, module.directions[0]).item() == pytest.approx(2 * 3 * 0.6)


def test_stopped_while_the_masks_train_and_after_the_cut(tmp_path: Path) -> None:
    def run(**arguments: Any) -> Any:
        module = small_cycle_gan(generator_ab=resnet(ngf=3, blocks=1))
        checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        fit = trainer(learning(), checkpoints, root=tmp_path, max_epochs=5)
        fit.fit(module, noise(8), weights_only=True, **arguments)
        return module

    whole = run()
    for epoch in (1, 3, 4):
        (tmp_path / f"epoch={epoch}.ckpt").rename(tmp_path / f"stopped{epoch}.ckpt")
    for epoch in (1, 3):
        assert_same(run(ckpt_path=tmp_path / f"stopped{epoch}.ckpt"), whole)
    loaded = lightning_compress.load(
        type(whole), tmp_path / "stopped4.ckpt", generator_ab=resnet(ngf=3, blocks=1),
        discriminator_ab=PatchDiscriminator(3, 3, layers=1), generator_ba=resnet(ngf=3, blocks=1),
        discriminator_ba=PatchDiscriminator(3, 3, layers=1),
    )  # fmt: skip
    assert_same(loaded, whole)


@pytest.mark.parametrize(
    ("arguments", "given", "message"),
    [
        ({"target_macs": {"xy": 0.3}}, {}, "target_macs: expected one for each direction"),
        ({"target_macs": 9e9}, {}, "target_macs=9000000000.0"),
        ({"target_macs": 2.0}, {}, "with one channel in each layer"),
        ({}, {"max_epochs": -1}, "max_epochs"),
    ],
)
def test_what_cannot_work_is_refused(arguments: Any, given: Any, message: str, tmp_path: Path) -> None:
    module = small_pix2pix()
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        trainer(learning(**arguments), root=tmp_path, **given).fit(module, noise(4))
    assert not module.generator_loss_terms


def test_other_generators_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="is a Identity"):
        trainer(learning(), root=tmp_path).fit(small_pix2pix(generator=Identity()), noise(4))
