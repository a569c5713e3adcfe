"""lightning-compress: published methods for smaller and faster networks, as Lightning callbacks and modules.

Importing this package imports no torch; the names below are found on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_compress._version import __version__

if TYPE_CHECKING:
    from lightning_compress.core.profile import Profile, profile
    from lightning_compress.core.ratio import parse_ratio
    from lightning_compress.core.surgery import load
    from lightning_compress.export import export
    from lightning_compress.export.packed import binary_network, load_packed, save_packed

__all__ = [
    "Profile",
    "__version__",
    "binary_network",
    "export",
    "load",
    "load_packed",
    "parse_ratio",
    "profile",
    "save_packed",
]

_HOME = {
    "Profile": "core.profile",
    "binary_network": "export.packed",
    "export": "export",
    "load": "core.surgery",
    "load_packed": "export.packed",
    "parse_ratio": "core.ratio",
    "profile": "core.profile",
    "save_packed": "export.packed",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
