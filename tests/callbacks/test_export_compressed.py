"""The file at the end of a fit holds the network as the fit left it."""

from __future__ import annotations

import pytest
import rich
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.callbacks.export_compressed import ExportCompressed
from lightning_compress.core.losses import add_loss_term


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Watcher(Callback):
    """What a method leaves on the module until ``teardown``: a hook, a wrapped training step."""

    def setup(self, trainer, pl_module, stage):
        seen: list[float] = []  # `item()` fails while torch.export traces
        self.handle = pl_module.network[0].register_forward_hook(lambda m, i, o: seen.append(o.mean().item()))
        self.term = add_loss_term(pl_module, "watcher", "zero", lambda *_: torch.zeros(()))

    def teardown(self, trainer, pl_module, stage):
        self.handle.remove()
        self.term.remove()


def fit(tmp_path, *callbacks, **kwargs) -> LightningModule:
    torch.manual_seed(0)
    module = Module()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(8, 4), torch.zeros(8)), batch_size=4))
    return module


@pytest.fixture(autouse=True)
def _wide_console(monkeypatch):
    monkeypatch.setattr(rich, "_console", Console(width=100))


@pytest.mark.parametrize(("format", "suffix"), [("auto", "onnx"), ("torch", "pt2")])
def test_trained_module_is_exported_into_the_run(tmp_path, capsys, format, suffix):
    callback = ExportCompressed(format=format, filename="small")
    module = fit(tmp_path, Watcher(), callback, logger=CSVLogger(tmp_path, "run"))
    exported = callback.exported
    assert exported.path == tmp_path / "run" / "version_0" / f"small.{suffix}"
    out = capsys.readouterr().out
    assert f"exported {exported.path}" in out
    assert "differs from eager by at most" in out
    x = torch.randn(3, 4)
    if suffix == "pt2":
        found = torch.export.load(exported.path).module()(x)
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    torch.testing.assert_close(found, module(x))
    assert module.network[0]._forward_hooks == {}


def test_fast_dev_run_exports_and_leaves_no_file(tmp_path):
    callback = ExportCompressed(format="torch")
    fit(tmp_path, callback, fast_dev_run=True)
    assert callback.exported.max_abs_difference == 0
    assert not list(tmp_path.rglob("*.pt2"))
    assert not callback.exported.path.exists()


def test_bad_arguments_are_refused_before_the_fit(monkeypatch):
    with pytest.raises(ValueError, match="format must be 'auto', 'onnx', 'torch', 'int8' or 'codebook', got 'onxx'"):
        ExportCompressed(format="onxx")
    monkeypatch.setattr("lightning_compress.export.missing", lambda: ["onnx"])
    with pytest.raises(MisconfigurationException, match="needs onnx: pip install"):
        ExportCompressed(format="onnx")


def test_two_in_one_trainer(tmp_path):
    first, second = ExportCompressed("torch", "a"), ExportCompressed("torch", "b")
    assert first.state_key != second.state_key
    fit(tmp_path, first, second, logger=False, enable_checkpointing=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pt2", "b.pt2"]
