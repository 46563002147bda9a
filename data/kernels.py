"""Loops over characters and words, compiled: `@kernel` is numba's njit, its result kept for the next process.

    @kernel
    def count(points): ...

It is kept beside the package, in the user's cache if that is read-only, and not at all if that is too. numba looks for changes in the
kernel's own file alone, and would go on with what another kernel or a table used to be; so the folder's name is a hash of all files here.
"""

import hashlib
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numba

HERE = Path(__file__).resolve().parent


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    folder, usual = _folder(), numba.config.CACHE_DIR
    if folder is None:
        return numba.njit(function)
    numba.config.CACHE_DIR = str(folder)  # numba asks for it here and now; other libraries' kernels keep their own place
    try:
        return numba.njit(cache=True)(function)
    finally:
        numba.config.CACHE_DIR = usual


@cache
def _folder() -> Path | None:
    """Where what these sources compile to is kept; None when nothing can be written."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(HERE.glob("*.py")))).hexdigest()[:16]
    for parent in (HERE / "__pycache__", Path.home() / ".cache" / "roundhouse"):
        folder = parent / f"kernels-{digest}"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
            for other in parent.glob("kernels-*"):  # of earlier sources
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
            return folder
    return None
