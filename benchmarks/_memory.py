"""Measure how much memory something takes at its peak; in a process of its own, or earlier peaks hide it."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak(file: str, which: str) -> int:
    """Bytes that ``python file --peak which`` prints, which is to print `watched(...)`."""
    command = [sys.executable, file, "--peak", which]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def watched(run: Callable[[], Any]) -> int:
    """Call `run` once: bytes that this process has above its start, at most."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, highest, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return highest - before


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
