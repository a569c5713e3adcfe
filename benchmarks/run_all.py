"""Measure all claims, one after the other, and say which hold. Takes some minutes; the machine should be idle."""

from __future__ import annotations

import sys
from importlib import import_module

from _alternate import machine, report

BENCHMARKS = (
    "startup", "profiling", "surgery", "callback_overhead", "hrank", "pruned_latency",
    "magnitude_pruning", "lbc", "lottery_jackpots", "pconv",
)  # fmt: skip


def main() -> int:
    print(machine())
    missed = []
    for name in BENCHMARKS:
        print(f"\n{name}.py", flush=True)
        missed += [claim for claim in report(import_module(name).claims()) if not claim.holds]
    print(f"\n{len(missed)} missed" if missed else "\nall targets reached")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
