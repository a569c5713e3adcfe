"""The bees: codes in, fitness out, no network in sight."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

Code = tuple[int, ...]

LEVELS = 10  # a code counts tenths of a layer's width
FLOOR = 1e-4  # a fitness of 0 or NaN becomes this, 0.01 %: the onlookers divide by the largest one


def perturb(code: Code, other: Code, places: Sequence[int], factors: Sequence[float], max_preserve: int) -> Code:
    """Move `code` in some places, by a factor of its distance to `other` there; truncated to 0, clipped to 1..P.

    Both factors of a place drawn twice work on the old code, so the later one counts.

    >>> [perturb((5,), (9,), [0], [r], 9) for r in (0.6, -1.0, 1.0)]
    [(2,), (9,), (1,)]
    """
    moved = list(code)
    for place, factor in zip(places, factors, strict=True):
        moved[place] = min(max(int(code[place] + factor * (code[place] - other[place])), 1), max_preserve)
    return tuple(moved)


def selection_weights(fitness: Sequence[float]) -> list[float]:
    """How likely an onlooker, who meets the sources in turns, stays at each: p_i = 0.9 * f_i / max f + 0.1.

    >>> selection_weights([50, 100])
    [0.55, 1.0]
    """
    return [0.9 * f / max(fitness) + 0.1 for f in fitness]


class BeeColony:
    """An artificial bee colony that is asked for codes and told their fitness, one after the other or in batches.

    It never calls anything, so it can be stopped between any two evaluations: `state_dict` holds all of it, the random
    generator too, and what continues from there is the same search.

    Args:
        length: D, numbers in a code.
        max_preserve: P, the largest number: 9 keeps at most 90 % of a layer.
        food_number: S, food sources; at least 2, since a bee moves relative to another source.
        max_cycle: T, cycles of employed bees, onlookers and scout; 0 only looks at S random codes.
        food_limit: M, failures after which a source is abandoned.
        honeychange_num: q, places that a bee moves.
        mutate_last: False as the authors' code, which is off by one twice: bees never move the last number, and a
            scout's new code practically never holds P. True corrects both.
        seed: of everything drawn.

    Attributes:
        sources: S codes.
        fitness: of each source.
        trials: failures of each source since it last improved.
        phase: ``"sources"``, ``"employed"``, ``"onlookers"``, ``"scout"`` or ``"done"``.
        cycle: cycles that are over.
        history: every (code, fitness) told, in order.
        best: index of the fittest in `history`, the first among equals; -1 before any.

    The defaults are those of the authors' code. Fitness is positive and higher is better, in any scale (shares and
    percents alike); what is 0, negative or not finite counts as 0.0001.

    >>> colony = BeeColony(3, food_number=2, max_cycle=2)
    >>> while codes := colony.ask():
    ...     best = colony.tell([sum(codes[0])])
    >>> len(colony.history), colony.best_fitness > colony.history[0][1]
    (10, True)
    """

    def __init__(
        self,
        length: int,
        *,
        max_preserve: int = 9,
        food_number: int = 10,
        max_cycle: int = 10,
        food_limit: int = 5,
        honeychange_num: int = 2,
        mutate_last: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("length", length, 1),
            ("food_number", food_number, 2),
            ("max_cycle", max_cycle, 0),
            ("food_limit", food_limit, 1),
            ("honeychange_num", honeychange_num, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value}: give a whole number of at least {least}.")
        if not 1 <= max_preserve <= LEVELS:
            raise ValueError(f"max_preserve={max_preserve}: give a whole number from 1 to {LEVELS}.")
        self.length = length
        self.max_preserve = max_preserve
        self.food_number = food_number
        self.max_cycle = max_cycle
        self.food_limit = food_limit
        self.honeychange_num = honeychange_num
        self.mutate_last = mutate_last
        self.seed = seed
        self.sources: list[Code] = []
        self.fitness: list[float] = []
        self.trials: list[int] = []
        self.phase = "sources"
        self.cycle = 0
        self.history: list[tuple[Code, float]] = []
        self.best = -1
        self._told = 0  # in this phase
        self._pointer = 0  # the source that the next onlooker meets
        self._weights: list[float] = []
        self._pending: list[tuple[int, Code]] = []  # (source, code) that were asked for and not told
        self._random = random.Random(seed)

    @property
    def best_code(self) -> Code:
        return self.history[self.best][0]

    @property
    def best_fitness(self) -> float:
        return self.history[self.best][1]

    @property
    def expected(self) -> int:
        """Evaluations of a whole search without scouts: S + 2 S T. Each cycle may add one scout."""
        return self.food_number * (1 + 2 * self.max_cycle)

    # ---- ask and tell

    def ask(self, count: int = 1) -> list[Code]:
        """The next codes to evaluate: at most `count`, all of one phase; empty when the search is over.

        The same ones again until they are told. With ``count=1`` every bee sees what the one before it found, as the
        authors' do. A larger batch is drawn from the sources as they are, so that its codes can be evaluated side by
        side; that is another sequence.
        """
        if not self._pending:
            for _ in range(min(count, self._left())):
                self._pending.append(self._draw())
        return [code for _, code in self._pending]

    def tell(self, fitness: Sequence[float]) -> int | None:
        """Take the fitness of the codes asked for, in their order.

        Returns:
            Which of them is the fittest of all so far; None if none is.
        """
        best = self.best
        for (source, code), value in zip(self._pending, fitness, strict=True):
            value = max(value, FLOOR) if math.isfinite(value) else FLOOR
            self.history.append((code, value))
            if self.best < 0 or value > self.best_fitness:
                self.best = len(self.history) - 1
            self._judge(source, code, value)
        first = len(self.history) - len(self._pending)
        self._told += len(self._pending)
        self._pending = []
        if self._left() == 0:
            self._next_phase()
        return self.best - first if self.best != best else None

    # ---- what a bee does

    def _left(self) -> int:
        """Codes of this phase that were not told yet."""
        return {"scout": 1, "done": 0}.get(self.phase, self.food_number) - self._told

    def _draw(self) -> tuple[int, Code]:
        position = self._told + len(self._pending)
        if self.phase == "sources":
            return position, tuple(self._random.randint(1, self.max_preserve) for _ in range(self.length))
        if self.phase == "employed":
            return position, self._moved(position)
        if self.phase == "onlookers":
            source = self._stay()
            return source, self._moved(source)
        source = self.trials.index(max(self.trials))
        if self.mutate_last:
            return source, tuple(self._random.randint(1, self.max_preserve) for _ in range(self.length))
        return source, tuple(max(1, int(self._random.random() * self.max_preserve)) for _ in range(self.length))

    def _moved(self, source: int) -> Code:
        other = self._random.randrange(self.food_number - 1)
        other += other >= source  # any but itself
        places = range(self.length if self.mutate_last else max(1, self.length - 1))
        drawn = [(self._random.choice(places), self._random.uniform(-1, 1)) for _ in range(self.honeychange_num)]
        chosen, factors = zip(*drawn, strict=True)
        return perturb(self.sources[source], self.sources[other], chosen, factors, self.max_preserve)

    def _stay(self) -> int:
        """The source at which the next onlooker stays, who meets them in turns."""
        while True:
            source = self._pointer
            self._pointer = (source + 1) % self.food_number
            if self._random.random() < self._weights[source]:
                return source

    def _judge(self, source: int, code: Code, value: float) -> None:
        if self.phase == "sources":
            self.sources.append(code)
            self.fitness.append(value)
            self.trials.append(0)
        elif self.phase == "scout" or value > self.fitness[source]:
            self.sources[source], self.fitness[source], self.trials[source] = code, value, 0
        else:
            self.trials[source] += 1

    def _next_phase(self) -> None:
        self._told = 0
        if self.phase == "employed":
            self.phase, self._pointer, self._weights = "onlookers", 0, selection_weights(self.fitness)
        elif self.phase == "onlookers" and max(self.trials) >= self.food_limit:
            self.phase = "scout"
        else:
            self.cycle += self.phase != "sources"
            self.phase = "employed" if self.cycle < self.max_cycle else "done"

    # ---- to stop and to continue

    _STATE = ("sources", "fitness", "trials", "phase", "cycle", "history", "best", "_told", "_pointer", "_weights")

    def state_dict(self) -> dict[str, Any]:
        """Everything but the arguments, as plain data: lists, numbers and text."""
        version, words, gauss = self._random.getstate()
        state = {name.lstrip("_"): getattr(self, name) for name in (*self._STATE, "_pending")}
        copied = {name: list(value) if isinstance(value, list) else value for name, value in state.items()}
        return {**copied, "random": [version, list(words), gauss]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another colony with the same arguments was.

        Raises:
            ValueError: its codes are of another length, or its sources of another number.
        """
        codes = [tuple(code) for code in (*state["sources"], *(code for code, _ in state["history"]))]
        if any(len(code) != self.length for code in codes) or len(state["sources"]) > self.food_number:
            raise ValueError(
                f"state: it is of {len(state['sources'])} sources with codes of {len(codes[0])} numbers; this colony "
                f"has food_number={self.food_number} and length={self.length}."
            )
        for name in self._STATE:
            value = state[name.lstrip("_")]
            setattr(self, name, list(value) if isinstance(value, list) else value)
        self.sources = [tuple(code) for code in state["sources"]]
        self.history = [(tuple(code), value) for code, value in state["history"]]
        self._pending = [(source, tuple(code)) for source, code in state["pending"]]
        version, words, gauss = state["random"]
        self._random.setstate((version, tuple(words), gauss))
