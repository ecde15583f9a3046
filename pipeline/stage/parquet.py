"""The Parquet files between the stages: their schemas, whole-or-not-at-all writes, metadata.

Every file carries one JSON document under the key `listing_vectors` that says which state of
the database, settings and encoder made it.
"""

import functools
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.stage import lifetime
from pipeline.stage.errors import DataError
from pipeline.stage.lock import machine, try_lock, wait_for_lock
from pipeline.stage.settings import Identity

KEY = b"listing_vectors"
ROW_GROUP = 64_000
VECTOR_ROW_GROUP = 4_096
ABANDONED_S = 24 * 3600  # a writer on another machine that has added nothing for so long is gone

_LISTING = [
    pa.field("generation", pa.int32()),
    pa.field("listing_id", pa.int64()),
    pa.field("edited_date", pa.timestamp("us", tz="UTC")),
]
LISTINGS = pa.schema(_LISTING)
CANDIDATES = pa.schema(
    [
        *_LISTING,
        pa.field("image_index", pa.int32()),
        pa.field("storage_path", pa.string()),
        pa.field("score", pa.int32()),
        pa.field("is_stock_photo", pa.bool_()),
        pa.field("battery_screenshot", pa.bool_()),
    ]
)
SELECTED = pa.schema(
    [
        *_LISTING,
        pa.field("image_index", pa.int32()),
        pa.field("storage_path", pa.string()),
        pa.field("score", pa.int32()),
        pa.field("rank", pa.int8()),
        pa.field("fallback", pa.bool_()),
    ]
)

# Listings that have no vector, and each file that was tried. `size` and `mtime_ns` are null where
# there was none; `candidates` is the hash of the candidate rows.
WITHOUT_VECTOR = pa.schema(
    [
        *_LISTING,
        pa.field("candidates", pa.string()),
        pa.field(
            "files",
            pa.list_(
                pa.struct(
                    [
                        pa.field("storage_path", pa.string()),
                        pa.field("size", pa.int64()),
                        pa.field("mtime_ns", pa.int64()),
                        pa.field("error", pa.string()),
                    ]
                )
            ),
        ),
    ]
)


def encoded(dim: int) -> pa.Schema:
    """Selected images with their vector, or null and the error.

    `size` (bytes) and `mtime_ns` are those of the file that was read; null where there was none.
    """
    return pa.schema(
        [
            *SELECTED,
            pa.field("size", pa.int64()),
            pa.field("mtime_ns", pa.int64()),
            pa.field("vec", pa.list_(pa.float32(), dim)),
            pa.field("error", pa.string()),
        ]
    )


def listing_vectors(dim: int) -> pa.Schema:
    """One row per listing: its key in the target table, the unit vector, how many images."""
    return pa.schema(
        [
            *_LISTING,
            *(pa.field(name, pa.string()) for name in Identity._fields),
            pa.field("vec", pa.list_(pa.float32(), dim)),
            pa.field("n_images", pa.int32()),
        ]
    )


def dimension(schema: pa.Schema) -> int:
    """The length of the vectors in a schema's `vec` column."""
    return int(schema.field("vec").type.list_size)


def matrix(table: pa.Table) -> npt.NDArray[np.float32]:
    """The vectors of a table's `vec` column, float32 (rows that have one, dim).

    ValueError: it is no column of vectors.
    """
    column = table["vec"].combine_chunks()
    if not pa.types.is_fixed_size_list(column.type):
        raise ValueError("vec is no list of one size")
    return np.asarray(column.flatten()).reshape(-1, column.type.list_size)


def made_by(paths: Sequence[Path]) -> dict[str, Any]:
    """The metadata of encode shards, which must all be made by the same; else DataError.

    Of `witnesses_there` the most: a shard without images has not looked for any.
    """
    found = metadata(paths[0])
    for path in paths:
        other = metadata(path)
        if {**other, "witnesses_there": 0} != {**found, "witnesses_there": 0}:
            raise DataError(
                f"shards of one export, one selection and one encoder, as {paths[0]}",
                "another",
                str(path),
                "run encode again: --forcerun encode",
            )
        there = other.get("witnesses_there", 0)
        found["witnesses_there"] = max(there, found.get("witnesses_there", 0))
    return found


def shards(folder: Path, number: int) -> list[Path]:
    """The files of a split in their order: 1-of-N.parquet to N-of-N.parquet."""
    return [folder / f"{n}-of-{number}.parquet" for n in range(1, number + 1)]


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when the block ends without an error.

    An OSError that names no file gets this one's name. What killed writers of `path` have left
    is removed. Not `durable`: after a power cut the file may be there without its bytes.
    """
    temporary = path.with_name(f".{path.name}.{machine()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        left = _temporaries(path.parent.absolute())
        _remove_abandoned(other for other in left if other.name.startswith(f".{path.name}."))
        with lifetime.unfinished(temporary), _held(temporary) as descriptor:
            try:
                yield temporary
                if durable:
                    os.fsync(descriptor)
                lifetime.check()
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def _held(temporary: Path) -> Iterator[int]:
    """Create a temporary file and hold its lock: the sign that its writer lives."""
    while True:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            wait_for_lock(descriptor)
            if not temporary.exists():  # taken for abandoned between the two lines above
                continue
            yield descriptor
            return
        finally:
            os.close(descriptor)


@functools.cache
def _temporaries(folder: Path) -> list[Path]:
    """The temporary files that there were in a folder when this process first wrote to it.

    To list it for each file would take a time that grows with the square of their number.
    """
    return sorted(folder.glob(".*.tmp"))


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Remove the temporary files whose writers are gone; safe beside running writers.

    A writer on this machine holds its file's lock. One on another machine may hold a lock that is
    not seen here, as may any where the file system has no locks: there, age decides.
    """
    _remove_abandoned(folder.glob(pattern))


def _remove_abandoned(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError), open(path, "r+b") as file:
            locked = try_lock(file.fileno())
            ours = locked and path.name.split(".")[-3] == machine()
            old = time.time() - path.stat().st_mtime > ABANDONED_S
            if locked is not False and (ours or old):
                path.unlink()


@contextmanager
def writer(path: Path, schema: pa.Schema, metadata: dict[str, Any]) -> Iterator[pq.ParquetWriter]:
    """A Parquet writer whose file appears under its name only when it is whole."""
    strings = [f.name for f in schema if pa.types.is_string(f.type)]
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(
            temporary,
            schema.with_metadata({KEY: json.dumps(metadata, sort_keys=True).encode()}),
            compression={f.name: "none" if f.name == "vec" else "zstd" for f in schema},
            use_dictionary=strings,
            write_page_checksum=True,
        ) as parquet,
    ):
        yield parquet


def metadata(path: Path) -> dict[str, Any]:
    """The JSON document that the writing stage left in the file."""
    document = (pq.read_schema(path).metadata or {}).get(KEY)
    if document is None:
        raise DataError(
            "a Parquet file of this pipeline", "no metadata", str(path), "run its stage again"
        )
    return dict(json.loads(document))


def write_json(path: Path, document: object) -> None:
    """Write a JSON document, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def batches(path: Path, rows: int, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Record batches of at most `rows` rows in file order, all columns unless some are named.

    With pyarrow's own default, pre_buffer, all that was read stays in memory until the end. One
    thread, the caller's: in files of vectors nearly all of the work is in one column.
    """
    with pq.ParquetFile(path, pre_buffer=False) as file:
        yield from file.iter_batches(batch_size=rows, columns=columns, use_threads=False)


def read_rows(file: pq.ParquetFile, rows: range, columns: list[str] | None = None) -> pa.Table:
    """These rows, by the caller's thread; of the file only the row groups that hold them are read.

    `rows` names one at least.
    """
    footer = file.metadata
    ends = np.cumsum([0, *(footer.row_group(i).num_rows for i in range(footer.num_row_groups))])
    first, last = np.searchsorted(ends, [rows.start, rows.stop - 1], side="right") - 1
    read = file.read_row_groups(list(range(first, last + 1)), columns, use_threads=False)
    return read.slice(rows.start - ends[first], len(rows))


def clustered_batches(
    path: Path, rows: int = ROW_GROUP, columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """Tables of about `rows` rows in file order that never split a listing.

    The file must keep the rows of one (generation, listing_id, edited_date) together, as all
    files of this pipeline do; `columns` must have those. Memory does not grow with the file.
    """
    carry: list[pa.Table] = []
    for batch in batches(path, rows, columns):
        table = pa.Table.from_batches([batch])
        start = last_listing_start(table)
        if start == 0:
            carry.append(table)
            continue
        yield pa.concat_tables([*carry, table.slice(0, start)])
        carry = [table.slice(start)]
    if carry:
        yield pa.concat_tables(carry)


def listing_starts(table: pa.Table) -> np.ndarray:
    """The rows at which the listings of a clustered table begin."""
    differs = np.zeros(max(0, table.num_rows - 1), bool)
    for name in LISTINGS.names:
        values = table[name].to_numpy()
        differs |= values[1:] != values[:-1]
    return np.flatnonzero(np.concatenate([np.ones(min(1, table.num_rows), bool), differs]))


def last_listing_start(table: pa.Table) -> int:
    """The row at which the last listing of a clustered table begins; 0 in an empty one."""
    return int(listing_starts(table)[-1]) if table.num_rows else 0


def rows(paths: Iterable[Path]) -> int:
    """The number of rows in the files together, from their footers."""
    return sum(pq.read_metadata(path).num_rows for path in paths)
