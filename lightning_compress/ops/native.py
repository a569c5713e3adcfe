"""Compile a C++ file of this package on first use, and keep the result.

The compiler of the machine makes code for just this processor. It lies in the user's cache folder (``$XDG_CACHE_HOME``
or ``~/.cache``) under a name made of the source, the flags, the compiler and the processor, so that nothing is compiled
twice and nothing stale is loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC")
TARGETS = {"native": ("-march=native",), "avx2": ("-mavx2", "-mfma"), "portable": ()}


class NoCompiler(RuntimeError):
    """There is no C++ compiler here, or it cannot make this file; the message says what to do."""


@cache
def library(source: Path, target: str = "native") -> ctypes.CDLL | None:
    """The compiled `source`; None, and a warning, where it cannot be compiled.

    Args:
        source: a C++ file without dependencies.
        target: ``"native"`` for this processor, or ``"avx2"`` or ``"portable"`` for any that have no more.
    """
    try:
        return ctypes.CDLL(str(compile_source(source, target)))
    except (NoCompiler, OSError) as error:
        rank_zero_warn(f"{source.parent.name}: {error} Dense PyTorch operators are used instead, which are slower.")
        return None


def compile_source(source: Path, target: str = "native") -> Path:
    """Compile `source` unless that was done before.

    Returns:
        The path of the shared library.

    Raises:
        NoCompiler: no compiler was found, or it failed.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise NoCompiler("There is no C++ compiler. Install one (such as g++), or name it in the variable CXX.")
    flags = (*FLAGS, *TARGETS[target])
    parts = (source.read_bytes(), " ".join(flags).encode(), _version(compiler), _processor())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    path = _folder() / f"{source.parent.name}-{key}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        # threads where the compiler has them; torch brings the same runtime
        for threads in (["-fopenmp"], []):
            done = subprocess.run(
                [compiler, *flags, *threads, str(source), "-o", str(made)], capture_output=True, text=True, check=False
            )
            if done.returncode == 0:
                os.replace(made, path)  # at once, as other processes may be doing the same
                return path
    raise NoCompiler(f"{compiler} cannot compile {source.name}: {done.stderr.strip()[-300:] or done.returncode}.")


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_compress"


@cache
def _version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout


@cache
def _processor() -> bytes:
    """What "native" depends on."""
    about = Path("/proc/cpuinfo")
    if not about.exists():
        return f"{platform.machine()} {platform.processor()}".encode()
    lines = about.read_text(encoding="utf-8", errors="replace").splitlines()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)})).encode()
