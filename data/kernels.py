"""What takes a moment to make and every worker needs, kept for the next process: compiled loops and tables of characters.

    @kernel                                # numba's njit
    def count(points): ...

    @table                                 # an array that takes a while
    def classes(): ...

It is kept beside the package, in the user's cache if that is read-only, and not at all if that is too. numba looks for changes in the
kernel's own file alone, and would go on with what another kernel or a table used to be; so the folder's name is a hash of all files here.
"""

import hashlib
import io
import shutil
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from functools import cache, wraps
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numba
import numpy as np
import regex

from data.files import write_bytes

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


def table(function: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    """What `function` returns, made once on a machine: two tables were 0.5 s of every worker's start. It may depend on these sources and
    on what Python and regex know of Unicode."""

    @cache
    @wraps(function)
    def kept() -> np.ndarray:
        name = f"{function.__module__}.{function.__name__}-{unicodedata.unidata_version}-{regex.__version__}.npy"
        path = None if (folder := _folder()) is None else folder / name
        if path is not None:
            with suppress(OSError, ValueError, EOFError):
                found: np.ndarray = np.load(path)
                return found
        found = function()
        if path is not None:
            whole = io.BytesIO()
            np.save(whole, found)
            with suppress(OSError):
                write_bytes(path, whole.getvalue())
        return found

    return kept


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
