"""Keeps small operators from waiting for each other's threads, and tests that share a fixture in one process."""

import os

# also for other processes, and for Lightning: without it, it sets as many threads as there are cores once DDP is used
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files stay whole, but the checks of one method may run beside those of another."""
    for item in items:
        if item.get_closest_marker("xdist_group"):
            continue
        params = item.callspec.params if hasattr(item, "callspec") else {}
        case = params.get("finished", params.get("case")) if "conformance" in item.nodeid else None
        group = str(case) if case else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
