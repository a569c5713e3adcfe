"""The bees of ABCPruner, without a network: against the paper's loop, written out, and against synthetic fitness."""

from __future__ import annotations

import json
import random
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from lightning_compress.callbacks.pruning.abc_pruner import BeeColony
from lightning_compress.callbacks.pruning.abc_pruner.colony import FLOOR, perturb, selection_weights
from lightning_compress.callbacks.pruning.abc_pruner.search import Found, PlanFile, search
from lightning_compress.core.surgery import ChannelPlan

TARGET = [random.Random(1).randint(1, 9) for _ in range(27)]


def synthetic(code):
    return 100 - 0.4 * sum(abs(c - t) for c, t in zip(code, TARGET, strict=True))


def fly(colony: BeeColony, fitness=synthetic, batch: int = 1) -> BeeColony:
    while codes := colony.ask(batch):
        colony.tell([fitness(code) for code in codes])
    return colony


def literal(length, seed, fitness, S=10, T=10, M=5, q=2, P=9):
    """The algorithm as the paper's code runs it, one bee after the other."""
    rng = random.Random(seed)
    history: list[Any] = []

    def evaluate(code):
        history.append((tuple(code), fitness(code)))
        return history[-1][1]

    def bee(i):
        k = rng.randrange(S - 1)
        k = k + 1 if k >= i else k
        new = list(C[i])
        for _ in range(q):
            d = rng.choice(range(length - 1))
            moved = int(C[i][d] + rng.uniform(-1, 1) * (C[i][d] - C[k][d]))
            new[d] = P if moved > P else 1 if moved < 1 else moved
        value = evaluate(new)
        if value > fit[i]:
            C[i], fit[i], trial[i] = new, value, 0
        else:
            trial[i] += 1

    C = [[rng.randint(1, P) for _ in range(length)] for _ in range(S)]
    fit = [evaluate(code) for code in C]
    trial = [0] * S
    for _ in range(T):
        for i in range(S):
            bee(i)
        p = [0.9 * f / max(fit) + 0.1 for f in fit]
        i = count = 0
        while count < S:
            if rng.random() < p[i]:
                count += 1
                bee(i)
            i = (i + 1) % S
        i = trial.index(max(trial))
        if trial[i] >= M:
            C[i] = [max(1, int(rng.random() * P)) for _ in range(length)]
            fit[i], trial[i] = evaluate(C[i]), 0
    return history


# ---- the formulas


@pytest.mark.parametrize(("r", "moved"), [(0.6, 2), (-1.0, 9), (1.0, 1)])
def test_perturbation(r, moved):
    assert perturb((5,), (9,), [0], [r], 9) == (moved,)


@pytest.mark.parametrize("r", [-1.0, -0.3, 0.7, 1.0])
def test_equal_sources_do_not_move(r):
    assert perturb((5, 3), (5, 9), [0], [r], 9) == (5, 3)


def test_perturbation_truncates_to_zero_and_clips():
    assert perturb((1,), (9,), [0], [0.9], 9) == (1,)  # 1 - 7.2
    assert perturb((2, 2), (4, 4), [0, 1], [0.3, 0.7], 9) == (1, 1)  # 1.4, and 0.6 becomes 0, then 1
    assert perturb((8,), (1,), [0], [1.0], 8) == (8,)


def test_of_two_draws_of_one_place_the_later_counts():
    """Both from the old code, so they do not add up."""
    assert perturb((5,), (9,), [0, 0], [-1.0, 0.6], 9) == (2,)


def test_selection_weights():
    assert selection_weights([50, 100]) == [0.55, 1.0]
    assert selection_weights([FLOOR, FLOOR]) == [1.0, 1.0]


# ---- the loop


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_loop_written_out(seed):
    assert fly(BeeColony(27, seed=seed)).history == literal(27, seed, synthetic)


def test_a_synthetic_optimum_is_approached():
    better, first, last = 0, [], []
    for seed in range(10):
        colony = fly(BeeColony(27, seed=seed))
        values = [value for _, value in colony.history]
        assert 210 <= len(values) <= 220
        assert all(1 <= c <= 9 for code, _ in colony.history for c in code)
        assert colony.best_fitness == max(values) == synthetic(colony.best_code)
        assert colony.expected == 210
        first.append(max(values[:10]))
        last.append(colony.best_fitness)
        better += last[-1] > first[-1]
    assert better >= 9
    assert statistics.mean(last) - statistics.mean(first) > 4


def test_the_best_never_gets_worse_and_the_first_of_equals_stays():
    colony = BeeColony(5, food_number=4, max_cycle=3)
    best = 0.0
    while codes := colony.ask():
        colony.tell([float(codes[0][0])])
        assert colony.best_fitness >= best
        best = colony.best_fitness
    values = [value for _, value in colony.history]
    assert colony.best == values.index(max(values))


def test_the_last_number_changes_only_by_scouting():
    """... as in the authors' code; and a scout never draws P there."""
    for correct in (False, True):
        colony = BeeColony(4, food_number=6, max_cycle=60, food_limit=2, mutate_last=correct)
        moved, scouted = 0, []
        while codes := colony.ask():
            source = colony._pending[0][0]
            if colony.phase == "scout":
                scouted += codes[0]
            elif colony.phase != "sources":
                moved += codes[0][-1] != colony.sources[source][-1]
            colony.tell([random.Random(str(codes)).random()])
        assert (moved > 0) == correct
        assert (max(scouted) == 9) == correct


def test_a_scout_leaves_the_source_that_failed_most_and_there_is_one_per_cycle():
    colony = BeeColony(6, food_number=3, max_cycle=4, food_limit=2)
    scouts = []
    while codes := colony.ask():
        if colony.phase == "scout":
            scouts.append(colony.cycle)
            assert colony._pending[0][0] == colony.trials.index(max(colony.trials))
        value = 1.0 if colony.phase == "sources" else 0.5
        phase, source = colony.phase, colony._pending[0][0]
        colony.tell([value])
        if phase == "scout":  # taken although it is worse
            assert (colony.sources[source], colony.fitness[source], colony.trials[source]) == (codes[0], 0.5, 0)
    assert scouts == [0, 1, 2, 3]
    assert len(colony.history) == colony.expected + 4


def test_onlookers_go_round_when_all_are_equal():
    """Not a roulette wheel: with weights of 1 each stays at the next source."""
    colony = BeeColony(6, food_number=5, max_cycle=1)
    met = []
    while colony.ask():
        if colony.phase == "onlookers":
            met.append(colony._pending[0][0])
        colony.tell([0.7])
    assert met == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("value", [0.0, float("nan"), -3.0, float("inf")])
def test_a_fitness_that_is_none_ends_the_search_all_the_same(value):
    colony = fly(BeeColony(5, food_number=3, max_cycle=3), lambda code: value)
    assert {v for _, v in colony.history} == {FLOOR}
    assert colony.best == 0


def test_a_single_number_can_move():
    fly(BeeColony(1, food_number=2, max_cycle=3), lambda code: code[0])


def test_no_cycles_are_a_random_search():
    assert len(fly(BeeColony(27, max_cycle=0)).history) == 10


# ---- asking and telling


@pytest.mark.parametrize("batch", [1, 4])
def test_a_kill_after_any_evaluation_loses_nothing(batch):
    """... nor between the question and the answer. The state goes through JSON."""

    def revived(colony: BeeColony) -> BeeColony:
        again = BeeColony(27, food_number=5, max_cycle=3, food_limit=2, seed=99)
        again.load_state_dict(json.loads(json.dumps(colony.state_dict())))
        return again

    def fresh() -> BeeColony:
        return BeeColony(27, food_number=5, max_cycle=3, food_limit=2, seed=5)

    whole, colony, phases = fly(fresh(), batch=batch), fresh(), set()
    while codes := colony.ask(batch):
        phases.add(colony.phase)
        assert revived(colony).ask(batch) == codes
        assert fly(revived(colony), batch=batch).history == whole.history
        colony.tell([synthetic(code) for code in codes])
        assert fly(revived(colony), batch=batch).history == whole.history
    assert phases == {"sources", "employed", "onlookers", "scout"}


def test_the_same_question_again_until_it_is_answered():
    colony = BeeColony(27)
    assert colony.ask() == colony.ask() == colony.ask(7)
    colony.tell([1.0])
    assert colony.ask(3) == colony.ask()
    with pytest.raises(ValueError, match="zip"):
        colony.tell([1.0])


def test_a_batch_is_of_one_phase_and_moves_from_the_sources_as_they_are():
    colony = BeeColony(27, food_number=5, max_cycle=2, seed=3)
    sizes = []
    while codes := colony.ask(4):
        phase, sources, places = colony.phase, list(colony.sources), [s for s, _ in colony._pending]
        sizes.append((phase, len(codes)))
        for source, code in zip(places, codes, strict=True):
            if phase in ("employed", "onlookers"):
                assert sum(a != b for a, b in zip(code, sources[source], strict=True)) <= 2
        colony.tell([synthetic(code) for code in codes])
    assert sizes == [(phase, n) for phase in ("sources", *("employed", "onlookers") * 2) for n in (4, 1)]


def test_the_winner_of_a_batch_is_told():
    colony = BeeColony(3, food_number=4, max_cycle=1)
    colony.ask(4)
    assert colony.tell([0.3, 0.9, 0.5, 0.9]) == 1
    colony.ask(4)
    assert colony.tell([0.9, 0.1, 0.2, 0.3]) is None
    colony.ask(2)
    assert colony.tell([0.91, 0.95]) == 1
    assert colony.best_fitness == 0.95


def test_state_of_another_colony_is_refused():
    state = fly(BeeColony(5, food_number=4, max_cycle=1), sum).state_dict()
    for other in (BeeColony(6, food_number=4), BeeColony(5, food_number=3)):
        with pytest.raises(ValueError, match="4 sources with codes of 5 numbers"):
            other.load_state_dict(state)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("max_preserve", 0),
        ("max_preserve", 11),
        ("food_number", 1),
        ("max_cycle", -1),
        ("food_limit", 0),
        ("honeychange_num", 0),
    ],
)
def test_impossible_arguments(argument, value):
    with pytest.raises(ValueError, match=f"{argument}={value}"):
        BeeColony(5, **{argument: value})


# ---- several processes


class Together:
    """What `search` sees of a Trainer, for threads that stand for processes."""

    def __init__(self, rank: int, barrier: threading.Barrier, board: dict[int, Any]) -> None:
        self.global_rank, self.world_size, self.is_global_zero = rank, barrier.parties, rank == 0
        self.progress_bar_callback, self.strategy, self.root_device = None, self, torch.device("cpu")
        self._barrier, self._board = barrier, board

    def _exchange(self, value: Any) -> list[Any]:
        self._board[self.global_rank] = value
        self._barrier.wait(20)
        values = [self._board[rank] for rank in range(self.world_size)]
        self._barrier.wait(20)
        return values

    def all_gather(self, value: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(value))

    def broadcast(self, value: Any, src: int = 0) -> Any:
        return self._exchange(value)[src]


@pytest.mark.parametrize("size", [1, 3])
def test_processes_hold_the_same_colony_and_evaluate_every_code_once(size, tmp_path):
    barrier, board, evaluated = threading.Barrier(size), {}, []
    colonies = [BeeColony(6, food_number=5, max_cycle=4, food_limit=2, seed=2) for _ in range(size)]
    plans = [PlanFile({}, {}, colony.state_dict(), Found()) for colony in colonies]

    def evaluate(code, number):
        evaluated.append((number, code))
        return sum(code) / 60, ChannelPlan({"layer": torch.tensor(code)}), {"weight": torch.tensor(code)}

    def run(rank: int) -> None:
        trainer: Any = Together(rank, barrier, board)
        search(trainer, colonies[rank], evaluate, plans[rank], tmp_path / "plan.pt", reuse=False)

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(run, range(size)))
    expected = fly(BeeColony(6, food_number=5, max_cycle=4, food_limit=2, seed=2), lambda c: sum(c) / 60, size)
    for colony, plan in zip(colonies, plans, strict=True):
        assert colony.state_dict() == expected.state_dict()
        assert plan.finished
        assert plan.found.code == plan.found.kept["layer"] == plan.found.weights["weight"].tolist()
        assert plan.found.fitness == sum(plan.found.code) / 60 == expected.best_fitness
    assert [code for _, code in sorted(evaluated)] == [code for code, _ in expected.history]
    assert sorted(number for number, _ in evaluated) == list(range(len(expected.history)))
    assert PlanFile.load(tmp_path / "plan.pt").found.code == list(expected.best_code)
