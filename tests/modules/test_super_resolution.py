from __future__ import annotations

import copy
import os
import pickle
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import assert_same
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from real_data import real_data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_compress
from lightning_compress.callbacks import L1Norm
from lightning_compress.cli.lightning_cli import CompressCLI
from lightning_compress.cli.lightning_cli import main as lc
from lightning_compress.datamodules import Photographs, SuperResolutionFolder
from lightning_compress.datamodules.bicubic import bicubic
from lightning_compress.export import export
from lightning_compress.metrics import LuminancePSNR, LuminanceSSIM
from lightning_compress.modules import SuperResolution
from lightning_compress.networks import EDSR, RDN


def small_network() -> EDSR:
    seed_everything(0, verbose=False)
    return EDSR(2, blocks=1, features=4)


def small(**arguments: Any) -> SuperResolution:
    return SuperResolution(small_network(), **{"scale": 2, "input_shape": (3, 8, 8), **arguments})


def noise(*sizes: tuple[int, int], scale: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Pairs of images of noise."""
    generator = torch.Generator().manual_seed(0)
    high = [255 * torch.rand(3, scale * h, scale * w, generator=generator) for h, w in sizes]
    return [(F.avg_pool2d(image, scale), image) for image in high]


def patches(count: int = 8) -> DataLoader:
    return DataLoader(noise(*[(8, 8)] * count), batch_size=2)


def whole() -> DataLoader:
    """Images of different size, one by one."""
    return DataLoader(noise((10, 12), (14, 10)))


def trainer(folder: Path | None = None, *callbacks: Any, **arguments: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0}
    return Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**defaults, **arguments},
    )


class Bicubic(nn.Module):
    """(N, 3, H, W) to (N, 3, 2 H, 2 W), without weights."""

    def forward(self, x: Tensor) -> Tensor:
        return bicubic(x, (2 * x.shape[2], 2 * x.shape[3]))


def test_it_learns_to_enlarge_photographs() -> None:
    seed_everything(0, verbose=False)
    data = Photographs(patch_size=32, samples_per_epoch=320)
    module = SuperResolution(
        EDSR(2, blocks=2, features=8),
        scale=2,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.004),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.004, total_steps=60),
        lr_scheduler_interval="step",
    )
    run = trainer(max_epochs=3)
    before = run.validate(module, data, verbose=False)[0]
    run.fit(module, data)
    assert before["val/psnr"] < 20
    assert run.callback_metrics["val/psnr"] > 27
    assert run.callback_metrics["val/ssim"] > 0.85
    assert run.callback_metrics["train/loss"] < 40


def test_the_loss_is_the_mean_absolute_difference_not_clamped() -> None:
    module = small()
    module.log = lambda *_, **__: None
    low, high = next(iter(patches()))
    assert torch.equal(module.training_step((low, 3 * high), 0), (module(low) - 3 * high).abs().mean())


@pytest.mark.parametrize(("border", "width"), [(None, 2), (0, 0), (4, 4)])
def test_scores_are_the_mean_over_images(border: int | None, width: int) -> None:
    scores = trainer().validate(small(border=border), whole(), verbose=False)[0]
    network = small_network()
    with torch.no_grad():
        pairs = [(network(low), high) for low, high in whole()]
    for name, metric in (("psnr", LuminancePSNR(width)), ("ssim", LuminanceSSIM(width))):
        expected = sum(copy.deepcopy(metric)(*pair).item() for pair in pairs) / 2
        assert scores[f"val/{name}"] == pytest.approx(expected, rel=1e-5)


def test_several_test_sets_are_reported_by_name() -> None:
    one, other = DataLoader(noise((10, 12))), DataLoader(noise((20, 16), (9, 9)))
    module = small()
    alone = [trainer().test(module, loader, verbose=False)[0] for loader in (one, other)]
    both = {k: v for found in trainer().test(module, [one, other], verbose=False) for k, v in found.items()}
    assert both == {f"test/{i}/{name}": alone[i][f"test/{name}"] for i in (0, 1) for name in ("psnr", "ssim")}
    assert alone[0]["test/psnr"] != alone[1]["test/psnr"]
    assert trainer().test(module, one, verbose=False)[0] == alone[0]

    class Named(Photographs):
        test_names = ("first", "second")

        def read(self, split: Any) -> Any:
            (pairs,) = super().read(split).values()
            return dict.fromkeys(self.test_names, pairs)

    found = [set(scores) for scores in trainer().test(SuperResolution(Bicubic(), 2), Named(2, 8), verbose=False)]
    assert found == [{f"test/{name}/psnr", f"test/{name}/ssim"} for name in ("first", "second")]


def test_the_score_of_bicubic_on_the_embedded_photographs() -> None:
    module, data = SuperResolution(Bicubic(), scale=2), Photographs()
    assert trainer().validate(module, data, verbose=False)[0]["val/psnr"] == pytest.approx(31.707, abs=1e-2)
    assert trainer().test(module, data, verbose=False)[0]["test/psnr"] == pytest.approx(35.252, abs=1e-2)


@pytest.mark.real_data
@pytest.mark.parametrize("scale", [2, 4])
def test_networks_are_tested_on_set5_and_set14(scale: int) -> None:
    root = real_data("super-resolution/Set5", "super-resolution/Set14") / "super-resolution"
    data = SuperResolutionFolder(str(root), test=["Set5", "Set14"], scale=scale)
    scores = trainer().test(SuperResolution(nn.Upsample(scale_factor=scale), scale), data, verbose=False)
    psnr = {2: (30.86, 28.31), 4: (26.25, 24.57)}[scale]  # of repeated pixels
    for name, found, expected in zip(("Set5", "Set14"), scores, psnr, strict=True):
        assert found[f"test/{name}/psnr"] == pytest.approx(expected, abs=0.3)


def test_half_precision_scores_as_full_precision_does() -> None:
    found = [
        trainer(precision=precision).validate(SuperResolution(nn.Upsample(scale_factor=2), 2), whole(), verbose=False)
        for precision in ("32-true", "bf16-mixed")
    ]
    assert found[0] == found[1]


def test_a_picture_is_logged_after_every_epoch(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    run = trainer(tmp_path, num_sanity_val_steps=1)
    run.loggers = [logger]
    run.fit(small(), patches(), whole())
    logger.finalize("")
    events = EventAccumulator(str(tmp_path)).Reload()
    (tag,) = events.Tags()["images"]
    pictures = events.Images(tag)
    assert [(p.step, p.height, p.width) for p in pictures] == [(4, 20, 3 * 24), (8, 20, 3 * 24)]


def test_prediction_gives_bytes_with_and_without_large_images() -> None:
    module = small()
    with_large = trainer().predict(module, whole())
    without = trainer().predict(module, DataLoader([low for low, _ in noise((10, 12), (14, 10))]))
    assert [image.shape for image in with_large] == [(1, 3, 20, 24), (1, 3, 28, 20)]
    for image, other in zip(with_large, without, strict=True):
        assert image.dtype == torch.uint8
        assert torch.equal(image, other)


@pytest.mark.parametrize(
    "arguments",
    [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}, {"fast_dev_run": True}],
    ids=["bf16", "accumulation", "fast_dev_run"],
)
def test_trains_under(arguments: dict[str, Any]) -> None:
    module = small()
    run = trainer(**arguments)
    run.fit(module, patches(), whole())
    assert run.callback_metrics["train/loss"].isfinite()
    changed = [not torch.equal(p, q) for p, q in zip(module.parameters(), small().parameters(), strict=True)]
    assert all(changed)


def test_accumulated_batches_count_as_one_large_one() -> None:
    weights = []
    for batch_size, accumulated in ((4, 1), (2, 2)):
        module = small(optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
        loader = DataLoader(noise(*[(8, 8)] * 8), batch_size=batch_size)
        trainer(accumulate_grad_batches=accumulated).fit(module, loader)
        weights.append(nn.utils.parameters_to_vector(module.parameters()))
    torch.testing.assert_close(*weights)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def run(epochs: int, ckpt_path: Path | None = None) -> SuperResolution:
        module = small(lr_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5))
        data = Photographs(patch_size=16, batch_size=4, samples_per_epoch=12)
        data._read = photographs._read
        checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer(tmp_path, checkpoints, max_epochs=epochs, limit_val_batches=0).fit(module, data, ckpt_path=ckpt_path)
        return module

    photographs = Photographs()
    photographs.setup("fit")
    uninterrupted = run(3)
    (tmp_path / "epoch=1.ckpt").rename(tmp_path / "stopped.ckpt")
    assert_same(run(3, tmp_path / "stopped.ckpt"), uninterrupted)


def test_nothing_is_left_behind() -> None:
    module = small()
    run = trainer()
    run.fit(module, patches(), whole())
    run.test(module, [whole(), whole()], verbose=False)
    before = copy.deepcopy(module.state_dict())
    images = next(iter(whole()))[0]
    expected = module(images)
    run.validate(module, whole(), verbose=False)
    run.predict(module, whole())
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module.network))):
        assert torch.equal(twin(images), expected)
    assert before.keys() == module.state_dict().keys() == small().state_dict().keys()
    assert_same(module.network, copy.deepcopy(module.network))


def test_checkpoints_hold_plain_values_and_rebuild_a_named_network(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    module = SuperResolution(scale=3, border=5, input_shape=(3, 4, 4))
    run = trainer(tmp_path, ModelCheckpoint(tmp_path, filename="last", save_weights_only=True), max_epochs=1)
    run.fit(module, DataLoader(noise((4, 4), scale=3)))
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["hyper_parameters"] == {
        "network": "edsr_baseline",
        "scale": 3,
        "lr_scheduler_interval": "epoch",
        "border": 5,
        "input_shape": (3, 4, 4),
        "channels_last": False,
    }
    assert all(key.startswith("network.") for key in content["state_dict"])
    for loaded in (
        SuperResolution.load_from_checkpoint(tmp_path / "last.ckpt"),
        lightning_compress.load(SuperResolution, tmp_path / "last.ckpt"),
    ):
        assert_same(loaded.network, module.network)


def test_weights_are_there_after_construction(tmp_path: Path) -> None:
    source = small_network()
    torch.save({f"network.{k}": v + 1 for k, v in source.state_dict().items()}, tmp_path / "w.pt")
    module = small(weights=str(tmp_path / "w.pt"))
    for value, original in zip(module.network.state_dict().values(), source.state_dict().values(), strict=True):
        assert torch.equal(value, original + 1)


@pytest.mark.parametrize("network", [EDSR(2, blocks=2, features=8), RDN(2, 2, 2, 8, 8)], ids=["EDSR", "RDN"])
def test_methods_that_know_nothing_of_it_work(network: nn.Module, tmp_path: Path) -> None:
    module = SuperResolution(copy.deepcopy(network), scale=2, input_shape=(3, 8, 8))
    checkpoint = ModelCheckpoint(tmp_path, filename="pruned", save_weights_only=True)
    trainer(tmp_path, L1Norm(0.5), checkpoint, max_epochs=1).fit(module, patches())
    sizes = [sum(p.numel() for p in m.parameters()) for m in (module.network, network)]
    assert sizes[0] < 0.5 * sizes[1]
    reloaded = lightning_compress.load(
        SuperResolution, tmp_path / "pruned.ckpt", network=copy.deepcopy(network), scale=2
    )
    assert_same(reloaded.network, module.network)
    assert export(module, tmp_path / "pruned", (1, 3, 8, 8), format="torch").max_abs_difference < 1e-3


def test_channels_last_changes_the_format_alone() -> None:
    plain, channels_last = small(), small(channels_last=True)
    assert channels_last.network.head[0].weight.is_contiguous(memory_format=torch.channels_last)
    images = 255 * torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(channels_last(images), plain(images))


def test_the_packaged_config_trains_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shorter = ["--trainer.max_epochs=1", "--data.samples_per_epoch=32", "--trainer.callbacks.format=torch"]
    lc(["fit", "--config=super_resolution", "--trainer.logger=false", "--trainer.enable_progress_bar=false", *shorter])
    assert (tmp_path / "compressed.pt2").is_file()


def test_the_scale_follows_the_data() -> None:
    for scale in (2, 3):
        cli = CompressCLI(
            ["--model=SuperResolution", "--data=Photographs", f"--data.scale={scale}", "--trainer.logger=false"],
            run=False,
        )
        assert cli.model.scale == cli.model.network.scale == scale
        assert cli.model.input_shape == cli.datamodule.input_shape == (3, 96 // scale, 96 // scale)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "edsr_basline"}, "network: there is no super-resolution network .* Did you mean 'edsr_baseline'"),
        ({"network": "resnet20"}, "network: there is no super-resolution network 'resnet20'"),
        ({"network": "edsr_baseline", "scale": 5}, "scale: expected one of 2, 3, 4, 8, got 5"),
        ({"scale": 1}, "scale: expected 2 or more, got 1"),
        ({"border": -1}, "border: expected 0 or more pixels, or None, got -1"),
        ({"lr_scheduler_interval": "batch"}, "lr_scheduler_interval: expected 'epoch' or 'step', got 'batch'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SuperResolution(**{"network": small_network(), "scale": 2, **arguments})


def test_scales_that_differ_are_refused_before_the_first_step() -> None:
    with pytest.raises(MisconfigurationException, match="scale: EDSR has 2, SuperResolution got 3"):
        small(scale=3)
    with pytest.raises(MisconfigurationException, match="scale: Photographs has 4, SuperResolution got 2"):
        trainer().fit(small(), Photographs(scale=4))
    module = SuperResolution(nn.Upsample(scale_factor=3), scale=2)
    with pytest.raises(MisconfigurationException, match=r"scale: Upsample makes \(1, 3, 30, 36\) of \(1, 3, 10, 12\)"):
        trainer().validate(module, whole(), verbose=False)


@pytest.mark.parametrize("batches", [torch.zeros(2, 3, 8, 8), [(torch.zeros(3, 8, 8),) * 3]], ids=["tensor", "three"])
def test_batches_that_are_no_pairs_are_described(batches: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"must be \(small images, large images\), got (shape|a list)"):
        trainer().validate(small(), DataLoader(batches), verbose=False)


def _train(rank: int, port: str, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    module = small(optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(minutes=1))
    run = trainer(max_epochs=1, strategy=strategy, devices=2)
    run.fit(module, DataLoader(noise(*[(8, 8)] * 8), batch_size=2), whole())
    scores = {name: value.item() for name, value in run.callback_metrics.items()}
    torch.save({"weights": module.network.state_dict(), "scores": scores}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # ten seconds, of which the processes take nine to start
def test_two_processes_are_as_good_as_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_train, (str(port), tmp_path), 2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["scores"] == other["scores"]
    module = small(optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
    pairs = noise(*[(8, 8)] * 8)
    both = [pairs[i] for step in (0, 4) for i in (step, step + 2, step + 1, step + 3)]  # what the two saw in a step
    run = trainer(max_epochs=1)
    run.fit(module, DataLoader(both, batch_size=4), whole())
    for name, value in module.network.state_dict().items():
        assert torch.equal(one["weights"][name], other["weights"][name])
        torch.testing.assert_close(one["weights"][name], value)
    assert one["scores"]["val/psnr"] == pytest.approx(run.callback_metrics["val/psnr"].item(), abs=1e-3)
