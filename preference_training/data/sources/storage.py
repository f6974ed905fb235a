"""Open files by name: local ones (`~` is home) or in storage that fsspec knows (s3://, gs://, hf://), compressed or not."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from preference_training.core.errors import UserError, first_line
from preference_training.core.files import hash_file


def _zstandard(file):
    """Decompress with pyarrow, which is installed anyway."""
    import io

    import pyarrow

    # It reads the one frame of most files, and the several of concatenated or parallel ones.
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd"))


COMPRESSIONS: dict[str, Callable] = {".gz": gzip.open, ".zst": _zstandard, ".bz2": bz2.open, ".xz": lzma.open}
# What the packages of storage are called; those of others are named by fsspec.
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
REQUIREMENTS = "pip install -r requirements/cloud.txt"
# What reading a damaged or unreadable file raises, besides errors in its text.
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)


def is_remote(name: str) -> bool:
    """Whether a path is a URL of fsspec's."""
    return "://" in name


def expanded(name: str) -> str:
    """A path with the home directory in place of `~`."""
    return str(Path(name).expanduser()) if name.startswith("~") else name


def is_pattern(name: str) -> bool:
    """Whether a path is a pattern of several files' paths."""
    return any(character in name for character in "*?[") and (is_remote(name) or not Path(name).exists())


def file_system(url: str):
    """fsspec's file system of a URL, and the path in it. Raises UserError where its package or its storage is missing."""
    import fsspec.core

    protocol = url.split("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        remedy = f"Run `{REQUIREMENTS}`, or `pip install {package}`." if package else f"{first_line(error)}."
        raise UserError(f"datasets: {url}: {protocol}:// needs a package that is not installed. {remedy}") from error
    except ValueError as error:
        known = "s3://, gs://, hf://, or another protocol of fsspec's"
        raise UserError(f"datasets: {url}: {first_line(error)}. Expected {known}, or a local path.") from error


@contextmanager
def cloud_errors(url: str) -> Iterator[None]:
    """Raise UserError for whatever goes wrong with storage: a dozen types, of as many packages."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = first_line(error) or type(error).__name__
        raise UserError(
            f"datasets: {url}: cannot be read: {reason}. Expected an address that this machine may read; credentials are "
            "those of the storage's own tools."
        ) from error


@contextmanager
def opened(name: str | Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of a file."""
    with _raw(name) as raw:
        decompress = COMPRESSIONS.get(Path(name).suffix.lower())
        if decompress is None:
            yield raw
        else:
            with decompress(raw) as file:
                yield file


@contextmanager
def _raw(name: str | Path) -> Iterator[BinaryIO]:
    if isinstance(name, Path) or not is_remote(name):
        with Path(name).open("rb") as file:
            yield file
        return
    system, path = file_system(name)
    with cloud_errors(name):
        file = system.open(path, "rb")
    with file:
        yield file


def content_hash(name: str | Path) -> str:
    """32 hexadecimal digits that change with a file's content: a hash of its bytes, or of what storage says identifies them.

    Raises UserError where it cannot be read.
    """
    if isinstance(name, str) and is_remote(name):
        return _remote_hash(name)
    path = Path(name)
    try:
        return hash_file(path)
    except OSError as error:
        raise UserError(f"datasets: {path}: cannot be read: {error}. Expected a whole, readable {path.suffix} file.") from error


def _remote_hash(url: str) -> str:
    import xxhash

    system, path = file_system(url)
    with cloud_errors(url):
        if not url.startswith("http"):
            return xxhash.xxh3_128_hexdigest(str(system.ukey(path)).encode())
        # The address of a web page says nothing of its content.
        digest = xxhash.xxh3_128()
        with system.open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
