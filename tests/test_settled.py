"""Days of which nothing is told, since those who wait there are as they were."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest
from conftest import Database

from pipeline.database.census import Standing, take
from pipeline.database.connection import connect, fetch
from pipeline.database.pending import prepare
from pipeline.database.waiting import LEDGER, LeftOut
from pipeline.stage.settings import Environment, Settings

FIRST = datetime(1969, 12, 28, 12, tzinfo=UTC)  # before 1970 microseconds are negative
DAYS = 4
LISTINGS = range(1, 1 + 2 * DAYS)  # two a day


def edited(listing: int) -> datetime:
    return FIRST + timedelta(days=(listing - 1) // 2, microseconds=listing)


@pytest.fixture
def market(database: Database, monkeypatch: pytest.MonkeyPatch) -> Database:
    monkeypatch.setenv("PG_DSN", database.dsn)
    for listing in LISTINGS:
        database.add_listing(listing, [f"{listing}.jpg"], edited_date=edited(listing).isoformat())
    return database


def ledger(listings: Sequence[int]) -> pa.Table:
    """Rows of these; their candidates have changed since."""
    rows: list[dict[str, Any]] = [
        {"generation": 1, "listing_id": n, "edited_date": edited(n), "limits": "", "files": [],
         "candidates": "others", "reason": "broken" if n == 1 else "missing"}
        for n in reversed(listings)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, LEDGER)


def asked(
    unseen: Sequence[int] = LISTINGS, looked_at: Sequence[int] = ()
) -> tuple[list[int], list[int], Standing]:
    """Who is pending, whose keys of the unseen went to Postgres, and where all stand."""
    waiting = LeftOut.of(ledger(looked_at), ledger(unseen), ledger([]))
    chosen = Settings(source="s", model_rev="m")
    with connect(read_only=True, repeatable=True) as connection, connection.cursor() as cursor:
        pending = prepare(cursor, Environment.read({}), chosen, waiting)
        told = fetch(
            cursor, "SELECT current_setting('listing_vectors.unseen_listing_id')::bigint[]"
        )
        listings = [row[1] for row in fetch(cursor, pending.listings)]
        return listings, told[0][0], take(cursor, pending).standing


def test_nothing_is_told_of_days_that_are_as_they_were(market: Database) -> None:
    """All wait, and the database needs the key of none to know; each is counted by its reason."""
    pending, told, standing = asked()

    assert [] == pending == told
    assert Standing(8, 0, {"missing": 7, "broken": 1}) == standing


def test_whose_files_were_looked_at_is_told(market: Database) -> None:
    """A day is settled by those alone of whom no file was looked at, though that be one or none."""
    market.execute('DELETE FROM "iPhone".iphone_listings WHERE listing_id > 3')

    assert ([3, 2, 1], [], Standing(3, 0, {})) == asked([], looked_at=[1, 2, 3])
    assert ([2, 1], [], Standing(3, 0, {"missing": 1})) == asked([3], looked_at=[1, 2])


CHANGES: dict[str, tuple[str, list[int], list[int], Standing]] = {
    "a listing is new": (
        "INSERT INTO {listings} VALUES (1, 9, '1969-12-30 23:59:59.999999+00', 'u', NULL);"
        "INSERT INTO {images} VALUES (1, 9, 0, '9.jpg')",
        [9], [5, 6], Standing(9, 0, {"missing": 7, "broken": 1}),
    ),
    "a listing is edited a microsecond later": (
        "UPDATE {listings} SET edited_date = edited_date + interval '1 us' WHERE listing_id = 3",
        [3], [3, 4], Standing(8, 0, {"missing": 6, "broken": 1}),
    ),
    "two listings change their dates": (
        "UPDATE {listings} l SET edited_date = o.edited_date FROM {listings} o"
        " WHERE l.listing_id = 7 - o.listing_id AND l.listing_id IN (3, 4)",
        [3, 4], [3, 4], Standing(8, 0, {"missing": 5, "broken": 1}),
    ),
    "a listing is of a later generation": (
        "INSERT INTO {listings} SELECT 2, listing_id, edited_date, url FROM {listings}"
        " WHERE listing_id = 8; INSERT INTO {images} VALUES (2, 8, 0, '8.jpg')",
        [8], [7, 8], Standing(8, 0, {"missing": 6, "broken": 1}),
    ),
    "a listing is deleted": (
        "DELETE FROM {listings} WHERE listing_id = 1",
        [], [1, 2], Standing(7, 0, {"missing": 7}),
    ),
    "a listing has a vector": (
        "INSERT INTO {vectors} SELECT listing_id, edited_date, 's', 'm', '',"
        " array_fill(1, ARRAY[512])::vector, 1 FROM {listings} WHERE listing_id = 2",
        [], [1, 2], Standing(8, 1, {"missing": 6, "broken": 1}),
    ),
    "a listing has no date that can be": (
        "INSERT INTO {listings} VALUES (1, 9, 'infinity', 'u', NULL);"
        "INSERT INTO {images} VALUES (1, 9, 0, '9.jpg')",
        [], [], Standing(8, 0, {"missing": 7, "broken": 1}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_day_that_changed_is_told_listing_by_listing(market: Database, change: str) -> None:
    """Whatever became of one listing, the others of its day still wait, and it is what it is."""
    statements, *expected = CHANGES[change]
    tables = {
        "listings": '"iPhone".iphone_listings', "images": '"iPhone".iphone_image_assets',
        "vectors": "ml.img_vec512_v1",
    }  # fmt: skip
    for statement in statements.format(**tables).split(";"):
        market.execute(statement)
    pending, told, standing = asked()

    assert expected == [sorted(pending), sorted(told), standing]
