"""Parquet between the stages: batches that never split a listing, files that are whole."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.stage import parquet

T0 = datetime(2026, 1, 1, 12, tzinfo=UTC)
T1 = T0 + timedelta(microseconds=1)
Key = tuple[int, int, datetime]  # generation, listing_id, edited_date

# Six listings; of two neighbours only one part of the key differs.
ROWS: list[Key] = [
    (1, 1, T1), (1, 1, T1), (1, 1, T1),
    (1, 1, T0),
    (1, 2, T0), (1, 2, T0),
    (2, 2, T0),
    (2, 3, T0), (2, 3, T0), (2, 3, T0), (2, 3, T0),
    (2, 4, T0),
]  # fmt: skip


def table(rows: list[Key]) -> pa.Table:
    columns = [list(column) for column in zip(*rows, strict=True)] or [[]] * 3
    return pa.table(columns, schema=parquet.LISTINGS)


@pytest.mark.parametrize(
    ("batch_rows", "lengths"),
    [
        (2, [3, 4, 4, 1]),
        (3, [4, 3, 4, 1]),
        (4, [3, 4, 4, 1]),
        (5, [4, 3, 4, 1]),
        (11, [7, 5]),
        (12, [11, 1]),
        (100, [11, 1]),
    ],
)
def test_batches_end_where_a_listing_ends(
    tmp_path: Path, batch_rows: int, lengths: list[int]
) -> None:
    """All rows in their order, in tables that end with a generation, listing or edit."""
    with parquet.writer(tmp_path / "rows.parquet", parquet.LISTINGS, {}) as writer:
        writer.write_table(table(ROWS))
    found = list(parquet.clustered_batches(tmp_path / "rows.parquet", batch_rows))

    assert lengths == [batch.num_rows for batch in found]
    assert table(ROWS).equals(pa.concat_tables(found).replace_schema_metadata())


def test_no_rows_are_no_batch(tmp_path: Path) -> None:
    """An empty file gives nothing to work on."""
    with parquet.writer(tmp_path / "rows.parquet", parquet.LISTINGS, {}):
        pass

    assert [] == list(parquet.clustered_batches(tmp_path / "rows.parquet"))


@pytest.mark.parametrize(
    ("rows", "start"), [(0, 0), (1, 0), (3, 0), (4, 3), (6, 4), (7, 6), (8, 7), (11, 7), (12, 11)]
)
def test_the_last_listing_begins_behind_all_others(rows: int, start: int) -> None:
    """Where any part of the key changes for the last time; 0 if it never does."""
    assert start == parquet.last_listing_start(table(ROWS[:rows]))


def test_what_can_be_made_again_waits_for_no_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a durable file is on the disk before it has its name."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    for durable, count in ((False, 0), (True, 1)):
        with parquet.replacing(tmp_path / "file", durable) as temporary:
            temporary.write_bytes(b"bytes")

        assert len(synced) == count
        assert (tmp_path / "file").read_bytes() == b"bytes"


def test_damaged_pages_are_found_out(tmp_path: Path) -> None:
    """Pages have checksums, for readers that look at them."""
    path = tmp_path / "rows.parquet"
    halves = pa.table({"vec": pa.array([[0.5] * 8], pa.list_(pa.float32(), 8))})
    with parquet.writer(path, halves.schema, {}) as writer:
        writer.write_table(halves)
    data = path.read_bytes()
    at = data.index(np.full(8, 0.5, np.float32).tobytes())
    path.write_bytes(data[:at] + b"\x01" + data[at + 1 :])

    with pytest.raises(OSError, match="CRC"):
        pq.read_table(path, page_checksum_verification=True)
