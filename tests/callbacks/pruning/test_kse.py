"""KSE: the indicator, the kernels that it grants, k-means, and the callback."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from foreign import Block, Foreign, assert_same, digits, fit, made, make_trainer, no_pictures
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn.cluster import KMeans
from torch import Tensor, nn

import lightning_compress
from lightning_compress.callbacks import KSE, L1Norm
from lightning_compress.callbacks.pruning.kse import callback as kse_callback
from lightning_compress.callbacks.pruning.kse.clustering import kmeans, lloyd, seed_on_line, seed_plus_plus
from lightning_compress.callbacks.pruning.kse.indicator import (
    channel_levels,
    importance,
    kernel_budgets,
    kernel_entropy,
    kernel_sparsity,
    level_count,
    neighbour_distances,
)
from lightning_compress.core.report import Account
from lightning_compress.core.sparse.shared_kernels import SharedKernels, load_packed, originals, shared_convolutions
from lightning_compress.networks import densenet40, resnet20


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


# ---- the indicator


def test_density_of_seven_numbers():
    kernels = torch.tensor([0.0, 1, 3, 6, 10, 15, 21])
    expected = [35, 31, 27, 27, 35, 46, 70]
    assert neighbour_distances(kernels.view(1, 7, 1), 5).tolist() == [expected]
    in_plane = torch.stack([kernels, torch.zeros(7)], 1)[None]
    assert neighbour_distances(in_plane, 5).tolist() == [expected]
    assert kernel_entropy(kernels.view(7, 1, 1, 1)).item() == pytest.approx(2.72226903, abs=1e-8)


def test_neighbours_on_a_line_are_those_in_space():
    line = random_weight(4, 40, 1).round(decimals=1)  # with some that are equal
    general = neighbour_distances(torch.cat([line, torch.zeros_like(line)], 2), 5)
    torch.testing.assert_close(neighbour_distances(line, 5).sort(1).values, general.sort(1).values)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    weights = random_weight(12, 9, 3, 3), random_weight(12, 9, 1, 1)
    whole = [kernel_entropy(w) for w in weights]
    monkeypatch.setattr("lightning_compress.callbacks.pruning.kse.indicator.CHUNK", 200)
    assert all(torch.equal(kernel_entropy(w), e) for w, e in zip(weights, whole, strict=True))


def test_indicator_of_four_channels():
    v = importance(torch.tensor([4.0, 2, 1, 8]), torch.tensor([1.0, 2, 3, 0]))
    assert v.tolist() == pytest.approx([0.566947, 0.292770, 0, 1], abs=1e-6)
    levels = channel_levels(v, 4)
    assert levels.tolist() == [2, 1, 0, 3]
    assert [kernel_budgets(16, 4)[g] for g in levels] == [8, 4, 0, 16]
    assert [kernel_budgets(16, 4, shift=1)[g] for g in levels] == [4, 2, 0, 16]


def test_alpha_weighs_the_entropy():
    s, e = torch.tensor([4.0, 2, 1, 8]), torch.tensor([1.0, 2, 3, 0])
    assert importance(s, e, alpha=0).tolist() == pytest.approx([math.sqrt(x) for x in (3 / 7, 1 / 7, 0, 1)])


def test_level_of_an_indicator():
    v = torch.tensor([0, 0.19, 0.2, 0.4, 0.75, 0.8, 0.81, 1])
    assert channel_levels(v, 5).tolist() == [0, 0, 1, 2, 3, 4, 4, 4]
    assert channel_levels(v.double(), 5).tolist() == [0, 0, 1, 2, 3, 4, 4, 4]


@pytest.mark.parametrize(
    ("n", "levels", "shift", "expected"),
    [
        (64, 5, 0, [0, 8, 16, 32, 64]),
        (64, 5, 1, [0, 4, 8, 16, 64]),
        (24, 5, 0, [0, 3, 6, 12, 24]),
        (64, 4, 0, [0, 16, 32, 64]),
        (12, 5, 0, [0, 2, 3, 6, 12]),
        (16, 2, 0, [0, 16]),
        (16, 8, 2, [0, 1, 1, 1, 1, 1, 2, 16]),
    ],
)
def test_kernels_by_level(n: int, levels: int, shift: int, expected: list[int]):
    assert kernel_budgets(n, levels, shift) == expected


@pytest.mark.parametrize("levels", [3, 4, 5, 7])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_the_papers_formula(levels: int, shift: int):
    """q = 0, N, or ceil(N / 2^(G - ceil(vG) + T)), for every v that is no multiple of 1/G."""
    v = (torch.arange(1000).double() + 0.5) / 1000
    for n in (12, 16, 64):
        for value, level in zip(v.tolist(), channel_levels(v, levels).tolist(), strict=True):
            up, down = math.ceil(value * levels), math.floor(value * levels)
            paper = 0 if down == 0 else n if up == levels else math.ceil(n / 2 ** (levels - up + shift))
            assert kernel_budgets(n, levels, shift)[level] == paper


def test_levels_may_follow_the_channels():
    assert level_count(64, 32, 0) == 32
    assert level_count(64, 64, 0) == 64
    assert level_count(12, 168, 0) == 14
    assert level_count(64, 1, 0) == 2
    assert level_count(64, 32, 5) == 5
    assert min(kernel_budgets(512, 2048)[1:]) == 1  # however many


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(8, 4, 3, 3),
        torch.ones(8, 4, 3, 3),
        random_weight(8, 1, 3, 3),
        random_weight(8, 1, 3, 3).expand(8, 5, 3, 3),
        random_weight(1, 5, 1, 1).expand(8, 5, 1, 1),
        random_weight(8, 6, 3, 3) * torch.tensor([1.0, 1, 1, 0, 1, 1]).view(6, 1, 1),
        random_weight(8, 6, 1, 1).round(),
    ],
    ids=["zeros", "ones", "one channel", "equal channels", "equal kernels", "dead channel", "duplicates"],
)
@pytest.mark.parametrize("axis", ["paper", "official"])
def test_nothing_is_divided_by_zero(weight: Tensor, axis: str):
    entropy = kernel_entropy(weight, axis=axis)
    v = importance(kernel_sparsity(weight), entropy)
    assert entropy.isfinite().all()
    assert (entropy >= 0).all()
    assert (entropy <= math.log2(8) + 1e-9).all()
    assert v.isfinite().all()
    assert v.max() == 1  # something stays


def test_channels_that_cannot_be_told_apart_are_full():
    for weight in (torch.ones(8, 4, 3, 3), random_weight(8, 1, 3, 3), random_weight(8, 1, 1, 1).expand(8, 5, 1, 1)):
        v = importance(kernel_sparsity(weight), kernel_entropy(weight))
        assert channel_levels(v, 4).tolist() == [3] * weight.shape[1]


def test_too_few_kernels_for_the_neighbours():
    with pytest.raises(ValueError, match=r"k=5: each of 5 points has only 4 neighbours"):
        kernel_entropy(random_weight(5, 8, 3, 3))


# ---- the axis


def test_the_order_of_the_filters_does_not_matter():
    weight = random_weight(16, 12, 3, 3)
    other = weight[torch.randperm(16, generator=generator(1))]
    assert torch.allclose(kernel_entropy(weight), kernel_entropy(other))
    assert torch.allclose(kernel_sparsity(weight), kernel_sparsity(other))
    assert not torch.allclose(kernel_entropy(weight, axis="official"), kernel_entropy(other, axis="official"))


def test_the_official_axis_is_the_other_one_in_square_layers():
    weight = random_weight(16, 16, 3, 3)
    assert torch.allclose(kernel_entropy(weight, axis="official"), kernel_entropy(weight.transpose(0, 1)))


def test_the_official_axis_mixes_both_in_others():
    """The authors' steps, one at a time: transpose to (C, N, D), reshape to (N, C, D), take [:, c]."""
    weight = random_weight(8, 6, 2, 1)
    chopped = weight.flatten(2).transpose(0, 1).reshape(8, 6, 2)
    expected = [kernel_entropy(chopped[:, c, None, :, None]).item() for c in range(6)]
    assert kernel_entropy(weight, axis="official").tolist() == pytest.approx(expected)


# ---- k-means


def inertia(points: Tensor, labels: Tensor) -> Tensor:
    """Sum of squared distances to the clusters' means, by set."""
    member = nn.functional.one_hot(labels).double().mT  # (B, q, N)
    centers = member @ points.double() / member.sum(2, keepdim=True).clamp(min=1)
    return (points.double() - member.mT @ centers).square().sum((1, 2))


@pytest.mark.parametrize(("n", "q", "d"), [(64, 16, 9), (64, 32, 9), (256, 64, 1), (24, 6, 9)])
def test_as_good_as_scikit_learn(n: int, q: int, d: int):
    points = random_weight(12, n, d)
    ours = inertia(points, kmeans(points, q, generator=generator()))
    theirs = [KMeans(q, n_init=10, random_state=0).fit(x).labels_ for x in points.numpy()]
    reference = inertia(points, torch.stack([torch.from_numpy(x).long() for x in theirs]))
    assert ours.sum() / reference.sum() < 1.02


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_restarts_help(init: str):
    points = random_weight(8, 60, 9)
    once = inertia(points, kmeans(points, 12, init=init, restarts=1, generator=generator()))
    often = inertia(points, kmeans(points, 12, init=init, restarts=20, generator=generator()))
    assert often.sum() < 0.99 * once.sum()


@pytest.mark.parametrize("d", [1, 9])
@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_no_more_different_kernels_than_clusters_are_split_exactly(d: int, init: str):
    different = random_weight(6, 5, d)
    points = different.gather(1, torch.randint(5, (6, 40, 1), generator=generator(1)).expand(6, 40, d))
    labels = kmeans(points, 8, init=init, restarts=20, generator=generator())
    assert inertia(points, labels).max() < 1e-9


@pytest.mark.parametrize("d", [1, 9])
def test_seeds_are_different_points_while_there_are_such(d: int):
    points = random_weight(6, 12, d).sort(1).values.repeat_interleave(3, 1)
    seeds = (seed_on_line if d == 1 else seed_plus_plus)(points, 12, generator())
    assert all(len(s.unique(dim=0)) == 12 for s in seeds)
    again = (seed_on_line if d == 1 else seed_plus_plus)(points, 20, generator())
    assert again.isfinite().all()  # more than there are: some come twice


def test_on_a_line_and_in_space_alike():
    """The same numbers with a second coordinate of zero: found on two ways, equally good."""
    line = random_weight(10, 50, 1)
    one = inertia(line, kmeans(line, 10, generator=generator()))
    plane = inertia(line, kmeans(torch.cat([line, torch.zeros_like(line)], 2), 10, generator=generator()))
    assert one.sum().item() == pytest.approx(plane.sum().item(), rel=0.02)


def test_a_centre_without_points_moves_to_the_farthest():
    points = torch.tensor([0.0, 0.1, 0.2, 5.0, 9.0]).view(1, 5, 1)
    far = torch.full((1, 3, 1), 100.0)
    far[0, 0] = 0.1
    labels, left = lloyd(points, far, 50, 1e-4)
    assert labels[0].tolist() == [0, 0, 0, 1, 2]
    assert left.item() == pytest.approx(0.02)
    planes = torch.cat([points, torch.zeros_like(points)], 2)
    labels, left = lloyd(planes, torch.cat([far, torch.zeros_like(far)], 2), 50, 1e-4)
    assert labels[0, :3].unique().numel() == 1
    assert labels[0].unique().numel() == 3
    assert left.item() == pytest.approx(0.02, rel=1e-4)


def test_clustering_is_deterministic():
    points = random_weight(5, 30, 9)
    assert torch.equal(kmeans(points, 6, generator=generator(1)), kmeans(points, 6, generator=generator(1)))


@pytest.mark.parametrize("d", [1, 4])
def test_one_cluster_and_as_many_as_points(d: int):
    points = random_weight(3, 7, d)
    assert not kmeans(points, 1, generator=generator()).any()
    assert all(len(labels.unique()) == 7 for labels in kmeans(points, 7, generator=generator()))


# ---- the callback


def shared(module: nn.Module) -> dict[str, SharedKernels]:
    return {name: form for name, _, form in shared_convolutions(module)}


def forward(module: nn.Module) -> Tensor:
    x = next(iter(digits()))[0]
    with torch.no_grad():
        return module.eval()(x)


def compressed(root: Path, callback: KSE, module: Foreign | None = None) -> Foreign:
    """A module as `setup` leaves it."""
    module = made() if module is None else module
    trainer = make_trainer(root, callback, max_epochs=0)
    with no_pictures:
        trainer.fit(module, digits(), digits(32, 64))
    return module


def test_every_layer_is_compressed_as_the_functions_say(tmp_path):
    module, dense = compressed(tmp_path, KSE(G=4)), made()
    forms = shared(module)
    assert list(forms) == [f"net.blocks.{b}.conv{c}" for b in (0, 1) for c in (1, 2)]
    for name, form in forms.items():
        weight = dense.get_parameter(f"{name}.weight").detach()
        v = importance(kernel_sparsity(weight), kernel_entropy(weight))
        assert form.levels == channel_levels(v, 4).tolist()
        assert form.budgets == kernel_budgets(len(weight), 4)
        assert len(form.levels) == weight.shape[1]
        assert form.levels[int(v.argmin())] == 0
        assert form.levels[int(v.argmax())] == 3
        now = module.get_submodule(name).weight.detach()
        full = [c for c, level in enumerate(form.levels) if level == 3]
        assert torch.equal(now[:, full], weight[:, full])
        for q, channels, _ in form.shared:
            assert all(len(now[:, c].flatten(1).unique(dim=0)) == q for c in channels)
            error = (now - weight)[:, channels].square().sum((0, 2, 3))
            kernels = weight[:, channels].flatten(2).transpose(0, 1)
            assert torch.allclose(error.double(), inertia(kernels, kmeans(kernels, q, restarts=50)), rtol=0.15)


def test_only_what_is_stored_is_trained(tmp_path):
    module = made()
    trainer = fit(module, tmp_path, KSE(G=4), max_epochs=1)
    forms, plain = shared(module), made()
    saved = sum(9 * (f.outputs * len(f.levels) - f.kernels) for f in forms.values())
    count = sum(p.numel() for p in module.parameters())
    assert count == sum(p.numel() for p in plain.parameters()) - saved
    assert count == sum(p.numel() for g in trainer.optimizers[0].param_groups for p in g["params"])
    for name, form in forms.items():
        conv = module.get_submodule(name)
        before = plain.get_parameter(f"{name}.weight")
        assert not torch.equal(conv.weight, before)  # it has been trained
        assert not conv.weight[:, [level == 0 for level in form.levels]].any()
        for q, channels, _ in form.shared:  # and still shares
            assert all(len(conv.weight[:, c].flatten(1).unique(dim=0)) == q for c in channels)
        assert len(originals(conv)) == 1 + len(form.shared)


def test_a_layer_with_few_different_kernels_loses_nothing(tmp_path):
    module = made()
    with torch.no_grad():
        for name in ("net.blocks.0.conv1", "net.blocks.1.conv2"):
            weight = module.get_parameter(f"{name}.weight")
            weight.copy_(weight[torch.arange(len(weight)) % 2])  # two kernels per channel
            weight[:, 0] = 0
    expected = forward(module)
    compressed(tmp_path, KSE(G=4, T=0, include=["net.blocks.0.conv1", "net.blocks.1.conv2"]), module)
    assert all(0 not in form.levels[1:] for form in shared(module).values())
    torch.testing.assert_close(forward(module), expected, atol=1e-6, rtol=0)


def test_two_levels_keep_or_drop(tmp_path):
    module, dense = compressed(tmp_path, KSE(G=2)), made()
    for name, form in shared(module).items():
        assert set(form.levels) == {0, 1}
        assert not form.shared
        weight = dense.get_parameter(f"{name}.weight") * torch.tensor(form.levels).view(-1, 1, 1)
        assert torch.equal(module.get_submodule(name).weight, weight)


def test_more_levels_and_shifts_keep_fewer_kernels(tmp_path):
    def kept(**arguments) -> int:
        return sum(f.kernels for f in shared(compressed(tmp_path, KSE(**arguments))).values())

    sizes = [kept(G=3), kept(G=4), kept(G=6), kept(G=8)]
    assert sizes == sorted(sizes, reverse=True)
    assert kept(G=5, T=2) < kept(G=5, T=1) < kept(G=5)
    forms = shared(compressed(tmp_path, KSE(G=0)))
    assert [len(f.budgets) for f in forms.values()] == [8, 2, 8, 2]  # C where N >= C, else ceil(C / N)


def test_a_layer_does_not_depend_on_the_others(tmp_path):
    every = compressed(tmp_path, KSE(G=4))
    alone = compressed(tmp_path, KSE(G=4, include=["*1.conv2"]))
    assert torch.equal(every.net.blocks[1].conv2.weight, alone.net.blocks[1].conv2.weight)


def test_the_axis_and_the_seed_matter(tmp_path):
    official = compressed(tmp_path, KSE(G=4, entropy_axis="official"))
    paper = compressed(tmp_path, KSE(G=4))
    assert any(a.levels != b.levels for a, b in zip(shared(official).values(), shared(paper).values(), strict=True))
    seeds = [compressed(tmp_path, KSE(G=4, seed=s, kmeans_restarts=1)).net.blocks[0].conv1.weight for s in (0, 0, 1)]
    assert torch.equal(seeds[0], seeds[1])
    assert not torch.equal(seeds[0], seeds[2])


def test_the_account_counts_what_is_stored(tmp_path):
    module = made()
    fit(module, tmp_path, KSE(G=4), max_epochs=1)
    account, forms = Account.load(tmp_path), shared(module)
    rows = {row.name: row for row in account.after.rows}
    for name, form in forms.items():
        assert rows[name].macs == 64 * 9 * form.kernels  # images of 8x8
        assert rows[name].params == 9 * form.kernels
        assert rows[name].bytes == 36 * form.kernels + math.ceil(form.index_bits / 8)
    assert account.after.params == sum(p.numel() for p in module.parameters())
    assert account.left_alone == [("net.stem", "is the first convolution")]
    assert account.notes[0].startswith("KSE: 4 convolutions keep")
    size = (tmp_path / "kse.pt").stat().st_size
    assert account.notes[1] == f"KSE: kse.pt holds the network with packed indices, {size / 1000:.1f} kB."
    fresh = made()
    load_packed(fresh, tmp_path / "kse.pt")
    assert_same(fresh, module)
    assert torch.equal(forward(fresh), forward(module))


def test_the_picture_has_a_row_per_layer(tmp_path):
    module = compressed(tmp_path, KSE(G=4))
    figure = kse_callback.level_map(shared(module))
    axes = figure.axes[0]
    assert axes.images[0].get_array().shape == (4, 4)
    assert torch.as_tensor(axes.images[0].get_array()).sum(1).tolist() == pytest.approx([1] * 4)
    trainer = make_trainer(tmp_path, KSE(G=4))
    trainer.fit(made(), digits(), digits(32, 64))
    assert (tmp_path / "kse_levels.png").stat().st_size > 5000


def test_nothing_is_clustered_again(tmp_path, monkeypatch: pytest.MonkeyPatch):
    module = made()
    fit(module, tmp_path, KSE(G=4), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=2)

    def refuse(*args, **kwargs):
        raise AssertionError("clustered")

    monkeypatch.setattr(kse_callback, "kmeans", refuse)
    again = made()
    fit(again, tmp_path, KSE(G=4), max_epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(again, module)
    assert_same(lightning_compress.load(Foreign, tmp_path / "epoch=1.ckpt"), module)


def test_resuming_another_run_is_refused(tmp_path):
    fit(made(), tmp_path, L1Norm(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"without KSE\{.*changed by L1Norm"):
        fit(made(), tmp_path, KSE(), max_epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt")


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_an_average_leaves_the_indices_alone(tmp_path, decay: float):
    """... or is refused: 5 * 0.9 + 5 * (1 - 0.9) is less than 5 in float32."""
    with pytest.raises(MisconfigurationException, match=r"KSE: EMAWeightAveraging.*use_buffers=False"):
        fit(made(), tmp_path, KSE(), EMAWeightAveraging(decay=decay))
    module, plain = made(), made()
    fit(module, tmp_path, KSE(), EMAWeightAveraging(decay=decay, use_buffers=False))
    fit(plain, tmp_path, KSE())
    for one, other in zip(shared(module).values(), shared(plain).values(), strict=True):
        assert all(torch.equal(a[2], b[2]) for a, b in zip(one.shared, other.shared, strict=True))
    assert not torch.equal(module.net.blocks[0].conv1.weight, plain.net.blocks[0].conv1.weight)


class Odd(nn.Module):
    """Convolutions that stay as they are, for one reason each, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.few = nn.Conv2d(8, 5, 1)
        self.tied = nn.Conv2d(5, 8, 1, bias=False)
        self.twin = nn.Conv2d(5, 8, 1, bias=False)
        self.twin.weight = self.tied.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.plain = nn.Conv2d(8, 8, 1, bias=False)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.few(self.grouped(self.stem(x)).relu())
        return self.head(self.plain(self.normed(self.tied(x) + self.twin(x)).relu()).mean((2, 3)))


def test_what_is_left_alone_and_why(tmp_path):
    module = made(Odd)
    fit(module, tmp_path, KSE(), max_epochs=1)
    assert list(shared(module)) == ["net.plain"]
    assert Account.load(tmp_path).left_alone == [
        ("net.stem", "is the first convolution"),
        ("net.grouped", "is grouped: each output reads few channels"),
        ("net.few", "has 5 outputs, too few for 5 neighbours"),
        ("net.tied", "shares its weight with another layer"),
        ("net.twin", "shares its weight with another layer"),
        ("net.normed", "has a weight that is parametrised already"),
    ]


def test_names_choose(tmp_path):
    assert list(shared(compressed(tmp_path, KSE(include=["*conv1"], exclude=["*1.conv1"])))) == ["net.blocks.0.conv1"]
    module = Foreign(densenet40())
    names = KSE(exclude="*.trans?.*")._reasons(dict(convolutions(module)))
    assert list(names) == ["net.conv1", "net.trans1.conv", "net.trans2.conv"]
    assert list(KSE()._reasons(dict(convolutions(Foreign(resnet20()))))) == ["net.conv1"]


def convolutions(module: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    return [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Conv2d)]


def test_a_network_without_convolutions_to_compress_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"no convolution of Foreign.*'net\.stem': 'is the first"):
        fit(made(), tmp_path, KSE(exclude=["*.conv?"]))
    dense = made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with pytest.raises(MisconfigurationException, match=r"KSE finds no Conv2d in Foreign"):
        fit(dense, tmp_path, KSE())


def test_weights_that_are_not_finite_are_refused(tmp_path):
    module = made()
    with torch.no_grad():
        module.net.blocks[0].conv2.weight[0, 0] = math.nan
    with pytest.raises(MisconfigurationException, match=r"the weight of 'net\.blocks\.0\.conv2' is not finite"):
        fit(module, tmp_path, KSE())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"G": 1}, r"KSE\(G=1\): give 2 or more levels, or 0"),
        ({"G": -1}, r"KSE\(G=-1\)"),
        ({"T": -1}, r"KSE\(T=-1\): give a whole number of at least 0"),
        ({"alpha": -0.5}, r"KSE\(alpha=-0.5\)"),
        ({"alpha": math.nan}, r"KSE\(alpha=nan\)"),
        ({"k_neighbors": 0}, r"KSE\(k_neighbors=0\)"),
        ({"kmeans_restarts": 0}, r"KSE\(kmeans_restarts=0\)"),
        ({"kmeans_iters": 0}, r"KSE\(kmeans_iters=0\)"),
        ({"entropy_axis": "code"}, r"KSE\(entropy_axis='code'\): give 'paper' or 'official'"),
        ({"kmeans_init": "k"}, r"KSE\(kmeans_init='k'\): give 'k-means\+\+' or 'random'"),
    ],
)
def test_impossible_arguments(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        KSE(**arguments)


class OneByOne(nn.Module):
    """A bottleneck: 1x1 convolutions around a 3x3 one, all with biases, in channels-last memory."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU(), Block(8, 8), nn.Conv2d(8, 16, 1), nn.ReLU())
        self.head = nn.Linear(16, 10)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def test_bottlenecks_with_biases_survive_the_file(tmp_path):
    module = made(OneByOne)
    fit(module, tmp_path, KSE(G=5), max_epochs=1, precision="bf16-mixed")
    fresh = made(OneByOne)
    load_packed(fresh, tmp_path / "kse.pt")
    assert torch.equal(fresh.net.body[0].bias, module.net.body[0].bias)
    assert torch.equal(forward(fresh), forward(module))


def test_channels_first_then_kernels(tmp_path):
    """Another method narrows the network in the same fit; both are in the file."""
    module = made()
    fit(module, tmp_path, L1Norm(pruning_ratio=0.25), KSE(G=4), max_epochs=1)
    assert shared(module)["net.blocks.0.conv1"].outputs == 9
    assert Account.load(tmp_path).after.params == sum(p.numel() for p in module.parameters())
    fresh = made()
    load_packed(fresh, tmp_path / "kse.pt")
    assert_same(fresh, module)


def test_two_with_a_part_each(tmp_path):
    module = made()
    fit(module, tmp_path, KSE(G=4, include=["*0.conv?"]), KSE(G=6, include=["*1.conv?"]), max_epochs=1)
    assert [len(form.budgets) for form in shared(module).values()] == [4, 4, 6, 6]
    assert Account.load(tmp_path).left_alone == [("net.stem", "is the first convolution")]
