"""What is pending, which candidates it has, and when its digest changes: on a real Postgres."""

import hashlib
import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import T0, Database

from pipeline import export
from pipeline.database import connection as postgres
from pipeline.database.inputs import check_inputs
from pipeline.database.pending import Digest, has_any, prepare
from pipeline.database.waiting import CANDIDATES_SQL, NOBODY, LeftOut
from pipeline.stage import parquet
from pipeline.stage.errors import DatabaseError
from pipeline.stage.settings import Environment, Settings

LATER = "2026-01-01 12:00:00.000002+00"


class Source:
    """The queries of one identity on one database, and the export that uses them."""

    def __init__(self, database: Database, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.database = database
        self.folder = folder
        self.environ: dict[str, str] = {}
        self.caplog = caplog

    def query(self, name: str, waiting: LeftOut = NOBODY, **settings: Any) -> list[tuple[Any, ...]]:
        """The rows of one of the queries."""
        environment = Environment.read(self.environ)
        with (
            postgres.connect(read_only=True, repeatable=True) as connection,
            connection.cursor() as cursor,
        ):
            check_inputs(cursor, environment)
            chosen = Settings(**{"model_rev": "m", "source": "s", **settings})
            pending = prepare(cursor, environment, chosen, waiting)
            return postgres.fetch(cursor, getattr(pending, name))

    def listings(self, waiting: LeftOut = NOBODY, **settings: Any) -> list[tuple[int, int, str]]:
        """(generation, listing_id, seconds of edited_date) of what is pending."""
        rows = self.query("listings", waiting, **settings)
        return [(generation, listing, f"{edited:%S.%f}") for generation, listing, edited in rows]

    def candidates(self, **settings: Any) -> list[tuple[Any, ...]]:
        """(listing_id, image_index, storage_path, score, stock, screenshot)."""
        return [(row[1], *row[3:]) for row in self.query("candidates", **settings)]

    def digest(self, **settings: Any) -> tuple[Any, ...]:
        return self.query("digest", **settings)[0][:4]

    def rest(self, **settings: Any) -> int:
        return int(self.query("rest", **settings)[0][0])

    def export(self, **settings: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The rows of listings.parquet and images.parquet."""
        files = self.folder / "listings.parquet", self.folder / "images.parquet"
        chosen = Settings(
            **{"model_rev": "m", "source": "s", "cache_dir": str(self.folder / "cache"), **settings}
        )
        with self.caplog.at_level("INFO", "pipeline"):
            export.export(Environment.read(self.environ), chosen, {}, *files)
        listings, images = (pq.read_table(file).to_pylist() for file in files)
        return listings, images


@pytest.fixture
def pending(
    database: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Source:
    monkeypatch.setenv("PG_DSN", database.dsn)
    return Source(database, tmp_path, caplog)


def done(database: Database, listing: int, edited: str = T0, **key: str) -> None:
    """A row in the target, under the key s, m and an empty pca_rev unless said otherwise."""
    names = {"source": "s", "model_rev": "m", "pca_rev": "", **key}
    database.execute(
        "INSERT INTO ml.img_vec512_v1 SELECT $1, $2::text::timestamptz, $3, $4, $5,"
        " array_fill(1, ARRAY[512])::vector, 1",
        listing, edited, *names.values(),
    )  # fmt: skip


def test_an_empty_database_has_nothing_pending(pending: Source) -> None:
    """No rows at all: no listings, no candidates, a digest of zeros, two empty files."""
    assert [] == pending.listings()
    assert [] == pending.candidates()
    assert (0, 0, "0", "0") == pending.digest()
    assert ([], []) == pending.export()
    assert parquet.LISTINGS == pq.read_schema(pending.folder / "listings.parquet")
    assert parquet.CANDIDATES == pq.read_schema(pending.folder / "images.parquet")


def test_only_eligible_listings_are_pending(pending: Source) -> None:
    """Eligible: an edited_date, a url, no spam mark and at least one image row."""
    add = pending.database.add_listing
    add(1, ["1.jpg"])
    add(2, ["2.jpg"], edited_date=None)
    add(3, ["3.jpg"], url=None)
    add(4, ["4.jpg"], spam="spam")
    add(5, ["5.jpg"], spam="")
    add(6, [])
    add(7, ["7.jpg"], url="")

    assert [(1, 1, "00.000001"), (1, 7, "00.000001")] == pending.listings()
    assert [(1, 0, "1.jpg", 0, False, False), (7, 0, "7.jpg", 0, False, False)] == (
        pending.candidates()
    )


def test_the_log_says_what_was_left_out(pending: Source) -> None:
    """Each reason is counted."""
    pending.database.add_listing(1, ["1.jpg"], edited_date=None)
    pending.database.add_listing(2, ["2.jpg"], url=None)
    pending.database.add_listing(3, ["3.jpg"], spam="spam")
    pending.export()

    assert ["3 listing rows; left out: 1 spam, 1 no_edited_date, 1 no_url"] == (
        pending.caplog.messages
    )


def test_newest_first_up_to_the_limit(pending: Source) -> None:
    """The newest edits come first, then the lower id; the next run takes the rest."""
    for listing, edited in ((1, T0), (2, LATER), (3, T0), (4, LATER)):
        pending.database.add_listing(listing, ["x.jpg"], edited_date=edited)
    first = pending.listings(limit_listings=3)
    for _, listing, second in first:
        done(pending.database, listing, LATER if second == "00.000002" else T0)

    assert [(1, 2, "00.000002"), (1, 4, "00.000002"), (1, 1, "00.000001")] == first
    assert [(1, 3, "00.000001")] == pending.listings(limit_listings=3)


def test_a_listing_in_the_target_is_done(pending: Source) -> None:
    """Done is what has a row of this very key; a new edit is pending again; force takes all."""
    for listing in (1, 2, 3, 4, 5):
        pending.database.add_listing(listing, [f"{listing}.jpg"])
    done(pending.database, 1)
    done(pending.database, 2, source="other")
    done(pending.database, 3, model_rev="other")
    done(pending.database, 4, pca_rev="other")
    done(pending.database, 5, LATER)

    assert [2, 3, 4, 5] == [row[1] for row in pending.listings()]
    assert [1, 2, 3, 4, 5] == [row[1] for row in pending.listings(force=True)]
    assert [1, 2, 3, 5] == [row[1] for row in pending.listings(pca_rev="other")]
    pending.database.edit(1, "2026-01-01 12:00:00.000003+00")
    assert [(1, 1, "00.000003")] == pending.listings(limit_listings=1)


def test_the_rest_of_a_key_is_what_a_forced_run_would_not_replace(pending: Source) -> None:
    """Rows of the key whose listing and edit are not among the pending: by limit, edit or spam."""
    for listing in (1, 2, 3, 4):
        pending.database.add_listing(listing, ["x.jpg"])
        done(pending.database, listing)
    done(pending.database, 9, source="other")
    rest = [pending.rest(force=True)]
    rest.append(pending.rest(force=True, limit_listings=3))
    pending.database.edit(1, LATER)
    rest.append(pending.rest(force=True))
    pending.database.execute(
        "UPDATE \"iPhone\".iphone_listings SET spam = 's' WHERE listing_id < 3"
    )
    rest.append(pending.rest(force=True))

    assert [0, 1, 1, 2] == rest
    assert 1 == pending.rest(force=True, source="other")


def test_the_highest_generation_wins(pending: Source) -> None:
    """Two generations with one edited_date are one key: the highest wins, and the log says so."""
    pending.database.add_listing(1, ["old.jpg"], generation=1)
    pending.database.add_listing(1, ["new.jpg"], generation=3)
    pending.database.add_listing(1, ["spam.jpg"], generation=4, spam="spam")
    pending.database.add_listing(1, [], generation=5)
    pending.database.add_listing(2, ["2.jpg"], generation=1)
    listings, images = pending.export()

    assert [(3, 1), (1, 2)] == [(row["generation"], row["listing_id"]) for row in listings]
    assert ["new.jpg", "2.jpg"] == [row["storage_path"] for row in images]
    assert [
        "5 listing rows; left out: 1 spam, 1 no_images, 1 other_generation",
        "other_generation: of rows with one edited_date the highest generation wins",
    ] == pending.caplog.messages


def test_generations_with_dates_of_their_own_are_both_pending(pending: Source) -> None:
    """Another edited_date is another key, so nothing is superseded."""
    pending.database.add_listing(1, ["old.jpg"], generation=2)
    pending.database.add_listing(1, ["new.jpg"], generation=1, edited_date=LATER)
    pending.export()

    assert [(1, 1, "00.000002"), (2, 1, "00.000001")] == pending.listings()
    assert 1 == len(pending.caplog.messages)


def test_microseconds_survive(pending: Source) -> None:
    """edited_date reaches the file to the microsecond, as UTC, from any zone."""
    pending.database.add_listing(1, ["1.jpg"], edited_date="2026-07-01 01:30:00.123457+05:30")
    pending.database.add_listing(2, ["2.jpg"], edited_date="1969-12-31 23:59:59.999999+00")
    listings, images = pending.export()
    expected = [
        datetime(2026, 6, 30, 20, 0, 0, 123457, UTC),
        datetime(1969, 12, 31, 23, 59, 59, 999999, UTC),
    ]

    assert expected == [row["edited_date"] for row in listings]
    assert expected == [row["edited_date"] for row in images]


def test_a_timestamp_without_zone_is_utc(pending: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `timestamp` column is read as UTC, whatever zone the client or the server is set to."""
    monkeypatch.setenv("PGTZ", "Asia/Kolkata")
    monkeypatch.setenv("TZ", "America/New_York")
    pending.database.execute(
        'ALTER TABLE "iPhone".iphone_listings ALTER COLUMN edited_date TYPE timestamp'
    )
    pending.database.execute(
        'INSERT INTO "iPhone".iphone_listings VALUES (1, 1, $1::text::timestamp, $2)',
        "2026-01-01 12:00:00.000001", "url",
    )  # fmt: skip
    pending.database.add_image(1, 0, "1.jpg")
    listings, _ = pending.export()
    done(pending.database, 1, T0)

    assert [datetime(2026, 1, 1, 12, 0, 0, 1, UTC)] == [row["edited_date"] for row in listings]
    assert [] == pending.listings()


def test_infinity_is_refused(pending: Source) -> None:
    """An infinite edited_date, or one beyond year 9999, is refused, counted and logged."""
    pending.database.add_listing(1, ["1.jpg"], edited_date="infinity")
    pending.database.add_listing(2, ["2.jpg"], edited_date="-infinity")
    pending.database.add_listing(3, ["3.jpg"], edited_date="10000-01-01 00:00:00+00")
    pending.database.add_listing(4, ["4.jpg"], edited_date="0044-03-15 12:00:00+00 BC")
    pending.database.add_listing(5, ["5.jpg"], edited_date="9999-12-31 23:59:59.999999+00")
    pending.database.add_listing(6, ["6.jpg"], edited_date="0001-01-01 00:00:00+00")
    listings, _ = pending.export()

    assert [5, 6] == [row["listing_id"] for row in listings]
    assert [
        "6 listing rows; left out: 4 bad_date",
        "bad_date: edited_date is infinite or outside of the years 1 to 9999; refused",
    ] == pending.caplog.messages


def test_the_score(pending: Source) -> None:
    """score = 10 * photo_quality_level + 3 * background_clean_level, nulls as 0."""
    pending.database.add_listing(1, ["a", "b", "c", "d", "e"])
    add = pending.database.add_features
    add(1, 0, quality=4, background=3)
    add(1, 1, quality=None, background=2)
    add(1, 2, quality=1, background=None)
    add(1, 3, quality=None, background=None, stock=None, screenshot=None)

    assert [
        (1, 0, "a", 49, False, False),
        (1, 1, "b", 6, False, False),
        (1, 2, "c", 10, False, False),
        (1, 3, "d", 0, False, False),
        (1, 4, "e", 0, False, False),
    ] == pending.candidates()


def test_features_join_on_their_whole_key(pending: Source) -> None:
    """Features of another version, generation, listing or index say nothing."""
    pending.database.add_listing(1, ["a"])
    add = pending.database.add_features
    add(1, 0, version=2, quality=1, stock=True)
    add(1, 0, generation=2, quality=2, stock=True)
    add(2, 0, quality=3, stock=True)
    add(1, 1, quality=4, stock=True)
    first = pending.candidates()
    pending.environ["IMAGE_FEATURE_VERSION"] = "2"

    assert [(1, 0, "a", 0, False, False)] == first
    assert [(1, 0, "a", 10, True, False)] == pending.candidates()


def test_duplicate_feature_rows_make_one_candidate(pending: Source) -> None:
    """Of several rows for one image any flag and the best level count; images never multiply."""
    pending.database.add_listing(1, ["a", "b"])
    pending.database.add_features(1, 0, quality=1, background=3, stock=True)
    pending.database.add_features(1, 0, quality=4, background=0, screenshot=True)
    pending.database.add_features(1, 0, quality=4, background=0, screenshot=True)

    assert [(1, 0, "a", 49, True, True), (1, 1, "b", 0, False, False)] == pending.candidates()


@pytest.mark.parametrize("features", [True, False])
def test_duplicate_image_rows_make_one_candidate(pending: Source, features: bool) -> None:
    """Exact duplicates collapse; two paths under one index are two candidates."""
    execute = pending.database.execute
    execute('ALTER TABLE "iPhone".iphone_image_assets DROP CONSTRAINT iphone_image_assets_pkey')
    if not features:
        execute("DROP TABLE ml.iphone_image_features_v1")
    pending.database.add_listing(1, ["a", None])
    pending.database.add_image(1, 0, "a")
    pending.database.add_image(1, 0, "b")
    pending.database.add_image(1, 1, None)

    assert [(1, 0, "a"), (1, 0, "b"), (1, 1, None)] == [row[:3] for row in pending.candidates()]


def test_the_features_table_is_optional(pending: Source) -> None:
    """Without it no image is a stock photo or a screenshot and all levels are 0."""
    pending.database.add_listing(1, ["a"])
    pending.database.execute("DROP TABLE ml.iphone_image_features_v1")

    assert [(1, 0, "a", 0, False, False)] == pending.candidates()
    assert 1 == len(pending.export()[1])


def test_a_missing_path_stays_a_candidate(pending: Source) -> None:
    """A null storage_path is that image's error later on; a null image_index is no image."""
    execute = pending.database.execute
    execute('ALTER TABLE "iPhone".iphone_image_assets DROP CONSTRAINT iphone_image_assets_pkey')
    execute('ALTER TABLE "iPhone".iphone_image_assets ALTER COLUMN image_index DROP NOT NULL')
    pending.database.add_listing(1, [None])
    pending.database.add_listing(2)
    execute('INSERT INTO "iPhone".iphone_image_assets VALUES (1, 2, NULL, $1)', "x")

    assert [(1, 0, None, 0, False, False)] == pending.candidates()
    assert [1] == [row[1] for row in pending.listings()]


def test_other_names_and_views(pending: Source) -> None:
    """Inputs may be views, of other column types, under other schema and table names."""
    pending.database.add_listing(1, ["a"])
    for statement in (
        'CREATE SCHEMA "Market"',
        'CREATE VIEW "Market"."Ads" AS SELECT generation::smallint, listing_id::int,'
        " edited_date AT TIME ZONE 'UTC' AS edited_date, url::varchar, spam::varchar"
        ' FROM "iPhone".iphone_listings',
        "CREATE SCHEMA assets",
        'CREATE VIEW assets."Photos" AS SELECT generation::bigint, listing_id::int,'
        ' image_index::smallint, storage_path::varchar FROM "iPhone".iphone_image_assets',
        "CREATE SCHEMA vision",
        "CREATE VIEW vision.flags AS SELECT 1 AS feature_version, 1 AS generation,"
        " 1 AS listing_id, 0 AS image_index, true AS is_stock_photo, false AS battery_screenshot,"
        " 2::int AS photo_quality_level, 1::int AS background_clean_level",
        "ALTER TABLE ml.img_vec512_v1 SET SCHEMA vision",
        "ALTER TABLE vision.img_vec512_v1 RENAME TO vectors",
    ):
        pending.database.execute(statement)
    pending.environ.update(
        LISTINGS_SCHEMA="Market", LISTINGS_TABLE="Ads", ASSETS_SCHEMA="assets",
        ASSETS_TABLE="Photos", ML_SCHEMA="vision", IMAGE_FEATURES_TABLE="flags",
        VECTORS_TABLE="vectors",
    )  # fmt: skip

    assert [(1, 0, "a", 23, True, False)] == pending.candidates()
    assert [(1, 1, "00.000001")] == pending.listings()
    assert parquet.CANDIDATES.names == list(pending.export()[1][0])


def who_waits(*listings: int, looked_at: bool = True, **columns: Any) -> LeftOut:
    """Listings that wait, tried with one candidate each: the listing's id and ".jpg"."""
    rows = [
        {"generation": 1, "listing_id": i, "edited_date": datetime.fromisoformat(T0),
         "candidates": _md5(f"0|{i}.jpg|0|0|0"), "reason": "missing", **columns}
        for i in listings
    ]  # fmt: skip
    schema = NOBODY.looked_at.schema
    found, nobody = pa.Table.from_pylist(rows, schema), NOBODY.looked_at
    return LeftOut.of(found, nobody, nobody) if looked_at else LeftOut.of(nobody, found, nobody)


@pytest.mark.parametrize("looked_at", [True, False])
def test_waiting_listings_take_no_place(pending: Source, looked_at: bool) -> None:
    """A listing that waits is not pending and fills no place under the limit; force takes it."""
    for listing in (1, 2, 3):
        pending.database.add_listing(listing, [f"{listing}.jpg"])
    waiting = who_waits(1, 3, looked_at=looked_at)

    assert [2] == [row[1] for row in pending.listings(waiting, limit_listings=1)]
    assert [1, 2, 3] == [row[1] for row in pending.listings(waiting, force=True)]


@pytest.mark.parametrize("looked_at", [True, False])
@pytest.mark.parametrize(
    "edited",
    ["0001-01-01 00:00:00+00", "1969-12-31 23:59:59.999999+00", "9999-12-31 23:59:59.999999+00"],
)
def test_who_waits_is_known_to_the_microsecond(
    pending: Source, edited: str, looked_at: bool
) -> None:
    """Only this edit waits, whenever it was; one a microsecond from it is pending."""
    moment = datetime.fromisoformat(edited)
    near = moment + timedelta(microseconds=1 if moment.year < 9000 else -1)
    pending.database.add_listing(1, ["1.jpg"], edited_date=edited)
    waiting = who_waits(1, looked_at=looked_at, edited_date=moment)
    other = who_waits(1, looked_at=looked_at, edited_date=near)

    assert [] == pending.listings(waiting)
    assert [1] == [row[1] for row in pending.listings(other)]


@pytest.mark.parametrize("looked_at", [True, False])
def test_another_generation_does_not_wait(pending: Source, looked_at: bool) -> None:
    """A row of a higher generation under the same date is new; a lower one never comes up."""
    pending.database.add_listing(1, ["1.jpg"])
    pending.database.add_listing(1, ["1.jpg"], generation=2)

    assert [2] == [row[0] for row in pending.listings(who_waits(1, looked_at=looked_at))]
    assert [] == pending.listings(who_waits(1, looked_at=looked_at, generation=2))


def test_rows_beyond_what_is_looked_at_wait_on(pending: Source) -> None:
    """Of a listing outside of the window no row is compared: it waits until its turn comes."""
    pending.database.add_listing(1, ["1.jpg"])
    pending.database.add_image(1, 1, "new.jpg")

    assert [] == pending.listings(who_waits(1, looked_at=False))
    assert [1] == [row[1] for row in pending.listings(who_waits(1))]


def test_postgres_and_duckdb_give_candidates_one_hash(pending: Source) -> None:
    """Whatever paths, levels and flags a listing has, what it was tried with is known again."""
    paths = ["B.jpg", "a.jpg", "ä|b\n.jpg", None, "a.jpg", "", "'quoted'"]
    pending.database.add_listing(1, paths)
    pending.database.add_features(1, 1, stock=True, quality=3)
    pending.database.add_features(1, 2, screenshot=True, background=1)
    _, images = pending.export()
    with duckdb.connect() as con:
        con.register("images", pa.Table.from_pylist(images, parquet.CANDIDATES))
        (tried,) = con.execute(f"SELECT {CANDIDATES_SQL} FROM images").fetchall()[0]

    assert [] == pending.listings(who_waits(1, candidates=tried))


@pytest.mark.parametrize(
    "change",
    [
        lambda database: database.add_image(1, 1, "new.jpg"),
        lambda database: database.add_features(1, 0, quality=1),
        lambda database: database.add_features(1, 0, stock=True),
        lambda database: database.edit(1, LATER),
        lambda database: database.execute(
            "UPDATE \"iPhone\".iphone_image_assets SET storage_path = 'b.jpg'"
        ),
    ],
    ids=["image", "level", "flag", "edit", "path"],
)
def test_a_changed_row_ends_the_wait(pending: Source, change: Callable[[Database], object]) -> None:
    """A listing that waits is pending again when one of its rows is new or changed."""
    pending.database.add_listing(1, ["1.jpg"])
    waiting = who_waits(1)
    before = pending.listings(waiting)
    change(pending.database)

    assert [] == before
    assert [1] == [row[1] for row in pending.listings(waiting)]


@pytest.mark.parametrize(
    "change",
    [
        lambda database: database.add_listing(2, ["2.jpg"]),
        lambda database: database.edit(1, LATER),
        lambda database: database.add_image(1, 1, "new.jpg"),
        lambda database: database.add_features(1, 0, quality=1),
        lambda database: database.add_features(1, 0, screenshot=True),
        lambda database: database.execute('DELETE FROM "iPhone".iphone_image_assets'),
        lambda database: done(database, 1),
    ],
    ids=["listing", "edit", "image", "level", "flag", "deleted", "done"],
)
def test_the_digest_changes_with_what_is_pending(
    pending: Source, change: Callable[[Database], object]
) -> None:
    """Any change of a pending listing or of its candidates is another digest."""
    pending.database.add_listing(1, ["a.jpg"])
    before = pending.digest()
    again = pending.digest()
    change(pending.database)

    assert before == again
    assert (1, 1) == before[:2]
    assert before != pending.digest()


def figures(pending: Source, waiting: LeftOut = NOBODY, **settings: Any) -> dict[str, int]:
    """The digest without its sums; zeros left out."""
    found = Digest(*pending.query("digest", waiting, **settings)[0])._asdict()
    return {name: n for name, n in found.items() if n and not name.endswith("_sum")}


def test_the_digest_says_how_much_is_pending_and_why(pending: Source) -> None:
    """Photos as select takes them, and who waited, was edited or is forced; the others are new."""
    add, features = pending.database.add_listing, pending.database.add_features
    add(1, ["a", "b", "c"])
    features(1, 0, stock=True)
    add(2, ["d", "e"])
    features(2, 0, screenshot=True)
    features(2, 1, stock=True)  # nothing else: its first ones count
    done(pending.database, 2, LATER)
    add(3, ["f"])
    add(4, ["g"])
    done(pending.database, 4)
    nobody = NOBODY.looked_at
    changed = LeftOut.of(nobody, nobody, who_waits(3).looked_at)

    assert {
        "listings": 3, "images": 6, "photos": 5, "due": 3, "changed": 1, "edited": 1,
    } == figures(pending, changed, topk=2)  # fmt: skip
    assert {"listings": 3, "images": 6, "photos": 5, "due": 3, "edited": 1} == (
        figures(pending, exclude_stock=False)
    )
    assert 4 == figures(pending, exclude_screenshots=False)["photos"]
    assert {
        "listings": 3, "images": 6, "photos": 5, "due": 4, "edited": 1,
    } == figures(pending, changed, force=True, limit_listings=3)  # fmt: skip
    assert {"listings": 4, "images": 7, "photos": 6, "due": 4, "edited": 1, "forced": 1} == (
        figures(pending, force=True)
    )


def test_each_listing_stands_in_one_place(pending: Source) -> None:
    """Of the eligible: with a vector or not; and who waits, by reason, unless it is done."""
    for listing in range(1, 7):
        pending.database.add_listing(listing, [f"{listing}.jpg"])
    pending.database.add_listing(7, ["7.jpg"], spam="spam")
    done(pending.database, 1)
    done(pending.database, 2)
    seen = who_waits(2, 3, 4).looked_at
    unseen = who_waits(5, reason="broken", looked_at=False).unseen
    waiting = LeftOut.of(seen, unseen.append_column("candidates", [[""]]), NOBODY.looked_at)

    assert [("broken", 1), ("missing", 2), ("unfinished", 4)] == (
        sorted(pending.query("standing", waiting))
    )
    assert [("unfinished", 4)] == pending.query("standing")
    assert [("unfinished", 4)] == pending.query("standing", waiting, force=True)
    assert {(None, 6, 6), ("spam", 1, 1)} == set(pending.query("judged"))


@pytest.mark.parametrize("batch_bytes", [1, 100, 200, 8 * 2**20])
def test_a_listing_that_lies_in_two_batches_is_exported_once(
    pending: Source, monkeypatch: pytest.MonkeyPatch, batch_bytes: int
) -> None:
    """Both files hold the pending listings, each once and in one order, however they arrive."""
    for listing in (1, 2, 3, 4):
        pending.database.add_listing(listing, [f"{listing}/{k}.jpg" for k in range(listing)])
    pending.database.add_listing(3, ["again.jpg"], generation=2, edited_date=LATER)
    monkeypatch.setattr(export, "BATCH_BYTES", batch_bytes)

    listings, images = pending.export()

    expected = [3, 1, 2, 3, 4]
    assert expected == [row["listing_id"] for row in listings]
    assert [key for key, _ in itertools.groupby(row["listing_id"] for row in images)] == expected
    assert [row[:2] for row in pending.listings()] == (
        [(row["generation"], row["listing_id"]) for row in listings]
    )
    assert 11 == len(images)


def test_what_is_due_knows_no_limit(pending: Source) -> None:
    """It is all that is pending, and nobody who waits."""
    for listing in (1, 2, 3):
        pending.database.add_listing(listing, [f"{listing}.jpg"])

    assert {2, 3} == {row[1] for row in pending.query("due", who_waits(1), limit_listings=1)}


def test_a_sample_is_of_whole_listings(pending: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many of the pending as SAMPLE says, with all of their candidates."""
    monkeypatch.setattr("pipeline.database.pending.SAMPLE", 2)
    for listing in (1, 2, 3):
        pending.database.add_listing(listing, [f"{listing}/0.jpg", f"{listing}/1.jpg"])
    everything, found = pending.query("candidates"), pending.query("sample")
    sampled = {row[1] for row in found}

    assert 2 == len(sampled)
    assert [row for row in everything if row[1] in sampled] == found


def test_witnesses_are_listings_that_had_photos(pending: Source) -> None:
    """The newest that have a vector, under whatever key: their best photos that have a path."""
    add = pending.database.add_listing
    add(1, ["1/0.jpg", None, "1/2.jpg", *[f"1/{i}.jpg" for i in range(3, 7)]])
    pending.database.add_features(1, 6, quality=4)
    add(2, ["2/0.jpg"])
    add(3, ["3/0.jpg"], edited_date=LATER)
    add(4, ["4/0.jpg"], spam="spam")
    done(pending.database, 1, source="other")
    done(pending.database, 3, LATER)
    done(pending.database, 4)

    assert [["3/0.jpg"], ["1/6.jpg", "1/0.jpg", "1/2.jpg", "1/3.jpg", "1/4.jpg"]] == (
        [paths for *_, paths in pending.query("witnesses")]
    )


def test_an_export_is_of_this_database_if_one_of_its_listings_is(pending: Source) -> None:
    """By id and edit, to the microsecond."""
    pending.database.add_listing(1, ["1.jpg"])
    there, later = datetime.fromisoformat(T0), datetime.fromisoformat(LATER)
    environment = Environment.read({})
    with postgres.connect() as connection, connection.cursor() as cursor:
        found = [
            has_any(cursor, environment, listings)
            for listings in ([(1, there)], [(2, there), (1, there)], [(1, later)], [(2, there)], [])
        ]

    assert [True, True, False, False, False] == found


def test_the_queries_wait_for_no_lock_longer_than_they_may(pending: Source) -> None:
    """From here to the end of the transaction."""
    chosen = Settings(model_rev="m", source="s", lock_timeout_s=7)
    shown = "SELECT current_setting('lock_timeout')"
    with postgres.connect() as connection, connection.cursor() as cursor:
        prepare(cursor, Environment.read({}), chosen)
        inside = postgres.fetch(cursor, shown)
        connection.rollback()

        assert [("7s",)] == inside
        assert [("7s",)] != postgres.fetch(cursor, shown)


def test_the_digest_ignores_what_makes_no_difference(pending: Source) -> None:
    """Other columns, spam, finished listings and unused features leave the digest alone."""
    pending.database.add_listing(1, ["a.jpg"])
    pending.database.add_listing(2, ["b.jpg"])
    done(pending.database, 2)
    before = pending.digest()
    pending.database.add_listing(3, ["c.jpg"], spam="spam")
    pending.database.add_image(2, 1, "new.jpg")
    pending.database.add_features(1, 0)
    pending.database.add_features(1, 7, quality=4)
    pending.database.execute(
        'UPDATE "iPhone".iphone_listings SET url = $1 WHERE listing_id = 1', "https://x"
    )

    assert before == pending.digest()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            'DROP TABLE "iPhone".iphone_listings',
            'expected the listings table "iPhone"."iphone_listings", found no such table or view;'
            " hint: set LISTINGS_SCHEMA and LISTINGS_TABLE,"
            " or python -m pipeline create-table --all for a trial",
        ),
        (
            'ALTER TABLE "iPhone".iphone_image_assets DROP COLUMN storage_path',
            "expected column storage_path in the images table, found columns generation,"
            ' image_index, listing_id ("iPhone"."iphone_image_assets"); hint: a view with'
            " your_column AS storage_path will do; docs/adopting.md has it in full",
        ),
        (
            "ALTER TABLE ml.iphone_image_features_v1 DROP COLUMN is_stock_photo,"
            " DROP COLUMN photo_quality_level",
            "expected column is_stock_photo, photo_quality_level in the features table, found"
            " columns background_clean_level, battery_screenshot, feature_version, generation,"
            ' image_index, listing_id ("ml"."iphone_image_features_v1"); hint: a view with'
            " NULL::bool AS is_stock_photo, NULL::smallint AS photo_quality_level will do;"
            " docs/adopting.md has it in full",
        ),
    ],
    ids=["table", "column", "features"],
)
def test_missing_inputs_are_named(pending: Source, break_it: str, message: str) -> None:
    """A missing table or column is one line: what was expected, what was found, a hint."""
    pending.database.execute(break_it)

    with pytest.raises(DatabaseError) as error:
        pending.listings()
    assert message == str(error.value)


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
