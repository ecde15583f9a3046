"""Where an image's entry is: sorted files of records that are only ever added, beside the parts.

Each part is in one of them; merged while two are of a like length, they stay few. Of a long one a
lookup reads 3 KB a key, so that memory hardly grows with the cache: 8 bytes for those 3 KB. They
are opened for each read and not mapped: on a network file system, to touch a mapped page of a
file that another machine has removed kills the process.
"""

import itertools
import json
import math
import os
import re
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from pipeline.cache import parts
from pipeline.cache.parts import RECORD, UNREADABLE, Array
from pipeline.stage.command import log
from pipeline.stage.parquet import replacing

FILE = re.compile(r"(part|index)-\d+-\d+-\d+\.(parquet|bin)")
PAGE = 128  # records
IN_MEMORY = 65_536  # records of a file that is kept in memory
AT_ONCE = 262_144  # records that are merged at a time
LEFT_S = 60.0  # a part that is younger gets its file of the index from its writer
TOGETHER = 64  # parts without an index that get one together


class Run:
    """A file of the index: records by key, the first key of each page, and as JSON its parts.

    `parts` are their names, each with how many rows and how many errors it has.
    """

    def __init__(self, path: Path) -> None:
        """Raises one of UNREADABLE."""
        self.path = path
        with open(path, "rb") as file:
            end = file.seek(max(file.seek(0, os.SEEK_END) - 8, 0))
            length = int.from_bytes(file.read(8), "little")
            file.seek(end := max(end - length, 0))
            document = json.loads(file.read()[:-8])
            self.count: int = document["records"]
            self.parts: dict[str, list[int]] = document["parts"]
            start = file.seek(self.count * RECORD.itemsize)
            self.firsts = np.frombuffer(file.read(end - start), "<u8")
        if len(self.firsts) != -(-self.count // PAGE):
            raise ValueError("its length is another")

    @staticmethod
    def write(path: Path, chunks: Iterable[Array], sizes: dict[str, list[int]]) -> None:
        """Write records that come sorted, whole or not at all; made anew after a power cut."""
        count, firsts = 0, []
        with replacing(path, durable=False) as temporary, open(temporary, "wb") as file:
            for records in chunks:
                file.write(records.tobytes())
                firsts.append(records["key"][-count % PAGE :: PAGE].tobytes())
                count += len(records)
            document = json.dumps({"records": count, "parts": sizes}).encode()
            file.writelines([*firsts, document, len(document).to_bytes(8, "little")])

    def find(self, keys: Array) -> Array:
        """For each key a record; it is another key's where this one is not here."""
        pages = np.unique(np.searchsorted(self.firsts, keys, "right")) - 1
        records = self._read(pages[pages >= 0].tolist())
        return nearest(records["key"], records, keys)

    def between(self, first: int, last: int) -> Array:
        """The records of all keys from `first` to `last`."""
        pages = np.searchsorted(self.firsts, np.array([first, last], "<u8"), "right")
        records = self._read(range(max(pages[0] - 1, 0), pages[1]))
        return records[(records["key"] >= first) & (records["key"] <= last)]

    def _read(self, pages: Sequence[int]) -> Array:
        size, end = PAGE * RECORD.itemsize, self.count * RECORD.itemsize
        with open(self.path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):  # the disk is told of all before the first is awaited
                for page in pages:
                    os.posix_fadvise(file.fileno(), page * size, size, os.POSIX_FADV_WILLNEED)
            data = [os.pread(file.fileno(), min(size, end - p * size), p * size) for p in pages]
        return np.frombuffer(b"".join(data), RECORD)


class Index:
    """The index of a folder and its parts, as far as they have been taken in. For many threads.

    A part that is in none, of an earlier version or of a writer that was killed, gets one.
    """

    def __init__(self, folder: Path, read: bool = True) -> None:
        """With `read=False` nothing is taken in but what is added here."""
        self.folder = folder
        self.read = read
        self.sizes: dict[str, list[int]] = {}  # rows and errors of each part that is in the index
        self._set_there([])
        self.unreadable: dict[str, Exception] = {}
        self.runs: dict[str, Run] = {}
        self._held: list[tuple[Array, Array]] = []  # keys, records; each run half the one before
        self._lock = threading.RLock()
        self.refresh()

    def refresh(self) -> int:
        """Take in what is new in the folder; returns how many parts."""
        if not self.read:
            return 0
        with self._lock:
            before = len(self.sizes)
            for _ in range(3):  # a file that has just gone is part of another by now
                found = parts.names(self.folder, FILE)  # in one look: a merge removes last
                new = [n for n in found if n not in self.runs and n not in self.unreadable]
                if whole := all(self._take(name) for name in new if name.endswith(".bin")):
                    break
            self.runs = {name: self.runs[name] for name in found if name in self.runs}
            there = [n for n in new if n.endswith(".parquet")]
            bare = [name for name in there if name not in self.sizes] if whole else []
            for start in range(0, len(bare), TOGETHER):
                self.add(bare[start : start + TOGETHER], LEFT_S)
            self._set_there(name for name in there if name in self.sizes)
            return len(self.sizes) - before

    def _set_there(self, names: Iterable[str]) -> None:
        self.there = {parts.written_ns(name): name for name in names}  # the parts that can be read
        self.entries = sum(self.sizes[name][0] for name in self.there.values())
        self._times = np.array(sorted(self.there), np.int64)

    def add(self, names: list[str], age_s: float = -math.inf) -> None:
        """Index parts; in memory alone if one is younger, which its writer is about to index."""
        sizes, every, left = {}, [], True
        for name in names:
            try:
                left &= (self.folder / name).stat().st_mtime <= time.time() - age_s
                table = parts.read(self.folder / name)
                every.append(parts.records_of(self.folder / name, table).ravel())
                sizes[name] = [len(table), len(table) - table["error"].null_count]
            except UNREADABLE as error:
                self.cannot_read(name, error)
        if not sizes:
            return
        run, name = newest(np.concatenate(every)), parts.new_name(form="index-{}.bin")
        if left:
            with suppress(OSError):  # who may only read does without the file
                Run.write(self.folder / name, [run], sizes)
        with self._lock:
            if not left or not self._take(name):
                self._hold(run)
            self.sizes |= sizes
            self._set_there([*self.there.values(), *sizes])

    def _take(self, name: str) -> bool:
        """Take a file in; False if it is gone."""
        try:
            run = Run(self.folder / name)
            if run.count <= IN_MEMORY:
                self._hold(run.between(0, 2**64 - 1))
        except UNREADABLE as error:
            self.cannot_read(name, error)
            return not parts.is_gone(error)
        self.runs = {**self.runs, name: run}
        self.sizes |= run.parts
        return True

    def _hold(self, records: Array) -> None:
        held = [*self._held, (records["key"].copy(), records)]
        while len(held) > 1 and len(held[-1][0]) * 2 > len(held[-2][0]):
            merged = newest(np.concatenate([held.pop(-2)[1], held.pop()[1]]))
            held.append((merged["key"].copy(), merged))
        self._held = held

    def cannot_read(self, name: str, error: Exception) -> None:
        """A file is gone, or damaged: its entries are missing from now on, with a warning."""
        with self._lock:
            self.runs = {n: run for n, run in self.runs.items() if n != name}
            self._set_there(n for n in self.there.values() if n != name)
            if not parts.is_gone(error) and name not in self.unreadable:
                self.unreadable[name] = error
                said = "cache file %s cannot be read and counts as missing: %r"
                log.warning(said, self.folder / name, error)

    def find(self, keys: Array) -> Array:
        """The newest record of each key; zeros where there is none."""
        found = [nearest(*held, keys) for held in self._held]
        for name, run in self.runs.items():
            if run.count > IN_MEMORY:
                try:
                    found.append(run.find(keys))
                except UNREADABLE as error:
                    self.cannot_read(name, error)
                    self.refresh()
                    return self.find(keys)
        best = np.zeros(len(keys), RECORD)
        for records in found:
            better = (records["key"] == keys) & (records["part"] > best["part"])
            better &= self.is_there(records)
            best[better] = records[better]
        return best

    def is_there(self, records: Array) -> Array:
        """Whether the part of each record can be read."""
        return np.asarray(nearest(self._times, self._times, records["part"]) == records["part"])

    def merge(self, whole: bool) -> None:
        """Make the short files one, without the records of parts that are gone; `whole`: all.

        Then each of what is left is longer than all that are shorter together.
        """
        runs = sorted(self.runs.values(), key=lambda run: run.count)
        ends = np.cumsum([run.count for run in runs])
        short = max(np.flatnonzero(np.diff(ends) <= ends[:-1]), default=-2) + 2
        runs, there = runs if whole else runs[:short], set(self.there.values())
        sizes = {n: size for run in runs for n, size in run.parts.items() if n in there}
        ranges = sum(run.count for run in runs) // AT_ONCE + 1  # keys are hashes, spread evenly
        bounds = itertools.pairwise(2**64 * i // ranges for i in range(ranges + 1))
        chunks = (np.concatenate([run.between(a, b - 1) for run in runs]) for a, b in bounds)
        if sizes:
            name = self.folder / parts.new_name(form="index-{}.bin")
            Run.write(name, (newest(c[self.is_there(c)]) for c in chunks), sizes)
        for run in runs:
            run.path.unlink(missing_ok=True)


def nearest(keys: Array, values: Array, wanted: Array) -> Array:
    """Of each wanted key the value, by sorted keys; any other where it is not there."""
    if not len(keys):
        return np.zeros(len(wanted), values.dtype)
    return np.take(values, np.minimum(np.searchsorted(keys, wanted), len(keys) - 1))


def newest(records: Array) -> Array:
    """The records sorted by key, of each key the one in the newest part."""
    records = np.take(records, np.lexsort((records["part"], records["key"])))
    is_last = np.append(records["key"][1:] != records["key"][:-1], True)[: len(records)]
    return np.asarray(records[is_last])
