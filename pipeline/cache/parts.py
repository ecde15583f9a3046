"""The cache's parts: Parquet files that are only ever added, one row an image.

A part's name says when it was written, so that of two entries of one image the newer wins. Its
vectors are neither compressed nor encoded: a record says at which byte one of them lies.
"""

import errno
import itertools
import os
import re
import time
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.stage.parquet import matrix

Array = npt.NDArray[Any]
Outcome = npt.NDArray[np.float32] | str

VECTORS = "vectors"
PART = re.compile(r"part-\d+-\d+-\d+\.parquet")
TEMPORARY = ".*.tmp"
FILE_KEY = ["storage_path", "size", "mtime_ns"]
UNREADABLE = (OSError, pa.ArrowException, ValueError, TypeError, LookupError)

# An image has two keys of 96 bits. A record says where the entry of one is: in which part, by the
# time in its name, and at which byte, or which of the part's errors it is. `check` is the entry's
# CRC-32 xor `low`: what is read there is what was written, and of this image.
KEY = np.dtype([("key", "<u8"), ("low", "<u4")])
RECORD = np.dtype([("key", "<u8"), ("part", "<i8"), ("at", "<u4"), ("check", "<u4")])
IS_ERROR = 1 << 31

_numbers = itertools.count()


class Entry(NamedTuple):
    """One remembered image, and its unit vector, float32 (dim,), or why it has none."""

    storage_path: str
    size: int
    mtime_ns: int
    digest: bytes
    outcome: Outcome


def new_name(at_ns: int | None = None, form: str = "part-{}.parquet") -> str:
    """A name that no other file has; `at_ns` is the time that it bears, now by default."""
    return form.format(f"{at_ns or time.time_ns()}-{os.getpid()}-{next(_numbers)}")


def written_ns(name: str) -> int:
    """When a part was written, in nanoseconds since 1970, by its name."""
    return int(name.split("-")[1])


def names(folder: Path, kind: re.Pattern[str] = PART) -> list[str]:
    """The names of the files of a kind in a folder, oldest first."""
    try:
        found = [name for name in os.listdir(folder) if kind.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):  # flush() says so if it is the latter
        return []
    return sorted(found, key=lambda name: (written_ns(name), name))


def file_keys(files: Iterable[tuple[str, int, int]]) -> Array:
    """The keys of images by (storage_path, size, mtime_ns)."""
    texts = (f"{path}\0{size}\0{mtime_ns}".encode() for path, size, mtime_ns in files)
    return digest_keys(blake2b(text, digest_size=KEY.itemsize).digest() for text in texts)


def digest_keys(digests: Iterable[bytes]) -> Array:
    """The keys of images by the SHA-256 of their bytes."""
    return np.frombuffer(b"".join(digest[: KEY.itemsize] for digest in digests), KEY)


def table_of(entries: Iterable[Entry], dim: int) -> pa.Table:
    """A part's rows: two keys of an image, and its vector or its error."""
    *keys, outcomes = zip(*entries, strict=True)
    vectors = [None if isinstance(each, str) else each for each in outcomes]
    errors = [each if isinstance(each, str) else None for each in outcomes]
    types = [pa.string(), pa.int64(), pa.int64(), pa.binary(32), pa.list_(pa.float32(), dim)]
    columns = map(pa.array, [*keys, vectors, errors], [*types, pa.string()])
    return pa.table(list(columns), [*FILE_KEY, "digest", "vec", "error"])


def read(path: Path) -> pa.Table:
    """A part's rows, without those whose vector is not of unit length: they are damaged.

    Raises one of UNREADABLE.
    """
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        table = file.read(use_threads=False).replace_schema_metadata()
    table = table.cast(table_of([Entry("", 0, 0, bytes(32), "")], matrix(table).shape[1]).schema)
    vectors, sound = matrix(table), np.array(table["error"].is_valid())
    sound[table["vec"].is_valid()] = np.abs(np.einsum("ij,ij->i", vectors, vectors) - 1) < 1e-3
    return table.filter(pa.array(sound))


def records_of(path: Path, table: pa.Table) -> Array:
    """The records (2, rows) of a part's rows, by file and by content.

    Where a vector lies is found by looking for its bytes in the file. Raises one of UNREADABLE.
    """
    columns = [table[name].to_pylist() for name in [*FILE_KEY, "digest", "error"]]
    keys = np.stack([file_keys(zip(*columns[:3], strict=True)), digest_keys(columns[3])])
    data, end, vectors, numbers = path.read_bytes(), 0, iter(matrix(table)), itertools.count()
    places, checks = [], []
    for error in columns[4]:
        value = next(vectors).tobytes() if error is None else error.encode()
        if error is None:
            start = end if data.startswith(value, end) else data.index(value, end)
            end = start + len(value)
        places.append(start if error is None else IS_ERROR | next(numbers))
        checks.append(crc32(value))
    records = np.zeros(keys.shape, RECORD)
    records["part"], records["at"] = written_ns(path.name), places
    records["key"], records["check"] = keys["key"], np.array(checks, "<u4") ^ keys["low"]
    return records


def values(path: Path, records: Array, low: Array, dim: int) -> list[Outcome]:
    """The vector or the error of each record. Raises one of UNREADABLE."""
    found: list[Outcome] = []
    errors: pa.ChunkedArray = []
    if (records["at"] >= IS_ERROR).any():
        errors = pq.read_table(path, columns=["error"], use_threads=False)["error"].drop_null()
    checks = records["check"] ^ low
    with open(path, "rb", buffering=0) as file:
        for at, check in zip(records["at"].tolist(), checks.tolist(), strict=True):
            error = errors[at ^ IS_ERROR].as_py() if at & IS_ERROR else None
            raw = os.pread(file.fileno(), dim * 4, at) if error is None else str(error).encode()
            if crc32(raw) != check:
                raise ValueError("not the bytes that were written")
            found.append(np.frombuffer(raw, np.float32) if error is None else error)
    return found


def is_gone(error: Exception) -> bool:
    """Whether a file was merged into another or pruned, by any machine."""
    return getattr(error, "errno", None) in (errno.ENOENT, errno.ESTALE)


def is_lost(error: Exception) -> bool:
    """Whether a file is damaged; what the disk did not give may be sound."""
    return getattr(error, "errno", None) is None
