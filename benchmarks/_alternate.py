"""Measure in turns, A B A B ..., so that whatever else the machine is doing meets both alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lightning_compress.core.profile import device_name


@dataclass(frozen=True)
class Claim:
    """A ratio that is promised.

    Args:
        what: what is compared with what.
        reached: the ratio.
        target: what it must reach; None where nothing is promised and the ratio is only told.
        at_most: whether the ratio must stay below the target, not above.
        detail: the two times, or whatever tells where the ratio is from.
    """

    what: str
    reached: float
    target: float | None = None
    at_most: bool = False
    detail: str = ""

    @property
    def holds(self) -> bool:
        return self.target is None or (self.reached <= self.target if self.at_most else self.reached >= self.target)

    def __str__(self) -> str:
        verdict = "" if self.target is None else "ok" if self.holds else "MISSED"
        target = "" if self.target is None else f"{'<=' if self.at_most else '>='} {self.target:g}"
        return f"{verdict:>6} {self.reached:8.4g}x {target:>8}  {self.what}{self.detail and f'  ({self.detail})'}"


def report(claims: Iterable[Claim]) -> list[Claim]:
    """Print claims as they come."""
    done = []
    for claim in claims:
        print(claim, flush=True)
        done.append(claim)
    return done


def machine() -> str:
    """What the numbers depend on."""
    return f"{device_name('cpu')}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def best_times(
    repeats: int, *runs: Callable[..., Any], calls: int = 1, prepare: Callable[[], tuple[Any, ...]] = tuple
) -> list[float]:
    """Shortest time of each of `runs` in seconds; they are run in turns, `repeats` times each.

    Args:
        calls: how often one is called in its turn. From two on the others have not just emptied the caches.
        prepare: makes the arguments anew for every run, outside of the time.
    """
    best = [math.inf] * len(runs)
    for _ in range(repeats):
        for i, run in enumerate(runs):
            for _ in range(calls):
                arguments = prepare()
                start = time.perf_counter()
                run(*arguments)
                best[i] = min(best[i], time.perf_counter() - start)
    return best


def geometric_mean(ratios: Iterable[float]) -> float:
    logs = [math.log(r) for r in ratios]
    return math.exp(sum(logs) / len(logs))


def milliseconds(*seconds: float) -> str:
    """For the detail of a claim: `milliseconds(0.0321, 1.2)` is "32.1 against 1200 ms"."""
    return " against ".join(f"{1e3 * s:.4g}" if s < 1 else f"{1e3 * s:.0f}" for s in seconds) + " ms"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
