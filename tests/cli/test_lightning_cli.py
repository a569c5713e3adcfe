"""`lc fit` and its relatives, in this process, on small inputs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringModel  # and BoringDataModule, by name
from torch import nn

from lightning_compress.callbacks import HRank, L1Norm, RestoreCompressed
from lightning_compress.cli.lightning_cli import CompressCLI
from lightning_compress.cli.main import main

TINY = ["--data.size", "8", "--data.batch_size", "16", "--trainer.limit_train_batches", "2"]
TINY += ["--trainer.limit_val_batches", "1", "--trainer.enable_progress_bar", "false"]
TINY += ["--trainer.enable_model_summary", "false", "--trainer.accelerator", "cpu"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def built(*args: str) -> CompressCLI:
    return CompressCLI([*args, "--trainer.logger", "false", "--trainer.accelerator", "cpu"], run=False)


def refused(args: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("lc: error: ")
    assert error.count("\n") == 1
    return error


# ---- configs


def test_fragments_compose_and_the_command_line_wins():
    parts = ["data/digits", "model/resnet20", "method/hrank", "method/l1_norm"]
    args = [arg for part in parts for arg in ("--config", part)]
    cli = built(*args, "--trainer.max_epochs", "3", "--data.batch_size", "7")
    kinds = [type(callback) for callback in cli.trainer.callbacks]
    assert kinds.index(HRank) < kinds.index(L1Norm)
    assert cli.trainer.max_epochs == 3  # the fragment of the model says 164
    assert cli.datamodule.batch_size == 7


def test_restore_compressed_is_always_there():
    assert any(
        isinstance(callback, RestoreCompressed) for callback in built("--config", "quickstart").trainer.callbacks
    )


def test_classes_and_shape_follow_the_data():
    cli = built("--config", "data/cifar100", "--config", "model/resnet20")
    assert cli.model.network.linear.out_features == 100
    assert built("--config", "data/digits", "--config", "model/resnet20").model.input_shape == (1, 32, 32)


def test_classes_that_the_config_sets_stay():
    args = ["--config", "data/digits", "--config", "model/resnet20", "--model.num_classes", "12"]
    assert built(*args).model.network.linear.out_features == 12


def test_config_in_place_of_a_file():
    cli = built("--config", "{model: BoringModel, data: BoringDataModule, trainer: {max_epochs: 5}}")
    assert (type(cli.model), cli.trainer.max_epochs) == (BoringModel, 5)


def test_print_config_can_be_read_again(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", "quickstart", "--trainer.max_epochs", "17", "--print_config"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["trainer"]["max_epochs"] == 17
    (tmp_path / "printed.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", "printed.yaml", "--print_config"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == text


# ---- mistakes


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["--config", "quikstart"], "'quickstart'"),
        (["--config", "quickstart", "--config", "recipes/hrank/quik"], "'recipes/hrank/quick'"),
        (["--config", "quickstart", "--trainer.callbacks+=HRnk"], "'HRank'"),
        (["--config", "quickstart", "--model", "ImageClasifier"], "'ImageClassifier'"),
        (["--config", "quickstart", "--data", "Digts"], "'Digits'"),
        (["--config", "quickstart", "--data.batchsize", "3"], "'batch_size'"),
        (["--config", "quickstart", "--optimizer", "SDG"], "'SGD'"),
        (["--config", "quickstart", "--trainer.max_epochs", "many"], "expected int"),
        (["--config", "quickstart", "--trainer.precison", "32"], "'trainer.precision'"),
        (["--config", "quickstart", "--data.channels", "3", "--model.network", "resnet21"], "'resnet20'"),
        (["--config", "quickstart", "--trainer.callbacks.pruning_ratio", "1.5"], "pruning_ratio"),
        (["--config", "data/cifar10", "--config", "model/resnet20"], "cifar10.npz"),
        ([], "lc fit --config quickstart"),
    ],
    ids=" ".join,
)
def test_mistakes_end_in_one_line_that_says_what_was_meant(args: list[str], hint: str, capsys):
    assert hint in refused(["fit", *args], capsys)


# ---- the optimiser


class SwapHead(Callback):
    """Replaces the layer in setup, as methods do."""

    def setup(self, trainer, pl_module, stage):
        pl_module.layer = nn.Linear(32, 2)
        self.before = pl_module.layer.weight.detach().clone()


class PlainModule(BoringModel):
    """A module whose optimiser is the command line's business."""


BORING = ["--model", "PlainModule", "--data", "BoringDataModule", "--trainer.max_epochs", "1"]


def test_optimizer_of_the_command_line_trains_layers_that_setup_replaced():
    args = ["--optimizer", "SGD", "--optimizer.lr", "0.1", "--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "1"]
    cli = built(*BORING, *args, "--trainer.limit_train_batches", "3", "--trainer.barebones", "true")
    swap = SwapHead()
    cli.trainer.callbacks.append(swap)
    cli.trainer.fit(cli.model, cli.datamodule)
    assert (cli.model.layer.weight - swap.before).abs().max() > 0.01
    assert isinstance(cli.trainer.lr_scheduler_configs[0].scheduler, torch.optim.lr_scheduler.StepLR)


def test_module_with_such_an_optimizer_can_be_sent_to_another_process():
    cli = built(*BORING, "--optimizer", "SGD", "--optimizer.lr", "0.1")
    copy = pickle.loads(pickle.dumps(cli.model))
    (group,) = copy.configure_optimizers().param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in copy.parameters()]


def test_without_an_optimizer_the_module_keeps_its_own():
    cli = built(*BORING)
    assert "configure_optimizers" not in vars(cli.model)


# ---- whole runs


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Folder of a short fit that prunes at epoch 1."""
    root = tmp_path_factory.mktemp("run")
    main(["fit", "--config", "recipes/l1_norm/quick", *TINY, "--trainer.max_epochs", "2",
          "--trainer.default_root_dir", str(root), "--trainer.callbacks.start_epoch", "1"])  # fmt: skip
    return next(root.glob("lightning_logs/version_0"))


@pytest.fixture
def checkpoint(run: Path) -> str:
    return str(next(run.glob("checkpoints/*.ckpt")))


def test_a_run_leaves_account_and_config(run: Path):
    account = json.loads((run / "compression.json").read_text())
    assert account
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 2
    assert (run / "config.yaml").read_text().startswith("# lightning-compress==")


def test_fit_runs_twice_in_one_folder():
    args = ["--model", "PlainModule", "--data", "BoringDataModule", "--trainer.logger", "false", "--trainer.max_steps"]
    for _ in range(2):
        main(["fit", *args, "1", "--trainer.enable_progress_bar", "false"])


def test_test_restores_the_pruned_network(run: Path, checkpoint: str, capsys):
    main(["test", "--config", str(run / "config.yaml"), "--ckpt_path", checkpoint, "--trainer.logger", "false"])
    assert "test/acc" in capsys.readouterr().out


def test_resume_keeps_the_command_lines_settings(run: Path, checkpoint: str):
    args = ["--config", str(run / "config.yaml"), "--ckpt_path", checkpoint, "--trainer.logger", "false"]
    cli = CompressCLI(["fit", *args, "--trainer.max_epochs", "3", "--model.label_smoothing", "0.25"])
    assert cli.model.label_smoothing == 0.25
    assert cli.model.network.layer1[0].conv1.out_channels == 8
    assert cli.trainer.current_epoch == 3


def test_export_needs_the_checkpoint_alone(checkpoint: str, tmp_path, capsys):
    main(["export", checkpoint, "--format", "torch", "--output", str(tmp_path / "net.pt2")])
    printed = capsys.readouterr().out
    assert "net.pt2" in printed
    assert "differs from eager by at most" in printed
    program = torch.export.load(tmp_path / "net.pt2").module()
    assert program(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_export_of_a_checkpoint_that_names_no_class(checkpoint: str, tmp_path, capsys):
    content = torch.load(checkpoint, weights_only=True)
    del content["hyper_parameters"]
    torch.save(content, tmp_path / "bare.ckpt")
    assert "--config or --model" in refused(["export", "bare.ckpt"], capsys)
    main(["export", "bare.ckpt", "--config", "recipes/l1_norm/quick", "--data.size", "8", "--format", "torch"])
    assert (tmp_path / "bare.pt2").is_file()


def test_profile_of_a_checkpoint_is_that_of_the_narrow_network(checkpoint: str, capsys):
    main(["profile", "--checkpoint", checkpoint, "--json"])
    layers = {layer["name"]: layer for layer in json.loads(capsys.readouterr().out)["layers"]}
    assert layers["network.layer1.0.conv1"]["shape"] == [8, 8, 8]


def test_report_is_one_page(run: Path, tmp_path, capsys):
    main(["report", str(run), "--output", "page.html"])
    assert capsys.readouterr().out.strip() == "page.html"
    assert (tmp_path / "page.html").read_text().lstrip().lower().startswith("<!doctype html")
