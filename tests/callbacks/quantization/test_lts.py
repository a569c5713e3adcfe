"""LTS: its recursion and threshold by hand, what freezing means in a real fit, and both ways to count what it saves."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from foreign import assert_same, digits, fit, made, make_trainer, no_pictures
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_compress.callbacks import LTS, QAT
from lightning_compress.callbacks.quantization.lts import Ticket, growth, next_distance
from lightning_compress.core.quant.attach import quantize_weight, real_weight, weight_quantizer
from lightning_compress.core.quant.interval import IntervalWeight
from lightning_compress.core.quant.lsq import LSQWeight
from lightning_compress.core.report import Account

BIN = 1 / 3  # of 2 bits


def two_bits():
    """Over [0, 1], so that a weight is its own place."""
    quantizer = IntervalWeight(torch.ones(1, 2), 2)
    quantizer.lower.data.zero_()
    quantizer.upper.data.fill_(1.0)
    return quantizer


def run(weights, thresholds=None, ema=0.9, quantizer=None):
    """The ticket of a few weights after each of their values, (steps, weights)."""
    weights = torch.tensor(weights)
    ticket = Ticket.of(weights[0].view(1, -1))
    history = []
    for index, weight in enumerate(weights):
        threshold = None if thresholds is None else thresholds[index]
        ticket.update(quantizer or two_bits(), weight.view(1, -1), threshold, ema)
        history.append((ticket.distance.clone().flatten(), ticket.frozen.clone().flatten()))
    return ticket, history


# ---- threshold


def rho(mode, step, epochs=400, warmup=80, steps_per_epoch=1, fixed_rate=0.1):
    return growth(mode, (step - steps_per_epoch * warmup) / (steps_per_epoch * (epochs - warmup)), fixed_rate)


def test_the_threshold_grows_from_nothing_to_one_level():
    assert BIN * rho("linear-growth", 240) == pytest.approx(1 / 6)
    assert BIN * rho("linear-growth", 400) == pytest.approx(1 / 3)
    assert BIN * rho("linear-growth", 60, 100, 20) == pytest.approx(1 / 6)
    assert rho("sine-growth", 240) == pytest.approx(math.sin(math.pi / 4))
    assert rho("sine-growth", 400) == 1
    assert rho("fixing", 240, fixed_rate=0.3) == 0.3


# ---- distance


def test_the_first_step_notes_levels_and_the_second_begins():
    """Level 1 of 3 held at a distance of 0.1."""
    ticket, history = run([[1 / 3 + 0.1]] * 6)
    expected = [BIN, 0.1, 0.1, 0.1, 0.1, 0.1]  # first another level than 0
    torch.testing.assert_close(torch.stack([d for d, _ in history]).flatten(), torch.tensor(expected))
    assert ticket.step == 5
    assert ticket.codes.item() == 1


def test_an_average_recovers_from_a_change():
    """D = 0.1 + (1/3 - 0.1) 0.9^k, k updates after the level changed."""
    _, history = run([[1 / 3 + 0.1]] * 4 + [[2 / 3 + 0.1]] * 6)
    for k in range(6):
        assert history[4 + k][0].item() == pytest.approx(0.1 + (BIN - 0.1) * 0.9**k, abs=1e-6)


def test_a_change_between_the_first_two_steps_counts_nothing():
    _, history = run([[1 / 3 + 0.1], [2 / 3 - 0.05], [2 / 3 - 0.05]])
    assert history[1][0].item() == pytest.approx(0.05, abs=1e-6)


def test_distances_beyond_the_range_are_not_clipped():
    _, history = run([[1.5, 1.2]] * 3)
    torch.testing.assert_close(history[-1][0], torch.tensor([0.5, 0.2]))


def test_distances_with_lsq():
    quantizer = LSQWeight(torch.ones(1, 6), 2)
    quantizer.step.data.fill_(0.5)
    _, history = run([[-1, -0.3, 0.1, 0.24, 0.8, 1.5]] * 2, quantizer=quantizer)
    expected = torch.tensor([0, 0.133333, 0.066667, 0.16, 0.2, 0.666667])
    torch.testing.assert_close(history[1][0], expected, atol=1e-6, rtol=0)


def test_the_recursion():
    distance, d = torch.tensor([0.2, 0.2]), torch.tensor([0.1, 0.1])
    changed = torch.tensor([False, True])
    torch.testing.assert_close(next_distance(distance, d, changed, 5, 0.99, BIN), torch.tensor([0.199, BIN]))
    torch.testing.assert_close(next_distance(distance, d, changed, 0, 0.99, BIN), d)


# ---- freezing


def test_a_level_that_changes_every_step_is_never_frozen():
    """400 epochs of one step, 80 of them of warm-up: it lives through steps 0 ... 399, and a 401st would end that."""
    weights = [[1 / 3], [2 / 3]] * 201
    thresholds = [rho("linear-growth", step) if step > 80 else None for step in range(402)]
    _, history = run(weights, thresholds)
    assert not any(frozen.item() for _, frozen in history[:400])
    assert history[400][1].item()


def test_who_has_settled_is_frozen_for_good():
    """... when the threshold passes its distance; in the warm-up nobody is."""
    thresholds = [rho("linear-growth", step) if step > 80 else None for step in range(400)]
    _, history = run([[1 / 3, 1 / 3 + 0.1]] * 300 + [[2 / 3 - 0.16, 0.0]] * 100, thresholds)
    counts = torch.stack([frozen for _, frozen in history])
    assert not counts[:81].any()
    assert counts[81, 0]  # no distance at all
    passes = next(step for step in range(81, 400) if BIN * rho("linear-growth", step) >= 0.1 - 1e-6)
    assert counts[:, 1].int().argmax() == passes
    assert (counts[1:] >= counts[:-1]).all()


@pytest.mark.parametrize(("min_group", "expected"), [(0.75, [True, False]), (1.0, [False, False])])
def test_the_rest_of_a_filter_follows(min_group, expected):
    ticket = Ticket.of(torch.zeros(2, 1, 2, 2))
    ticket.frozen[0, 0, 0] = ticket.frozen[0, 0, 1, 0] = ticket.frozen[1, 0, 0, 0] = True
    ticket.complete(min_group)
    assert ticket.frozen.flatten(1).all(1).tolist() == expected
    assert ticket.frozen[1].sum() == 1


# ---- in a fit


class Watch(Callback):
    """Frozen weights, their values, and their gradients, at the end of every step."""

    def __init__(self, lts):
        self.lts, self.counts, self.first, self.gradients = lts, [], {}, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for name, ticket in self.lts.tickets.items():
            parameters = pl_module.get_submodule(name)
            weight = parameters.parametrizations.weight.original
            self.gradients.append(float(weight.grad[ticket.frozen].abs().sum()))
            quantizer = parameters.parametrizations.weight[0]
            if ticket.frozen.all() and hasattr(quantizer, "upper"):
                self.ranges = max(getattr(self, "ranges", 0.0), float(quantizer.upper.grad.abs()))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.counts.append({name: int(t.frozen.sum()) for name, t in self.lts.tickets.items()})
        for name, ticket in self.lts.tickets.items():
            weight = pl_module.get_submodule(name).parametrizations.weight.original.detach()
            before, value = self.first.setdefault(name, (torch.zeros_like(ticket.frozen), weight.clone()))
            assert (ticket.frozen >= before).all()
            assert torch.equal(weight[before], value[before])
            self.first[name] = (ticket.frozen.clone(), weight.clone())


@pytest.mark.parametrize("quantizer", ["interval", "lsq"])
def test_frozen_weights_stay_to_the_bit(quantizer, tmp_path):
    """... under momentum and weight decay, without a gradient, while their range still learns."""
    lts = LTS(warmup_epochs=1, ema=0.5)
    watch = Watch(lts)
    module = made()
    fit(module, tmp_path, QAT(2, 2, quantizer=quantizer), lts, watch, max_epochs=8)
    totals = [sum(c.values()) for c in watch.counts]
    assert totals[3] == 0 < totals[12] < totals[-1]
    assert all(after >= before for before, after in itertools.pairwise(totals))
    assert max(watch.gradients) == 0
    assert lts.frozen_share == totals[-1] / sum(t.frozen.numel() for t in lts.tickets.values()) > 0.5
    if quantizer == "interval":
        assert watch.ranges > 0
    steps = {ticket.step for ticket in lts.tickets.values()}
    assert steps == {31}  # counted from -1: after 32 updates


def test_the_papers_account_and_the_clock(tmp_path):
    lts = LTS(warmup_epochs=1, ema=0.5)
    watch = Watch(lts)
    module = made()
    trainer = fit(module, tmp_path, QAT(2, 2), lts, watch, max_epochs=6)
    trainable = sum(p.numel() for p in module.parameters())
    skipped = sum(sum(c.values()) for c in watch.counts) / trainable / len(watch.counts)
    assert trainer.callback_metrics["lts/updates"].item() == pytest.approx(1 - skipped)
    assert trainer.callback_metrics["lts/frozen"].item() == pytest.approx(lts.frozen_share)
    assert trainer.callback_metrics["lts/backward_ms"] > 0
    notes = " ".join(Account.load(tmp_path).notes)
    assert f"{skipped:.1%} were skipped, and as the paper counts {skipped / 2:.1%} of the backward pass" in notes
    assert "a backward pass took" in notes


def test_accumulated_gradients_are_one_step(tmp_path):
    lts = LTS(warmup_epochs=1)
    fit(made(), tmp_path, QAT(), lts, max_epochs=3, accumulate_grad_batches=2)
    assert {ticket.step for ticket in lts.tickets.values()} == {5}
    assert lts._steps == (2, 6)


def test_filters_that_rest_get_no_gradient(tmp_path):
    """... from the epoch after they froze, and are the layer's business of this run only."""

    class Wide(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(512, 10))

    seen = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            layers = [m for m in pl_module.modules() if isinstance(m, nn.Conv2d)]
            seen.append(
                [("_conv_forward" in vars(m), int(t.resting.sum())) for m, t in zip(layers, tickets(), strict=False)]
            )

    def tickets():
        return list(lts.tickets.values())

    lts = LTS("fixing", 1, 0.0, fixed_rate=0.45, granularity="channel", min_group=0.7)
    module = made(Wide, lr=0.001)
    fit(module, tmp_path, QAT(), lts, Look(), max_epochs=4)
    assert [layer for layer, _ in seen[1]] == [False, False]
    assert any(saves for saves, _ in seen[3])
    assert all(saves == (rests > 16) for saves, rests in seen[3])
    assert not any("_conv_forward" in vars(m) for m in module.modules())
    ticket = lts.tickets["net.2"]
    whole = ticket.frozen.flatten(1).all(1)
    assert whole.any()
    assert (ticket.frozen.flatten(1).float().mean(1)[~whole] < 0.7).all()


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_a_resumed_run_knows_its_steps(granularity, tmp_path):
    """... although its loader has another length: the threshold does not jump."""

    def run(root, epochs, **kwargs):
        lts = LTS(warmup_epochs=1, ema=0.5, granularity=granularity, min_group=0.6)
        module = made()
        trainer = make_trainer(root, QAT(2, 2), lts, ModelCheckpoint(root, "{epoch}", save_top_k=-1), max_epochs=epochs)
        with no_pictures:
            trainer.fit(module, kwargs.pop("data", digits()), **kwargs)
        return module, lts

    whole, first = run(tmp_path / "whole", 5)
    path = tmp_path / "whole" / "epoch=2.ckpt"
    again, second = run(tmp_path / "again", 5, ckpt_path=path)
    assert_same(again, whole)
    for name, ticket in first.tickets.items():
        other = second.tickets[name]
        assert ticket.step == other.step
        for attribute in ("distance", "codes", "frozen", "resting"):
            assert torch.equal(getattr(ticket, attribute), getattr(other, attribute)), attribute
    assert first._ledger.skipped == pytest.approx(second._ledger.skipped)
    _, longer = run(tmp_path / "longer", 5, data=digits(128), ckpt_path=path)
    assert longer._steps == first._steps == (4, 20)


def test_another_fit_begins_with_nothing_frozen(tmp_path):
    lts = LTS("fixing", 0, 0.5, fixed_rate=2.0)
    fit(made(), tmp_path, QAT(), lts)
    assert lts.frozen_share == 1
    module = made()
    before = [p.clone() for n, p in module.named_parameters() if "weight" in n and p.ndim > 1]
    lts.fixed_rate = 1e-9
    fit(module, tmp_path, QAT(), lts)
    assert lts.frozen_share < 0.5
    after = [p for n, p in module.named_parameters() if "weight.original" in n]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_state_of_a_ticket_is_plain_data(tmp_path):
    ticket, _ = run([[0.4, 0.1]] * 5, [None, None, 0.5, 0.5, 0.5])
    torch.save(ticket.state_dict(), tmp_path / "ticket.pt")
    state = torch.load(tmp_path / "ticket.pt", weights_only=True)
    again = Ticket.from_state(state, torch.zeros(1, 2))
    for name, value in vars(ticket).items():
        assert torch.equal(torch.as_tensor(getattr(again, name)), torch.as_tensor(value)), name
    bytes_per_weight = sum(t.element_size() for t in (ticket.distance, ticket.codes, ticket.frozen))
    assert bytes_per_weight == 6


# ---- what cannot be


def test_it_needs_qat(tmp_path):
    with pytest.raises(
        MisconfigurationException, match=r"LTS freezes weights that QAT quantises.*\[QAT\(\), LTS\(\)\]"
    ):
        fit(made(), tmp_path, LTS(warmup_epochs=1))


def test_it_needs_an_end(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(list(digits())[0:1])

    loader = torch.utils.data.DataLoader(Endless(), batch_size=None)
    trainer = make_trainer(tmp_path, QAT(), LTS(warmup_epochs=1), max_epochs=3)
    with no_pictures, pytest.raises(MisconfigurationException, match="must know how many steps"):
        trainer.fit(made(), loader)
    assert trainer.global_step == 0
    trainer = make_trainer(tmp_path, QAT(), LTS(warmup_epochs=0), max_epochs=-1)
    with no_pictures, pytest.raises(MisconfigurationException, match="must know how many steps"):
        trainer.fit(made(), digits())


def test_real_weights_are_what_freezes():
    """The range may move a frozen weight's level."""
    torch.manual_seed(0)
    layer = nn.Linear(9, 12)
    nn.init.normal_(layer.weight)
    quantize_weight(layer, IntervalWeight(layer.weight, 2))
    quantizer = weight_quantizer(layer)
    before = quantizer.integer(real_weight(layer)).codes
    with torch.no_grad():
        quantizer.lower *= 1.2
        quantizer.upper *= 1.2
    after = quantizer.integer(real_weight(layer)).codes
    assert 0 < (before != after).sum() < 30
