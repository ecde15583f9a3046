"""Who waits for files: the ledger, what a plan looks at, and what ends the wait. Real files."""

import hashlib
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.database import waiting
from pipeline.database.waiting import NOBODY, Files, LeftOut
from pipeline.photos.files import PhotoFolder
from pipeline.stage import parquet
from pipeline.stage.settings import Identity, Settings

T0 = datetime(2026, 1, 1, 12, 0, 0, 1, tzinfo=UTC)
KEY = Identity("s", "m", "")


def failed(listing: int, *paths: str | None, newer: int = 0, **stat: Any) -> dict[str, Any]:
    """A row of without_vector.parquet; the files were missing, or as `stat` says."""
    files = [
        {"storage_path": path, "size": None, "mtime_ns": None, "error": "e", **stat}
        for path in paths
    ]
    return {
        "generation": 1,
        "listing_id": listing,
        "edited_date": T0 + timedelta(microseconds=newer),
        "candidates": f"c{listing}",
        "files": files,
    }


class Nights:
    """Runs over one folder of photos and one cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.photos = folder / "photos"
        self.photos.mkdir()
        self.chosen = Settings(cache_dir=str(folder / "cache"))
        self.ledger = waiting.ledger_of(folder / "cache", KEY)

    def photo(self, name: str, size: int = 10, mtime_ns: int = 7) -> None:
        (self.photos / name).write_bytes(b"x" * size)
        os.utime(self.photos / name, ns=(mtime_ns, mtime_ns))

    def write(self, name: str, schema: pa.Schema, rows: list[dict[str, Any]]) -> Path:
        with parquet.writer(self.folder / name, schema, {}) as writer:
            keys = [{column: row[column] for column in schema.names} for row in rows]
            writer.write_table(pa.Table.from_pylist(keys, schema))
        return self.folder / name

    def remember(self, *without: dict[str, Any], tried: tuple[dict[str, Any], ...] = ()) -> int:
        """A load after which these have no vector, and those that were tried have one."""
        return waiting.remember(
            self.write("without", parquet.WITHOUT_VECTOR, list(without)),
            self.write("tried", parquet.LISTINGS, [*without, *tried]),
            self.chosen,
            KEY,
        )

    def files(self) -> Files:
        return Files(self.chosen, self.photos)

    def judged(self, **settings: Any) -> LeftOut:
        out = waiting.left_out(self.files(), self.chosen.model_copy(update=settings), KEY)
        key = ["generation", "listing_id", "edited_date"]
        assert [*key, "candidates", "reason"] == out.looked_at.column_names
        assert [*key, "reason"] == out.unseen.column_names
        assert key == out.changed.column_names
        assert bool(out) == any(map(len, out))
        return out

    def left_out(self, **settings: Any) -> tuple[list[int], list[int]]:
        """The listings that are left out: looked at, and unseen."""
        looked_at, unseen, _ = self.judged(**settings)
        return looked_at["listing_id"].to_pylist(), unseen["listing_id"].to_pylist()

    def changed_files(self, *without: dict[str, Any]) -> str:
        path = self.write("without", parquet.WITHOUT_VECTOR, list(without))
        return waiting.changed_files(self.files(), path)


@pytest.fixture
def nights(tmp_path: Path) -> Nights:
    return Nights(tmp_path)


def test_nobody_is_left_out_without_a_ledger(nights: Nights) -> None:
    """No ledger, nobody waits; and `NOBODY` is what an empty one gives."""
    assert ([], []) == nights.left_out()
    assert not NOBODY
    for name in NOBODY._fields:
        assert NOBODY._replace(**{name: pa.table({"listing_id": [1]})})


def test_a_listing_waits_while_its_files_are_as_they_were(nights: Nights) -> None:
    """One that appears, or changes in size or in time, ends the wait of its listing alone."""
    for name in ("same", "longer", "later"):
        nights.photo(name)
    nights.remember(
        failed(1, "gone", "same", size=10, mtime_ns=7),
        failed(2, "longer", size=10, mtime_ns=7),
        failed(3, "later", size=10, mtime_ns=7),
        failed(4, "gone", "appears"),
        failed(5, None, "outside/../../x"),
    )
    before = nights.left_out()
    nights.photo("longer", size=11)
    nights.photo("later", mtime_ns=8)
    nights.photo("appears")

    assert ([1, 2, 3, 4, 5], []) == before
    assert ([1, 5], []) == nights.left_out()
    assert [2, 3, 4] == nights.judged().changed["listing_id"].to_pylist()


def test_the_reason_is_that_of_most_files(nights: Nights) -> None:
    """Missing, broken and so on, without the detail; a listing without files was cancelled out."""
    nights.remember(
        failed(1, "a", "b", error="missing: no such file"),
        {**failed(2), "files": [_tried("broken: x"), _tried("missing: y"), _tried("broken: z")]},
        failed(3),
    )

    assert ["missing", "broken", "cancelled"] == nights.judged().looked_at["reason"].to_pylist()


def _tried(error: str) -> dict[str, Any]:
    return {"storage_path": "p", "size": None, "mtime_ns": None, "error": error}


@pytest.mark.parametrize("limit", ["max_image_bytes", "max_image_pixels"])
def test_who_failed_under_another_limit_is_tried_again(nights: Nights, limit: str) -> None:
    """What was too large then may be read now, looked at or not."""
    nights.remember(failed(1, "gone"))

    assert ([1], []) == nights.left_out()
    assert ([], []) == nights.left_out(**{limit: getattr(nights.chosen, limit) + 1})


def test_a_plan_looks_at_some_and_leaves_out_all(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest half and one block of the older are looked at, the rest left out unseen."""
    monkeypatch.setattr(waiting, "LOOKED_AT", 4)
    monkeypatch.setattr(waiting, "ROW_GROUP", 3)
    nights.remember(*(failed(n, f"{n}.jpg", newer=-n) for n in range(7)))
    for name in range(7):
        nights.photo(f"{name}.jpg")
    nights.photo("6.jpg", size=11)
    monkeypatch.setattr("time.time", lambda: 2 * 3600.0)
    _, second = waiting.window(7, 2 * 3600.0)

    assert range(4, 6) == second
    assert ([], [2, 3, 6]) == nights.left_out()
    assert ([], []) == nights.left_out(max_image_bytes=1)
    assert [0, 1, 4, 5] == nights.judged().changed["listing_id"].to_pylist()
    assert [*range(7)] == sorted(nights.judged(max_image_bytes=1).changed["listing_id"].to_pylist())


def test_all_are_looked_at_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest always, of the older a block at a time, the same for all plans of an hour."""
    monkeypatch.setattr(waiting, "LOOKED_AT", 10)
    hours = [waiting.window(17, 3600.0 * hour) for hour in range(12)]

    assert [[range(0)], [range(10)]] == [waiting.window(rows, 0.0) for rows in (0, 10)]
    assert {range(5)} == {first for first, _ in hours}
    assert {range(5, 10), range(10, 15), range(15, 17)} == {second for _, second in hours}
    assert hours == [waiting.window(17, 3600.0 * hour + 3599.9) for hour in range(12)]


def test_rows_are_those_of_the_blocks(tmp_path: Path) -> None:
    """Whichever row groups they are in."""
    pq.write_table(pa.table({"n": range(10), "m": range(10)}), tmp_path / "f", row_group_size=3)
    with pq.ParquetFile(tmp_path / "f") as file:
        for start in range(10):
            for stop in range(start, 11):
                blocks = [range(start, stop), range(2, 4)]
                rows = waiting._rows(file, blocks, ["n"])

                assert ["n"] == rows.column_names
                assert [*blocks[0], 2, 3] == rows["n"].to_pylist()


def test_what_has_changed_since_the_last_run(nights: Nights) -> None:
    """Nothing, or a digest of the files that appeared or changed, by path, size and time."""
    nights.photo("same")
    nights.photo("other", size=11)
    rows = failed(1, "gone", "same", "other", size=10, mtime_ns=7), failed(2, "new")
    before = nights.changed_files(rows[1])
    nights.photo("new", mtime_ns=8)
    changed = json.dumps([["other", 11, 7], ["new", 10, 8]]).encode()

    assert "" == before == nights.changed_files()
    assert "" == waiting.changed_files(nights.files(), nights.folder / "none")
    assert hashlib.sha256(changed).hexdigest()[:12] == nights.changed_files(*rows)


def test_each_file_is_looked_at_once(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where many listings and both questions are about it; a path that is null is none."""
    stat, asked = PhotoFolder.stat, []

    def counted(folder: PhotoFolder, path: str) -> Any:
        asked.append(path)
        return stat(folder, path)

    monkeypatch.setattr(PhotoFolder, "stat", counted)
    monkeypatch.setattr("pipeline.photos.files.STAT_PATHS", 2)
    rows = [failed(n, "shared", f"{n}.jpg", None) for n in range(5)]
    nights.remember(*rows)
    files = nights.files()
    waiting.left_out(files, nights.chosen, KEY)
    waiting.changed_files(files, nights.folder / "without")

    assert ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "shared"] == sorted(asked)


def test_a_file_system_that_fails_is_said_once(
    nights: Nights, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who waits for it waits on; it is asked once, for the first file."""
    asked = []

    def fails(folder: PhotoFolder, path: str) -> Any:
        asked.append(path)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pipeline.photos.files.STAT_THREADS", 1)
    monkeypatch.setattr("pipeline.photos.root.RETRY_S", (0.0,))  # of a stage, that has the time
    monkeypatch.setattr(PhotoFolder, "_stat", fails)
    nights.remember(failed(1, "a", "b"), failed(2, "c"))
    files = nights.files()
    looked_at = waiting.left_out(files, nights.chosen, KEY).looked_at

    assert [1, 2] == looked_at["listing_id"].to_pylist()
    assert "" == waiting.changed_files(files, nights.folder / "without")
    assert ["a"] == asked
    (said,) = caplog.messages
    assert said.endswith("; listings that wait for files wait on")
    assert "found input/output error (a)" in said


@pytest.mark.parametrize(
    ("ledger", "said"), [(b"PAR1 and\nno more", True), (None, False)], ids=["rubbish", "columns"]
)
def test_a_ledger_in_disorder_leaves_nobody_out(
    nights: Nights, ledger: bytes | None, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Who waits is tried again; one that is no Parquet file is a warning in one line."""
    nights.ledger.parent.mkdir()
    if ledger:
        nights.ledger.write_bytes(ledger)
    else:
        pq.write_table(pa.table({"listing_id": [1]}), nights.ledger)

    assert ([], []) == nights.left_out()
    assert said == bool(caplog.messages)
    for message in caplog.messages:
        assert message.startswith(f"{nights.ledger} cannot be read: ")
        assert message.endswith("; who waits is tried again")
        assert "Parquet magic bytes not found in footer" in message
        assert "\n" not in message


def test_what_was_tried_of_a_listing_is_known_by_edit(nights: Nights) -> None:
    """The files and their errors, of this key alone; nothing of a listing that never failed."""
    nights.remember(failed(1, "a"), failed(1, "b", None, newer=1), failed(2, "c"))
    found = waiting.files_of(nights.chosen, KEY, 1)

    assert {T0: [_tried("e") | {"storage_path": "a"}]} == {T0: found.pop(T0)}
    assert {T0 + timedelta(microseconds=1): ["b", None]} == {
        edit: [file["storage_path"] for file in files] for edit, files in found.items()
    }
    assert {} == waiting.files_of(nights.chosen, KEY, 3)
    assert {} == waiting.files_of(nights.chosen, KEY._replace(pca_rev="p"), 1)


def test_who_is_tried_again_waits_no_more(nights: Nights) -> None:
    """From the export on, whatever becomes of the run; an earlier edit that is tried ends none."""
    nights.remember(failed(1, "a"), failed(2, "b"), failed(3, "c", newer=1))
    tried = nights.write(
        "tried", parquet.LISTINGS, [failed(1, newer=1), failed(3), failed(4), failed(5)]
    )
    waiting.release(tried, nights.chosen, KEY)

    assert ([3, 2], []) == nights.left_out()


def test_nobody_waits_and_no_ledger_is_made(nights: Nights) -> None:
    """Neither by an export nor by a load that leaves nobody out."""
    waiting.release(nights.write("tried", parquet.LISTINGS, [failed(1)]), nights.chosen, KEY)

    assert not nights.ledger.parent.exists()
    assert 0 == nights.remember(tried=(failed(1),))
    assert not nights.ledger.exists()


def test_a_ledger_that_cannot_be_replaced_is_a_warning(
    nights: Nights, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on, told how many wait of its own."""
    nights.remember(failed(1, "a"))
    nights.ledger.unlink()
    nights.ledger.mkdir()

    assert 2 == nights.remember(failed(2, "b"), failed(3, "c"))
    waiting.release(nights.folder / "tried", nights.chosen, KEY)
    (said,) = caplog.messages
    assert said.startswith(f"{nights.ledger} cannot be written: ")


def test_a_ledger_is_left_alone_where_nothing_changes(nights: Nights) -> None:
    """Newest edit first in it; a load of others writes nothing, nor does it forget any."""
    first = nights.remember(failed(2, "b"), failed(3, "c", newer=1), failed(1, "a"))
    before = nights.ledger.stat()
    again = nights.remember(tried=(failed(7), failed(8)))
    table = pq.read_table(nights.ledger)

    assert (3, 3) == (first, again)
    assert before.st_ino == nights.ledger.stat().st_ino
    assert [3, 1, 2] == table["listing_id"].to_pylist()
    assert waiting.LEDGER.equals(table.schema)
    assert {"waiting": KEY._asdict()} == parquet.metadata(nights.ledger)
