from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader
from translation import Identity, Remembering, noise, rates, small_cycle_gan, trainer

from lightning_compress.datamodules import UnpairedPhotographs
from lightning_compress.metrics import FrechetDistance
from lightning_compress.modules import CycleGAN
from lightning_compress.modules.translation import ImagePool
from lightning_compress.networks import PatchDiscriminator, ResNetGenerator, UNetGenerator

LOSSES = ("train/discriminator_ab", "train/discriminator_ba", "train/generators")


def reference(module: CycleGAN, batches: Any, lr: float) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The paper's loop, pass by pass; trains the module's networks in place. Returns (L_D_A, L_D_B, L_G)."""
    g_a, g_b, d_a, d_b = module.generator_ab, module.generator_ba, module.discriminator_ab, module.discriminator_ba
    to_generators = SGD([*g_a.parameters(), *g_b.parameters()], lr)
    to_judges = SGD([*d_a.parameters(), *d_b.parameters()], lr)
    rng = torch.Generator().manual_seed(0)
    pool_b, pool_a = ImagePool(3, rng), ImagePool(3, rng)
    losses = []
    for a, b in batches:
        a, b = a.double(), b.double()
        fake_b, fake_a = g_a(a), g_b(b)
        rec_a, rec_b = g_b(fake_b), g_a(fake_a)
        loss_g = ((d_a(fake_b) - 1) ** 2).mean() + ((d_b(fake_a) - 1) ** 2).mean()
        loss_g = loss_g + 10 * (rec_a - a).abs().mean() + 12 * (rec_b - b).abs().mean()
        loss_g = loss_g + 0.5 * 12 * (g_a(b) - b).abs().mean() + 0.5 * 10 * (g_b(a) - a).abs().mean()
        to_generators.zero_grad()
        loss_g.backward()
        to_generators.step()
        to_judges.zero_grad()
        loss_a = (((d_a(b) - 1) ** 2).mean() + (d_a(pool_b.query(fake_b)) ** 2).mean()) / 2
        loss_b = (((d_b(a) - 1) ** 2).mean() + (d_b(pool_a.query(fake_a)) ** 2).mean()) / 2
        (loss_a + loss_b).backward()
        to_judges.step()
        losses.append((loss_a.detach(), loss_b.detach(), loss_g.detach()))
    return losses


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_it_takes_the_steps_of_the_paper(norm: Any) -> None:
    """Also with several passes in one call, which is exact where there is no batch norm."""
    networks = ResNetGenerator(ngf=3, blocks=1, norm=norm), PatchDiscriminator(3, 3, layers=2, norm=norm)
    module = CycleGAN(
        *networks, lambda_b=12, pool_size=3, optimizer=lambda p: SGD(p, 0.02), input_shape=(3, 16, 16)
    ).double()
    other = copy.deepcopy(module)
    batches = noise(10, batch_size=2)
    expected = reference(other, batches, 0.02)
    remembering = Remembering(*LOSSES)
    trainer(remembering, max_epochs=1, precision="64-true").fit(module, batches)
    torch.testing.assert_close(torch.tensor(remembering.values, dtype=torch.float64), torch.tensor(expected).double())
    for network, same in zip(module.children(), other.children(), strict=True):
        for (name, p), q in zip(network.named_parameters(), same.parameters(), strict=True):
            torch.testing.assert_close(p, q, msg=name)


def test_neither_side_depends_on_the_rate_of_the_other() -> None:
    def weights(lr_g: float, lr_d: float) -> tuple[list[Tensor], list[Tensor]]:
        module = small_cycle_gan(optimizer=rates(lr_g, lr_d))
        trainer(max_epochs=1).fit(module, noise(2))
        sides = (module.generator_ab, module.generator_ba), (module.discriminator_ab, module.discriminator_ba)
        return tuple([p.detach() for n in side for p in n.parameters()] for side in sides)  # type: ignore[return-value]

    g, d = weights(0.01, 0.01)
    same_g, other_d = weights(0.01, 0.1)
    other_g, same_d = weights(0.1, 0.01)
    assert all(map(torch.equal, g, same_g))
    assert all(map(torch.equal, d, same_d))
    assert not any(map(torch.equal, [p for p in g if p.ndim > 1], [p for p in other_g if p.ndim > 1]))
    assert not any(map(torch.equal, [p for p in d if p.ndim > 1], [p for p in other_d if p.ndim > 1]))


def test_gradients_reach_one_side_alone() -> None:
    seen: list[tuple[bool, bool]] = []

    class Watching(CycleGAN):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            sides = (self.generator_ab, self.generator_ba), (self.discriminator_ab, self.discriminator_ba)
            seen.append(
                tuple(any(p.grad is not None and bool(p.grad.any()) for n in s for p in n.parameters()) for s in sides)  # type: ignore[arg-type]
            )
            self.zero_grad()

    trainer(max_epochs=1).fit(small_cycle_gan(Watching), noise(4))
    assert seen == [(True, False), (False, True)] * 2


def test_a_generator_that_changes_nothing_has_no_cycle_and_no_identity_loss() -> None:
    module = small_cycle_gan(generator_ab=Identity())
    assert isinstance(module.generator_ba, Identity)
    inputs = module.inputs_of(next(iter(noise(2))))
    losses = module.generator_loss(inputs, module.compute_fakes(inputs))
    assert set(losses) == {"gan_ab", "gan_ba", "cycle_a", "cycle_b", "identity_a", "identity_b"}
    assert all(losses[name] == 0 for name in losses if not name.startswith("gan"))
    without = small_cycle_gan(generator_ab=Identity(), lambda_identity=0)
    assert set(without.generator_loss(inputs, without.compute_fakes(inputs))) == {n for n in losses if n[0] != "i"}


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_the_first_call_of_a_generator_begins_with_real_images(norm: Any) -> None:
    module = small_cycle_gan(generator_ab=ResNetGenerator(ngf=2, blocks=1, norm=norm))
    first: dict[str, Tensor] = {}
    calls: list[str] = []
    for name in ("generator_ab", "generator_ba"):

        def hook(m: nn.Module, args: Any, name: str = name) -> None:
            calls.append(name)
            first.setdefault(name, args[0])

        getattr(module, name).register_forward_pre_hook(hook)
    inputs = module.inputs_of(next(iter(noise(3, batch_size=3))))
    module.compute_fakes(inputs)
    assert torch.equal(first["generator_ab"][:3], inputs["a"])
    assert torch.equal(first["generator_ba"][:3], inputs["b"])
    assert len(calls) == (3 if norm == "instance" else 6)


def test_the_second_pair_of_networks_has_weights_of_its_own() -> None:
    module = small_cycle_gan()
    for one, other in (
        (module.generator_ab, module.generator_ba),
        (module.discriminator_ab, module.discriminator_ba),
    ):
        assert not torch.equal(next(one.parameters()), next(other.parameters()))
        assert [p.shape for p in one.parameters()] == [p.shape for p in other.parameters()]
        assert next(other.parameters()).std() < 0.04
    students = ResNetGenerator(ngf=2, blocks=1), ResNetGenerator(ngf=4, blocks=1)
    module = small_cycle_gan(generator_ab=students[0], generator_ba=students[1])
    assert (module.generator_ab, module.generator_ba) == students


def test_discriminators_are_shown_old_translations() -> None:
    shown: list[Tensor] = []

    class Watching(CycleGAN):
        def telling_loss(self, direction: Any, source: Tensor, real: Tensor, fake: Tensor) -> Tensor:
            shown.append(fake)
            return super().telling_loss(direction, source, real, fake)

    module = small_cycle_gan(Watching, pool_size=2)
    trainer(max_epochs=6).fit(module, noise(4))
    assert len(shown) == 24
    assert all(not fake.requires_grad for fake in shown)
    for pool, fakes in zip(module.pools.values(), (shown[::2], shown[1::2]), strict=True):
        assert len(pool.images) == 2
        images = torch.cat(fakes).flatten(1)
        assert len(images.unique(dim=0)) < len(images), "some came twice"


def test_it_learns_to_come_back() -> None:
    torch.manual_seed(0)
    data = UnpairedPhotographs(crop_size=32, samples_per_epoch=96, batch_size=4, eval_batch_size=8)
    module = CycleGAN(
        UNetGenerator(ngf=8, downs=4, dropout=0),
        PatchDiscriminator(3, 6, layers=1),
        optimizer=lambda p: torch.optim.Adam(p, lr=2e-3, betas=(0.5, 0.999)),
        metrics=[FrechetDistance()],
        input_shape=(3, 32, 32),
    )
    run = trainer(max_epochs=1)
    before = run.validate(module, data, verbose=False)[0]
    assert set(before) == {"val/cycle", "val/ab/frechet_distance", "val/ba/frechet_distance"}
    run.fit(module, data)
    assert run.callback_metrics["val/cycle"] < 0.5 * before["val/cycle"]


def test_every_image_of_unequal_sets_is_scored_once() -> None:
    module = small_cycle_gan(metrics=[FrechetDistance()])
    a, b = 2 * torch.rand(5, 3, 16, 16) - 1, 2 * torch.rand(2, 3, 16, 16) - 1
    batches = [(a[:2], b[:1]), (a[2:4], b[1:]), (a[4:], None)]
    found = trainer().test(module, DataLoader(batches, batch_size=None), verbose=False)[0]
    module.eval()
    with torch.no_grad():
        fake_b, fake_a = module.generator_ab(a), module.generator_ba(b)
        there = (module.generator_ba(fake_b) - a).abs().mean((1, 2, 3))
        back = (module.generator_ab(fake_a) - b).abs().mean((1, 2, 3))
        metric = FrechetDistance()
        metric.update(fake_b, b)
    assert found["test/cycle"] == pytest.approx(torch.cat([there, back]).mean().item(), rel=1e-5)
    assert found["test/ab/frechet_distance"] == pytest.approx(metric.compute().item(), rel=1e-4)
    found = trainer().test(module, DataLoader([(None, b)], batch_size=None), verbose=False)[0]
    assert found["test/cycle"] == pytest.approx(back.mean().item(), rel=1e-5)


def test_metrics_with_statistics_belong_to_a_direction(tmp_path: Any) -> None:
    metric = FrechetDistance()
    metric.update(None, torch.rand(4, 3, 16, 16))
    metric.save_statistics(tmp_path / "real.npz")
    known = FrechetDistance(statistics=tmp_path / "real.npz")
    with pytest.raises(ValueError, match=r"metrics: statistics are of one kind of image; give \{'ab'"):
        small_cycle_gan(metrics=[known])
    module = small_cycle_gan(metrics={"ab": [known]})
    found = trainer().validate(module, noise(4), verbose=False)[0]
    assert set(found) == {"val/cycle", "val/ab/frechet_distance"}
    with pytest.raises(ValueError, match="metrics: there is no direction a, only ab, ba"):
        small_cycle_gan(metrics={"a": [FrechetDistance()]})
    with pytest.raises(ValueError, match="metrics: there are two named frechet_distance"):
        small_cycle_gan(metrics=[FrechetDistance(), FrechetDistance()])


def test_impossible_arguments_are_refused() -> None:
    for name in ("lambda_a", "lambda_b", "lambda_identity", "pool_size", "n_epochs_decay", "seed", "lambda_gp"):
        with pytest.raises(ValueError, match=f"{name}: expected 0 or more, got -1"):
            small_cycle_gan(**{name: -1})
    with pytest.raises(ValueError, match="n_epochs: expected 1 or more, got 0"):
        small_cycle_gan(n_epochs=0)
    with pytest.raises(ValueError, match=r"gan_mode: .*got 'lsga'"):
        small_cycle_gan(gan_mode="lsga")
