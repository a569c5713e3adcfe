"""A teacher beside other methods in one Trainer: structure, masks and quantisers do what they do alone."""

from __future__ import annotations

from pathlib import Path

import foreign
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_compress
from lightning_compress.callbacks import LBC, QAT, HRank, KnowledgeDistillation
from lightning_compress.core.quant.attach import quantized_layers
from lightning_compress.core.sparse.nm import is_nm

EPOCHS = 3


def kd(hints: bool) -> KnowledgeDistillation:
    """By logits, and from the last block; hints bring connectors of the student's width."""
    torch.manual_seed(7)
    term = "hints" if hints else "similarity"
    return KnowledgeDistillation(
        foreign.Network(), {"logits": 1.0, term: 1.0}, features={"net.blocks.1": "blocks.1"}, task_weight=0.5
    )


def hrank(start_epoch: int = 0) -> HRank:
    return HRank(pruning_ratio=0.5, num_batches=1, rank_batch_size=16, start_epoch=start_epoch)


CASES = {
    "HRank, KD": lambda: [hrank(), kd(True)],
    "KD, HRank": lambda: [kd(False), hrank()],
    "HRank in mid-fit, KD": lambda: [hrank(1), kd(False)],
    "KD, LBC": lambda: [kd(True), LBC(n=2, m=4, end_epoch=2)],
    "LBC, KD": lambda: [LBC(n=2, m=4, end_epoch=2), kd(True)],
    "KD, QAT": lambda: [kd(True), QAT(weight_bits=4, activation_bits=4)],
    "QAT, KD": lambda: [QAT(weight_bits=4, activation_bits=4), kd(True)],
    "HRank, QAT, KD": lambda: [hrank(), QAT(weight_bits=4, activation_bits=4), kd(True)],
    "HRank, KD, QAT": lambda: [hrank(), kd(True), QAT(weight_bits=4, activation_bits=4)],
}


def fit(name: str, root: Path, *others: Callback, **kwargs) -> foreign.Foreign:
    module = foreign.made()
    torch.manual_seed(0)
    foreign.fit(module, root, *CASES[name](), *others, max_epochs=EPOCHS, **kwargs)
    return module


@pytest.mark.parametrize("name", CASES)
def test_a_teacher_and_others(name: str, tmp_path: Path) -> None:
    module = fit(name, tmp_path, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1))
    assert float(module.trainer.callback_metrics["train/kd/logits"]) > 0
    if "HRank" in name:
        assert foreign.widths(module)["net.blocks.0.conv1"] == 6
    if "LBC" in name:
        assert is_nm(module.net.blocks[0].conv1.weight, 2, 4)
    if "QAT" in name:
        assert set(quantized_layers(module)) == {n for n in foreign.widths(module) if n.startswith("net.")}

    # stopped and resumed, loaded, exported: as of any other method
    again = fit(name, tmp_path, ckpt_path=tmp_path / "epoch=1.ckpt")
    foreign.assert_same(again, module)
    foreign.assert_same(lightning_compress.load(foreign.Foreign, tmp_path / "epoch=2.ckpt"), module)
    x = next(iter(foreign.digits()))[0]
    exported = lightning_compress.export(module, tmp_path / "small", x[:1], format="torch")
    with torch.no_grad():
        expected = module.eval()(x)
    torch.testing.assert_close(torch.export.load(exported.path).module()(x), expected, atol=1e-4, rtol=0)
    assert not any("knowledge_distillation" in name for name, _ in torch.export.load(exported.path).named_parameters())


@pytest.mark.parametrize(("one", "other"), [("LBC, KD", "KD, LBC"), ("QAT, KD", "KD, QAT")])
def test_the_order_in_the_list_does_not_matter(one: str, other: str, tmp_path: Path) -> None:
    first, second = (dict(fit(name, tmp_path).named_parameters()) for name in (one, other))
    assert first.keys() == second.keys()
    for name, parameter in first.items():
        torch.testing.assert_close(second[name], parameter)
