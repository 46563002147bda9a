"""Small helpers for files that are either whole or not there."""

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any, BinaryIO


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(file: BinaryIO) -> None:
    """Have everything written so far on the disk itself."""
    file.flush()
    os.fsync(file.fileno())


def partial_path(path: Path) -> Path:
    """Where to write what will be `path`. Another name each time: a task of a driver that was killed may still be writing there too."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")


def write_bytes(path: Path, data: bytes) -> None:
    """Write, flush to disk, then rename into place: readers see the old file or the new one, never half of it."""
    partial = partial_path(path)
    with open(partial, "wb") as file:
        file.write(data)
        flush(file)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of indented JSON with a trailing newline."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
