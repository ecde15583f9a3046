"""The vector cache: every vector ever made, and every photo known to be broken.

One folder per encoder fingerprint, in it Parquet parts that are only ever added. An image is
found by (storage_path, size, mtime) without reading it, then by the hash of its bytes. Several
processes may read and add at the same time. Deleting any of it costs time, never correctness.
"""

import fcntl
import itertools
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.command import log
from pipeline.errors import DataError
from pipeline.model import Fingerprint
from pipeline.parquet import dimension, metadata, remove_abandoned, writer

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Vectors = npt.NDArray[np.float32]

VECTORS = "vectors"
ROW_GROUP = 256  # rows that one hit reads: half a megabyte at 512 dimensions
FLUSH_ROWS = 1_024
FLUSH_S = 5.0
MERGED_ROWS = 16_384
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


def folder_of(cache_dir: Path, fingerprint: Fingerprint) -> Path:
    """Where the vectors with this fingerprint are kept."""
    return cache_dir / VECTORS / fingerprint.folder


@dataclass
class Entry:
    """One remembered image; exactly one of `vec` (float32, unit length) and `error` is set."""

    storage_path: str
    size: int
    mtime_ns: int
    digest: bytes
    vec: Vectors | None
    error: str | None


@dataclass
class Hits:
    """What a lookup found, by the row of the question."""

    vectors: dict[int, Vectors] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)

    def found(self, row: int) -> bool:
        """Whether the cache knows this image, by its vector or by its error."""
        return row in self.vectors or row in self.errors

    def vector(self, row: int) -> Vectors | None:
        """The image's unit vector, float32 (dim,); None where there is none."""
        return self.vectors.get(row)

    def error(self, row: int) -> str | None:
        """Why the image has no vector; None where it has one or is not known."""
        return self.errors.get(row)

    def __len__(self) -> int:
        return len(self.vectors) + len(self.errors)


class VectorCache:
    """The entries of one fingerprint. For one thread at a time, and any number of processes.

    Memory: 32 bytes an entry, and the entries that are not written yet. With `read=False`
    nothing but what this object adds is found; it is written, and wins over what was there.
    """

    def __init__(
        self, folder: Path, dim: int, read: bool = True, document: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self.dim = dim
        self.read = read
        self._document = dict(document or {})
        self._parts = _Parts()
        self._files = _Index(self._parts)
        self._digests = _Index(self._parts)
        self._unwritten: list[Entry] = []
        self._unwritten_files: dict[tuple[str, int, int], Entry] = {}
        self._unwritten_digests: dict[bytes, Entry] = {}
        self._oldest = 0.0
        self._warned = False
        self.refresh()

    @classmethod
    def of(cls, cache_dir: Path, fingerprint: Fingerprint, dim: int, read: bool = True) -> Self:
        """The cache of a fingerprint below `cache_dir`; its parts say what made them."""
        return cls(folder_of(cache_dir, fingerprint), dim, read, fingerprint.as_dict())

    def __enter__(self) -> Self:
        remove_abandoned(self.folder, TEMPORARY)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what is not written yet, also when the block failed: it was paid for."""
        self._write_or_forget()

    @property
    def entries(self) -> int:
        """How many images are known, more or less: a replaced entry may count twice."""
        return len(self._files) + len(self._unwritten_files)

    def lookup_files(self, paths: list[str], sizes: Ints, mtimes: Ints) -> Hits:
        """Images by storage_path, size in bytes and mtime in nanoseconds, row by row.

        Made for thousands of rows a call, in the order in which they were added.
        """
        columns = [pa.array(paths, pa.string()), pa.array(sizes), pa.array(mtimes)]
        asked = pa.table(columns, FILE_KEY)
        keys = zip(paths, sizes.tolist(), mtimes.tolist(), strict=True)
        unwritten = {
            row: entry for row, key in enumerate(keys) if (entry := self._unwritten_files.get(key))
        }
        return self._lookup(self._files, _file_hashes(asked), asked, unwritten)

    def lookup_digests(self, digests: list[bytes]) -> Hits:
        """Images by the SHA-256 of their bytes, row by row."""
        asked = pa.table([pa.array(digests, pa.binary(32))], ["digest"])
        unwritten = {
            row: entry
            for row, digest in enumerate(digests)
            if (entry := self._unwritten_digests.get(digest))
        }
        return self._lookup(self._digests, _digest_hashes(asked), asked, unwritten)

    def add(
        self,
        storage_path: str,
        size: int,
        mtime_ns: int,
        digest: bytes,
        vec: Vectors | None,
        error: str | None,
    ) -> None:
        """Remember an image's unit vector, or why it has none. Written within seconds.

        Where the folder takes no files, a warning says so once and the entries are forgotten: the
        shard that needs them does without.
        """
        entry = Entry(storage_path, size, mtime_ns, digest, vec, error)
        if not self._unwritten:
            self._oldest = time.monotonic()
        self._unwritten.append(entry)
        self._unwritten_files[storage_path, size, mtime_ns] = entry
        self._unwritten_digests[digest] = entry
        if len(self._unwritten) >= FLUSH_ROWS:
            self._write_or_forget()
        else:
            self._flush_if_due()

    def flush(self) -> None:
        """Write what is not written yet as one part. DataError: the folder takes no files."""
        if not self._unwritten:
            return
        table = _table(self._unwritten, self.dim)
        name = f"part-{time.time_ns()}-{os.getpid()}-{next(_numbers)}.parquet"
        try:
            with writer(self.folder / name, table.schema, self._document) as parquet:
                parquet.write_table(table, row_group_size=ROW_GROUP)
        except OSError as error:
            raise DataError(
                "a cache folder that takes files",
                os.strerror(error.errno).lower() if error.errno else str(error), str(self.folder),
                "make room, or set another cache_dir",
            ) from None  # fmt: skip
        self._index([(name, _file_hashes(table), _digest_hashes(table))])
        self._forget_unwritten()

    def _write_or_forget(self) -> None:
        try:
            self.flush()
        except DataError as error:
            if not self._warned:
                log.warning("%s; going on: what is not cached will be encoded again", error)
            self._warned = True
            self._forget_unwritten()

    def _forget_unwritten(self) -> None:
        self._unwritten.clear()
        self._unwritten_files.clear()
        self._unwritten_digests.clear()

    def refresh(self) -> int:
        """Take in the parts that other processes have written since; returns how many."""
        self._flush_if_due()
        if not self.read:
            return 0
        new = [name for name in _part_names(self.folder) if name not in self._parts.known]
        read = [(name, *keys) for name in new if (keys := self._keys(name)) is not None]
        self._index(read)
        return len(read)

    def _flush_if_due(self) -> None:
        if self._unwritten and time.monotonic() - self._oldest > FLUSH_S:
            self._write_or_forget()

    def _index(self, parts: list[tuple[str, Hashes, Hashes]]) -> None:
        if not parts:
            return
        rows = [
            self._parts.add(name) << np.uint64(32) | np.arange(len(files), dtype=np.uint64)
            for name, files, _ in parts
        ]
        self._files.add(np.concatenate([part[1] for part in parts]), np.concatenate(rows))
        self._digests.add(np.concatenate([part[2] for part in parts]), np.concatenate(rows))

    def _keys(self, name: str) -> tuple[Hashes, Hashes] | None:
        """The two hashes of each row of a part; None, with a warning, if it cannot be read."""
        try:
            return _keys(self.folder / name, self.dim)
        except FileNotFoundError:
            return None  # merged into another by a prune since the folder was listed
        except UNREADABLE as error:
            self._parts.known.add(name)
            _warn_of_part(self.folder / name, error)
            return None

    def _lookup(
        self, index: "_Index", hashes: Hashes, asked: pa.Table, unwritten: dict[int, Entry]
    ) -> Hits:
        hits = Hits()
        for row, entry in unwritten.items():
            _put(hits, row, entry.vec, entry.error)
        while True:
            missing = np.array([r for r in range(len(hashes)) if not hits.found(r)], np.int64)
            vanished = self._read_hits(hits, index.find(hashes[missing]), missing, asked)
            # a prune moves entries to a new part before it removes the old one
            if not vanished:
                return hits
            if not self.refresh():
                log.warning("%d cache parts were removed and count as missing", len(vanished))
                return hits

    def _read_hits(self, hits: Hits, places: Ints, asked_rows: Ints, asked: pa.Table) -> list[str]:
        """Read the rows at `places` (-1: none) part by part; returns the parts that are gone."""
        vanished = []
        parts = places >> 32
        for part in np.unique(parts[places >= 0]):
            name = self._parts.names[part]
            here = np.flatnonzero(parts == part)
            try:
                self._read_part(hits, name, places[here] & 0xFFFFFFFF, asked_rows[here], asked)
            except FileNotFoundError:
                self._parts.drop(int(part))
                vanished.append(name)
            except UNREADABLE as error:
                self._parts.drop(int(part))
                _warn_of_part(self.folder / name, error)
        return vanished

    def _read_part(
        self, hits: Hits, name: str, rows: Ints, asked_rows: Ints, asked: pa.Table
    ) -> None:
        """Add the rows of a part whose key is the one asked for, not just its hash."""
        table, at = _read_rows(self.folder / name, rows, [*asked.column_names, "vec", "error"])
        same = np.ones(len(rows), bool)
        for key in asked.column_names:
            equal = pc.equal(table[key].take(at), asked[key].take(asked_rows))
            same &= pc.fill_null(equal, False).to_numpy()
        vectors, null = _matrix(table["vec"], self.dim)
        errors = table["error"].take(at).to_pylist()
        found = vectors[at]
        unit = np.abs(np.einsum("ij,ij->i", found, found) - 1) < 1e-3  # else the bytes are damaged
        for i in np.flatnonzero(same & (null[at] | unit)).tolist():
            _put(hits, int(asked_rows[i]), None if null[at[i]] else found[i], errors[i])


class NoCache(VectorCache):
    """Finds nothing and keeps nothing: what a benchmark measures with."""

    def __init__(self, dim: int) -> None:
        super().__init__(Path(os.devnull), dim, read=False)

    def add(
        self,
        storage_path: str,
        size: int,
        mtime_ns: int,
        digest: bytes,
        vec: Vectors | None,
        error: str | None,
    ) -> None:
        """Forget it."""


class _Parts:
    """The parts by number: name, when they were written, and whether they are still there."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.known: set[str] = set()
        self._written: list[int] = []
        self._there: list[bool] = []

    def add(self, name: str) -> np.uint64:
        self.names.append(name)
        self.known.add(name)
        self._written.append(_written(name))
        self._there.append(True)
        return np.uint64(len(self.names) - 1)

    def drop(self, part: int) -> None:
        self._there[part] = False

    @property
    def written(self) -> Ints:
        return np.array(self._written, np.int64)

    @property
    def there(self) -> npt.NDArray[np.bool_]:
        return np.array(self._there, bool)


class _Index:
    """From 64-bit hashes to places (part << 32 | row), the newest entry of each hash only.

    Sorted segments, each at most half as long as the one before, so that an addition is cheap
    and a lookup searches few. Two keys with one hash shadow each other: the older is a miss.
    """

    def __init__(self, parts: _Parts) -> None:
        self._parts = parts
        self._segments: list[tuple[Hashes, Hashes]] = []

    def __len__(self) -> int:
        return sum(len(hashes) for hashes, _ in self._segments)

    def add(self, hashes: Hashes, places: Hashes) -> None:
        if not len(hashes):
            return
        self._segments.append(self._newest(hashes, places))
        while len(self._segments) > 1 and len(self._segments[-1][0]) * 2 > len(
            self._segments[-2][0]
        ):
            one, other = self._segments.pop(), self._segments.pop()
            self._segments.append(
                self._newest(np.concatenate([one[0], other[0]]), np.concatenate([one[1], other[1]]))
            )

    def _newest(self, hashes: Hashes, places: Hashes) -> tuple[Hashes, Hashes]:
        kept = newest(hashes, places, self._parts.written)
        return hashes[kept], places[kept]

    def find(self, wanted: Hashes) -> Ints:
        """The place of each hash, -1 where there is none."""
        written, there = self._parts.written, self._parts.there
        best = np.full(len(wanted), -1, np.int64)
        age = np.full(len(wanted), -1, np.int64)
        for hashes, places in self._segments:
            at = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
            place = places[at].astype(np.int64)
            part = place >> 32
            better = (hashes[at] == wanted) & there[part] & (written[part] > age)
            best[better], age[better] = place[better], written[part[better]]
        return best


def newest(hashes: Hashes, places: Hashes, written: Ints) -> Ints:
    """Positions, in the order of the hashes, of the newest place (part << 32 | row) of each."""
    order = np.lexsort((places, written[(places >> np.uint64(32)).astype(np.int64)], hashes))
    ordered = hashes[order]
    last = np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)]
    kept: Ints = order[last]
    return kept


@dataclass(frozen=True)
class FolderStats:
    """What one fingerprint's folder holds."""

    folder: str
    fingerprint: dict[str, Any]
    entries: int
    failures: int
    parts: int
    bytes: int


def stats(cache_dir: Path) -> list[FolderStats]:
    """What the cache holds, folder by folder, from the parts' footers, without unreadable parts."""
    return [_folder_stats(folder) for folder in _folders(cache_dir)]


def prune(
    cache_dir: Path,
    *,
    keep: Collection[str] | None = None,
    max_bytes: int | None = None,
    older_than_days: float | None = None,
    root: Path | None = None,
) -> int:
    """Merge small parts and drop replaced entries; returns the bytes that this has freed.

    `keep`: only these fingerprint folders stay. `older_than_days`: parts written before are
    dropped. `root`: entries whose file below it is gone or has changed are dropped. `max_bytes`:
    the oldest parts are dropped until the rest fits. Others may read and add meanwhile; a second
    prune waits.
    """
    vectors = cache_dir / VECTORS
    if not vectors.is_dir():
        return 0
    with _only_prune(vectors):
        before = _bytes(cache_dir)
        for folder in _folders(cache_dir):
            if keep is not None and folder.name not in keep:
                _remove(folder)
                continue
            remove_abandoned(folder, TEMPORARY)
            if older_than_days is not None:
                oldest = time.time_ns() - int(older_than_days * 86_400e9)
                _unlink(folder / name for name in _part_names(folder) if _written(name) < oldest)
            _merge(folder, root)
        if max_bytes is not None:
            _shrink(cache_dir, max_bytes)
        return before - _bytes(cache_dir)


def _merge(folder: Path, root: Path | None) -> None:
    """Write runs of small parts anew without replaced entries, then remove them.

    A merged part bears the time of its newest source: it loses to all that is added after.
    """
    names, kept = _kept_rows(folder)
    if root is not None:
        kept = [_current(folder / n, rows, root) for n, rows in zip(names, kept, strict=True)]
    for run in _runs([len(rows) for rows in kept]):
        paths = [folder / names[i] for i in run]
        rows = [kept[i] for i in run]
        whole = len(run) == 1 and len(rows[0]) == pq.read_metadata(paths[0]).num_rows
        if whole:
            continue
        try:
            if any(len(r) for r in rows):
                _write_merged(folder, paths, rows)
        except UNREADABLE as error:
            _warn_of_part(paths[-1], error)
        else:
            _unlink(paths)


def _kept_rows(folder: Path) -> tuple[list[str], list[Ints]]:
    """The readable parts, oldest first, and of each the rows that no later entry replaces.

    Parts that are no whole Parquet files are removed: no one can read them.
    """
    names: list[str] = []
    hashes: list[Hashes] = []
    places: list[Hashes] = []
    for name in _part_names(folder):
        try:
            files, _ = _keys(folder / name)
        except UNREADABLE as error:
            _warn_of_part(folder / name, error)
            if not isinstance(error, OSError) or error.errno is None:  # else: the disk's fault
                _unlink([folder / name])
            continue
        hashes.append(files)
        places.append(np.uint64(len(names)) << np.uint64(32) | np.arange(len(files), dtype="u8"))
        names.append(name)
    if not names:
        return [], []
    every = np.concatenate(places)
    written = np.array([_written(name) for name in names], np.int64)
    best = np.sort(every[newest(np.concatenate(hashes), every, written)]).astype(np.int64)
    bounds = np.searchsorted(best, np.arange(len(names) + 1, dtype=np.int64) << 32)
    return names, [
        best[start:stop] & 0xFFFFFFFF for start, stop in itertools.pairwise(bounds.tolist())
    ]


def _current(path: Path, rows: Ints, root: Path) -> Ints:
    """Those of the rows whose file is still as it was."""
    table = pq.read_table(path, columns=FILE_KEY).take(rows)

    def same(storage_path: str, size: int, mtime_ns: int) -> bool:
        try:
            found = os.stat(root / storage_path)
        except (OSError, ValueError):
            return False
        return (found.st_size, found.st_mtime_ns) == (size, mtime_ns)

    columns = [table[name].to_pylist() for name in FILE_KEY]
    current: Ints = rows[np.array([same(*row) for row in zip(*columns, strict=True)], bool)]
    return current


def _runs(lengths: list[int]) -> Iterator[list[int]]:
    """Neighbouring parts that together have at most MERGED_ROWS rows, or one longer part."""
    run: list[int] = []
    rows = 0
    for i, length in enumerate(lengths):
        if run and rows + length > MERGED_ROWS:
            yield run
            run, rows = [], 0
        run.append(i)
        rows += length
    if run:
        yield run


def _write_merged(folder: Path, paths: list[Path], rows: list[Ints]) -> None:
    name = f"part-{_written(paths[-1].name)}-{os.getpid()}-{next(_numbers)}.parquet"
    table = pa.concat_tables(
        pq.read_table(path).take(kept) for path, kept in zip(paths, rows, strict=True)
    )
    columns = table.schema.remove_metadata()
    with writer(folder / name, columns, metadata(paths[0])) as parquet:
        parquet.write_table(table, row_group_size=ROW_GROUP)


def _shrink(cache_dir: Path, max_bytes: int) -> None:
    parts = [folder / name for folder in _folders(cache_dir) for name in _part_names(folder)]
    total = sum(part.stat().st_size for part in parts)
    for part in sorted(parts, key=lambda part: _written(part.name)):
        if total <= max_bytes:
            return
        total -= part.stat().st_size
        _unlink([part])


@contextmanager
def _only_prune(vectors: Path) -> Iterator[None]:
    """Hold the lock that two prunes contend for; readers and writers need none."""
    with open(vectors / ".prune.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes, also by a crash
        yield


def _folders(cache_dir: Path) -> list[Path]:
    vectors = cache_dir / VECTORS
    return sorted(f for f in vectors.iterdir() if f.is_dir()) if vectors.is_dir() else []


def _folder_stats(folder: Path) -> FolderStats:
    entries = failures = parts = size = 0
    document: dict[str, Any] = {}
    for name in _part_names(folder):
        try:
            footer = pq.read_metadata(folder / name)
            document = document or metadata(folder / name)
            size += (folder / name).stat().st_size
        except (OSError, pa.ArrowException, DataError):
            continue
        parts += 1
        entries += footer.num_rows
        failures += _failures(footer)
    return FolderStats(folder.name, document, entries, failures, parts, size)


def _failures(footer: pq.FileMetaData) -> int:
    error = footer.num_columns - 1
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    return sum(group.num_rows - group.column(error).statistics.null_count for group in groups)


def _bytes(cache_dir: Path) -> int:
    return sum(
        file.stat().st_size for folder in _folders(cache_dir) for file in folder.iterdir()
    )  # fmt: skip


def _remove(folder: Path) -> None:
    _unlink(folder / name for name in _part_names(folder))
    remove_abandoned(folder, TEMPORARY)
    with suppress(OSError):  # not empty: someone is writing to it
        folder.rmdir()


def _unlink(paths: Collection[Path] | Iterator[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _part_names(folder: Path) -> list[str]:
    """The names of the parts in a folder, oldest first."""
    try:
        names = [name for name in os.listdir(folder) if PART.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):  # flush() says so if it is the latter
        return []
    return sorted(names, key=lambda name: (_written(name), name))


def _written(name: str) -> int:
    """When a part was written, in nanoseconds since 1970, by its name."""
    return int(name.split("-", 2)[1])


def _keys(path: Path, dim: int | None = None) -> tuple[Hashes, Hashes]:
    """The two hashes of each row. ValueError: the part has another dimension than `dim`."""
    with pq.ParquetFile(path) as file:
        if dim is not None and (found := dimension(file.schema_arrow)) != dim:
            raise ValueError(f"vectors of {found} dimensions, not {dim}")
        table = file.read(columns=[*FILE_KEY, "digest"], use_threads=False)
    return _file_hashes(table), _digest_hashes(table)


def _file_hashes(table: pa.Table) -> Hashes:
    """64 bits of each row's (storage_path, size, mtime_ns); the same within a process only."""
    frame = pl.DataFrame(table.select(FILE_KEY).cast(_FILE_KEY_TYPES))
    return frame.hash_rows(seed=0).to_numpy()


_FILE_KEY_TYPES = pa.schema([schema(1).field(name) for name in FILE_KEY])


def _digest_hashes(table: pa.Table) -> Hashes:
    """The first 64 bits of each row's SHA-256."""
    column = table["digest"].combine_chunks()
    values = np.frombuffer(column.buffers()[1] or b"", np.uint64)[column.offset * 4 :]
    return values[: len(column) * 4 : 4].copy()


def _table(entries: list[Entry], dim: int) -> pa.Table:
    vectors = np.zeros((len(entries), dim), np.float32)
    for row, entry in enumerate(entries):
        if entry.vec is not None:
            vectors[row] = entry.vec
    null = pa.array([entry.vec is None for entry in entries], pa.bool_())
    columns = {
        "storage_path": [entry.storage_path for entry in entries],
        "size": [entry.size for entry in entries],
        "mtime_ns": [entry.mtime_ns for entry in entries],
        "digest": [entry.digest for entry in entries],
        "vec": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim, mask=null),
        "error": [entry.error for entry in entries],
    }
    return pa.table(columns, schema=schema(dim))


def _read_rows(path: Path, rows: Ints, columns: list[str]) -> tuple[pa.Table, Ints]:
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


def _matrix(column: pa.ChunkedArray, dim: int) -> tuple[Vectors, npt.NDArray[np.bool_]]:
    """The vectors, float32 (rows, dim), and which of them are null (their values are any)."""
    if column.type.list_size != dim:
        raise ValueError(f"vectors of {column.type.list_size} dimensions, not {dim}")
    chunks = [
        chunk.values.slice(chunk.offset * dim, len(chunk) * dim).to_numpy(zero_copy_only=False)
        for chunk in column.chunks
    ]
    matrix = np.concatenate(chunks).reshape(len(column), dim)
    return matrix, column.is_null().to_numpy()


def _put(hits: Hits, row: int, vec: Vectors | None, error: str | None) -> None:
    if vec is not None:
        hits.vectors[row] = vec
    elif error is not None:
        hits.errors[row] = error


def _warn_of_part(path: Path, error: Exception) -> None:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    log.warning("cache part %s cannot be read and counts as missing: %s", path, reason)
