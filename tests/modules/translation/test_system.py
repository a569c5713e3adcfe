"""What Pix2Pix and CycleGAN share."""

from __future__ import annotations

import copy
import os
import pickle
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import assert_same
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, multiprocessing, nn
from torch.optim import SGD
from torch.utils.data import DataLoader
from translation import Remembering, noise, small_cycle_gan, small_pix2pix, trainer

import lightning_compress
from lightning_compress.callbacks import L1Norm
from lightning_compress.core.images import as_bytes
from lightning_compress.core.losses import add_loss_term
from lightning_compress.export import export
from lightning_compress.metrics import FrechetDistance
from lightning_compress.modules import CycleGAN, Pix2Pix
from lightning_compress.modules.translation import TranslationGAN
from lightning_compress.modules.translation.system import together
from lightning_compress.networks import PatchDiscriminator, ResNetGenerator, UNetGenerator

SYSTEMS = pytest.mark.parametrize("small", [small_pix2pix, small_cycle_gan])
Small = Callable[..., Any]


def dropping_pix2pix(**arguments: Any) -> Pix2Pix:
    """With a dropout, batch norms, and a penalty that draws."""
    torch.manual_seed(0)
    networks = UNetGenerator(ngf=2, downs=6), PatchDiscriminator(6, 2, layers=1)
    return Pix2Pix(*networks, gan_mode="wgangp", input_shape=(3, 64, 64), **arguments)


@pytest.mark.parametrize("make", [dropping_pix2pix, small_cycle_gan])
def test_a_resumed_run_equals_an_uninterrupted_one(make: Small, tmp_path: Path) -> None:
    size = 64 if make is dropping_pix2pix else 16

    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[TranslationGAN, list[list[float]]]:
        module = make(n_epochs=1, n_epochs_decay=2)
        checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        remembering = Remembering("train/generators")
        torch.rand(epochs)  # the global stream is somewhere else
        trainer(checkpoints, remembering, root=tmp_path, max_epochs=epochs).fit(
            module, noise(4, size), ckpt_path=ckpt_path, weights_only=True
        )
        return module, remembering.values

    uninterrupted, losses = run(3)
    (tmp_path / "epoch=1.ckpt").rename(tmp_path / "stopped.ckpt")
    resumed, later = run(3, tmp_path / "stopped.ckpt")
    assert later == losses[4:], "the same next loss"
    assert_same(resumed, uninterrupted)
    assert resumed.images_seen == uninterrupted.images_seen == 12
    if isinstance(resumed, CycleGAN):
        for name, pool in resumed.pools.items():
            assert torch.equal(pool.images, uninterrupted.pools[name].images)


def test_files_of_weights_hold_no_pools(tmp_path: Path) -> None:
    module = small_cycle_gan()
    checkpoints = ModelCheckpoint(tmp_path, filename="last", save_weights_only=True)
    trainer(checkpoints, root=tmp_path, max_epochs=1).fit(module, noise(4))
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["translation"] == {"images_seen": 4}
    assert {key.split(".")[0] for key in content["state_dict"]} == {
        "generator_ab", "generator_ba", "discriminator_ab", "discriminator_ba"
    }  # fmt: skip
    assert content["hyper_parameters"]["lambda_identity"] == 0.5
    assert "generator_ab" not in content["hyper_parameters"]
    parts = {"generator_ab": ResNetGenerator(ngf=3, blocks=1), "discriminator_ab": PatchDiscriminator(3, 3, layers=1)}
    for load in (CycleGAN.load_from_checkpoint, lambda path, **k: lightning_compress.load(CycleGAN, path, **k)):
        loaded = load(tmp_path / "last.ckpt", **copy.deepcopy(parts))
        assert_same(loaded, module)


@SYSTEMS
def test_the_rate_falls_to_zero_along_a_line(small: Small) -> None:
    module = small()
    assert [module.rate(epoch) for epoch in range(100)] == [1.0] * 100
    assert module.rate(100) == pytest.approx(0.990099, abs=1e-6)
    assert module.rate(199) == pytest.approx(0.009901, abs=1e-6)
    assert module.rate(200) == 0

    class Rates(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])

    seen: list[list[float]] = []
    module = small(n_epochs=2, n_epochs_decay=1)
    trainer(Rates(), max_epochs=3).fit(module, noise(2))
    assert seen == [[2e-4] * 2, [2e-4] * 2, [1e-4] * 2]
    with pytest.warns(UserWarning, match="zero from epoch 3 on, the Trainer goes on to max_epochs=4"):
        trainer(max_epochs=4, limit_train_batches=0).fit(small(n_epochs=2, n_epochs_decay=1), noise(2))


@SYSTEMS
def test_terms_of_the_generators_loss(small: Small) -> None:
    """Those of methods that know the system, and those of methods that know nothing of it."""
    module = small(optimizer=lambda p: SGD(p, 0.0))
    module.scale = nn.Parameter(torch.tensor(3.0))
    seen: list[tuple[set[str], set[str], int]] = []

    def term(inputs: dict[str, Tensor], fakes: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((set(inputs), set(fakes), len(fakes["fake_b"])))
        return {"method/one": 2 * fakes["fake_b"].square().mean(), "method/two": module.scale.square()}

    plain = Remembering("train/generators")
    trainer(plain, max_epochs=1).fit(module, noise(4))
    module.generator_loss_terms.append(term)
    handle = add_loss_term(module, "other", "term", lambda loss, batch, index: loss.new_tensor(5.0), weight=2.0)
    remembering = Remembering("train/generators", "train/method/one", "train/method/two")
    run = trainer(remembering, max_epochs=1)
    run.fit(module, noise(4))
    for (before,), (total, one, two) in zip(plain.values, remembering.values, strict=True):
        assert two == 9
        assert total == pytest.approx(before + one + two + 10, rel=1e-5)
    assert run.callback_metrics["train/other/term"] == 5
    fakes = {"fake_b"} if small is small_pix2pix else {"fake_b", "fake_a", "rec_a", "rec_b", "identity_a", "identity_b"}
    assert seen[0] == ({"a", "b"}, fakes, 2)
    # it is a parameter of the generators' optimiser, and terms belong to the run
    assert any(p is module.scale for p in run.optimizers[0].param_groups[0]["params"])
    assert copy.deepcopy(module).generator_loss_terms == []
    handle.remove()
    assert pickle.loads(pickle.dumps(module.generator_loss_terms)) == []
    module.generator_loss_terms.append(term)
    with pytest.raises(ValueError, match="two terms 'method/one'"):
        trainer(max_epochs=1).fit(module, noise(4))


@SYSTEMS
@pytest.mark.parametrize(
    "arguments", [{"precision": "bf16-mixed"}, {"fast_dev_run": True}], ids=["bf16", "fast_dev_run"]
)
def test_trains_under(small: Small, arguments: dict[str, Any]) -> None:
    module = small(metrics=[FrechetDistance()], gan_mode="hinge")
    dtypes: list[torch.dtype] = []
    module.generator_loss_terms.append(lambda i, fakes: dtypes.extend(f.dtype for f in fakes.values()) or {})
    run = trainer(**{"max_epochs": 1, **arguments})
    run.fit(module, noise(4), noise(4))
    assert run.callback_metrics["train/generators"].isfinite()
    assert set(dtypes) == {torch.float32}
    for (name, p), q in zip(module.named_parameters(), small().parameters(), strict=True):
        assert p.dtype == torch.float32
        assert not name.endswith("weight") or not torch.equal(p, q)


@SYSTEMS
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accumulate_grad_batches": 2}, "accumulation"),
        ({"gradient_clip_val": 1.0}, "clipping"),
        ({"precision": "bf16-true"}, "precision='bf16-true' has none"),
    ],
    ids=["accumulation", "clipping", "half"],
)
def test_what_two_optimisers_cannot_do_is_refused(small: Small, arguments: dict[str, Any], message: str) -> None:
    module = small()
    run = trainer(**arguments)
    with pytest.raises(MisconfigurationException, match=message):
        run.fit(module, noise(2))
    assert_same(module, small())


def test_ddp_is_told_to_look_for_unused_parameters() -> None:
    module = small_pix2pix()
    module.trainer = trainer(strategy=(strategy := DDPStrategy()))
    module.setup("fit")
    assert strategy._ddp_kwargs["find_unused_parameters"]
    module.trainer = trainer(strategy=DDPStrategy(static_graph=True))
    with pytest.raises(MisconfigurationException, match="static_graph: a step has two backward passes"):
        module.setup("fit")


@SYSTEMS
def test_nothing_is_left_behind(small: Small) -> None:
    module = small()
    run = trainer()
    run.fit(module, noise(4), noise(2))
    before = copy.deepcopy(module.state_dict())
    assert before.keys() == small().state_dict().keys()
    images = next(iter(noise(2)))[0]
    expected = module.eval()(images)
    run.validate(module, noise(2), verbose=False)
    run.test(module, noise(2), verbose=False)
    run.predict(module, noise(2))
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module.generator_of(module.directions[0])))):
        assert torch.equal(twin(images), expected)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.requires_grad for p in module.parameters())


@SYSTEMS
def test_predictions_are_bytes(small: Small) -> None:
    module = small()
    pairs = noise(3)
    (fakes, _), (first, _) = (trainer().predict(module, one) for one in (pairs, DataLoader(pairs.dataset[:][0], 2)))
    assert set(fakes) == {"fake_b"} | ({"fake_a"} if small is small_cycle_gan else set())
    with torch.no_grad():
        expected = as_bytes(module.eval()(next(iter(pairs))[0]))
    assert torch.equal(fakes["fake_b"], expected)
    assert torch.equal(first, expected)


@SYSTEMS
def test_pictures_are_logged_after_every_epoch(small: Small, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    run = trainer(root=tmp_path, num_sanity_val_steps=1)
    run.loggers = [logger]
    run.fit(small(), noise(2), noise(6, batch_size=6))
    logger.finalize("")
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()["images"]
    assert tags == (
        ["val/ab: input, translation, target"]
        if small is small_pix2pix
        else ["val/ab: input, translation", "val/ba: input, translation"]
    )
    columns = 3 if small is small_pix2pix else 2
    for tag in tags:
        assert [(p.step, p.height, p.width) for p in events.Images(tag)] == [
            (2, 4 * 16, columns * 16), (4, 4 * 16, columns * 16)
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        (torch.zeros(2, 3, 16, 16), r"a tensor of shape \(2, 3, 16, 16\)"),
        ((torch.zeros(2, 3, 16, 16),), "a tuple of float32"),
        ((torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)), "a tuple of float32, uint8"),
        ((torch.zeros(2, 3, 16, 16), None), "a tuple of float32, NoneType"),
        ({"a": 0}, "a dict"),
    ],
)
@SYSTEMS
def test_batches_that_are_no_pairs_are_described(small: Small, batch: Any, got: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"train batches must be \(images a, images b\).*, got {got}"):
        small().inputs_of(batch)


def test_channels_last_changes_the_format_alone() -> None:
    formats: list[bool] = []
    plain, other = small_cycle_gan(), small_cycle_gan(channels_last=True)
    layer = other.generator_ab.model[4]
    layer.register_forward_hook(lambda m, x, y: formats.append(y.is_contiguous(memory_format=torch.channels_last)))
    images = next(iter(noise(2)))[0]
    torch.testing.assert_close(other(images), plain(images))
    assert formats == [True]


def test_several_batches_in_one_call_where_that_is_exact() -> None:
    torch.manual_seed(0)
    x, y, small = torch.rand(2, 3, 16, 16), torch.rand(1, 3, 16, 16), torch.rand(1, 3, 8, 8)
    calls: list[int] = []
    for norm in ("instance", "batch"):
        network = PatchDiscriminator(3, 4, layers=1, norm=norm)
        network.register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
        for given in ((x, y), (x, small)):
            for found, batch in zip(together(network, *given), given, strict=True):
                torch.testing.assert_close(found, network(batch))
    assert calls == [3, 2, 1, 2, 1, 2, 1] + [2, 1, 2, 1] * 2


def test_the_generator_is_exported(tmp_path: Path) -> None:
    module = small_cycle_gan(generator_ab=UNetGenerator(ngf=2, downs=4))
    exported = export(module, tmp_path / "generator.pt2", module.example_input_array)
    assert exported.max_abs_difference < 1e-4
    assert exported.dynamic_batch
    smallest = sum(p.numel() for p in module.generator_ab.parameters()) * 4
    assert smallest < exported.bytes < 2 * smallest + 200_000, "no other network in it"


def test_methods_that_know_nothing_of_it_work(tmp_path: Path) -> None:
    module, dense = small_cycle_gan(), small_cycle_gan()
    checkpoints = ModelCheckpoint(tmp_path, filename="pruned")
    trainer(L1Norm(0.5), checkpoints, root=tmp_path, max_epochs=1).fit(module, noise(4))
    sizes = [sum(p.numel() for p in m.generator_ab.parameters()) for m in (module, dense)]
    assert sizes[0] < 0.5 * sizes[1]
    networks = {name: copy.deepcopy(network) for name, network in dense.named_children() if name != "metrics"}
    reloaded = lightning_compress.load(CycleGAN, tmp_path / "pruned.ckpt", **networks)
    assert_same(reloaded, module)
    assert reloaded.images_seen == 4


def test_the_optimiser_of_the_command_line_is_refused() -> None:
    module = small_pix2pix()
    module.configure_optimizers = lambda: SGD(module.parameters(), 0.1)  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match=r"give model\.optimizer, and no --optimizer"):
        trainer().fit(module, noise(2))


# ---- two processes


def _train(rank: int, port: str, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)

    def run(make: Small, images: int, epochs: int, ckpt_path: Path | None = None) -> TranslationGAN:
        module = make(optimizer=lambda p: SGD(p, 1e-3))
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(minutes=1))
        checkpoints = ModelCheckpoint(folder / make.__name__, filename="{epoch}", save_top_k=-1)
        one = trainer(checkpoints, root=folder, max_epochs=epochs, strategy=strategy, devices=2)
        one.fit(module, noise(images), noise(4), ckpt_path=ckpt_path, weights_only=True)
        return module

    paired = run(small_pix2pix, 4, 1)
    unpaired = run(small_cycle_gan, 8, 2)
    resumed = run(small_cycle_gan, 8, 2, folder / "small_cycle_gan" / "epoch=0.ckpt")
    assert_same(resumed, unpaired)
    pools = [pool.images for pool in unpaired.pools.values()]
    for pool, other in zip(resumed.pools.values(), pools, strict=True):
        assert torch.equal(pool.images, other)
    state = {"paired": paired.state_dict(), "unpaired": unpaired.state_dict(), "pools": pools}
    torch.save(state | {"seen": unpaired.images_seen}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # twenty seconds, of which the processes take nine to start
def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_train, (str(port), tmp_path), 2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for system in ("paired", "unpaired"):
        assert all(torch.equal(value, other[system][name]) for name, value in one[system].items())
    assert one["seen"] == other["seen"] == 16
    assert not any(map(torch.equal, one["pools"], other["pools"]))
    # the step of one process with all four pairs
    module = small_pix2pix(optimizer=lambda p: SGD(p, 1e-3))
    trainer(max_epochs=1).fit(module, noise(4, batch_size=4))
    for name, value in module.state_dict().items():
        torch.testing.assert_close(one["paired"][name], value, msg=name)
