"""The front door: dispatch, listings, what is imported, how mistakes are answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from lightning_compress import __version__
from lightning_compress.catalog import CARDS, CONFIGS, config_names
from lightning_compress.cli.configs import find_config, summary
from lightning_compress.cli.main import COMMANDS, main


def refused(args: list[str], capsys) -> str:
    """What `lc` says when it refuses a command line, with exit code 2 and in one line."""
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize("args", [["methods"], ["configs"], ["configs", "hrank"], ["--version"], ["--help"], []])
def test_quick_commands_import_neither_torch_nor_lightning(args: list[str]):
    code = (
        "import sys; from lightning_compress.cli.main import main; main(sys.argv[1:]);"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, *args], check=True, capture_output=True)


@pytest.mark.slow
def test_methods_takes_a_fifth_of_importing_lightning():
    def seconds(*args: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *args], check=True, capture_output=True)
        return time.perf_counter() - start

    ours = min(seconds("-m", "lightning_compress", "methods") for _ in range(3))
    assert ours < seconds("-c", "import lightning.pytorch") / 5


@pytest.mark.slow
def test_help_of_fit_takes_hardly_longer_than_lightning_cli():
    def cpu_seconds(code: str) -> float:
        code = f"import resource\ntry:\n    {code}\nexcept SystemExit: pass\n" + (
            "import sys; print(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        return float(done.stderr.split()[-1])

    ours = "from lightning_compress.cli.main import main; main(['fit', '--help'])"
    theirs = "from lightning.pytorch.cli import LightningCLI; LightningCLI(args=['fit', '--help'])"
    assert min(cpu_seconds(ours) for _ in range(3)) < 1.3 * min(cpu_seconds(theirs) for _ in range(3))


def test_help_lists_every_command(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert "lc fit --config quickstart" in text


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"lightning-compress {__version__}\n"


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["fti"], "unknown command 'fti'. Did you mean 'fit'"),
        (["methods", "hrnk"], "'hrank'"),
        (["methods", "prunning"], "'pruning'"),
        (["configs", "quikstart"], "'quickstart'"),
        (["configs", "quikstart", "--show"], "'quickstart'"),
        (["report", "no_such_folder"], "no_such_folder"),
        (["profile", "resnet21", "--input", "3,32,32"], "'resnet20'"),
        (["profile", "resnet20", "--input", "three"], "3,224,224"),
        (["profile", "resnet20"], "--input"),
        (["profile", "resnet20", "--input", "3,32,32", "--convention", "mac"], "'macs'"),
        (["profile", "torchvision.models.no_such", "--input", "3,32,32"], "no_such"),
        (["profile"], "lc profile resnet56"),
        (["export", "no_such.ckpt"], "no_such.ckpt"),
    ],
    ids=" ".join,
)
def test_mistakes_are_answered_with_what_was_meant(args: list[str], hint: str, capsys):
    assert hint in refused(args, capsys)


def test_methods_lists_all_and_shows_one(capsys):
    main(["methods"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CARDS) + 1
    main(["methods", "HRank"])
    shown = capsys.readouterr().out
    assert "arXiv:2002.10179" in shown
    assert "93.57  65.94M" in shown
    assert "recipes/hrank/quick" in shown


def test_methods_as_json(capsys):
    main(["methods", "quantization", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [entry["slug"] for entry in found] == [c.slug for c in CARDS if c.family == "quantization"]


def test_configs_lists_all_with_their_first_line(capsys):
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == config_names()
    assert lines[0].endswith(summary(config_names()[0]))


def test_configs_shows_one(capsys):
    main(["configs", "data/digits", "--show"])
    assert capsys.readouterr().out == (CONFIGS / "data" / "digits.yaml").read_text()
    main(["configs", "data/digits", "--path"])
    assert capsys.readouterr().out.strip() == str(CONFIGS / "data" / "digits.yaml")


def test_an_existing_file_wins_over_a_packaged_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart") == CONFIGS / "quickstart.yaml"
    (tmp_path / "quickstart").write_text("trainer: {}")
    assert find_config("quickstart").read_text() == "trainer: {}"


def test_a_config_is_found_by_a_mistyped_last_part():
    with pytest.raises(ValueError, match="'method/hrank'"):
        find_config("method/hrnk")


def test_our_own_bugs_keep_their_traceback(monkeypatch):
    def broken(args):
        raise KeyError("a bug")

    monkeypatch.setattr("lightning_compress.cli.methods.main", broken)
    with pytest.raises(KeyError, match="a bug"):
        main(["methods"])


def test_profile_of_a_name_as_json(capsys):
    main(["profile", "resnet56", "--input", "3x32x32", "--json"])
    assert json.loads(capsys.readouterr().out)["macs"] == 125_485_696


def test_profile_of_a_class_path_with_arguments(capsys):
    main(["profile", "torchvision.models.resnet18", "--init", "num_classes=10", "--input", "3,32,32", "--json"])
    assert json.loads(capsys.readouterr().out)["params"] == 11_181_642


def test_profile_of_a_config_with_latency(capsys):
    main(["profile", "--config", "recipes/l1_norm/quick", "--data.size", "8", "--latency"])
    printed = capsys.readouterr().out
    assert "│ 16×8×8 │" in printed
    assert "network.layer1.0.conv1" in printed
    assert "ms a batch of 1" in printed


def test_profile_refuses_a_config_without_a_model(capsys):
    assert "has no model" in refused(["profile", "--config", "data/digits"], capsys)


@pytest.mark.parametrize("policy", [None, "active"])
def test_threads_of_a_fit_sleep_while_they_wait_unless_told_otherwise(policy: str | None, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    monkeypatch.setattr("lightning_compress.cli.lightning_cli.main", lambda args: None)
    main(["fit"])
    assert os.environ["OMP_WAIT_POLICY"] == (policy or "passive")
