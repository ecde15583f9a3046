"""The vector cache: every vector ever made, and every photo known to be broken.

One folder per encoder fingerprint, in it Parquet parts that are only ever added. An image is
found by (storage_path, size, mtime) without reading it, then by the hash of its bytes. Several
processes may read and add at the same time. Deleting any of it costs time, never correctness.
"""

import json
import os
import threading
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np

from pipeline.cache import parts
from pipeline.cache.index import Index
from pipeline.cache.parts import TEMPORARY, UNREADABLE, VECTORS, Array, Entry, Outcome
from pipeline.cache.prune import merge
from pipeline.stage.command import log
from pipeline.stage.parquet import VECTOR_ROW_GROUP, remove_abandoned, writer

FLUSH_ROWS = 1_024
FLUSH_S = 5.0
TAKES_NO_FILES = (
    "expected a cache folder that takes files, found %s (%s);"
    " going on: what is not cached will be encoded again; hint: make room, or set another cache_dir"
)


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
    def of(cls, cache_dir: Path, made_by: Mapping[str, Any], dim: int, read: bool = True) -> Self:
        """The cache of an encoder's fingerprint: all that decides a vector, as plain values."""
        text = json.dumps(made_by, sort_keys=True, separators=(",", ":"))
        return cls(cache_dir / VECTORS / sha256(text.encode()).hexdigest()[:16], dim, read, made_by)

    def __enter__(self) -> Self:
        remove_abandoned(self.folder, TEMPORARY)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Write what is left, also after an error: it was paid for. Else merge small files."""
        self.flush()
        if self._wrote and kind is None:
            merge(self.folder)

    @property
    def entries(self) -> int:
        """How many images are known, more or less: a replaced entry may count twice."""
        return self._index.entries + len(self._unwritten)

    def lookup_files(self, paths: list[str], sizes: Array, mtimes: Array) -> dict[int, Outcome]:
        """What is known, by row, of images by storage_path, size in bytes and mtime in ns."""
        asked = list(zip(paths, sizes.tolist(), mtimes.tolist(), strict=True))
        return self._lookup(parts.file_keys(asked), [self._unwritten.get(key) for key in asked])

    def lookup_digests(self, digests: list[bytes]) -> dict[int, Outcome]:
        """What is known, by row, of images by the SHA-256 of their bytes."""
        unwritten = [self._unwritten_digests.get(digest) for digest in digests]
        return self._lookup(parts.digest_keys(digests), unwritten)

    def add(self, entry: Entry) -> None:
        """Remember an image. Written within seconds."""
        with self._lock:
            if not self._unwritten:
                self._oldest = time.monotonic()
            self._unwritten[entry[:3]] = self._unwritten_digests[entry.digest] = entry
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

    def _lookup(self, keys: Array, unwritten: list[Entry | None]) -> dict[int, Outcome]:
        hits = {row: entry.outcome for row, entry in enumerate(unwritten) if entry is not None}
        # a merge moves entries to a new part before it removes the old one
        while (vanished := self._read(hits, keys)) and self._index.read:
            if not self.refresh():
                log.warning("%d cache parts were removed and count as missing", vanished)
                break
        return hits

    def _read(self, hits: dict[int, Outcome], keys: Array) -> int:
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
