"""The account: counts against closed forms, its files, and its life within a fit."""

from __future__ import annotations

import gc
import io
import json
import weakref
from dataclasses import replace

import pytest
import rich
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

from lightning_compress.core import plots
from lightning_compress.core.measurement import count, disk_bytes, time_in_turns
from lightning_compress.core.profile import Latency
from lightning_compress.core.report import (
    Account,
    LayerCost,
    LayerRow,
    Measurement,
    close_account,
    log_figure,
    measure,
    open_account,
    run_folder,
)


def network(width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 5),
    )


def row(name: str, macs: int, width: int | None = 8, **changes: int) -> LayerRow:
    whole = LayerRow(name, "conv", width, macs, macs, params=10, nonzeros=10, bits=32, bytes=40)
    return replace(whole, **changes)


def text(renderable: object, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


# ---------------------------------------------------------------------------------------------------- measure


def test_measure_against_closed_forms():
    net = network()
    with torch.no_grad():
        net[0].weight[:2] = 0  # 54 of 216 weights
        net[1].bias.fill_(1)
    found = measure(net, (1, 3, 10, 10), latency=False)
    conv, norm, linear = found.rows
    assert conv == LayerRow(
        name="0",
        kind="conv",
        width=8,
        macs=100 * 8 * 27,
        effective_macs=100 * 6 * 27,
        params=216,
        nonzeros=162,
        bits=32,
        bytes=864,
    )
    assert (norm.kind, norm.params, norm.macs, norm.width) == ("batchnorm", 16, 0, 8)
    assert (linear.macs, linear.params, linear.width) == (40, 45, 5)
    assert found.macs == 21600 + 40
    assert found.effective_macs == 16200 + 40
    assert found.params == 216 + 16 + 45
    assert found.nonzeros == 162 + 16 + 45
    assert found.bytes == 4 * found.params
    assert found.bits == 32
    assert found.latency is None


def test_bits_apply_to_weights_and_not_to_the_rest():
    found = measure(network(), (1, 3, 10, 10), latency=False, bits={"*": 8, "5": 1})
    conv, norm, linear = found.rows
    assert (conv.bits, conv.bytes) == (8, 216)
    assert (linear.bits, linear.bytes) == (1, 5 + 5 * 4)  # 40 weights of a bit, 5 biases of 4 bytes
    assert norm.bytes == 16  # nothing but vectors: the glob names it, so it is at 8 bits
    assert found.bits == pytest.approx(8 * (216 + 25 + 16) / 277)
    with pytest.raises(ValueError, match=r"bits: 'conv\*' matches no name"):
        measure(network(), (1, 3, 10, 10), latency=False, bits={"conv*": 8})


class Mask(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * (torch.arange(weight.shape[1]) < 2)


def test_what_is_measured_is_what_would_be_deployed():
    net = network().bfloat16()
    parametrize.register_parametrization(net[5], "weight", Mask())
    net[0].register_forward_hook(lambda *_: pytest.fail("called"))
    found = measure(net, torch.zeros(1, 3, 10, 10), latency=False)
    linear = found.rows[-1]
    assert (linear.name, linear.params, linear.nonzeros, linear.bits) == ("5", 45, 10 + 5, 16)
    assert linear.effective_macs == 10
    assert net.training
    assert parametrize.is_parametrized(net[5])


def test_parameters_of_attention_and_of_the_root_are_counted_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.ones(1, 1, 8))
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.first = nn.Linear(8, 8)
            self.tied = self.first

        def forward(self, x):
            x = x + self.token
            return self.tied(self.first(self.attention(x, x, x)[0]))

    net = Net()
    found = measure(net, (1, 4, 8), latency=False)
    assert found.params == sum(p.numel() for p in net.parameters())
    assert found.bytes == 4 * found.params
    assert found.nonzeros == sum(int(p.count_nonzero()) for p in net.parameters())


def test_disk_bytes_is_the_size_of_the_file(tmp_path):
    net = network(64)
    torch.save(net.state_dict(), tmp_path / "file")
    # the name of the file is inside it, and the entries are aligned to 64 bytes
    assert disk_bytes(net) == pytest.approx((tmp_path / "file").stat().st_size, abs=1024)


def test_latency_in_turns(monkeypatch):
    calls = []

    def measured(module, example_input, *, repeats, warmup):
        calls.append((module, repeats))
        return Latency(100.0 if len(calls) > 5 else 1000.0, "cpu", 1, 1)  # something else runs at first

    monkeypatch.setattr("lightning_compress.core.measurement.measure_latency", measured)
    a, b = network(), network()
    times = time_in_turns([a, b], (1, 3, 10, 10), rounds=5)
    assert [module for module, _ in calls] == [a, b] * 6
    assert calls[-1][1] == 1  # a pass of a second is not repeated within a turn
    assert [t.median_ms for t in times] == [100.0, 100.0]


def test_measured_latency():
    found = measure(network(), (2, 3, 10, 10))
    assert found.latency is not None
    assert found.latency.batch == 2
    assert 0 < found.latency_ms < 1000


# ---------------------------------------------------------------------------------------------------- account


@pytest.fixture
def account() -> Account:
    latency = Latency(4.0, "A Processor", 1, 2)
    before = Measurement((row("net.a", 100), row("net.b", 300)), disk_bytes=2000, latency=latency)
    small = row("net.b", 100, width=4, params=5, nonzeros=2, bits=4, bytes=5, effective_macs=40)
    after = Measurement((row("net.a", 100), small), 1000, replace(latency, median_ms=1.0))
    return Account(before, after, ["A note."], [("net.a", "too small")])


def test_metrics(account):
    found = account.metrics()
    assert found["compression/macs"] == 200
    assert found["compression/macs_cut"] == 0.5
    assert found["compression/effective_macs"] == 140
    assert found["compression/params_cut"] == 0.25
    assert found["compression/sparsity"] == pytest.approx(0.2)
    assert found["compression/bits"] == pytest.approx(8 * 45 / 15)
    assert found["compression/disk_bytes_cut"] == 0.5
    assert found["compression/latency_ms"] == 1
    assert found["compression/speedup"] == 4
    untimed = Account(replace(account.before, latency=None), account.after).metrics()
    assert "compression/macs" in untimed
    assert not {"compression/speedup", "compression/latency_ms"} & untimed.keys()


def test_table(account):
    shown = text(account)
    for line in [
        "MACs                           400        200  -50.0 %  2.00×",
        "latency                       4 ms       1 ms  -75.0 %  4.00×",
        "a batch of 1 on A Processor, 2 threads",
        "layers of net",
        "• A note.",
        "• left alone: net.a: too small",
    ]:
        assert " ".join(line.split()) in " ".join(shown.split())
    b = next(line for line in shown.splitlines() if line.strip().startswith("b "))
    assert b.split() == [
        "b",
        "8",
        "→",
        "4",
        "300",
        "→",
        "100",
        "10",
        "→",
        "5",
        "60.0",
        "32",
        "→",
        "4",
        "█░░░░░░░",
    ]
    assert max(map(len, shown.splitlines())) <= 80


def test_table_of_many_layers_leaves_out_the_middle():
    rows = tuple(row(f"layer{i}", 10) for i in range(100))
    account = Account(Measurement(rows, 1), Measurement(rows, 1))
    shown = text(account.table(max_layers=6))
    assert [i for i in range(100) if f"layer{i} " in shown] == [0, 1, 2, 97, 98, 99]
    assert "94 layers in the middle are left out" in shown


def test_layers_that_come_and_go():
    before = Measurement((row("a", 10), row("b", 10), row("c", 10)), 1)
    after = Measurement((row("a", 10), row("b.0", 3), row("b.1", 3), row("c", 10)), 1)
    account = Account(before, after)
    assert [(r.name, b is None, a is None) for r, b, a in account.layers()] == [
        ("a", False, False),
        ("b.0", True, False),
        ("b.1", True, False),
        ("b", False, True),
        ("c", False, False),
    ]
    assert Account.from_dict(json.loads(json.dumps(account.to_dict()))) == account
    assert "removed" in text(account)
    assert "new" in text(account)


def test_saved_and_loaded(account, tmp_path):
    path = account.save(tmp_path / "run")
    assert Account.load(path) == Account.load(tmp_path / "run") == account
    data = json.loads(path.read_text())
    assert data["versions"].keys() == {"lightning_compress", "torch", "lightning"}
    assert data["device"] == "A Processor"
    assert data["convention"].startswith("MACs: multiply-accumulates")
    assert data["rows"][1]["after"]["width"] == 4
    assert data["before"]["macs"] == 400
    for name in ("compression_layers.png", "compression_summary.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")


def test_plots_show_the_numbers(account):
    figures = account.figures()
    dense, kept = figures["layers"].axes[0].containers
    assert [bar.get_height() for bar in dense] == [8, 8]
    assert [bar.get_height() for bar in kept] == [8, 4]
    assert [label.get_text() for label in figures["layers"].axes[0].get_xticklabels()] == ["a", "b"]
    left = figures["summary"].axes[0].containers[1]
    assert left[0].get_width() == 50
    assert left[-1].get_width() == 25


def test_without_matplotlib_it_says_so_once(account, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    plots.available.cache_clear()
    try:
        with caplog.at_level("INFO"):
            account.save(tmp_path)
            account.save(tmp_path)
    finally:
        plots.available.cache_clear()
    assert caplog.text.count("pip install matplotlib") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["compression.json"]


def test_load_errors(account, tmp_path):
    with pytest.raises(ValueError, match=r"path: there is no compression.json at '.*absent'"):
        Account.load(tmp_path / "absent")
    path = account.save(tmp_path)
    whole = path.read_text()
    path.write_text(whole[:200])
    with pytest.raises(ValueError, match=r"is not a whole account \(JSONDecodeError"):
        Account.load(path)
    path.write_text(whole.replace('"notes"', '"nuts"'))
    with pytest.raises(ValueError, match=r"is not a whole account \(KeyError: 'notes'\)"):
        Account.load(path)


# ---------------------------------------------------------------------------------------------------- a fit


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.example_input_array = torch.zeros(1, 3, 10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return self(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Halve(Callback):
    """A method: it removes half of the channels, or does nothing but open and close the account."""

    def __init__(self, note: str, width: int | None = None, bits: dict[str, int] | None = None) -> None:
        self.note, self.width, self.bits = note, width, bits
        self.account: Account | None = None

    @property
    def state_key(self) -> str:
        return self.note

    def setup(self, trainer, pl_module, stage):
        open_account(trainer, pl_module)
        if self.width:
            pl_module.network = network(self.width)

    def on_fit_end(self, trainer, pl_module):
        self.account = close_account(
            trainer, pl_module, notes=[self.note], left_alone={self.note: "no reason"}, bits=self.bits
        )


@pytest.fixture(autouse=True)
def _wide_console(monkeypatch):
    monkeypatch.setattr(rich, "_console", Console(width=100))


def fit(tmp_path, *methods, module=None, **kwargs) -> Trainer:
    options = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }
    options |= {"enable_model_summary": False, "default_root_dir": tmp_path, "logger": False}
    trainer = Trainer(callbacks=list(methods), **(options | kwargs))
    trainer.fit(module or Module(), DataLoader(torch.randn(4, 3, 10, 10), batch_size=2))
    return trainer


def test_two_methods_share_one_account(tmp_path, capsys):
    first, second = Halve("first", width=4), Halve("second")
    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb")]
    trainer = fit(tmp_path, first, second, logger=loggers)
    account = first.account
    assert account is second.account
    assert account.notes == ["first", "second"]
    assert [name for name, _ in account.left_alone] == ["first", "second"]
    assert (account.before.macs, account.after.macs) == (21640, 10820)
    assert account.before.latency.device_name == account.after.latency.device_name
    assert run_folder(trainer) == tmp_path / "csv" / "version_0"
    assert Account.load(tmp_path / "csv" / "version_0") == account
    assert capsys.readouterr().out.count("before and after") == 1
    assert "compression/macs" in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = EventAccumulator(loggers[1].log_dir).Reload().Tags()
    assert "compression/speedup" in tags["scalars"]
    assert "compression/layers" in tags["images"]


def test_a_later_method_brings_bits(tmp_path, capsys):
    first, second = Halve("first"), Halve("second", bits={"network.0": 2})
    fit(tmp_path, first, second)
    account = Account.load(tmp_path)
    assert [r.bits for r in account.after.rows] == [2, 32, 32]
    assert account.notes == ["first", "second"]
    assert account.after.latency is not None
    assert capsys.readouterr().out.count("before and after") == 2


def test_each_fit_has_its_own_account(tmp_path):
    module = Module()
    first, second = Halve("first", width=4), Halve("second", width=2)
    fit(tmp_path, first, module=module)
    fit(tmp_path, second, module=module)
    assert (first.account.before.macs, second.account.before.macs) == (21640, 10820)
    assert second.account.notes == ["second"]
    reference = weakref.ref(module)
    del module, first, second  # Lightning binds the module's `log` to callbacks
    gc.collect()
    assert reference() is None  # the account keeps no module alive


def test_module_that_trains_in_bfloat16(tmp_path):
    method = Halve("first")
    fit(tmp_path, method, precision="bf16-true")
    assert method.account.before.bits == method.account.after.bits == 16


def test_fast_dev_run_leaves_no_file(tmp_path, capsys):
    method = Halve("first", width=4)
    fit(tmp_path, method, fast_dev_run=True)
    assert method.account.after.macs == 10820
    assert "before and after" in capsys.readouterr().out
    assert not list(tmp_path.rglob("compression*"))


def test_one_rank_works_alone(tmp_path, monkeypatch):
    """The others return at once, and rank 0 asks them for nothing."""

    class Lonely(Halve):
        def on_fit_end(self, trainer, pl_module):
            with monkeypatch.context() as patch:
                for collective in ("broadcast", "barrier", "reduce", "all_gather"):
                    patch.setattr(trainer.strategy, collective, lambda *a, **k: pytest.fail("collective"))
                super().on_fit_end(trainer, pl_module)
            monkeypatch.setattr(type(trainer), "is_global_zero", False)
            assert close_account(trainer, pl_module) is None

    method = Lonely("first", width=4)
    fit(tmp_path, method, logger=CSVLogger(tmp_path))
    assert method.account is not None


def test_closing_what_was_not_opened(tmp_path):
    trainer = Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path)
    assert close_account(trainer, Module()) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_both_networks_are_timed_on_the_device_of_the_fit(tmp_path):
    method = Halve("first", width=4)
    fit(tmp_path, method, accelerator="gpu", devices=1)
    name = torch.cuda.get_device_name()
    assert method.account.before.latency.device_name == method.account.after.latency.device_name == name
    assert measure(network().cuda(), (1, 3, 10, 10)).latency.device_name == name


def test_costs_of_layers_that_their_plain_form_does_not_show():
    conv = nn.Conv2d(4, 8, 3, bias=False)
    dense = count(conv, (1, 4, 6, 6))
    cheap = count(conv, (1, 4, 6, 6), costs={"": LayerCost(macs=100, params=20, bytes=33)})
    assert (dense.macs, dense.params) == (4608, 288)
    assert (cheap.macs, cheap.effective_macs, cheap.params, cheap.nonzeros, cheap.bytes) == (100, 100, 20, 20, 33)


def test_a_picture_goes_into_the_folder_of_the_run(tmp_path):
    trainer = Trainer(default_root_dir=tmp_path, logger=False)
    figure = plots.heat_map(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), title="scores", rows=["a", "b"])
    shown = figure.axes[0].images[0].get_array()
    assert shown.tolist() == [[0, 1], [2, 3]]
    log_figure(trainer, "white_box/scores", figure)
    log_figure(trainer, "curves", plots.lines({"x": [1.0, 2.0]}, title="t", x_label="epoch", y_label="bits"))
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["curves.png", "white_box_scores.png"]
    log_figure(Trainer(default_root_dir=tmp_path, fast_dev_run=True), "none", figure)
    assert not (tmp_path / "none.png").exists()
