"""Prune the cache: merge small parts, drop what was replaced, is old or too much; and its figures.

Readers and writers may be at work meanwhile.
"""

import itertools
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.index import newest
from pipeline.cache.parts import (
    FILE_KEY,
    ROW_GROUP,
    TEMPORARY,
    UNREADABLE,
    VECTORS,
    Hashes,
    Ints,
    first_line,
    keys,
    new_name,
    part_names,
    warn_of_part,
    written_ns,
)
from pipeline.stage.command import log
from pipeline.stage.errors import DataError
from pipeline.stage.lock import wait_for_lock
from pipeline.stage.parquet import metadata, remove_abandoned, writer

MERGED_ROWS = 16_384


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
                _unlink(folder / name for name in part_names(folder) if written_ns(name) < oldest)
            _merge(folder, root)
        if max_bytes is not None:
            _shrink(cache_dir, max_bytes)
        return before - _bytes(cache_dir)


def _merge(folder: Path, root: Path | None) -> None:
    """Write runs of small parts anew without replaced entries, then remove them.

    A merged part bears the time of its newest origin: it loses to all that is added after.
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
            log.warning("%d parts in %s are not merged: %s", len(run), folder, first_line(error))
        else:
            _unlink(paths)


def _kept_rows(folder: Path) -> tuple[list[str], list[Ints]]:
    """The readable parts, oldest first, and of each the rows that no later entry replaces.

    Parts that are no whole Parquet files are removed: no one can read them.
    """
    names: list[str] = []
    hashes: list[Hashes] = []
    places: list[Hashes] = []
    for name in part_names(folder):
        try:
            files, _ = keys(folder / name)
        except UNREADABLE as error:
            warn_of_part(folder / name, error)
            if not isinstance(error, OSError) or error.errno is None:  # else: the disk's fault
                _unlink([folder / name])
            continue
        hashes.append(files)
        places.append(np.uint64(len(names)) << np.uint64(32) | np.arange(len(files), dtype="u8"))
        names.append(name)
    if not names:
        return [], []
    every = np.concatenate(places)
    written = np.array([written_ns(name) for name in names])
    best = np.sort(every[newest(np.concatenate(hashes), every, written)]).astype(np.int64)
    bounds = np.searchsorted(best, np.arange(len(names) + 1) << 32)
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
    name = new_name(written_ns(paths[-1].name))
    table = pa.concat_tables(
        pq.read_table(path).take(kept) for path, kept in zip(paths, rows, strict=True)
    )
    columns = table.schema.remove_metadata()
    with writer(folder / name, columns, metadata(paths[0])) as parquet:
        parquet.write_table(table, row_group_size=ROW_GROUP)


def _shrink(cache_dir: Path, max_bytes: int) -> None:
    parts = [folder / name for folder in _folders(cache_dir) for name in part_names(folder)]
    total = sum(part.stat().st_size for part in parts)
    for part in sorted(parts, key=lambda part: written_ns(part.name)):
        if total <= max_bytes:
            return
        total -= part.stat().st_size
        _unlink([part])


@contextmanager
def _only_prune(vectors: Path) -> Iterator[None]:
    """Hold the lock that two prunes contend for; readers and writers need none."""
    with open(vectors / ".prune.lock", "w") as lock:
        wait_for_lock(lock.fileno())  # released when the file closes, also by a crash
        yield


def _folders(cache_dir: Path) -> list[Path]:
    vectors = cache_dir / VECTORS
    return sorted(f for f in vectors.iterdir() if f.is_dir()) if vectors.is_dir() else []


def _folder_stats(folder: Path) -> FolderStats:
    entries = failures = parts = size = 0
    document: dict[str, Any] = {}
    for name in part_names(folder):
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
    _unlink(folder / name for name in part_names(folder))
    remove_abandoned(folder, TEMPORARY)
    with suppress(OSError):  # not empty: someone is writing to it
        folder.rmdir()


def _unlink(paths: Collection[Path] | Iterator[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
