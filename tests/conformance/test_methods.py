"""What every method promises, whatever it does: the same checks on all of them."""

from __future__ import annotations

import copy
import pickle
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from method_table import CASES, COMPANIONS, EPOCHS, METHODS, Case, Finished, Parts
from torch import Tensor, nn
from two_processes import Results

import lightning_compress
from lightning_compress.callbacks import RestoreCompressed
from lightning_compress.cli.lightning_cli import CompressCLI
from lightning_compress.cli.main import main
from lightning_compress.core.report import Account
from lightning_compress.core.surgery import attach_record

REMEDY = "load_this_with_lightning_compress_load"
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_method = pytest.mark.parametrize("case", METHODS, ids=str)


def evaluate(parts: Parts, root: Path, *callbacks: Callback, ckpt_path: Any = None) -> dict[str, Tensor]:
    trainer = foreign.make_trainer(root, *callbacks)
    trainer.validate(parts.module, **parts.evaluation, ckpt_path=ckpt_path, verbose=False)
    return trainer.callback_metrics


# ---- training


def test_fits_a_module_that_is_not_ours(finished: Finished) -> None:
    """... and makes it smaller, if that is its business."""
    assert finished.trainer.current_epoch == EPOCHS
    assert all(p.isfinite().all() for p in finished.module.parameters())
    if finished.case.compresses:
        account = Account.load(finished.root / "compression.json")
        before, after = account.before, account.after
        if finished.case.keeps_weights:
            assert after.macs < before.macs
            return
        if finished.case.card.family == "quantization":  # as many weights, and ranges beside them
            assert after.bytes < before.bytes
            return
        assert (after.macs, after.nonzeros, after.bytes) < (before.macs, before.nonzeros, before.bytes)


def test_every_trainable_parameter_is_in_the_optimiser(finished: Finished) -> None:
    groups = [g for o in finished.trainer.optimizers for g in o.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    own = [id(p) for p in finished.module.parameters() if p.requires_grad]
    assert sorted(held) == sorted(own)


@each_case
@pytest.mark.parametrize(
    "arguments",
    [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}, {"fast_dev_run": True, "max_epochs": None}],
    ids=["bf16", "accumulation", "fast_dev_run"],
)
def test_trains_under(case: Case, arguments: dict[str, Any], tmp_path: Path) -> None:
    parts = case.parts()
    manual = not parts.module.automatic_optimization
    if manual and "accumulate_grad_batches" in arguments:
        with pytest.raises(MisconfigurationException, match="not supported for manual optimization"):
            case.fit(tmp_path, parts=parts, **arguments)
        return
    trainer = case.fit(tmp_path, parts=parts, **arguments)
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in parts.module.parameters())
    steps = 1 if "fast_dev_run" in arguments else EPOCHS * 4 // arguments.get("accumulate_grad_batches", 1)
    # with manual optimisation the global step counts the steps of every optimiser
    assert (trainer.fit_loop.epoch_loop._batches_that_stepped if manual else trainer.global_step) == steps


@pytest.mark.parametrize("epoch", range(EPOCHS - 1))
def test_resumed_equals_uninterrupted(finished: Finished, epoch: int, tmp_path: Path) -> None:
    """Stopped before, at and after the epoch in which something changes: equal bit for bit."""
    parts = finished.case.parts()
    finished.case.fit(tmp_path, parts=parts, ckpt_path=finished.checkpoint(epoch))
    foreign.assert_same(parts.module, finished.module)


def test_two_processes_end_with_the_same_weights(finished: Finished, pool: Results) -> None:
    first, second = pool[finished.case]
    alone = dict(finished.module.named_parameters())
    if finished.case.learns_widths:
        dense = finished.case.parts().module
        assert first.keys() == alone.keys()
        assert sum(p.numel() for p in first.values()) < sum(p.numel() for p in dense.parameters())
    else:
        assert {n: p.shape for n, p in first.items()} == {n: p.shape for n, p in alone.items()}
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name]), name


@each_case
@pytest.mark.parametrize("first", ["method", "average"])
def test_an_average_of_the_weights_is_right_or_refused(case: Case, first: str, tmp_path: Path) -> None:
    """An average that always takes the newest weights ends with them, whatever happened on the way."""

    class Newest(WeightAveraging):
        def __init__(self) -> None:
            super().__init__(avg_fn=lambda average, newest, count: newest)

    parts, plain = case.parts(), case.parts()
    parts.callbacks = [*parts.callbacks, Newest()] if first == "method" else [Newest(), *parts.callbacks]
    refusal = ""
    try:
        trainer = case.fit(tmp_path, ModelCheckpoint(tmp_path), parts=parts)
    except MisconfigurationException as error:
        refusal = str(error)
    if refusal:
        assert any(name in refusal for name in (case.cls.__name__, *COMPANIONS.get(case.card.slug, [])))
        assert "Newest" in refusal
        assert not parts.module.trainer.global_step
        return
    case.fit(tmp_path, parts=plain)
    foreign.assert_same(parts.module, plain.module)
    path = trainer.checkpoint_callback.best_model_path
    foreign.assert_same(lightning_compress.load(type(plain.module), path, **case.networks()), plain.module)


# ---- afterwards


def hooks(module: nn.Module) -> int:
    kinds = [k for k in vars(module) if k.endswith("_hooks") and ("forward" in k or "backward" in k)]
    return sum(len(getattr(m, kind)) for m in module.modules() for kind in kinds)


def test_nothing_is_left_behind(finished: Finished) -> None:
    module = finished.module
    reloaded = finished.case.parts().module
    attach_record(reloaded)
    reloaded.load_state_dict(module.state_dict())
    assert hooks(module) == hooks(reloaded)  # gates are part of some networks; nothing else may stay
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in module.parameters())
    for optimizer in finished.trainer.optimizers:
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    assert "training_step" not in vars(module)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        foreign.assert_same(copied, module)
        again = finished.case.parts().module
        attach_record(again)
        again.load_state_dict(copied.state_dict())
        foreign.assert_same(again, module)


@each_case
def test_a_trainer_fits_twice(case: Case, tmp_path: Path) -> None:
    parts = case.parts()
    trainer = case.fit(tmp_path, parts=parts)
    narrow = foreign.widths(parts.module)
    trainer.fit_loop.max_epochs = EPOCHS + 1
    trainer.fit(parts.module, **parts.data)
    assert trainer.current_epoch == EPOCHS + 1
    assert foreign.widths(parts.module) == narrow


def test_validation_and_prediction_change_nothing(finished: Finished, tmp_path: Path) -> None:
    for module, callbacks in (
        (finished.module, finished.callbacks),
        (finished.case.parts().module, finished.case.parts().callbacks),
    ):
        parts = finished.case.parts()
        before = copy.deepcopy(module)
        trainer = foreign.make_trainer(tmp_path, *callbacks)
        trainer.validate(module, **parts.evaluation, verbose=False)
        trainer.predict(module, **parts.evaluation)
        foreign.assert_same(module, before)


def test_an_export_equals_the_module(finished: Finished, tmp_path: Path) -> None:
    given = getattr(finished.module, "example_input_array", None)
    x = torch.rand(3, *(next(iter(foreign.digits()))[0] if given is None else given).shape[1:])
    exported = lightning_compress.export(finished.module, tmp_path / "small", x, format="torch")
    assert exported.max_abs_difference < 1e-5
    with torch.no_grad():
        expected = finished.module.eval()(x)
    torch.testing.assert_close(torch.export.load(exported.path).module()(x), expected, atol=1e-5, rtol=0)
    finished.module.train()


@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights"])
def test_a_checkpoint_reloads(finished: Finished, weights_only: bool, tmp_path: Path) -> None:
    """By RestoreCompressed, by the method itself, and by `load`; by plain torch, or its error names the remedy."""
    path = tmp_path / "saved.ckpt"
    finished.trainer.save_checkpoint(path, weights_only)
    loaded = lightning_compress.load(type(finished.module), path, **finished.case.networks())
    foreign.assert_same(loaded, finished.module)
    parts = finished.case.parts()
    parts.module = finished.module
    expected = evaluate(parts, tmp_path)
    for callback in (RestoreCompressed(), *finished.case.parts().callbacks):
        assert evaluate(finished.case.parts(), tmp_path, callback, ckpt_path=path) == expected
    fresh, state = finished.case.parts().module, torch.load(path, weights_only=True)["state_dict"]
    if state.keys() == fresh.state_dict().keys():
        fresh.load_state_dict(state)
    else:
        with pytest.raises(RuntimeError, match=REMEDY):
            fresh.load_state_dict(state)


# ---- arguments

# Argument of our vocabulary -> values that cannot be, and what the message must show of each.
IMPOSSIBLE: dict[str, list[tuple[Any, str]]] = {
    "pruning_ratio": [
        (1.5, "1.5"),
        (-0.1, "-0.1"),
        ("[0.5]*", "'[0.5]*'"),
        ({"net.stem": 2.0}, "2.0"),
        ({"no.such.layer": 0.5}, "'no.such.layer'"),
    ],
    "sparsity": [
        (1.5, "1.5"),
        (-0.1, "-0.1"),
        ("[0.5]*", "'[0.5]*'"),
        ({"net.stem": 2.0}, "2.0"),
        ({"no.such.layer": 0.5}, "'no.such.layer'"),
    ],
    "target_macs": [(0.0, "0.0"), (1.0, "1.0"), (-1, "-1")],
    "include": [(["no.such.layer*"], "'no.such.layer*'")],
    "exclude": [(["no.such.layer*"], "'no.such.layer*'")],
    "round_to": [(0, "0")],
    "start_epoch": [(-1, "-1"), (EPOCHS, f"max_epochs={EPOCHS}")],
    "end_epoch": [(-1, "-1"), (EPOCHS, f"max_epochs={EPOCHS}")],
    "num_batches": [(0, "0")],
    "rank_batch_size": [(0, "0")],
    "epochs_per_layer": [(0, "0")],
    "start_conv": [(0, "0")],
    "connectivity": [(0.5, "0.5"), ({"net.stem": 0.0}, "0.0"), ({"no.such.layer": 2.0}, "'no.such.layer'")],
    "weight_bits": [(0, "0"), (33, "33"), ({"no.such.layer": 4}, "'no.such.layer'")],
    "activation_bits": [(-1, "-1"), (33, "33")],
    "first_last_bits": [(0, "0"), (33, "33")],
    "range_lr": [(0.0, "0.0")],
    "ema": [(1.0, "1.0"), (-0.1, "-0.1")],
    "fixed_rate": [(0.0, "0.0")],
    "min_group": [(0.0, "0.0"), (1.5, "1.5")],
    "w_at": [(-1.0, "-1.0")],
    "feature_layer": [("no.such.layer", "'no.such.layer'")],
    "ema_epoch": [(-1, "-1")],
    "ema_decay": [(1.5, "1.5")],
    "alpha_init": [(0.0, "0.0")],
    "alpha_lr": [(0.0, "0.0")],
    "prune_epochs": [(0, "0"), (EPOCHS, f"max_epochs={EPOCHS}")],
    "retrain_epochs": [(0, "0")],
    "quant_epochs": [(0, "0")],
    "quant_rho": [(0.0, "0.0")],
    "partial_fraction": [(0.0, "0.0"), (1.5, "1.5")],
    "quant_rounds": [(-1, "-1")],
    "partial_epochs": [(0, "0")],
    "num_patterns": [(0, "0"), ({"no.such.layer": 4}, "'no.such.layer'")],
    "progressive": [([], "[]"), ([3, 4], "[3, 4]")],
    "connectivity_exclude": [(["no.such.layer*"], "'no.such.layer*'")],
    "pattern_block": [(0, "0")],
    "n_entries": [(0, "0"), (10, "10")],
    "library_sizes": [([], "[]"), ([4, 8], "[4, 8]")],
    "extract_epochs_per_phase": [(0, "0")],
    "every_n_epochs": [(0, "0")],
    "warmup_epochs": [(-1, "-1"), (EPOCHS, f"warmup_epochs={EPOCHS}")],
    "rho": [(0.0, "0.0")],
    "rho_growth": [(0.5, "0.5")],
    "recalibrate_bn": [(-1, "-1")],
    "G": [(1, "1"), (-1, "-1")],
    "T": [(-1, "-1")],
    "k_neighbors": [(0, "0")],
    "kmeans_restarts": [(0, "0")],
    "kmeans_iters": [(0, "0")],
    "tau": [(0.0, "0.0"), (-1.0, "-1.0")],
    "sigma_empirical": [(0.0, "0.0")],
    "gmm_lr": [(0.0, "0.0")],
    "gmm_weight_decay": [(-1e-4, "-0.0001")],
    "max_preserve": [(0, "0"), (11, "11")],
    "food_number": [(1, "1")],
    "max_cycle": [(-1, "-1")],
    "food_limit": [(0, "0")],
    "honeychange_num": [(0, "0")],
    "calfitness_epoch": [(0, "0")],
    "fitness_batches": [(0, "0")],
    "fixed_code": [([5], "[5]"), ([0, 5], "[0, 5]")],
    "lambda_": [(-0.1, "-0.1"), ({"no.such.layer": 0.5}, "'no.such.layer'")],
    "update_fy_step": [(0, "0")],
    "steps_per_layer": [(0, "0"), (10**6, "1000000")],
    "finetune_steps": [(0, "0")],
    "average_last": [(0, "0")],
    "num_classes": [(1, "1")],
    "vote_layers": [(["no.such.layer*"], "'no.such.layer*'")],
    "sparse_lambda": [(-1.0, "-1.0")],
    "min_preserve": [(1.5, "1.5")],
    "start_keep": [(0.0, "0.0")],
    "keep_step": [(0.0, "0.0")],
    "miu": [(-1.0, "-1.0")],
    "mask_step": [(0, "0")],
    "mask_points": [("no.such.block", "'no.such.block'")],
    "search_epochs": [(-1, "-1")],
    "thre": [(-0.5, "-0.5")],
    "reduction": [(0, "0")],
    "lambda_k": [(-1.0, "-1.0")],
    "lambda_m": [(-1.0, "-1.0")],
    "lambda_s": [(-1.0, "-1.0")],
    "target_density": [(-0.1, "-0.1"), (1.5, "1.5")],
    "update_every_n_steps": [(0, "0")],
    "init_low": [(2.0, "2.0")],
    "tune_epochs": [(-1, "-1"), (EPOCHS, str(EPOCHS))],
    "tune_lr": [(0.0, "0.0")],
    "n": [(0, "0"), (64, "64")],
    "m": [(2, "2"), (64, "64")],
    "exponent": [(0, "0")],
    "teacher": [("no_such_network", "'no_such_network'"), ("no_such_file.ckpt", "'no_such_file.ckpt'")],
    "teacher_weights": [("no_such_file.pt", "'no_such_file.pt'"), (["one.pt", "two.pt"], "['one.pt', 'two.pt']")],
    "losses": [({}, "{}"), ({"logit": 1.0}, "'logit'"), ({"logits": -1.0}, "-1.0"), ({"hints": 1.0}, "'hints'")],
    "features": [({"no.such.layer": "*"}, "'no.such.layer'")],
    "groups": [(0, "0")],
    "task_weight": [(-0.5, "-0.5")],
    "temperature": [(0.0, "0.0")],
    "contrast_dim": [(0, "0")],
    "teacher_head": [("no.such.layer", "'no.such.layer'"), ("net.stem", "'net.stem'")],
    "student_head": [("net.head", "'net.head'")],
    "z_dim": [(0, "0")],
    "hidden": [([0], "0")],
    "classifier_dim": [(0, "0")],
    "dropout": [(1.0, "1.0")],
    "contrast_temperature": [(0.0, "0.0")],
    "contrast_negatives": [(0, "0")],
    "initial_epochs": [(-1, "-1"), (EPOCHS, f"initial_epochs={EPOCHS}")],
    "contrast_momentum": [(1.0, "1.0")],
    "connector_lr_factor": [(0.0, "0.0")],
    "keep_ratio": [(0.0, "0.0"), (1.5, "1.5")],
    "num_stages": [(0, "0")],
    "mix_low": [(-0.1, "-0.1"), (1.5, "1.5")],
    "visit_exponent": [(-1.0, "-1.0")],
    "visit_norm": [(0.0, "0.0")],
    "vsd_weight": [(-1.0, "-1.0")],
    "vcd_weight": [(-1.0, "-1.0")],
    "score_lr_factor": [(0, "0")],
    "score_weight_decay": [(-1e-4, "-0.0001")],
    "rotation_update": [(0, "0")],
    "rotation_iters": [(0, "0")],
    "t_min": [(0.0, "0.0"), (20.0, "20.0")],
    "t_max": [(-1.0, "-1.0")],
    "max_epochs": [(0, "0")],
    "feature_layers": [(["no.such.layer"], "'no.such.layer'")],
    "num_students": [(1, "1")],
    "lambda_diversity": [(-1.0, "-1.0")],
    "lambda_fusion": [(-1.0, "-1.0")],
    "lambda_self_distillation": [(-1.0, "-1.0")],
    "fusion_weight_decay": [(-1e-4, "-0.0001")],
    "mask_weight_decay": [(-1.0, "-1.0")],
    "lambda_update_coeff": [(-1.0, "-1.0")],
    "upconv_coeff": [(-1.0, "-1.0")],
    "band_updates": [(0, "0")],
    "band_end": [(0.0, "0.0"), (1.5, "1.5")],
    "frozen_threshold": [(0.0, "0.0"), (1.5, "1.5")],
    "student_weights": [("no_such_file.ckpt", "'no_such_file.ckpt'")],
    "lambda_attention": [(-1.0, "-1.0")],
    "lambda_discriminator": [(-1.0, "-1.0")],
    "attention_mix": [([-1.0, 0.5], "-1.0"), ([0.0, 0.0], "[0.0, 0.0]")],
    "layers": [(["no.such.layer"], "'no.such.layer'")],
    "student_ratio": [(0, "0")],
    "lambda_cd": [(-1.0, "-1.0")],
    "lambda_rel": [(-1.0, "-1.0")],
    "clip_start": [(-1.0, "-1.0"), (50.0, "50.0")],
}


def impossible() -> Iterator[Any]:
    for case in METHODS:
        for argument, kind in typing.get_type_hints(case.cls.__init__).items():
            values = list(IMPOSSIBLE.get(argument, []))
            if any(typing.get_origin(k) is typing.Literal for k in (kind, *typing.get_args(kind))):
                values.append(("nonsense", "'nonsense'"))
            for value, shown in values:
                yield pytest.param(case, argument, value, shown, id=f"{case}-{argument}-{value}")


@pytest.mark.parametrize(("case", "argument", "value", "shown"), list(impossible()))
def test_an_impossible_argument_is_named_before_the_first_step(
    case: Case, argument: str, value: Any, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tried: list[Parts] = []

    def attempt() -> None:
        tried.append(case.parts(**{argument: value}))
        case.fit(tmp_path, parts=tried[0])

    # a method that is a module is built from its recipe, where the parser may be the one that refuses
    with pytest.raises((ValueError, MisconfigurationException, SystemExit)) as caught:
        attempt()
    refused = isinstance(caught.value, SystemExit)
    message = capsys.readouterr().err if refused else str(caught.value)
    assert argument in message
    assert (shown.strip("'") if refused else shown) in message
    assert not any(parts.module.trainer.global_step for parts in tried)


@pytest.mark.parametrize("case", [m for m in METHODS if "include" in m.parameters], ids=str)
def test_two_instances_coexist(case: Case, tmp_path: Path) -> None:
    """... each with its own part of the network, and resume together."""
    parts = case.parts(include=["net.blocks.0.*"])
    parts.callbacks += case.parts(include=["net.blocks.1.*"]).callbacks
    one, two = parts.callbacks
    assert one.state_key != two.state_key
    case.fit(tmp_path, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), parts=parts)
    both = foreign.widths(parts.module)
    again = case.parts(include=["net.blocks.0.*"])
    again.callbacks += case.parts(include=["net.blocks.1.*"]).callbacks
    case.fit(tmp_path, parts=again, ckpt_path=tmp_path / "epoch=1.ckpt")
    foreign.assert_same(again.module, parts.module)
    if case.card.family == "pruning" and not case.keeps_widths:
        assert both["net.blocks.0.conv1"] == both["net.blocks.1.conv1"] < 12


# ---- command line


@each_method
def test_its_quick_recipe_runs(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as where ONNX is not installed, which is twice as fast; exports have their own tests
    monkeypatch.setattr(sys.modules["lightning_compress.export"], "missing", lambda: ["onnx"])
    name = f"recipes/{case.card.slug}/quick"
    few = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.logger=false"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    main(["fit", "--config", name, *few, *quiet, f"--trainer.default_root_dir={tmp_path}"])
    if case.compresses:
        assert (tmp_path / "compression.json").exists()
        assert "before and after" in capsys.readouterr().out


@each_method
def test_its_config_survives_a_round_trip(case: Case, tmp_path: Path) -> None:
    name = f"recipes/{case.card.slug}/quick"
    first = CompressCLI(["--config", name], run=False)
    (tmp_path / "saved.yaml").write_text(first.parser.dump(first.config))
    second = CompressCLI(["--config", str(tmp_path / "saved.yaml")], run=False)
    assert first.parser.dump(first.config) == second.parser.dump(second.config)
    for made in (first, second):
        assert sum(isinstance(part, case.cls) for part in (made.model, *made.trainer.callbacks)) == 1
