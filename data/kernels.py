"""Loops over characters and words, compiled: `@kernel` is numba's njit, its result kept for the next process.

    @kernel
    def count(points): ...

It is kept beside the package, in the user's cache if that is read-only, and not at all if that is too. numba looks for changes in the
kernel's own file alone: kernels call no kernel of another file, and who changes `characters.py` says `touch data/*.py`.
"""

from collections.abc import Callable
from typing import Any

import numba


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # no folder to write to
        return numba.njit(function)
