"""The cache's parts: Parquet files that are only ever added, one row an image.

A part's name says when it was written, so that of two entries of one image the newer wins.
"""

import itertools
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.stage.command import log

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Vectors = npt.NDArray[np.float32]

VECTORS = "vectors"
ROW_GROUP = 256  # rows that one hit reads: half a megabyte at 512 dimensions
PART = re.compile(r"part-(\d+)-\d+-\d+\.parquet")
TEMPORARY = ".part-*.tmp"
FILE_KEY = ["storage_path", "size", "mtime_ns"]
UNREADABLE = (OSError, pa.ArrowException, ValueError, KeyError)

_numbers = itertools.count()


def schema(dim: int) -> pa.Schema:
    """A part's columns: two keys of an image, and its vector or its error."""
    return pa.schema(
        [
            pa.field("storage_path", pa.string()),
            pa.field("size", pa.int64()),
            pa.field("mtime_ns", pa.int64()),
            pa.field("digest", pa.binary(32)),
            pa.field("vec", pa.list_(pa.float32(), dim)),
            pa.field("error", pa.string()),
        ]
    )


@dataclass
class Entry:
    """One remembered image; exactly one of `vec` (float32, unit length) and `error` is set."""

    storage_path: str
    size: int
    mtime_ns: int
    digest: bytes
    vec: Vectors | None
    error: str | None


def new_name(at_ns: int | None = None) -> str:
    """A name that no other part has; `at_ns` is the time that it bears, now by default."""
    return f"part-{at_ns or time.time_ns()}-{os.getpid()}-{next(_numbers)}.parquet"


def part_names(folder: Path) -> list[str]:
    """The names of the parts in a folder, oldest first."""
    try:
        names = [name for name in os.listdir(folder) if PART.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):  # flush() says so if it is the latter
        return []
    return sorted(names, key=lambda name: (written_ns(name), name))


def written_ns(name: str) -> int:
    """When a part was written, in nanoseconds since 1970, by its name."""
    return int(name.split("-")[1])


def keys(path: Path) -> tuple[Hashes, Hashes]:
    """The two hashes of each row."""
    with pq.ParquetFile(path) as file:
        table = file.read(columns=[*FILE_KEY, "digest"], use_threads=False)
    return file_hashes(table), digest_hashes(table)


def file_hashes(table: pa.Table) -> Hashes:
    """64 bits of each row's (storage_path, size, mtime_ns); the same within a process only."""
    frame = pl.DataFrame(table.select(FILE_KEY).cast(_FILE_KEY_TYPES))
    return frame.hash_rows(seed=0).to_numpy()


_FILE_KEY_TYPES = pa.schema([schema(1).field(name) for name in FILE_KEY])


def digest_hashes(table: pa.Table) -> Hashes:
    """The first 64 bits of each row's SHA-256."""
    column = table["digest"].combine_chunks()
    values = np.frombuffer(column.buffers()[1] or b"", np.uint64)[column.offset * 4 :]
    return values[: len(column) * 4 : 4].copy()


def table_of(entries: list[Entry], dim: int) -> pa.Table:
    vectors = np.zeros((len(entries), dim), np.float32)
    for row, entry in enumerate(entries):
        if entry.vec is not None:
            vectors[row] = entry.vec
    null = pa.array([entry.vec is None for entry in entries])
    columns = {
        "storage_path": [entry.storage_path for entry in entries],
        "size": [entry.size for entry in entries],
        "mtime_ns": [entry.mtime_ns for entry in entries],
        "digest": [entry.digest for entry in entries],
        "vec": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim, mask=null),
        "error": [entry.error for entry in entries],
    }
    return pa.table(columns, schema=schema(dim))


def read_rows(path: Path, rows: Ints, columns: list[str]) -> tuple[pa.Table, Ints]:
    """The row groups that hold `rows`, and where in them each of the rows is."""
    with pq.ParquetFile(path) as file:
        footer = file.metadata
        lengths = np.array([footer.row_group(i).num_rows for i in range(footer.num_row_groups)])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        group = np.searchsorted(starts, rows, side="right") - 1
        needed, which = np.unique(group, return_inverse=True)
        table = file.read_row_groups(needed.tolist(), columns=columns, use_threads=False)
    begins = np.concatenate([[0], np.cumsum(lengths[needed])])
    return table, rows - starts[group] + begins[which]


def matrix(column: pa.ChunkedArray, dim: int) -> tuple[Vectors, npt.NDArray[np.bool_]]:
    """The vectors, float32 (rows, dim), and which of them are null (their values are any)."""
    if column.type.list_size != dim:
        raise ValueError(f"vectors of {column.type.list_size} dimensions, not {dim}")
    chunks = [
        chunk.values.slice(chunk.offset * dim, len(chunk) * dim).to_numpy(zero_copy_only=False)
        for chunk in column.chunks
    ]
    matrix = np.concatenate(chunks).reshape(len(column), dim)
    return matrix, column.is_null().to_numpy()


def warn_of_part(path: Path, error: Exception) -> None:
    log.warning("cache part %s cannot be read and counts as missing: %s", path, first_line(error))


def first_line(error: Exception) -> str:
    """What an error says, in one line; its kind if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
