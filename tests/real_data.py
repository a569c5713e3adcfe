"""Where tests marked `real_data` find it: the folder that LC_DATA names, as far as it is filled."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def real_data(*files: str) -> Path:
    """The folder; the test is skipped if it lacks one of `files`."""
    root = Path(os.environ.get("LC_DATA", "nowhere"))
    missing = [file for file in files if not (root / file).exists()]
    if missing:
        pytest.skip(f"LC_DATA={os.environ.get('LC_DATA')!r} has no {', '.join(missing)}")
    return root
