"""Measure all claims, one after the other, and say which hold. Takes some minutes; the machine should be idle."""

from __future__ import annotations

import sys
from importlib import import_module

from _alternate import machine, report

BENCHMARKS = (
    "architecture_decoupling",
    "binary_conv2d",
    "callback_overhead",
    "content_relations",
    "dcd",
    "dgms",
    "dmad",
    "ffsd",
    "gal",
    "hrank",
    "integer_inference",
    "kcd",
    "knowledge_distillation",
    "kse",
    "lbc",
    "lottery_jackpots",
    "lts",
    "magnitude_pruning",
    "online_distillation",
    "pams",
    "pattern_conv2d",
    "pconv",
    "profiling",
    "pruned_latency",
    "qat",
    "rbnn",
    "ssr",
    "startup",
    "surgery",
    "wavelet_distillation",
    "wavelets",
    "variational_distillation",
    "white_box",
)


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
