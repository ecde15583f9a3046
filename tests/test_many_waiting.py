"""A plan and a load cost the same however many listings wait: what they look at, read and hold."""

import json
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY

from pipeline.database import waiting
from pipeline.photos.files import FileStat, PhotoFolder
from pipeline.stage import parquet
from pipeline.stage.settings import Identity, Settings

LOOKED_AT = 40
IDENTITY = Identity("s", "m", "")
HOUR = waiting.TURN_S


class Folder:
    """A cache folder and an empty image root, with the photos that plans ask for."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.chosen = Settings(cache_dir=str(folder / "cache"))
        self.photos = folder / "photos"
        self.photos.mkdir()
        self.failed = folder / "without_vector.parquet"
        self.now = 0.0
        self.asked: list[str] = []
        stat = PhotoFolder.stat

        def counted(photos: PhotoFolder, path: str) -> FileStat:
            self.asked.append(path)
            return stat(photos, path)

        patch.setattr(PhotoFolder, "stat", counted)
        patch.setattr(waiting, "LOOKED_AT", LOOKED_AT)
        patch.setattr(waiting, "ROW_GROUP", LOOKED_AT // 4)
        patch.setattr("time.time", lambda: self.now)

    def wait(self, listings: int) -> None:
        """Remember so many listings: 0 is the newest edit, each with a photo of its number."""
        tried = self.failed.with_name("listings.parquet")
        rows = [failed(i) for i in range(listings)]
        write(self.failed, parquet.WITHOUT_VECTOR, rows)
        write(tried, parquet.LISTINGS, [{k: row[k] for k in waiting.KEY} for row in rows])
        waiting.remember(self.failed, tried, self.chosen, IDENTITY)

    def plan(self) -> waiting.LeftOut:
        """Who is left out by a plan at this hour; its looks replace those of the last one."""
        self.asked.clear()
        files = waiting.Files(self.chosen, self.photos)
        return waiting.left_out(files, self.chosen, IDENTITY)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    return Folder(tmp_path, monkeypatch)


def failed(listing: int) -> dict[str, Any]:
    """A row of without_vector.parquet; the higher the number, the older the edit."""
    file = {"storage_path": f"{listing}.jpg", "size": None, "mtime_ns": None, "error": "missing"}
    edited = datetime(2026, 1, 1, tzinfo=UTC) - timedelta(seconds=listing)
    return {"generation": 1, "listing_id": listing, "edited_date": edited, "candidates": "0" * 32,
            "files": [file]}  # fmt: skip


def write(path: Path, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
    with parquet.writer(path, schema, {}) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema), row_group_size=LOOKED_AT // 4)


@pytest.mark.parametrize("listings", [LOOKED_AT, LOOKED_AT + 1, 10 * LOOKED_AT])
def test_a_plan_looks_at_no_more_however_many_wait(folder: Folder, listings: int) -> None:
    """So many files are looked at, each once and the newest always; nobody is let in for that."""
    folder.wait(listings)
    left_out = folder.plan()
    looked = sorted(int(Path(path).stem) for path in folder.asked)

    assert LOOKED_AT >= len(looked) == len(set(looked)) == left_out.looked_at.num_rows
    assert list(range(LOOKED_AT // 2)) == looked[: LOOKED_AT // 2]
    assert listings == left_out.looked_at.num_rows + left_out.unseen.num_rows
    assert set(range(listings)) == {
        listing for table in left_out for listing in table["listing_id"].to_pylist()
    }


def test_plans_of_one_hour_look_at_the_same_and_in_the_end_at_all(folder: Folder) -> None:
    """Else each plan of an hour would be another, or a listing would never have its turn."""
    folder.wait(5 * LOOKED_AT)
    folder.plan()
    first = sorted(folder.asked)
    folder.now = HOUR - 1
    folder.plan()
    again = sorted(folder.asked)
    looked = Counter(folder.asked)
    for hour in range(1, 200):
        folder.now = hour * HOUR
        folder.plan()
        looked.update(folder.asked)

    assert first == again
    assert {f"{i}.jpg" for i in range(5 * LOOKED_AT)} == set(looked)


def test_of_what_failed_last_a_plan_looks_at_no_more(folder: Folder) -> None:
    """A night of a million failures costs the plans after it as much as one of ten thousand."""
    folder.wait(10 * LOOKED_AT)
    (folder.photos / "0.jpg").write_bytes(b"here")
    changed = waiting.changed_files(waiting.Files(folder.chosen, folder.photos), folder.failed)

    assert changed
    assert LOOKED_AT == len(folder.asked)


def test_of_the_others_a_plan_reads_their_keys_alone(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files and errors of a ledger, nearly all of its bytes, are read where they are needed."""
    read: list[int] = []
    original = pq.ParquetFile.read_row_groups

    def counted(file: pq.ParquetFile, groups: list[int], *words: Any, **flags: Any) -> pa.Table:
        read.extend(groups)
        return original(file, groups, *words, **flags)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
    folder.wait(10 * LOOKED_AT)
    folder.plan()

    assert LOOKED_AT // 2 + LOOKED_AT // 2 == len(read) * (LOOKED_AT // 4)


# Peak memory of a process that remembers, in MB above what it held before.
REMEMBER = """
import json, sys
from pathlib import Path
import duckdb, numpy as np, pyarrow as pa
from pipeline.database import waiting
from pipeline.stage import parquet
from pipeline.stage.settings import Identity, Settings

def memory(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) // 1024

folder, listings = Path(sys.argv[1]), int(sys.argv[2])
tried, without = folder / "listings.parquet", folder / "without_vector.parquet"
with parquet.writer(tried, parquet.LISTINGS, {}) as writer:
    for start in range(0, listings, 50_000):
        ids = np.arange(start, start + 50_000)
        columns = [np.ones(len(ids), np.int32), ids, -ids]
        columns = [pa.array(c).cast(f.type) for c, f in zip(columns, parquet.LISTINGS)]
        writer.write_table(pa.Table.from_arrays(columns, schema=parquet.LISTINGS))
row = {"generation": 1, "listing_id": 1, "edited_date": 0, "candidates": "0" * 32, "files": []}
with parquet.writer(without, parquet.WITHOUT_VECTOR, {}) as writer:
    writer.write_table(pa.Table.from_pylist([row] * 10_000, parquet.WITHOUT_VECTOR))
chosen, identity = Settings(cache_dir=str(folder / "cache")), Identity("s", "m", "")
before = memory("VmRSS")
for _ in range(2):  # the second finds a ledger, of which all are tried again
    waiting.remember(without, tried, chosen, identity)
print(json.dumps(memory("VmHWM") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read memory from")
def test_memory_of_a_load_does_not_grow_with_its_listings(tmp_path: Path) -> None:
    """Two million listings that were tried take what fifty thousand do; as objects, 600 MB more."""
    peaks = []
    for listings in (50_000, 2_000_000):
        folder = tmp_path / str(listings)
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", REMEMBER, str(folder), str(listings)],
            capture_output=True, text=True, check=True, cwd=REPOSITORY,
        )  # fmt: skip
        peaks.append(json.loads(done.stdout))

    assert peaks[1] < peaks[0] + 100
