"""The vector cache: every vector ever made, and every photo known to be broken.

One folder per encoder fingerprint, in it Parquet parts that are only ever added. An image is
found by (storage_path, size, mtime) without reading it, then by the hash of its bytes. Several
processes may read and add at the same time. Deleting any of it costs time, never correctness.
"""

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from pipeline.cache import parts
from pipeline.cache.index import Index
from pipeline.cache.parts import TEMPORARY, UNREADABLE, VECTORS, Array, Entry, Vectors
from pipeline.cache.prune import merge
from pipeline.stage.command import log
from pipeline.stage.parquet import VECTOR_ROW_GROUP, remove_abandoned, writer

FLUSH_ROWS = 1_024
FLUSH_S = 5.0
TAKES_NO_FILES = (
    "expected a cache folder that takes files, found %s (%s);"
    " going on: what is not cached will be encoded again; hint: make room, or set another cache_dir"
)


class Fingerprint(Protocol):
    """What decides an image's vector: equal ones have equal folders; as_dict is for people."""

    @property
    def folder(self) -> str: ...

    def as_dict(self) -> dict[str, Any]: ...


class Hits(dict[int, Vectors | str]):
    """What a lookup found, by the row of the question: a unit vector, or why there is none."""

    def vector(self, row: int) -> Vectors | None:
        """The image's unit vector, float32 (dim,); None where there is none."""
        value = self.get(row)
        return None if isinstance(value, str) else value

    def error(self, row: int) -> str | None:
        """Why the image has no vector; None where it has one or is not known."""
        value = self.get(row)
        return value if isinstance(value, str) else None


class VectorCache:
    """The entries of one fingerprint, for any number of threads and processes.

    Threads wait for each other only in memory and while a part is written, not while one is read.

    Memory: the index's page table, and the entries that are not written yet. With `read=False`
    nothing but what this object adds is found; it is written, and wins over what was there.
    """

    def __init__(
        self, folder: Path, dim: int, read: bool = True, document: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self.dim = dim
        self._document = dict(document or {})
        self._index = Index(folder, read)
        self._unwritten: dict[tuple[str, int, int], Entry] = {}
        self._unwritten_digests: dict[bytes, Entry] = {}
        self._oldest = 0.0
        self._wrote = self._warned = False
        self._lock = threading.RLock()  # over what is not written

    @classmethod
    def of(cls, cache_dir: Path, fingerprint: Fingerprint, dim: int, read: bool = True) -> Self:
        """The cache of a fingerprint below `cache_dir`; its parts say what made them."""
        return cls(cache_dir / VECTORS / fingerprint.folder, dim, read, fingerprint.as_dict())

    def __enter__(self) -> Self:
        remove_abandoned(self.folder, TEMPORARY)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Write what is not written yet, also when the block failed: it was paid for.

        After a block that did not, small files are merged.
        """
        self.flush()
        if self._wrote and kind is None:
            merge(self.folder)

    @property
    def entries(self) -> int:
        """How many images are known, more or less: a replaced entry may count twice."""
        return self._index.entries + len(self._unwritten)

    def lookup_files(self, paths: list[str], sizes: Array, mtimes: Array) -> Hits:
        """Images by storage_path, size in bytes and mtime in nanoseconds, row by row."""
        asked = list(zip(paths, sizes.tolist(), mtimes.tolist(), strict=True))
        return self._lookup(parts.file_keys(asked), [self._unwritten.get(key) for key in asked])

    def lookup_digests(self, digests: list[bytes]) -> Hits:
        """Images by the SHA-256 of their bytes, row by row."""
        unwritten = [self._unwritten_digests.get(digest) for digest in digests]
        return self._lookup(parts.digest_keys(digests), unwritten)

    def add(
        self,
        storage_path: str,
        size: int,
        mtime_ns: int,
        digest: bytes,
        vec: Vectors | None,
        error: str | None,
    ) -> None:
        """Remember an image's unit vector, or why it has none. Written within seconds."""
        entry = Entry(storage_path, size, mtime_ns, digest, vec, error)
        with self._lock:
            if not self._unwritten:
                self._oldest = time.monotonic()
            self._unwritten[entry[:3]] = self._unwritten_digests[digest] = entry
            self._flush_if_due()

    def flush(self) -> None:
        """Write what is not written yet as one part.

        Where the folder takes no files, a warning says so once and the entries are forgotten: the
        shard that needs them does without.
        """
        if not self._unwritten:
            return
        name, table = parts.new_name(), parts.table_of(self._unwritten.values(), self.dim)
        try:
            with writer(self.folder / name, table.schema, self._document) as file:
                file.write_table(table, row_group_size=VECTOR_ROW_GROUP)
            self._index.add([name])
            self._wrote = True
        except OSError as error:
            if not self._warned:
                found = os.strerror(error.errno).lower() if error.errno else error
                log.warning(TAKES_NO_FILES, found, self.folder)
            self._warned = True
        self._unwritten, self._unwritten_digests = {}, {}

    def refresh(self) -> int:
        """Take in the parts that other processes have written since; returns how many."""
        with self._lock:
            self._flush_if_due()
        return self._index.refresh()

    def _flush_if_due(self) -> None:
        if len(self._unwritten) >= FLUSH_ROWS or time.monotonic() - self._oldest > FLUSH_S:
            self.flush()

    def _lookup(self, keys: Array, unwritten: list[Entry | None]) -> Hits:
        hits = Hits()
        for row, entry in enumerate(unwritten):
            if entry is not None and (value := entry.error or entry.vec) is not None:
                hits[row] = value
        # a merge moves entries to a new part before it removes the old one
        while (vanished := self._read(hits, keys)) and self._index.read:
            if not self.refresh():
                log.warning("%d cache parts were removed and count as missing", vanished)
                break
        return hits

    def _read(self, hits: Hits, keys: Array) -> int:
        """Read the entries that are missing, part by part; returns how many parts are gone."""
        asked = np.array([row for row in range(len(keys)) if row not in hits], np.int64)
        records, low = self._index.find(keys["key"][asked]), keys["low"][asked]
        vanished = 0
        for part in np.unique(records["part"][records["part"] > 0]).tolist():
            here, name = records["part"] == part, self._index.there.get(part, "gone")
            try:
                found = parts.values(self.folder / name, records[here], low[here], self.dim)
                hits.update(zip(asked[here].tolist(), found, strict=True))
            except UNREADABLE as error:
                self._index.cannot_read(name, error)
                vanished += parts.is_gone(error)
        return vanished


class NoCache(VectorCache):
    """Finds nothing and keeps nothing: what a benchmark measures with."""

    def __init__(self, dim: int) -> None:
        super().__init__(Path(os.devnull), dim)

    def add(self, *entry: Any) -> None:
        """Forget it."""
