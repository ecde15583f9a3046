"""Keep the cache small: merge its files, by itself at the end of a shard, prune it; its figures.

Readers and writers may be at work meanwhile. Should two processes merge the same files, entries
are there twice until the next merge.
"""

import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.cache import parts
from pipeline.cache.index import Index
from pipeline.stage.command import log
from pipeline.stage.errors import DataError
from pipeline.stage.lock import claimed
from pipeline.stage.parquet import VECTOR_ROW_GROUP, metadata, remove_abandoned, writer

FAN = 8  # so many parts of a like length become one
LONG = 4_096  # rows of a part that is written no more: others are, four times at most
AT_ONCE = 64  # merges at the end of a shard: seconds, be there ever so many parts
CLAIM = ".merging"
CLAIM_S = 900.0  # one that is older was left by a killed process


class FolderStats(NamedTuple):
    """What one fingerprint's folder holds."""

    folder: str
    fingerprint: dict[str, Any]
    entries: int
    broken: int
    parts: int
    bytes: int


def stats(cache_dir: Path) -> Iterator[FolderStats]:
    """What the cache holds, folder by folder, from its index, without unreadable parts."""
    for folder in _folders(cache_dir):
        index = Index(folder)
        names = list(index.there.values())
        made_by = next(filter(None, (_made_by(folder / name) for name in names)), {})
        broken = sum(index.sizes[name][1] for name in names)
        yield FolderStats(folder.name, made_by, index.entries, broken, len(names), _bytes(folder))


def prune(
    cache_dir: Path,
    max_bytes: float = math.inf,
    older_than_days: float = math.inf,
    root: Path | None = None,
) -> int:
    """Merge small files and drop replaced entries; returns the bytes that this has freed.

    `older_than_days`: parts written before are dropped. `max_bytes`: the oldest parts are dropped
    until the rest fits. `root`: entries whose file below it is gone or has changed are dropped.
    All that stays is read. Others may read and add meanwhile.
    """
    folders = _folders(cache_dir)
    before = left = sum(map(_bytes, folders))
    oldest = time.time_ns() - older_than_days * 86_400e9
    found = [folder / name for folder in folders for name in parts.names(folder)]
    for part in sorted(found, key=lambda part: parts.written_ns(part.name)):
        if parts.written_ns(part.name) < oldest or left > max_bytes:
            left -= _size(part)
            part.unlink(missing_ok=True)
    for folder in folders:
        remove_abandoned(folder, parts.TEMPORARY)
        merge(folder, True, root)
    return before - sum(map(_bytes, _folders(cache_dir)))


def merge(folder: Path, whole: bool = False, root: Path | None = None) -> None:
    """Merge parts where there are FAN of a like length, and the index.

    Unless another process is at it. `whole`: be it or not, all parts, and what is damaged goes. A
    failure is a warning.
    """
    with claimed(folder / CLAIM, CLAIM_S) as mine:
        if not mine and not whole:
            return
        try:
            index = Index(folder)
            for name, error in index.unreadable.items():
                if whole and parts.is_lost(error):
                    (folder / name).unlink(missing_ok=True)
            runs = [run for run in _like_parts(index) if whole or len(run) == FAN]
            for run in runs[: None if whole else AT_ONCE]:
                _rewrite(index, run, root)
            index.refresh()
            index.merge(whole)
        except parts.UNREADABLE as error:
            if not parts.is_gone(error):
                log.warning("%s is not merged: %r", folder, error)


def _like_parts(index: Index) -> Iterator[list[str]]:
    """FAN parts or fewer whose lengths are within a factor of FAN; long ones are alone."""
    tiers = defaultdict(list)
    for name in index.there.values():
        tiers[int(math.log2(index.sizes[name][0] or 1) / math.log2(FAN))].append(name)
    for tier in tiers.values():
        width = FAN if index.sizes[tier[0]][0] < LONG else 1
        yield from (tier[start : start + width] for start in range(0, len(tier), width))


def _rewrite(index: Index, run: list[str], root: Path | None = None) -> None:
    """Write parts anew as one, without replaced and damaged entries, then remove them.

    It bears the time of the newest of them: it loses to all that is added after.
    """
    folder, tables, document = index.folder, [], dict[str, Any]()
    for name in run:
        try:
            table = parts.read(folder / name)
            records = parts.records_of(folder / name, table)[0]
            document = document or _made_by(folder / name)
        except parts.UNREADABLE as error:
            if not parts.is_lost(error):
                raise
            index.cannot_read(name, error)
            continue
        found = index.find(records["key"])
        live = (found == records) | (found["part"] < records["part"])
        if root is not None:
            files = zip(*(table[name].to_pylist() for name in parts.FILE_KEY), strict=True)
            live &= [_is_there(root, *file) for file in files]
        tables.append(table.filter(pa.array(live)))
    rows = sum(map(len, tables))
    if len(run) == 1 and rows == index.sizes[run[0]][0]:
        return  # all of it is left
    if rows:
        name = parts.new_name(parts.written_ns(run[-1]) + 1 + os.getpid() % 1000)
        with writer(folder / name, tables[0].schema, document) as file:
            file.write_table(pa.concat_tables(tables), row_group_size=VECTOR_ROW_GROUP)
        index.add([name])
    for name in run:
        (folder / name).unlink(missing_ok=True)


def _is_there(root: Path, storage_path: str, size: int, mtime_ns: int) -> bool:
    with suppress(OSError, ValueError):
        found = os.stat(root / storage_path)
        return (found.st_size, found.st_mtime_ns) == (size, mtime_ns)
    return False


def _made_by(path: Path) -> dict[str, Any]:
    with suppress(DataError, *parts.UNREADABLE):
        return metadata(path)
    return {}


def _folders(cache_dir: Path) -> list[Path]:
    return sorted(f for f in (cache_dir / parts.VECTORS).glob("*") if f.is_dir())


def _bytes(folder: Path) -> int:
    return sum(map(_size, folder.iterdir()))


def _size(file: Path) -> int:
    with suppress(FileNotFoundError):  # another process has merged it since
        return file.stat().st_size
    return 0
