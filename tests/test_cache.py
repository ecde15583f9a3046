"""The vector cache: what it finds, whoever else reads, writes and prunes at the same time."""

import fcntl
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache import parts as parts_module
from pipeline.cache import prune as prune_module
from pipeline.cache import vectors as vectors_module
from pipeline.cache.index import Index, Parts, newest
from pipeline.cache.prune import prune, stats
from pipeline.cache.vectors import NoCache, VectorCache
from pipeline.encoder.model import Fingerprint
from pipeline.stage.errors import DataError
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
        cache.add(name, size, 1, digest(name), vec, None)


def axes(cache: VectorCache, *names: str, size: int = 10) -> list[int | str | None]:
    """The axis of each image's vector, its error, or None where it is not found."""
    hits = cache.lookup_files(
        list(names), np.full(len(names), size), np.full(len(names), 1, np.int64)
    )
    return [
        hits.error(row) if (vec := hits.vector(row)) is None else int(vec.argmax())
        for row in range(len(names))
    ]


def _bits(vec: np.ndarray | None) -> bytes:
    return b"" if vec is None else vec.tobytes()


def parts(folder: Path) -> list[Path]:
    return sorted(folder.rglob("part-*.parquet"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "vectors" / "f"


def test_finds_by_file_and_by_content_what_was_added(folder: Path) -> None:
    """A vector comes back bit by bit, by its file and by its bytes, before and after the write."""
    vec = np.array([0.6, 0, -0.8, 0], np.float32)
    for already in (0, 1):
        cache = VectorCache(folder, DIM)
        assert cache.entries == already
        if not already:
            cache.add("a.jpg", 5, 6, digest("a"), vec, None)
        by_file = cache.lookup_files(["x", "a.jpg"], np.array([5, 5]), np.array([6, 6]))
        by_content = cache.lookup_digests([digest("a"), digest("x")])
        cache.flush()

        assert [by_file.found(0), by_file.found(1), len(by_file)] == [False, True, 1]
        assert _bits(by_file.vector(1)) == _bits(vec)
        assert _bits(by_content.vector(0)) == _bits(vec)
        assert by_content.found(1) is False


@pytest.mark.parametrize(("size", "mtime_ns"), [(6, 6), (5, 7)])
def test_a_changed_file_is_a_miss(folder: Path, size: int, mtime_ns: int) -> None:
    """Another size or mtime under the same path is another image."""
    with VectorCache(folder, DIM) as cache:
        cache.add("a.jpg", 5, 6, digest("a"), unit(0), None)

    hits = VectorCache(folder, DIM).lookup_files(["a.jpg"], np.array([size]), np.array([mtime_ns]))

    assert len(hits) == 0


def test_errors_are_remembered(folder: Path) -> None:
    """A broken photo is known to be broken, with the same words."""
    with VectorCache(folder, DIM) as cache:
        cache.add("bad", 10, 1, digest("bad"), None, "broken: truncated")
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
        cache.add("a0", 10, 1, digest("a0"), np.array(vec, np.float32), None)
        put(cache, "a1")
    hits = VectorCache(folder, DIM).lookup_files(["a0", "a1"], np.array([10, 10]), np.array([1, 1]))

    assert [*found, 1] == sorted(hits.vectors)


def test_many_rows_across_parts_come_back_in_the_order_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row groups, parts and the order of the question do not mix up vectors."""
    monkeypatch.setattr(vectors_module, "FLUSH_ROWS", 300)
    names = [f"image{i}" for i in range(1_000)]
    with VectorCache(folder, DIM) as cache:
        put(cache, *names)
    shuffled = np.random.default_rng(0).permutation(names).tolist()

    assert len(parts(folder)) == 4
    assert [pq.read_metadata(part).num_row_groups for part in parts(folder)] == [2, 2, 2, 1]
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


def test_equal_hashes_never_give_another_images_vector(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every hash the same, a lookup finds the right image or none."""

    def constant(table: pa.Table) -> np.ndarray:
        return np.full(table.num_rows, 7, np.uint64)

    for module in (parts_module, vectors_module):
        monkeypatch.setattr(module, "file_hashes", constant)
        monkeypatch.setattr(module, "digest_hashes", constant)
    with VectorCache(folder, DIM) as cache:
        put(cache, "a1", "a2", "a3")
    cache = VectorCache(folder, DIM)

    assert axes(cache, "a1", "a2", "a3", "a0") == [None, None, 3, None]
    assert [cache.lookup_digests([digest(n)]).found(0) for n in ("a1", "a3")] == [False, True]


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


def test_the_index_keeps_segments_of_halving_lengths() -> None:
    """An addition is merged with what is not twice as long, so that a lookup searches few."""
    index = Index(Parts())
    part = index._parts.add("part-5-1-1.parquet") << np.uint64(32)
    lengths = []
    for start, count in ((0, 4), (4, 2), (6, 1), (7, 1), (8, 0)):
        rows = np.arange(start, start + count, dtype=np.uint64)
        index.add(rows, part | rows)
        lengths.append([len(hashes) for hashes, _ in index._segments])

    assert lengths == [[4], [4, 2], [4, 2, 1], [8], [8]]
    assert index.find(np.array([7, 9, 0], np.uint64)).tolist() == [7, -1, 0]


def test_the_newest_place_is_that_of_the_newest_part() -> None:
    """Of one hash, the part that was written last counts, then the higher place."""
    hashes = np.array([7, 7, 7, 3, 3], np.uint64)
    places = np.array([1 << 32, 0, 2 << 32, 4, 5], np.uint64)

    assert newest(hashes, places, np.array([3, 9, 5], np.int64)).tolist() == [4, 0]


def test_parts_are_listed_oldest_first(tmp_path: Path) -> None:
    """By the time in their names, a number, and then by name."""
    names = ["part-9-1-1.parquet", "part-10-1-1.parquet", "part-10-2-1.parquet"]
    for name in (*reversed(names), "part-8-1-1.json", "apart-8-1-1.parquet"):
        (tmp_path / name).touch()

    assert parts_module.part_names(tmp_path) == names


def test_rows_of_a_slice_are_its_own() -> None:
    """Hashes and vectors of some rows of a table are those of the rows, wherever they begin."""
    table = parts_module.table_of(
        [
            parts_module.Entry(n, 10, 1, digest(n), unit(int(n[1])), None)
            for n in ("a1", "a2", "a3")
        ],
        DIM,
    )
    hashes, (vectors, _) = parts_module.digest_hashes(table), parts_module.matrix(table["vec"], DIM)
    middle = table.slice(1, 1)

    assert parts_module.digest_hashes(middle).tolist() == hashes[1:2].tolist()
    assert parts_module.matrix(middle["vec"], DIM)[0].tolist() == vectors[1:2].tolist()


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
        "from pipeline.cache.vectors import VectorCache\n"
        f"cache = VectorCache(Path(sys.argv[1]), {DIM})\n"
        "for i in itertools.count():\n"
        f"    cache.add(f'i{{i}}', 1, 1, os.urandom(32), np.eye({DIM}, dtype='f4')[0], None)\n"
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
    assert len(parts(folder)) == len(cache._parts.names) >= 5


@pytest.mark.parametrize("damage", ["cut", "rubbish", "empty", "vectors", "removed", "other dim"])
def test_a_damaged_part_is_a_miss(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An unreadable part costs its entries and one warning, whenever it is damaged."""
    with VectorCache(folder, DIM) as writer:
        put(writer, "a1")
        writer.flush()
        put(writer, "a2")
    opened = VectorCache(folder, DIM)
    _damage(parts(folder)[0], damage)
    caplog.clear()
    for cache in (opened, VectorCache(folder, DIM)):
        for _ in range(2):
            cache.refresh()
            assert axes(cache, "a1", "a2") == [None, 2]

    warnings = [r for r in caplog.records if r.levelname == "WARNING"]
    expected = {"vectors": 0, "removed": 1}.get(damage, 2)
    assert len(warnings) == expected


def _damage(part: Path, how: str) -> None:
    data = part.read_bytes()
    if how == "removed":
        part.unlink()
    elif how == "other dim":
        part.unlink()
        other = VectorCache(part.parent, DIM + 1)
        other.add("a1", 10, 1, digest("a1"), np.eye(DIM + 1, dtype=np.float32)[0], None)
        other.flush()
        newest = max(parts(part.parent), key=lambda path: int(path.name.split("-")[1]))
        newest.rename(part)
    elif how == "vectors":
        at = data.index(unit(1).tobytes())
        part.write_bytes(data[: at + 7] + b"\x7f" + data[at + 8 :])
    else:
        part.write_bytes({"cut": data[:-20], "rubbish": b"PAR1" * 40, "empty": b""}[how])


def test_prune_merges_parts_and_drops_replaced_entries(folder: Path) -> None:
    """Many parts become one with the newest entry of each file, found as before."""
    cache = VectorCache(folder, DIM, document={"weights": "w"})
    for name in ("a1", "a2", "a3", "a1"):
        put(cache, name)
        cache.flush()
    cache.add("bad", 10, 1, digest("bad"), None, "broken")
    cache.flush()
    root = folder.parent.parent
    before = stats(root)[0]
    freed = prune(root)
    after = stats(root)[0]

    assert (before.entries, before.failures, before.parts) == (5, 1, 5)
    assert (after.entries, after.failures, after.parts) == (4, 1, 1)
    assert freed == before.bytes - after.bytes > 0
    assert after.fingerprint == {"weights": "w"}
    assert axes(VectorCache(folder, DIM), "a1", "a2", "a3", "bad") == [1, 2, 3, "broken"]
    assert prune(root) == 0


def test_a_cache_that_is_not_there_has_nothing_to_prune(tmp_path: Path) -> None:
    """No cache, no figures and nothing freed."""
    assert prune(tmp_path) == 0
    assert stats(tmp_path) == []


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

    assert len(parts(folder)) == 1
    assert axes(VectorCache(folder, DIM), "a1") == [3]


def test_what_is_merged_has_at_most_so_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours are merged up to the limit and not beyond; a part of more stays by itself."""
    monkeypatch.setattr(prune_module, "MERGED_ROWS", 4)

    assert list(prune_module._runs([1, 3, 1, 5, 2, 1, 1, 3, 2])) == [
        [0, 1], [2], [3], [4, 5, 6], [7], [8]
    ]  # fmt: skip
    assert list(prune_module._runs([])) == []


def test_prune_goes_on_after_a_part_that_needs_no_merge(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that is long enough stays as it is, and the smaller ones after it become one."""
    monkeypatch.setattr(prune_module, "MERGED_ROWS", 2)
    monkeypatch.setattr(prune_module, "ROW_GROUP", 1)
    cache = VectorCache(folder, DIM)
    for names in (["a1", "a2"], ["a3"], ["a4"]):
        put(cache, *names)
        cache.flush()
    whole = parts(folder)[0].name
    prune(folder.parent.parent)
    footers = [pq.read_metadata(part) for part in parts(folder)]

    assert whole == parts(folder)[0].name
    assert [(footer.num_rows, footer.num_row_groups) for footer in footers] == [(2, 1), (2, 2)]


def test_parts_that_cannot_be_merged_stay(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One line says so, the parts are what they were, and the rest is merged."""
    for name, dim in (("a1", DIM), ("a2", DIM + 1)):
        cache = VectorCache(folder, dim)
        cache.add(name, 10, 1, digest(name), np.eye(dim, dtype=np.float32)[1], None)
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
    assert said.startswith(f"2 parts in {folder} are not merged: Schema at index 1 was different")
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
def test_prune_removes_what_no_one_can_read(
    folder: Path, error: Exception, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that is no file goes, one that the disk failed to give stays, the rest merges."""
    cache = VectorCache(folder, DIM)
    for name in ("a1", "a2", "a3"):
        put(cache, name)
        cache.flush()
    unreadable = parts(folder)[0]

    def keys(path: Path) -> tuple[np.ndarray, np.ndarray]:
        if path == unreadable:
            raise error
        return parts_module.keys(path)

    monkeypatch.setattr(prune_module, "keys", keys)
    prune(folder.parent.parent)

    assert unreadable.exists() == stays
    assert len(parts(folder)) == 1 + stays
    assert axes(VectorCache(folder, DIM), "a2", "a3") == [2, 3]


def test_prune_and_another_may_remove_the_same_part(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that went between its listing and its removal is no error."""
    with VectorCache(folder, DIM) as cache:
        put(cache, "a1")
    listed = [parts_module.new_name(), *parts_module.part_names(folder)]
    monkeypatch.setattr(prune_module, "part_names", lambda folder: listed)
    prune(folder.parent.parent, keep=())

    assert parts(folder) == []


def test_figures_leave_out_what_cannot_be_read(folder: Path) -> None:
    """Entries, failures and parts are counted over all parts but those without a footer."""
    cache = VectorCache(folder, DIM)
    (folder / "part-1-1-1.parquet").parent.mkdir(parents=True)
    (folder / "part-1-1-1.parquet").write_bytes(b"rubbish")
    for name in ("bad1", "bad2"):
        cache.add(name, 10, 1, digest(name), None, "broken")
        put(cache, f"good{name}")
        cache.flush()
    (figures,) = stats(folder.parent.parent)

    assert (figures.entries, figures.failures, figures.parts) == (4, 2, 2)


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
    """Old parts, other fingerprints, changed files and too many bytes go, each when asked."""
    root = folder.parent.parent
    photos = root / "photos"
    photos.mkdir()
    (photos / "a1").write_bytes(b"ten bytes!")
    os.utime(photos / "a1", ns=(1, 1))
    cache = VectorCache(folder, DIM)
    for name in ("a1", "a2", "a1"):
        put(cache, name)
        cache.flush()
    for other in ("e", "g"):
        with VectorCache(folder.parent / other, DIM) as others:
            put(others, "b1")

    prune(root, keep={"f"})
    assert [s.folder for s in stats(root)] == ["f"]
    prune(root, root=photos)
    assert axes(VectorCache(folder, DIM), "a1", "a2") == [1, None]
    prune(root, older_than_days=1, max_bytes=10**6)
    assert stats(root)[0].entries == 1
    prune(root, max_bytes=0)
    assert stats(root)[0].parts == 0
    put(cache, "a3")
    cache.flush()
    prune(root, older_than_days=0)
    assert stats(root)[0].parts == 0


def _part_of(folder: Path, monkeypatch: pytest.MonkeyPatch, hours_ago: float, name: str) -> None:
    """A part with one image, too long to be merged, that was written so many hours ago."""
    at = time.time_ns() - int(hours_ago * 3600e9)
    with monkeypatch.context() as patch, VectorCache(folder, DIM) as cache:
        patch.setattr(vectors_module, "new_name", lambda: parts_module.new_name(at))
        put(cache, name)


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
    monkeypatch.setattr(prune_module, "MERGED_ROWS", 1)
    for name, hours in {"e": 1, "f": 3, "g": 4, "h": 2}.items():
        _part_of(folder.parent / name, monkeypatch, hours, "a1")
    size = sum(part.stat().st_size for part in parts(folder.parent))
    kept = []
    for most in (size, size - 1, size // 4):
        prune(folder.parent.parent, max_bytes=most)
        kept.append("".join(part.parent.name for part in parts(folder.parent)))

    assert kept == ["efgh", "efh", "e"]


def test_a_merged_part_is_as_old_as_its_newest_origin(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written while parts are merged wins over them, though its name is older."""
    _part_of(folder, monkeypatch, 3, "a1")
    _part_of(folder, monkeypatch, 2, "a2")
    newest = max(parts_module.written_ns(part.name) for part in parts(folder))
    prune(folder.parent.parent)

    assert [parts_module.written_ns(part.name) for part in parts(folder)] == [newest]


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
    with VectorCache.of(tmp_path, FINGERPRINT, DIM) as cache:
        put(cache, "a1")

    assert axes(VectorCache.of(tmp_path, other, DIM), "a1") == [None]
    assert axes(VectorCache.of(tmp_path, FINGERPRINT, DIM), "a1") == [1]
    assert stats(tmp_path)[0].fingerprint == FINGERPRINT.as_dict()


def test_a_folder_that_takes_no_files_is_one_line(tmp_path: Path) -> None:
    """A cache that cannot be written is an error with the folder and a hint."""
    (tmp_path / "vectors").write_text("a file where a folder should be")
    cache = VectorCache(tmp_path / "vectors" / "f", DIM)
    put(cache, "a1")

    with pytest.raises(DataError, match="expected a cache folder that takes files"):
        cache.flush()


def test_a_cache_that_takes_no_files_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A shard goes on without it, and is told so once."""
    (tmp_path / "vectors").write_text("a file where a folder should be")
    for caches in (1, 2):
        with VectorCache(tmp_path / "vectors" / "f", DIM) as cache:
            for _ in range(2):
                put(cache, "a1")
                cache._write_or_forget()
                assert len(caplog.messages) == caches

    assert all("going on: what is not cached will be encoded" in m for m in caplog.messages)


@pytest.mark.parametrize(
    ("error", "said"),
    [(ValueError("one line\nand more"), "one line"), (KeyError(), "KeyError")],
)
def test_an_unreadable_part_is_named_in_one_line(
    error: Exception, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the reader raised, the warning says which part and why."""
    parts_module.warn_of_part(Path("f/part"), error)

    assert caplog.messages == [f"cache part f/part cannot be read and counts as missing: {said}"]


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
