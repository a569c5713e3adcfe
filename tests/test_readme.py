"""The README says what is: its table comes from the catalog, its commands and code work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_compress.catalog import CARDS, markdown_table
from lightning_compress.cli.configs import find_config
from lightning_compress.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_table_is_in_sync_with_the_catalog():
    assert markdown_table() in README, "run `lc methods --markdown` and paste its output between the markers"
    assert markdown_table().count("\n") == len(CARDS) + 1


def test_the_two_commands_of_a_newcomer_are_there():
    commands = "".join(blocks("bash"))
    assert "pip install -e . && lc fit --config quickstart\n" in commands
    assert "pip install -e '.[test]' && pytest\n" in commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_and_configs_exist(page: Path):
    shell = "\n".join(blocks("bash", page.read_text(encoding="utf-8")))
    for command in re.findall(r"^(?:.*&& )?lc (\w+)", shell, re.MULTILINE):
        assert command in COMMANDS
    for name in re.findall(r"--config (\S+)", shell):
        if not name.endswith(".yaml"):  # of a run
            find_config(name)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_functions_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = next(block for block in blocks("python") if "feature_map_rank" in block)
    exec(code, {})
    assert capsys.readouterr().out.split() == ["125485696", "8", "36"]
    assert list(tmp_path.glob("resnet56.*"))


def test_trainer_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = next(block for block in blocks("python") if "trainer.fit" in block)
    quick = code.replace("max_epochs=10", "max_epochs=2, limit_train_batches=1, limit_val_batches=1, logger=False")
    quick = quick.replace("start_epoch=5", "start_epoch=1, num_batches=1, rank_batch_size=2")
    assert quick != code
    exec(quick, {})
    assert list(tmp_path.glob("compressed.*"))
