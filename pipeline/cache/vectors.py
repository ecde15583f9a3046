"""The vector cache: every vector ever made, and every photo known to be broken.

One folder per encoder fingerprint, in it Parquet parts that are only ever added. An image is
found by (storage_path, size, mtime) without reading it, then by the hash of its bytes. Several
processes may read and add at the same time. Deleting any of it costs time, never correctness.
"""

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cache.index import Index, Parts
from pipeline.cache.parts import (
    FILE_KEY,
    ROW_GROUP,
    TEMPORARY,
    UNREADABLE,
    VECTORS,
    Entry,
    Hashes,
    Ints,
    Vectors,
    digest_hashes,
    file_hashes,
    keys,
    matrix,
    new_name,
    part_names,
    read_rows,
    table_of,
    warn_of_part,
)
from pipeline.stage.command import log
from pipeline.stage.errors import DataError
from pipeline.stage.parquet import remove_abandoned, writer

FLUSH_ROWS = 1_024
FLUSH_S = 5.0


class Fingerprint(Protocol):
    """What decides an image's vector, as far as the cache must know it."""

    @property
    def folder(self) -> str:
        """A folder name; equal fingerprints have equal ones, and no others."""

    def as_dict(self) -> dict[str, Any]:
        """What it consists of, for people who look into a part."""


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
    """The entries of one fingerprint, for any number of threads and processes.

    Threads wait for each other only in memory and while a part is written, not while one is read.

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
        self._parts = Parts()
        self._files = Index(self._parts)
        self._digests = Index(self._parts)
        self._unwritten: list[Entry] = []
        self._unwritten_files: dict[tuple[str, int, int], Entry] = {}
        self._unwritten_digests: dict[bytes, Entry] = {}
        self._oldest = 0.0
        self._warned = False
        self._lock = threading.RLock()  # over all of the above
        self.refresh()

    @classmethod
    def of(cls, cache_dir: Path, fingerprint: Fingerprint, dim: int, read: bool = True) -> Self:
        """The cache of a fingerprint below `cache_dir`; its parts say what made them."""
        return cls(cache_dir / VECTORS / fingerprint.folder, dim, read, fingerprint.as_dict())

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
        columns = [pa.array(paths), pa.array(sizes), pa.array(mtimes)]
        asked = pa.table(columns, FILE_KEY)
        keys = zip(paths, sizes.tolist(), mtimes.tolist(), strict=True)
        with self._lock:
            unwritten = {
                row: entry
                for row, key in enumerate(keys)
                if (entry := self._unwritten_files.get(key))
            }
        return self._lookup(self._files, file_hashes(asked), asked, unwritten)

    def lookup_digests(self, digests: list[bytes]) -> Hits:
        """Images by the SHA-256 of their bytes, row by row."""
        asked = pa.table([pa.array(digests, pa.binary(32))], ["digest"])
        with self._lock:
            unwritten = {
                row: entry
                for row, digest in enumerate(digests)
                if (entry := self._unwritten_digests.get(digest))
            }
        return self._lookup(self._digests, digest_hashes(asked), asked, unwritten)

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
        with self._lock:
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
        table = table_of(self._unwritten, self.dim)
        name = new_name()
        try:
            with writer(self.folder / name, table.schema, self._document) as parquet:
                parquet.write_table(table, row_group_size=ROW_GROUP)
        except OSError as error:
            raise DataError(
                "a cache folder that takes files",
                os.strerror(error.errno).lower() if error.errno else str(error), str(self.folder),
                "make room, or set another cache_dir",
            ) from None  # fmt: skip
        self._index([(name, file_hashes(table), digest_hashes(table))])
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
        with self._lock:
            self._flush_if_due()
        if not self.read:
            return 0
        new = [name for name in part_names(self.folder) if name not in self._parts.known]
        read = [(name, *keys) for name in new if (keys := self._keys(name)) is not None]
        with self._lock:
            # what another thread has taken in meanwhile is here already
            self._index([part for part in read if part[0] not in self._parts.known])
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
            return keys(self.folder / name)
        except FileNotFoundError:
            return None  # merged into another by a prune since the folder was listed
        except UNREADABLE as error:
            self._parts.known.add(name)
            warn_of_part(self.folder / name, error)
            return None

    def _lookup(
        self, index: "Index", hashes: Hashes, asked: pa.Table, unwritten: dict[int, Entry]
    ) -> Hits:
        hits = Hits()
        for row, entry in unwritten.items():
            _put(hits, row, entry.vec, entry.error)
        while True:
            missing = np.array([r for r in range(len(hashes)) if not hits.found(r)], np.int64)
            with self._lock:
                places = index.find(hashes[missing])
            vanished = self._read_hits(hits, places, missing, asked)
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
                warn_of_part(self.folder / name, error)
        return vanished

    def _read_part(
        self, hits: Hits, name: str, rows: Ints, asked_rows: Ints, asked: pa.Table
    ) -> None:
        """Add the rows of a part whose key is the one asked for, not just its hash."""
        table, at = read_rows(self.folder / name, rows, [*asked.column_names, "vec", "error"])
        same = np.ones(len(rows), bool)
        for key in asked.column_names:
            equal = pc.equal(table[key].take(at), asked[key].take(asked_rows))
            same &= pc.fill_null(equal, False).to_numpy()
        vectors, null = matrix(table["vec"], self.dim)
        errors = table["error"].take(at).to_pylist()
        found = vectors[at]
        unit = np.abs(np.einsum("ij,ij->i", found, found) - 1) < 1e-3  # else the bytes are damaged
        for i in np.flatnonzero(same & (null[at] | unit)).tolist():
            _put(hits, int(asked_rows[i]), None if null[at[i]] else found[i], errors[i])


class NoCache(VectorCache):
    """Finds nothing and keeps nothing: what a benchmark measures with."""

    def __init__(self, dim: int) -> None:
        super().__init__(Path(os.devnull), dim)

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


def _put(hits: Hits, row: int, vec: Vectors | None, error: str | None) -> None:
    if vec is not None:
        hits.vectors[row] = vec
    elif error is not None:
        hits.errors[row] = error
