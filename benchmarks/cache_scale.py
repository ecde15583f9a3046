"""The vector cache at a million entries and more: opening, lookups, adding, merging, memory.

Entries are made up, and added a shard at a time as an encode does it. Each size goes on from the
one before. Lookups are those of a process that has just opened the cache, by path, size and
mtime, in calls of 1024 rows: clustered rows were added together, scattered ones anywhere. Cold
ones find none of the files in memory. A handful is 8 rows by content, as a GPU's threads ask.
With --others the index has records of so many more entries, whose vectors are nowhere: what it
takes to find, and to merge, among a hundred million.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import measure
from pipeline.cache.index import Index, Run
from pipeline.cache.parts import RECORD, Entry, new_name
from pipeline.cache.prune import merge
from pipeline.cache.vectors import VectorCache

CALL_ROWS = 1_024
VECTORS = 4_096  # different ones
CHUNK = 250_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--millions", type=float, nargs="+", default=[1.0], help="entries")
    parser.add_argument("--folder", type=Path, required=True, help="of the cache; kept")
    parser.add_argument("--others", type=float, default=0.0, help="millions, in the index only")
    parser.add_argument("--dimension", type=int, default=512, help="of the vectors")
    parser.add_argument("--shard", type=int, default=100_000, help="entries between two merges")
    parser.add_argument("--calls", type=int, default=40, help="lookups of 1024 rows of each kind")
    args = parser.parse_args()
    for millions in sorted(args.millions):
        entries = int(millions * 1e6)
        folder = args.folder / "vectors" / "made-up"
        figures = fill(folder, args.dimension, entries, args.shard)
        if args.others:
            figures |= add_others(folder, int(args.others * 1e6))
        files = [path for path in folder.iterdir() if path.is_file()]
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            figures |= fresh.apply(look, (folder, args.dimension, entries, args.calls))
        measure.emit(
            "cache scale", entries=entries, others=int(args.others * 1e6), dimension=args.dimension,
            **figures, files=len(files), bytes=sum(path.stat().st_size for path in files),
        )  # fmt: skip


def fill(folder: Path, dim: int, entries: int, shard: int) -> dict[str, Any]:
    """Add what is missing up to so many entries; how fast at first and at last, and the merges."""
    start = VectorCache(folder, dim).entries
    rates, merges = [], []
    vectors = unit_vectors(dim)
    with measure.memory() as memory:
        for first in range(start, entries, shard):
            rows = range(first, min(first + shard, entries))
            with VectorCache(folder, dim) as cache:
                adding = measure.seconds(partial(add, cache, rows, vectors))
                closing = time.perf_counter()
            merges.append(time.perf_counter() - closing)
            rates.append(len(rows) / adding)
            measure.say(f"{rows.stop} entries, {rates[-1]:.0f}/s, closed in {merges[-1]:.2f} s")
    return {
        "add_per_s_first": rates[0] if rates else None,
        "add_per_s_last": rates[-1] if rates else None,
        "merge_s": sum(merges),
        "longest_merge_s": max(merges, default=0),
        "fill_peak_mb": memory.peak,
    }


def add(cache: VectorCache, rows: range, vectors: np.ndarray) -> None:
    for row in rows:
        path, size, mtime_ns = key(row)
        cache.add(Entry(path, size, mtime_ns, digest(row), vectors[row % VECTORS]))


def add_others(folder: Path, entries: int) -> dict[str, Any]:
    """Two files of the index of random records, and what it takes to merge them with the rest."""
    index, random = Index(folder), np.random.default_rng(2)
    part = next(iter(index.there))
    sizes = {index.there[part]: index.sizes[index.there[part]]}
    ranges = entries // CHUNK + 1  # of each file: an entry has two records

    def records() -> Iterator[np.ndarray]:
        for low in range(ranges):
            chunk = np.zeros(CHUNK, RECORD)
            bounds = (2**64 * low // ranges, 2**64 * (low + 1) // ranges)
            chunk["key"] = np.sort(random.integers(*bounds, CHUNK, np.uint64))
            chunk["part"] = part
            yield chunk

    for _ in range(2):
        Run.write(folder / new_name(form="index-{}.bin"), records(), sizes)
    with measure.memory() as memory:
        seconds = measure.seconds(partial(merge, folder))
    return {"merge_all_s": seconds, "merge_all_peak_mb": memory.peak}


def look(folder: Path, dim: int, entries: int, calls: int) -> dict[str, Any]:
    """Open the cache and look entries up, in a process that does nothing else."""
    vectors, random = unit_vectors(dim), np.random.default_rng(1)
    figures: dict[str, Any] = {"imports_mb": psutil.Process().memory_info().rss / measure.MB}
    with measure.memory() as memory:
        figures["open_s"] = measure.seconds(lambda: VectorCache(folder, dim))
        cache = VectorCache(folder, dim)
        blocks = random.integers(0, entries // CALL_ROWS, calls)
        together = [np.arange(CALL_ROWS) + block * CALL_ROWS for block in blocks]
        anywhere = [random.integers(0, entries, CALL_ROWS) for _ in range(calls)]
        for kind, asked in {"clustered": together, "scattered": anywhere}.items():
            forget(folder)
            for how in ("cold", "warm"):
                seconds = measure.seconds(partial(check, cache, asked, vectors))
                figures[f"{kind}_{how}_per_s"] = calls * CALL_ROWS / seconds
        handfuls = [[digest(row) for row in rows[:8].tolist()] for rows in anywhere]
        seconds = measure.seconds(lambda: [cache.lookup_digests(each) for each in handfuls])
    return figures | {"handful_ms": 1000 * seconds / calls, "rss_mb": memory.peak}


def check(cache: VectorCache, asked: list[np.ndarray], vectors: np.ndarray) -> None:
    """Look rows up, call by call; all are found, each with its vector."""
    for rows in asked:
        paths, sizes, mtimes = zip(*map(key, rows.tolist()), strict=True)
        hits = cache.lookup_files(list(paths), np.array(sizes), np.array(mtimes))
        found = [hits.get(place) for place in range(len(rows))]
        assert np.array_equal(np.array(found), vectors[rows % VECTORS])


def key(row: int) -> tuple[str, int, int]:
    return f"listings/{row // 5:09d}/photo-{row % 5}.jpg", 100_000 + row % 7919, 10**18 + row


def digest(row: int) -> bytes:
    return sha256(row.to_bytes(8, "little")).digest()


def unit_vectors(dim: int) -> np.ndarray:
    vectors = np.random.default_rng(0).standard_normal((VECTORS, dim), dtype=np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def forget(folder: Path) -> None:
    """Let the kernel drop what it keeps of the files in memory."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    main()
