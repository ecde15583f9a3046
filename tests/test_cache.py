"""The vector cache: what it finds, whoever else reads, writes and prunes at the same time."""

import fcntl
import hashlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.benchmark import NoCache
from pipeline.cache import index as index_module
from pipeline.cache import parts as parts_module
from pipeline.cache import prune as prune_module
from pipeline.cache import vectors as vectors_module
from pipeline.cache.index import Index, Run, newest
from pipeline.cache.parts import RECORD, Entry
from pipeline.cache.prune import merge, prune, stats
from pipeline.cache.vectors import VectorCache
from pipeline.encoder.model import Fingerprint
from pipeline.stage import parquet
from pipeline.stage.lock import machine

DIM = 4
FINGERPRINT = Fingerprint("w", "a", "t", "fp32", "full", True)


def unit(axis: int) -> np.ndarray:
    vec = np.zeros(DIM, np.float32)
    vec[axis % DIM] = 1
    return vec


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def put(cache: VectorCache, *names: str, size: int = 10, axis: int | None = None) -> None:
    """Add images with these paths; the vector's axis is by default the path's last digit."""
    for name in names:
        vec = unit(int(name[-1]) if axis is None else axis)
        cache.add(Entry(name, size, 1, digest(name), vec))


def axes(cache: VectorCache, *names: str, size: int = 10) -> list[int | str | None]:
    """The axis of each image's vector, its error, or None where it is not found."""
    hits = cache.lookup_files(
        list(names), np.full(len(names), size), np.full(len(names), 1, np.int64)
    )
    return [_axis(hits.get(row)) for row in range(len(names))]


def _bits(outcome: np.ndarray | str) -> bytes:
    return np.asarray(outcome).tobytes()


def _axis(outcome: np.ndarray | str | None) -> int | str | None:
    return int(outcome.argmax()) if isinstance(outcome, np.ndarray) else outcome


def parts(folder: Path) -> list[Path]:
    return sorted(folder.rglob("part-*.parquet"))


def indexes(folder: Path) -> list[Path]:
    return sorted(folder.rglob("index-*.bin"))


def fill(folder: Path, *names: str) -> None:
    """A part and a file of the index for each image."""
    cache = VectorCache(folder, DIM)
    for name in names:
        put(cache, name)
        cache.flush()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a part without an index is taken for left by a killed writer at once."""
    monkeypatch.setattr(index_module, "LEFT_S", 0.0)
    return tmp_path / "vectors" / "f"


def test_finds_by_file_and_by_content_what_was_added(folder: Path) -> None:
    """A vector comes back bit by bit, by its file and by its bytes, before and after the write."""
    vec = np.array([0.6, 0, -0.8, 0], np.float32)
    for already in (0, 1):
        cache = VectorCache(folder, DIM)
        assert cache.entries == already
        if not already:
            cache.add(Entry("a.jpg", 5, 6, digest("a"), vec))
        by_file = cache.lookup_files(["x", "a.jpg"], np.array([5, 5]), np.array([6, 6]))
        by_content = cache.lookup_digests([digest("a"), digest("x")])
        cache.flush()

        assert list(by_file) == [1]
        assert _bits(by_file[1]) == _bits(vec)
        assert _bits(by_content[0]) == _bits(vec)
        assert 1 not in by_content


@pytest.mark.parametrize(("size", "mtime_ns"), [(6, 6), (5, 7)])
def test_a_changed_file_is_a_miss(folder: Path, size: int, mtime_ns: int) -> None:
    """Another size or mtime under the same path is another image."""
    with VectorCache(folder, DIM) as cache:
        cache.add(Entry("a.jpg", 5, 6, digest("a"), unit(0)))

    hits = VectorCache(folder, DIM).lookup_files(["a.jpg"], np.array([size]), np.array([mtime_ns]))

    assert len(hits) == 0


def test_errors_are_remembered(folder: Path) -> None:
    """A broken photo is known to be broken, with the same words."""
    with VectorCache(folder, DIM) as cache:
        cache.add(Entry("bad", 10, 1, digest("bad"), "broken: truncated"))
        put(cache, "good1")
        both = cache.lookup_digests([digest("bad"), digest("good1"), digest("x")])

    assert len(both) == 2
    assert axes(VectorCache(folder, DIM), "good1", "bad") == [1, "broken: truncated"]


@pytest.mark.parametrize(
    ("vec", "found"),
    [
        ([0, 0, 0, 0], []),
        ([0, 0.99, 0, 0], []),
        ([0, 1.01, 0, 0], []),
        ([0, np.nan, 0, 1], []),
        ([0, np.inf, 0, 0], []),
        ([0, 0.9999, 0, 0], [0]),
        ([0, -1.0001, 0, 0], [0]),
    ],
)
def test_a_vector_that_is_not_of_unit_length_is_a_miss(
    folder: Path, vec: list[float], found: list[int]
) -> None:
    """Too short, too long or no number: the bytes on the disk are damaged, others are not."""
    with VectorCache(folder, DIM) as cache:
        cache.add(Entry("a0", 10, 1, digest("a0"), np.array(vec, np.float32)))
        put(cache, "a1")
    hits = VectorCache(folder, DIM).lookup_files(["a0", "a1"], np.array([10, 10]), np.array([1, 1]))

    assert [*found, 1] == sorted(hits)


def test_many_rows_across_parts_come_back_in_the_order_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts and the order of the question do not mix up vectors."""
    monkeypatch.setattr(vectors_module, "FLUSH_ROWS", 300)
    names = [f"image{i}" for i in range(1_000)]
    with VectorCache(folder, DIM) as cache:
        put(cache, *names)
    shuffled = np.random.default_rng(0).permutation(names).tolist()

    assert len(parts(folder)) == 4
    assert axes(VectorCache(folder, DIM), *shuffled) == [int(n[-1]) % DIM for n in shuffled]


def test_the_newest_entry_wins(folder: Path) -> None:
    """Of two vectors for one file the later is found, in one part, across parts, after a prune."""
    cache = VectorCache(folder, DIM)
    put(cache, "a1", axis=0)
    put(cache, "a1", axis=1)
    assert axes(cache, "a1") == [1]
    cache.flush()
    assert axes(cache, "a1") == [1]
    put(cache, "a1", axis=2)
    cache.flush()

    assert axes(cache, "a1") == [2]
    assert axes(VectorCache(folder, DIM), "a1") == [2]
    prune(folder.parent.parent)
    assert axes(VectorCache(folder, DIM), "a1") == [2]
    assert axes(cache, "a1") == [2]


def test_equal_keys_never_give_another_images_vector(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where 64 bits of all keys are the same, a lookup finds the right image or none."""
    for keys, same in ((parts_module.file_keys, 7), (parts_module.digest_keys, 8)):

        def alike(asked: object, keys: object = keys, same: int = same) -> np.ndarray:
            found = keys(asked).copy()  # type: ignore[operator]
            found["key"] = same
            return np.asarray(found)

        monkeypatch.setattr(parts_module, keys.__name__, alike)
    with VectorCache(folder, DIM) as cache:
        put(cache, "a1", "a2", "a3")
    names = ("a1", "a2", "a3", "a0")
    by_content = [VectorCache(folder, DIM).lookup_digests([digest(n)]).get(0) for n in names]

    assert [axes(VectorCache(folder, DIM), n) for n in names] == [[None], [None], [3], [None]]
    assert [None, None, 3, None] == [_axis(found) for found in by_content]


def test_force_finds_only_what_this_run_adds_and_wins_later(folder: Path) -> None:
    """Without reading, what was there is a miss; what is added replaces it for the next run."""
    with VectorCache(folder, DIM) as before:
        put(before, "a1", "a2")
    forced = VectorCache(folder, DIM, read=False)
    assert axes(forced, "a1", "a2") == [None, None]
    put(forced, "a1", axis=3)
    forced.flush()

    assert forced.refresh() == 0
    assert axes(forced, "a1", "a2") == [3, None]
    assert axes(VectorCache(folder, DIM), "a1", "a2") == [3, 2]


def test_what_is_in_memory_is_merged_as_it_grows(folder: Path) -> None:
    """Each run is at most half as long as the one before, so that a lookup searches few."""
    cache = VectorCache(folder, DIM)
    for i in range(11):
        put(cache, f"a{i}")
        cache.flush()

    assert [len(keys) for keys, _ in cache._index._held] == [16, 4, 2]
    assert axes(cache, *(f"a{i}" for i in range(11))) == [i % 10 % DIM for i in range(11)]


def test_the_newest_record_is_that_of_the_newest_part() -> None:
    """Of one key, the part that was written last counts, and in one part the last row."""
    records = np.array(
        [(7, 3, 1, 0), (7, 9, 2, 0), (7, 5, 3, 0), (3, 3, 4, 0), (3, 3, 5, 0)], RECORD
    )

    assert newest(records)["at"].tolist() == [5, 2]
    assert len(newest(records[:0])) == 0


def test_parts_are_listed_oldest_first(tmp_path: Path) -> None:
    """By the time in their names, a number, and then by name."""
    names = ["part-9-1-1.parquet", "part-10-1-1.parquet", "part-10-2-1.parquet"]
    for name in (*reversed(names), "part-8-1-1.json", "apart-8-1-1.parquet", "index-7-1-1.bin"):
        (tmp_path / name).touch()

    assert parts_module.names(tmp_path) == names


def test_vectors_of_a_slice_are_its_own() -> None:
    """Of some rows of a table, wherever they begin; a row with an error has none."""
    rows = [Entry(n, 10, 1, digest(n), unit(int(n[1]))) for n in ("a1", "a2", "a3")]
    rows.insert(1, Entry("b", 10, 1, digest("b"), "broken"))
    table = parts_module.table_of(rows, DIM)

    assert parquet.matrix(table.slice(1, 2)).tolist() == [unit(2).tolist()]
    assert parquet.matrix(table.slice(1, 1)).shape == (0, DIM)


def test_keys_are_those_of_earlier_versions() -> None:
    """What they have cached is found by the same numbers."""
    by_file, by_content = "c1ac906760b47b70ef6d7eb3", "000102030405060708090a0b"

    assert by_file == parts_module.file_keys([("a.jpg", 10, 1)]).tobytes().hex()
    assert by_content == parts_module.digest_keys([bytes(range(32))]).tobytes().hex()


def test_removed_parts_are_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What they held is a miss, and how many there were is said once."""
    cache = VectorCache(folder, DIM)
    for name in ("a1", "a2"):
        put(cache, name)
        cache.flush()
    reader = VectorCache(folder, DIM)
    for part in parts(folder):
        part.unlink()

    assert axes(reader, "a1", "a2") == axes(reader, "a1", "a2") == [None, None]
    assert ["2 cache parts were removed and count as missing"] == caplog.messages


def test_refresh_takes_in_the_parts_of_others(folder: Path) -> None:
    """What another process wrote is found after a refresh, not before."""
    reader, other = VectorCache(folder, DIM), VectorCache(folder, DIM)
    put(other, "a1")
    other.flush()

    assert axes(reader, "a1") == [None]
    assert [reader.refresh(), reader.refresh()] == [1, 0]
    assert axes(reader, "a1") == [1]


def test_flushes_by_itself_after_seconds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed run loses no more than the last seconds."""
    cache = VectorCache(folder, DIM)
    put(cache, "a1")
    assert parts(folder) == []
    monkeypatch.setattr(vectors_module, "FLUSH_S", 0.0)
    cache.refresh()

    assert len(parts(folder)) == 1


def test_flushes_by_itself_after_so_many_images(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one image earlier nor one later."""
    monkeypatch.setattr(vectors_module, "FLUSH_ROWS", 3)
    cache = VectorCache(folder, DIM)
    put(cache, "a1", "a2")
    assert parts(folder) == []
    put(cache, "a3")

    assert len(parts(folder)) == 1


def _add_range(folder: Path, start: int, stop: int) -> None:
    cache = VectorCache(folder, DIM)
    for i in range(start, stop):
        put(cache, f"image{i}")
        if i % 10 == 0:
            cache.flush()
            cache.refresh()
    cache.flush()


def test_two_processes_share_one_folder(folder: Path) -> None:
    """Two writers at the same time lose none of each other's entries."""
    context = multiprocessing.get_context("spawn")
    writers = [
        context.Process(target=_add_range, args=(folder, start, start + 100)) for start in (0, 100)
    ]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    names = [f"image{i}" for i in range(200)]

    assert [process.exitcode for process in writers] == [0, 0]
    assert axes(VectorCache(folder, DIM), *names) == [int(n[-1]) % DIM for n in names]


def test_a_killed_writer_leaves_no_partial_part(folder: Path) -> None:
    """SIGKILL in the middle of writing: every part that is there is whole."""
    code = (
        "import sys, numpy as np, itertools, os\n"
        "from pathlib import Path\n"
        "from pipeline.cache.vectors import Entry, VectorCache\n"
        f"cache = VectorCache(Path(sys.argv[1]), {DIM})\n"
        "for i in itertools.count():\n"
        f"    cache.add(Entry(f'i{{i}}', 1, 1, os.urandom(32), np.eye({DIM}, dtype='f4')[0]))\n"
        "    i % 50 or cache.flush()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)])
    deadline = time.monotonic() + 20
    while len(parts(folder)) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    cache = VectorCache(folder, DIM)

    assert sum(s.entries for s in stats(folder.parent.parent)) == cache.entries
    assert len(parts(folder)) == len(cache._index.there) >= 5


@pytest.mark.parametrize("index", ["kept", "removed"])
@pytest.mark.parametrize(
    "damage",
    ["cut", "rubbish", "empty", "vectors", "error", "removed", "other dim", "lists"],
)
def test_a_damaged_part_is_a_miss(
    folder: Path, damage: str, index: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its entries are missing with one warning, or found as they were; never anything else."""
    with VectorCache(folder, DIM) as writer:
        put(writer, "a1")
        writer.add(Entry("bad", 10, 1, digest("bad"), "broken: here"))
        writer.flush()
        put(writer, "a2")
    opened = VectorCache(folder, DIM)
    _damage(parts(folder)[0], damage)
    if index == "removed":
        for path in indexes(folder):
            path.unlink()
    caplog.clear()
    found = []
    for cache in (opened, VectorCache(folder, DIM)):
        for _ in range(2):
            cache.refresh()
            found.append([*axes(cache, "a1"), *axes(cache, "a2"), *axes(cache, "bad")])

    warnings = [r for r in caplog.records if r.levelname == "WARNING"]
    assert all(each[0] in (None, 1) and each[2] in (None, "broken: here") for each in found)
    assert [each[1] for each in found] == [2] * 4
    assert found[3][0] is None
    assert len(warnings) == (0 if damage == "removed" else 2)


@pytest.mark.parametrize("index", ["kept", "removed"])
def test_errors_that_are_no_texts_are_misses_at_most(folder: Path, index: str) -> None:
    """A bit of the footer makes bytes of texts; all else is where it was."""
    with VectorCache(folder, DIM) as writer:
        put(writer, "a1")
        writer.add(Entry("bad", 10, 1, digest("bad"), "broken: here"))
    (part,) = parts(folder)
    table = pq.read_table(part)
    for kind in (pa.string(), pa.binary()):  # the one as the other, but for the type
        errors = table["error"].cast(kind)
        table = table.set_column(table.column_names.index("error"), "error", errors)
        pq.write_table(table, part, compression="none", use_dictionary=False)
        if kind == pa.string() or index == "removed":
            for path in indexes(folder):
                path.unlink()
        a1, bad = axes(VectorCache(folder, DIM), "a1", "bad")

        assert (a1 in (1, None), bad in ("broken: here", None)) == (True, True)


def test_a_flipped_bit_is_a_miss_at_most(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever in a part: opened, merged and shown, what is found is right, and nothing fails."""
    monkeypatch.setattr(prune_module, "FAN", 2)
    fill(folder, "a1", "a2")
    part = parts(folder)[0]
    files = {path: path.read_bytes() for path in folder.iterdir()}
    caplog.set_level("CRITICAL")
    for bit in range(0, len(files[part]) * 8, 83):
        for with_index in (True, False):
            for path in folder.iterdir():
                path.unlink()
            for path, data in files.items():
                if with_index or path.suffix == ".parquet":
                    path.write_bytes(data)
            flipped = bytearray(files[part])
            flipped[bit // 8] ^= 1 << bit % 8
            part.write_bytes(flipped)
            list(stats(folder.parent.parent))
            merge(folder)

            a1, a2 = axes(VectorCache(folder, DIM), "a1", "a2")

            assert (a1 in (None, 1), a2) == (True, 2), bit


def _damage(part: Path, how: str) -> None:
    data = part.read_bytes()
    if how == "removed":
        part.unlink()
    elif how == "other dim":
        part.unlink()
        other = VectorCache(part.parent, DIM + 1)
        other.add(Entry("a1", 10, 1, digest("a1"), np.eye(DIM + 1, dtype=np.float32)[0]))
        other.flush()
        newest = max(parts(part.parent), key=lambda path: int(path.name.split("-")[1]))
        newest.rename(part)
    elif how == "lists":  # a column of another type, else as it was
        table = pq.read_table(part)
        vectors = table["vec"].cast(pa.list_(pa.float32()))
        pq.write_table(table.set_column(table.column_names.index("vec"), "vec", vectors), part)
    elif how == "vectors":
        at = data.index(unit(1).tobytes())
        part.write_bytes(data[: at + 7] + b"\x7f" + data[at + 8 :])
    elif how == "error":
        at = data.index(b"broken: here")
        part.write_bytes(data[:at] + b"BROKEN" + data[at + 6 :])
    else:
        part.write_bytes({"cut": data[:-20], "rubbish": b"PAR1" * 40, "empty": b""}[how])


@pytest.mark.parametrize("damage", ["cut", "rubbish", "empty", "no JSON", "longer", "removed"])
def test_a_damaged_index_is_made_anew(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is lost with it but time; a prune removes it."""
    fill(folder, "a1", "a2")
    index = indexes(folder)[0]
    data = index.read_bytes()
    damaged = {
        "cut": data[:-20], "rubbish": b"PAR1" * 40, "empty": b"", "longer": b"x" * 24 + data,
        "no JSON": data[:-9] + b"]" + data[-8:], "removed": b"",
    }  # fmt: skip
    index.write_bytes(damaged[damage])
    if damage == "removed":
        index.unlink()
    said = "" if damage == "removed" else f"cache file {index} cannot be read"

    assert axes(VectorCache(folder, DIM), "a1", "a2") == [1, 2]
    assert [message.startswith(said) for message in caplog.messages] == [True] * bool(said)
    prune(folder.parent.parent)
    caplog.clear()
    assert axes(VectorCache(folder, DIM), "a1", "a2") == [1, 2]
    assert (len(indexes(folder)), caplog.messages) == (1, [])


def test_records_that_are_damaged_are_misses(folder: Path) -> None:
    """Whatever a byte of the index becomes: the right vector or none."""
    fill(folder, "a1")
    (index,) = indexes(folder)
    data = index.read_bytes()
    for at in range(2 * RECORD.itemsize):
        index.write_bytes(data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :])
        assert axes(VectorCache(folder, DIM), "a1") in ([1], [None])


def test_parts_of_earlier_versions_are_indexed(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts without an index, with other row groups and pages, are found without a word."""
    monkeypatch.setattr(index_module, "TOGETHER", 2)
    folder.mkdir(parents=True)
    for part in range(5):
        names = [f"image{part}{i}" for i in range(10)]
        rows = [Entry(n, 10, 1, digest(n), unit(int(n[-1]))) for n in names]
        rows.insert(4, Entry(f"bad{part}", 10, 1, digest(f"bad{part}"), "broken"))
        pq.write_table(
            parts_module.table_of(rows, DIM), folder / f"part-{part + 5}-1-1.parquet",
            row_group_size=4, data_page_size=1, write_batch_size=1, use_dictionary=["storage_path"],
            compression={"vec": "none", "error": "zstd", "digest": "zstd"},
        )  # fmt: skip
    names = [f"image{part}{i}" for part in range(5) for i in range(10)]
    for made in (3, 3):
        cache = VectorCache(folder, DIM)

        assert axes(cache, *names) == [int(n[-1]) % DIM for n in names]
        assert axes(cache, "bad2", "bad0") == ["broken", "broken"]
        assert sorted(cache.lookup_digests([digest(n) for n in names])) == list(range(50))
        assert (cache.entries, len(indexes(folder))) == (55, made)
    fill(folder, "new1")
    prune(folder.parent.parent)
    assert len(parts(folder)) == 2
    assert axes(VectorCache(folder, DIM), "image29", "bad1", "new1") == [1, "broken", 1]
    assert caplog.messages == []


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A file of records whose keys are 2^62, 2^62 + 2 and so on, written in uneven portions."""
    records = np.zeros(1000, RECORD)
    records["key"] = 2**62 + 2 * np.arange(1000, dtype="<u8")
    Run.write(tmp_path / "index-1-1-1.bin", np.split(records, [100, 173, 600]), {})
    return Run(tmp_path / "index-1-1-1.bin")


def test_a_range_of_the_index_has_its_ends(run: Run) -> None:
    """Wherever they lie: at the first key of a page, beside it, before all keys or behind."""
    keys = run.between(0, 2**64 - 1)["key"].tolist()
    ends = [0, *(keys[at] + near for at in (0, 127, 128, 640, 999) for near in (-1, 0, 1))]

    assert 1000 == len(keys)
    for first in ends:
        for last in (end for end in ends if end >= first):
            expected = [key for key in keys if first <= key <= last]
            assert expected == run.between(first, last)["key"].tolist()


def test_a_key_of_the_index_is_found_by_its_page(run: Run) -> None:
    """Each alone, so that no other's page is read; one before all others is not there."""
    keys = run.between(0, 2**64 - 1)["key"]

    assert all(run.find(keys[at : at + 1])["key"] == keys[at] for at in range(len(keys)))
    assert [0] == run.find(np.array([1], "<u8"))["key"].tolist()


def test_a_file_of_the_index_is_in_memory_or_searched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Be it shorter than the limit, as long or longer, its entries are found."""
    fill(folder, "a1")
    for limit in (1, 2, 3):
        monkeypatch.setattr(index_module, "IN_MEMORY", limit)
        assert axes(VectorCache(folder, DIM), "a1") == [1]


@pytest.mark.parametrize(("age", "written"), [(0, 0), (50, 0), (61, 1)])
def test_a_part_of_a_killed_writer_is_found_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, age: float, written: int
) -> None:
    """Though it has no index; others write it one only where the writer has had a minute for it."""
    monkeypatch.undo()
    fill(folder, "a1", "b2")
    indexes(folder)[-1].unlink()
    os.utime(parts(folder)[-1], (time.time() - age, time.time() - age))
    cache = VectorCache(folder, DIM)

    assert axes(cache, "a1", "b2") == [1, 2]
    assert (cache.entries, len(indexes(folder))) == (2, 1 + written)


def test_vectors_that_are_compressed_are_no_part(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What someone has written otherwise is a miss with a warning."""
    folder.mkdir(parents=True)
    table = parts_module.table_of([Entry("a1", 10, 1, digest("a1"), unit(1))], DIM)
    pq.write_table(table, folder / "part-5-1-1.parquet", compression="gzip")

    assert axes(VectorCache(folder, DIM), "a1") == [None]
    assert len(caplog.messages) == 1


def test_who_may_only_read_needs_no_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no index can be written, parts that have none are found all the same."""
    fill(folder, "a1", "a2")
    for path in indexes(folder):
        path.unlink()

    def refuse(*args: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Run, "write", refuse)

    assert axes(VectorCache(folder, DIM), "a1", "a2") == [1, 2]
    assert indexes(folder) == []


def _on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep no file of the index in memory, and let each have many pages and ranges."""
    for name, value in {"IN_MEMORY": 0, "PAGE": 2, "AT_ONCE": 5}.items():
        monkeypatch.setattr(index_module, name, value)


def test_a_long_index_is_read_page_by_page(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the first page to the last, what is there is found and what is not is not."""
    monkeypatch.setattr(prune_module, "FAN", 1000)
    _on_disk(monkeypatch)
    names = [f"image{i}" for i in range(31)]
    for start in range(0, 31, 4):
        with VectorCache(folder, DIM) as cache:
            put(cache, *names[start : start + 4])
    cache = VectorCache(folder, DIM)

    assert len(indexes(folder)) < 8
    assert (cache._index._held, caplog.messages) == ([], [])
    assert axes(cache, *names) == [int(n[-1]) % DIM for n in names]
    assert axes(cache, *(f"other{i}" for i in range(31))) == [None] * 31
    assert sorted(cache.lookup_digests([digest(n) for n in names])) == list(range(31))


def test_the_newest_entry_wins_whenever_it_was_indexed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the file of the index that is newer counts, but the part."""
    _on_disk(monkeypatch)
    cache = VectorCache(folder, DIM)
    for axis in (1, 2):
        put(cache, "a1", axis=axis)
        cache.flush()
    indexes(folder)[0].unlink()

    assert axes(VectorCache(folder, DIM), "a1") == [2]
    assert len(indexes(folder)) == 2


def test_a_file_of_the_index_that_was_merged_away_costs_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A reader takes in the one that has its records now."""
    _on_disk(monkeypatch)
    fill(folder, "a1", "a2")
    reader = VectorCache(folder, DIM)
    prune(folder.parent.parent)

    assert axes(reader, "a1", "a2") == [1, 2]
    assert caplog.messages == []


def test_an_index_that_is_merged_while_it_is_opened_is_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Files that have gone since the folder was listed are looked for in another."""
    fill(folder, "a1", "a2")
    take = Index._take

    def merged_first(index: Index, name: str) -> bool:
        monkeypatch.setattr(Index, "_take", take)
        merge(folder)
        return take(index, name)

    monkeypatch.setattr(Index, "_take", merged_first)

    assert axes(VectorCache(folder, DIM), "a1", "a2") == [1, 2]
    assert (len(indexes(folder)), caplog.messages) == (1, [])


def test_a_file_of_the_index_that_the_disk_does_not_give_is_a_miss(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With one warning, however often it is asked."""
    _on_disk(monkeypatch)
    fill(folder, "a1", "a2")
    reader = VectorCache(folder, DIM)
    index = indexes(folder)[0]
    index.write_bytes(index.read_bytes()[:10])

    assert [axes(reader, "a1", "a2"), axes(reader, "a1", "a2")] == [[None, 2], [None, 2]]
    assert len(caplog.messages) == 1


def test_prune_merges_parts_and_drops_replaced_entries(folder: Path) -> None:
    """Many parts become one with the newest entry of each file, found as before."""
    cache = VectorCache(folder, DIM, document={"weights": "w"})
    for name in ("a1", "a2", "a3", "a1"):
        put(cache, name)
        cache.flush()
    cache.add(Entry("bad", 10, 1, digest("bad"), "broken"))
    cache.flush()
    root = folder.parent.parent
    before = next(stats(root))
    freed = prune(root)
    after = next(stats(root))

    assert (before.entries, before.broken, before.parts) == (5, 1, 5)
    assert (after.entries, after.broken, after.parts) == (4, 1, 1)
    assert freed == before.bytes - after.bytes > 0
    assert after.fingerprint == {"weights": "w"}
    assert axes(VectorCache(folder, DIM), "a1", "a2", "a3", "bad") == [1, 2, 3, "broken"]
    assert prune(root) == 0


def test_a_cache_that_is_not_there_has_nothing_to_prune(tmp_path: Path) -> None:
    """No cache, no figures and nothing freed."""
    assert prune(tmp_path) == 0
    assert [] == list(stats(tmp_path))


def test_prune_goes_by_the_file_where_every_entry_was_replaced(folder: Path) -> None:
    """A part of which nothing is left goes, be the photos looked at or not."""
    photo = folder.parent.parent / "a1"
    photo.write_bytes(b"ten bytes!")
    os.utime(photo, ns=(1, 1))
    cache = VectorCache(folder, DIM)
    for axis in (2, 3):
        put(cache, "a1", axis=axis)
        cache.flush()
    prune(folder.parent.parent, root=photo.parent)
    left = VectorCache(folder, DIM)

    assert len(parts(folder)) == left.entries == 1
    assert axes(left, "a1") == [3]


def test_prune_keeps_both_of_two_files_with_the_same_bytes(folder: Path) -> None:
    """An entry is replaced by one of its own file, not by one of its content."""
    cache = VectorCache(folder, DIM)
    for name in ("a1", "b1"):
        cache.add(Entry(name, 10, 1, digest("one"), unit(1)))
        cache.flush()
    prune(folder.parent.parent)

    assert axes(VectorCache(folder, DIM), "a1", "b1") == [1, 1]


def test_prune_ends_where_another_has_removed_a_part_that_it_merged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other parts go, and all is found in the new one."""
    fill(folder, "a1", "a2", "a3")
    writer = parquet.writer

    @contextmanager
    def slow(*words: Any) -> Iterator[pq.ParquetWriter]:
        with writer(*words) as file:
            yield file
        parts(folder)[0].unlink()

    monkeypatch.setattr(prune_module, "writer", slow)
    prune(folder.parent.parent)

    assert len(parts(folder)) == 1
    assert axes(VectorCache(folder, DIM), "a1", "a2", "a3") == [1, 2, 3]


def test_parts_of_like_lengths_are_merged_at_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many become one, again and again until they are long; fewer wait, and all are found."""
    monkeypatch.setattr(prune_module, "FAN", 2)
    monkeypatch.setattr(prune_module, "LONG", 4)
    rows = []
    for i in range(11):
        with VectorCache(folder, DIM) as cache:
            put(cache, f"a{i}")
        rows.append([pq.read_metadata(part).num_rows for part in parts(folder)])

    assert [sorted(each) for each in rows[:8]] == [
        [1], [2], [1, 2], [2, 2], [1, 4], [2, 4], [1, 2, 4], [2, 2, 4]
    ]  # fmt: skip
    assert sorted(rows[10]) == [1, 2, 4, 4]
    assert len(indexes(folder)) <= 3
    assert not (folder / prune_module.CLAIM).exists()
    assert axes(VectorCache(folder, DIM), *(f"a{i}" for i in range(11))) == [
        i % 10 % DIM for i in range(11)
    ]


def test_like_lengths_are_those_within_a_factor(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to three rows are of a like length where four parts become one; four rows are not."""
    monkeypatch.setattr(prune_module, "FAN", 4)
    for start, rows in enumerate((1, 2, 3, 4, 1)):
        cache = VectorCache(folder, DIM)
        put(cache, *(f"a{start}{i}" for i in range(rows)))
        cache.flush()
    merge(folder)

    assert [4, 7] == sorted(pq.read_metadata(part).num_rows for part in parts(folder))


def test_records_of_parts_that_are_gone_leave_the_index(folder: Path) -> None:
    """With the next merge of the file that they are in."""
    fill(folder, "a1", "a2", "a3")
    parts(folder)[0].unlink()
    merge(folder)

    assert [run.count for run in Index(folder).runs.values()] == [4]
    assert axes(VectorCache(folder, DIM), "a1", "a2", "a3") == [None, 2, 3]


def test_the_end_of_a_shard_takes_no_longer_for_more_parts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many merges at a time, the oldest first; a prune does all of them."""
    monkeypatch.setattr(prune_module, "FAN", 2)
    monkeypatch.setattr(prune_module, "AT_ONCE", 2)
    fill(folder, *(f"a{i}" for i in range(8)))
    left = []
    for work in (merge, lambda folder: prune(folder.parent.parent)):
        work(folder)
        left.append(sorted(pq.read_metadata(part).num_rows for part in parts(folder)))

    assert left == [[1, 1, 1, 1, 2, 2], [2, 2, 4]]


def test_files_of_the_index_stay_few(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a merge each is longer than all that are shorter together."""
    monkeypatch.setattr(prune_module, "FAN", 1000)
    for i in range(1, 40):
        fill(folder, *(f"a{i}-{j}" for j in range(i % 3 + 1)))
        merge(folder)
        counts = sorted(run.count for run in Index(folder).runs.values())

        assert all(sum(counts[:n]) < counts[n] for n in range(1, len(counts)))


def test_a_long_file_of_the_index_is_left_alone(folder: Path) -> None:
    """While those that are shorter are not as long together, none is written anew."""
    with VectorCache(folder, DIM) as cache:
        put(cache, *(f"a{i}" for i in range(8)))
    fill(folder, "b1")
    before = indexes(folder)
    merge(folder)

    assert before == indexes(folder)
    assert [2, 16] == sorted(run.count for run in Index(folder).runs.values())


def test_only_what_was_written_is_merged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that adds nothing, or fails, leaves the files to others."""
    monkeypatch.setattr(prune_module, "FAN", 2)
    fill(folder, "a1", "a2")
    with VectorCache(folder, DIM) as cache:
        axes(cache, "a1")
    with pytest.raises(KeyError), VectorCache(folder, DIM) as cache:
        put(cache, "a3")
        raise KeyError

    assert len(parts(folder)) == 3


@pytest.mark.parametrize(
    ("age", "left"), [(prune_module.CLAIM_S - 60, 2), (prune_module.CLAIM_S + 1, 1)]
)
def test_one_process_merges(
    folder: Path, monkeypatch: pytest.MonkeyPatch, age: float, left: int
) -> None:
    """While another is at it nothing is merged, unless that was killed long ago."""
    monkeypatch.setattr(prune_module, "FAN", 2)
    fill(folder, "a1", "a2")
    claim = folder / prune_module.CLAIM
    claim.touch()
    os.utime(claim, (time.time() - age, time.time() - age))
    merge(folder)

    assert (len(parts(folder)), claim.exists()) == (left, left == 2)


def test_a_merge_keeps_the_newest_whatever_lies_between(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was replaced by a part that is not merged does not come back with a newer time."""
    monkeypatch.setattr(prune_module, "FAN", 2)
    monkeypatch.setattr(prune_module, "LONG", 1000)
    cache = VectorCache(folder, DIM)
    cache.add(Entry("a1", 10, 1, digest("a1"), "broken: once"))
    cache.flush()
    put(cache, "a1", "b2", "b3")
    cache.flush()
    put(cache, "b0")
    cache.flush()
    merge(folder)
    rows = sorted(pq.read_metadata(part).num_rows for part in parts(folder))

    assert rows == [1, 3]
    assert axes(VectorCache(folder, DIM), "a1", "b0", "b2") == [1, 0, 2]


@pytest.mark.parametrize(
    "checked", [True, False], ids=["checked pages", "pages of earlier versions"]
)
def test_a_merge_gives_no_damaged_vector_new_life(
    folder: Path, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """A vector of which a bit has changed, if not its length, is left out."""
    monkeypatch.setattr(prune_module, "FAN", 2)
    fill(folder, "a1", "a2")
    part = parts(folder)[0]
    if not checked:
        document = pq.read_schema(part).metadata
        table = pq.read_table(part).replace_schema_metadata(document)
        pq.write_table(table, part, compression={"vec": "none"}, use_dictionary=False)
        for index in indexes(folder):
            index.unlink()
        Index(folder)
    data = part.read_bytes()
    at = data.index(unit(1).tobytes())
    part.write_bytes(data[:at] + unit(3).tobytes() + data[at + 16 :])
    merge(folder)

    assert len(parts(folder)) == 1
    assert axes(VectorCache(folder, DIM), "a1", "a2") == [None, 2]


def test_a_merge_drops_nothing_that_the_index_does_not_know(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file of the index cannot be read for now, its entries are not taken for replaced."""
    monkeypatch.setattr(prune_module, "FAN", 2)
    _on_disk(monkeypatch)
    fill(folder, "a1", "a2")
    with monkeypatch.context() as patch:
        patch.setattr(Index, "find", lambda index, keys: np.zeros(len(keys), RECORD))
        merge(folder)

    assert len(parts(folder)) == 1
    assert axes(VectorCache(folder, DIM), "a1", "a2") == [1, 2]


def test_a_merge_that_was_killed_halfway_leaves_all_entries_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new part is there, without its index, and the old ones too: the next one goes on."""
    monkeypatch.setattr(prune_module, "FAN", 2)
    fill(folder, "a1", "a2")
    old = {path: path.read_bytes() for path in folder.iterdir()}
    merge(folder)
    for path in indexes(folder):
        path.unlink()
    for path, data in old.items():
        path.write_bytes(data)
    assert axes(VectorCache(folder, DIM), "a1", "a2") == [1, 2]
    merge(folder)

    assert axes(VectorCache(folder, DIM), "a1", "a2") == [1, 2]
    assert VectorCache(folder, DIM).entries == 2


def _merge_often(folder: Path, seconds: float) -> None:
    prune_module.FAN = 2
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        merge(folder)


def test_readers_and_writers_beside_merges_lose_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two processes merge what one writes and another looks up, all the time."""
    context = multiprocessing.get_context("spawn")
    mergers = [context.Process(target=_merge_often, args=(folder, 4.0)) for _ in range(2)]
    for process in mergers:
        process.start()
    writer, reader = VectorCache(folder, DIM), VectorCache(folder, DIM)
    for i in itertools.count():
        put(writer, f"image{i}")
        writer.flush()
        reader.refresh()
        names = [f"image{j}" for j in range(i + 1)]
        assert axes(reader, *names) == [int(n[-1]) % DIM for n in names]
        if not any(process.is_alive() for process in mergers):
            break

    assert [process.exitcode for process in mergers] == [0, 0]
    assert axes(VectorCache(folder, DIM), *names) == [int(n[-1]) % DIM for n in names]
    assert caplog.messages == []


def test_parts_that_cannot_be_merged_stay(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One line says so, the parts are what they were, and the rest is merged."""
    for name, dim in (("a1", DIM), ("a2", DIM + 1)):
        cache = VectorCache(folder, dim)
        cache.add(Entry(name, 10, 1, digest(name), np.eye(dim, dtype=np.float32)[1]))
        cache.flush()
    other = VectorCache(folder.parent / "g", DIM)
    for name in ("b1", "b2"):
        put(other, name)
        other.flush()
    before = parts(folder)
    caplog.clear()
    prune(folder.parent.parent)

    assert parts(folder) == before
    assert len(parts(folder.parent / "g")) == 1
    (said,) = caplog.messages
    assert said.startswith(f"{folder} is not merged: ArrowInvalid('Schema at index 1 was different")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (OSError(5, "Input/output error"), True),
        (OSError("Couldn't deserialize thrift"), False),
        (pa.ArrowInvalid("Parquet magic bytes not found"), False),
    ],
    ids=["disk", "page", "footer"],
)
@pytest.mark.parametrize("indexed", [True, False])
def test_prune_removes_what_no_one_can_read(
    folder: Path, error: Exception, stays: bool, indexed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that is no file goes, one that the disk failed to give stays."""
    fill(folder, "a1", "a2", "a3")
    unreadable = parts(folder)[0]
    if not indexed:
        indexes(folder)[0].unlink()
    read = parts_module.read

    def fails(path: Path) -> pa.Table:
        if path == unreadable:
            raise error
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(parts_module, "read", fails)
        prune(folder.parent.parent)

    assert unreadable.exists() == stays
    assert axes(VectorCache(folder, DIM), "a1", "a2", "a3") == [1 if stays else None, 2, 3]
    if not stays:
        assert len(parts(folder)) == 1


def test_prune_and_another_may_remove_the_same_part(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that goes while it is merged is no error, and nothing is said."""
    fill(folder, "a1", "a2", "a3")
    read = parts_module.read

    def goes(path: Path) -> pa.Table:
        table = read(path)
        for part in parts(folder)[:2]:
            part.unlink(missing_ok=True)
        return table

    monkeypatch.setattr(parts_module, "read", goes)
    prune(folder.parent.parent)

    assert axes(VectorCache(folder, DIM), "a3") == [3]


def test_what_another_prune_removes_meanwhile_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that is too old has gone when its turn comes."""
    fill(folder, "a1")
    old, written_ns = parts(folder)[0], parts_module.written_ns

    def goes(name: str) -> int:
        old.unlink(missing_ok=True)
        return written_ns(name)

    monkeypatch.setattr(parts_module, "written_ns", goes)
    prune(folder.parent.parent, older_than_days=0)

    assert [] == parts(folder.parent)


def test_prune_drops_entries_whose_path_is_none(folder: Path) -> None:
    """A name with a zero byte, which no file system takes, is that of no file."""
    fill(folder, "a\x001")
    prune(folder.parent.parent, root=folder)

    assert [] == parts(folder)


def test_files_that_vanish_are_not_counted(folder: Path) -> None:
    """What another process has merged or renamed between its listing and its look."""
    fill(folder, "a1")
    before = list(stats(folder.parent.parent))
    (folder / f".index-1-1-1.bin.{machine()}.1.tmp").symlink_to("gone")

    assert before == list(stats(folder.parent.parent))
    assert prune(folder.parent.parent) == 0


def test_a_prune_goes_on_where_another_has_removed_what_cannot_be_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged file that has gone when its turn comes keeps the others from nothing."""
    fill(folder, "a1", "a2")
    strange = folder / "part-5-1-1.parquet"
    strange.write_bytes(b"of a later version?")

    def is_lost(error: Exception) -> bool:
        strange.unlink(missing_ok=True)
        return True

    monkeypatch.setattr(parts_module, "is_lost", is_lost)
    prune(folder.parent.parent)

    assert len(parts(folder)) == 1
    assert axes(VectorCache(folder, DIM), "a1", "a2") == [1, 2]


def test_only_a_prune_removes_what_cannot_be_read(folder: Path) -> None:
    """The end of a shard leaves it to people."""
    fill(folder, "a1")
    strange = folder / "part-5-1-1.parquet"
    strange.write_bytes(b"of a later version?")
    merge(folder)
    assert strange.exists()
    prune(folder.parent.parent)

    assert not strange.exists()


def test_figures_leave_out_what_cannot_be_read(folder: Path) -> None:
    """Entries, failures and parts are counted over all parts but those without a footer."""
    cache = VectorCache(folder, DIM)
    (folder / "part-1-1-1.parquet").parent.mkdir(parents=True)
    (folder / "part-1-1-1.parquet").write_bytes(b"rubbish")
    for name in ("bad1", "bad2"):
        cache.add(Entry(name, 10, 1, digest(name), "broken"))
        put(cache, f"good{name}")
        cache.flush()
    (figures,) = stats(folder.parent.parent)

    assert (figures.entries, figures.broken, figures.parts) == (4, 2, 2)


def test_a_reader_finds_everything_while_parts_are_merged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A prune beside an open cache costs it no entry, and what it adds later still wins."""
    cache = VectorCache(folder, DIM)
    for name in ("a1", "a2", "a3"):
        put(cache, name)
        cache.flush()
    reader = VectorCache(folder, DIM)
    prune(folder.parent.parent)
    put(cache, "a1", axis=0)
    cache.flush()

    assert len(parts(folder)) == 2
    assert axes(reader, "a2", "a3", "x1") == [2, 3, None]
    assert axes(cache, "a1", "a2") == [0, 2]
    assert axes(VectorCache(folder, DIM), "a1") == [0]
    assert caplog.records == []


def test_prune_keeps_within_limits(folder: Path) -> None:
    """Old parts, changed files and too many bytes go, each when asked."""
    root = folder.parent.parent
    photos = root / "photos"
    photos.mkdir()
    (photos / "a1").write_bytes(b"ten bytes!")
    os.utime(photos / "a1", ns=(1, 1))
    cache = VectorCache(folder, DIM)
    for name in ("a1", "a2", "a1"):
        put(cache, name)
        cache.flush()

    prune(root, root=photos)
    assert axes(VectorCache(folder, DIM), "a1", "a2") == [1, None]
    prune(root, older_than_days=1, max_bytes=10**6)
    assert next(stats(root)).entries == 1
    prune(root, max_bytes=0)
    assert (next(stats(root)).parts, next(stats(root)).bytes) == (0, 0)
    put(cache, "a3")
    cache.flush()
    prune(root, older_than_days=0)
    assert next(stats(root)).parts == 0


def _part_of(folder: Path, monkeypatch: pytest.MonkeyPatch, hours_ago: float, name: str) -> None:
    """A part with one image that was written so many hours ago."""
    at = time.time() - hours_ago * 3600
    with monkeypatch.context() as patch, VectorCache(folder, DIM) as cache:
        put(cache, name)
        patch.setattr(time, "time_ns", lambda: int(at * 1e9))
        cache.flush()


def test_prune_drops_what_is_older_than_so_many_days(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part written 25 hours ago is older than a day, one of 23 hours is not."""
    _part_of(folder, monkeypatch, 25, "a1")
    _part_of(folder, monkeypatch, 23, "a2")
    prune(folder.parent.parent, older_than_days=1)

    assert axes(VectorCache(folder, DIM), "a1", "a2") == [None, 2]


def test_prune_drops_the_oldest_parts_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many of the oldest go, whatever their folder, as are too many for the limit."""
    for name, hours in {"e": 1, "f": 3, "g": 4, "h": 2}.items():
        _part_of(folder.parent / name, monkeypatch, hours, "a1")
    size = sum(path.stat().st_size for path in folder.parent.rglob("*.*"))
    kept = []
    for most in (size, size - 1, size * 3 // 8):
        prune(folder.parent.parent, max_bytes=most)
        kept.append("".join(part.parent.name for part in parts(folder.parent)))
        assert sum(path.stat().st_size for path in folder.parent.rglob("*.*")) <= most

    assert kept == ["efgh", "efh", "e"]


def test_a_merged_part_is_as_old_as_its_newest_origin(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written while parts are merged wins over them, though its name is older."""
    _part_of(folder, monkeypatch, 3, "a1")
    _part_of(folder, monkeypatch, 2, "a2")
    newest = max(parts_module.written_ns(part.name) for part in parts(folder))
    prune(folder.parent.parent)
    (merged,) = (parts_module.written_ns(part.name) for part in parts(folder))

    assert newest < merged <= newest + 1000


def test_prune_removes_what_killed_writers_left(folder: Path) -> None:
    """Temporary files that nobody holds go, those of a running writer stay."""
    with VectorCache(folder, DIM) as cache:
        put(cache, "a1")
    killed, running = (folder / f".part-1-1-1.parquet.{machine()}.{n}.tmp" for n in (1, 2))
    killed.write_bytes(b"half")
    running.write_bytes(b"half")
    with open(running) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        prune(folder.parent.parent)

    assert [running] == list(folder.glob(".*"))


def test_each_fingerprint_has_its_folder_and_says_what_made_it(tmp_path: Path) -> None:
    """Vectors of another precision are not found; a part names its encoder."""
    other = Fingerprint("w", "a", "t", "fp16", "full", True)
    with VectorCache.of(tmp_path, FINGERPRINT.as_dict(), DIM) as cache:
        put(cache, "a1")

    found = VectorCache.of(tmp_path, other.as_dict(), DIM)
    assert "b42e181d0b7a1002" == found.folder.name  # as in every earlier version
    assert axes(found, "a1") == [None]
    assert axes(VectorCache.of(tmp_path, FINGERPRINT.as_dict(), DIM), "a1") == [1]
    assert next(stats(tmp_path)).fingerprint == FINGERPRINT.as_dict()


def test_a_cache_that_takes_no_files_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A shard goes on without it, and is told so once."""
    (tmp_path / "vectors").write_text("a file where a folder should be")
    for caches in (1, 2):
        with VectorCache(tmp_path / "vectors" / "f", DIM) as cache:
            for _ in range(2):
                put(cache, "a1")
                cache.flush()
                assert len(caplog.messages) == caches
                assert axes(cache, "a1") == [None]

    found = f"expected a cache folder that takes files, found not a directory ({cache.folder});"
    assert [message.startswith(found) for message in caplog.messages] == [True, True]
    assert all("going on: what is not cached will be encoded" in m for m in caplog.messages)


def test_no_cache_keeps_nothing() -> None:
    """A benchmark's cache finds nothing, not even what was added."""
    with NoCache(DIM) as cache:
        put(cache, "a1")

        assert axes(cache, "a1") == [None]


def test_an_empty_question_has_an_empty_answer(folder: Path) -> None:
    """No rows asked, none found, with and without entries."""
    cache = VectorCache(folder, DIM)
    assert len(cache.lookup_digests([])) == 0
    put(cache, "a1")
    cache.flush()

    assert axes(cache) == []
    assert len(cache.lookup_digests([])) == 0
