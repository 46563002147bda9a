"""Where files are: paths of this machine, and URIs of object stores. The rest of the room asks here and knows neither.

    files = find("s3://bucket/crawl/*.warc.gz")      # URIs as str, sorted; what is local comes as absolute Path
    with open_file(files[0]) as stream: ...          # bytes, seekable
    size = size_of(files[0])

`s3://` and `gs://` are read by pyarrow itself (credentials as their own tools find them: environment, profile, instance;
options behind a `?`, as `s3://bucket/a?region=eu-west-1` or `gs://anonymous@bucket/a`), `hf://`, `memory://` and all else
by fsspec, if the package for it is installed.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from fsspec.core import url_to_fs
from fsspec.utils import glob_translate
from pyarrow import fs

from data.errors import DataError

File = Path | str
"""A local path, or a URI."""
_URI = re.compile(r"([a-z][a-z0-9+.-]+)://")
_PATTERN = re.compile(r"[*?\[]")
_REMOTE_BUFFER = 8 << 20  # bytes asked for at once: a request to a store takes 20 to 100 ms, whatever it brings
_GS_SECONDS = 30  # pyarrow would try for 15 minutes


def is_uri(file: File) -> bool:
    return isinstance(file, str) and _URI.match(file) is not None and not file.startswith("file://")


def local(file: File) -> Path:
    """The absolute path of what is not on an object store."""
    text = str(file)
    return Path(unquote(text.removeprefix("file://")) if text.startswith("file://") else text).expanduser().absolute()


def find(pattern: File) -> list[File]:
    """The files of a path, URI or glob (`**` crosses folders), sorted. Empty when there is none."""
    if not is_uri(pattern):
        return sorted(Path(path) for path in glob(str(local(pattern)), recursive=True) if Path(path).is_file())
    with _told(pattern):
        system, path = _system(str(pattern))
        hit = _PATTERN.search(path)
        if hit is None:
            return [str(pattern)] if system.get_file_info(path).is_file else []
        wanted, base = re.compile(glob_translate(path)), path[: hit.start()].rpartition("/")[0]
        before, _, after = str(pattern).partition(path)  # scheme and who asks; the options
        found = system.get_file_info(fs.FileSelector(base, recursive="/" in path[hit.start() :], allow_not_found=True))
        return sorted(before + info.path + after for info in found if info.is_file and wanted.match(info.path))


def size_of(file: File) -> int:
    """Bytes of a file as it is stored. Raises DataError when there is none."""
    if not is_uri(file):
        try:
            return local(file).stat().st_size
        except OSError as error:
            raise DataError(f"{file}: {error.strerror or error}") from None
    with _told(file):
        system, path = _system(str(file))
        info = system.get_file_info(path)
    if not info.is_file:
        raise DataError(f"{file}: no such file")
    return info.size


def stamp(file: File) -> str:
    """What tells a file from an earlier one of that name without reading it: its size and time of change."""
    if not is_uri(file):
        about = local(file).stat()
        return f"{file} {about.st_size} {about.st_mtime_ns}"
    with _told(file):
        system, path = _system(str(file))
        info = system.get_file_info(path)
        return f"{file} {info.size} {info.mtime_ns}"


def open_file(file: File) -> BinaryIO:
    """The bytes of a file, seekable; of a remote one 8 MiB are fetched at once. Raises DataError when it cannot be opened."""
    if not is_uri(file):
        try:
            return open(local(file), "rb")
        except OSError as error:
            raise DataError(f"{file}: {error.strerror or error}") from None
    with _told(file):
        system, path = _system(str(file))
        return io.BufferedReader(system.open_input_file(path), _REMOTE_BUFFER)


@lru_cache(maxsize=64)
def _opened_system(scheme: str, place: str) -> tuple[fs.FileSystem, str]:
    if scheme in ("s3", "gs", "gcs"):
        if scheme != "s3" and "retry_limit_seconds" not in place:
            place += f"{'&' if '?' in place else '?'}retry_limit_seconds={_GS_SECONDS}"
        return fs.FileSystem.from_uri(f"{scheme}://{place}")
    system, path = url_to_fs(f"{scheme}://{place}")
    return fs.PyFileSystem(fs.FSSpecHandler(system)), path


def _system(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system behind a URI, and the path within it."""
    scheme, _, place = uri.partition("://")
    return _opened_system(scheme, place)


@contextmanager
def _told(file: File) -> Iterator[None]:
    """Whatever a store's library raises becomes one DataError that says what to do."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"{file}: no library for {str(file).partition('://')[0]}:// is installed: {error}") from None
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise DataError(f"{file}: the store does not answer or refuses; check the address, credentials and network: {text}") from error
