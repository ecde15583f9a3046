"""What the database holds to embed: pending listings and their scored image candidates.

The SQL names tables only; every value reaches it through `bind`.
"""

import json
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from adbc_driver_manager.dbapi import Cursor

from pipeline.database.catalog import has_table
from pipeline.database.connection import bind, fetch, quoted, set_lock_timeout, sort_in_memory
from pipeline.database.key import HALF_OF_KEY, OF_KEY, rest_sql
from pipeline.database.settled import NOT_SETTLED, settle
from pipeline.database.waiting import CANDIDATES_SQL, NOBODY, LeftOut
from pipeline.stage.settings import Environment, Settings

# The dates that Arrow, Python and DuckDB can all hold; 'infinity' is outside.
_FIRST, _LAST = "0001-01-01 00:00:00+00", "9999-12-31 23:59:59.999999+00"

WITNESSES = 100  # listings by whose photos a wrong image root is known
WITNESS_PHOTOS = 5  # of each

SAMPLE = 2000  # listings by which the cache is asked what a run would find there

# What an eligible row `l` of the listings table is, by the name of why another is left out. The
# first that a row fails is its reason.
RULES = {
    "spam": "l.spam IS NULL",
    "no_edited_date": "l.edited_date IS NOT NULL",
    "no_url": "l.url IS NOT NULL",
    "no_generation": "l.generation IS NOT NULL",
    "bad_date": f"l.edited_date::timestamptz BETWEEN '{_FIRST}' AND '{_LAST}'",
    "no_images": """EXISTS (SELECT FROM {images} i WHERE i.generation = l.generation
        AND i.listing_id = l.listing_id AND i.image_index IS NOT NULL)""",
}
OTHER_GENERATION = "other_generation"  # eligible, but of one edit the highest generation wins

_IS_ELIGIBLE = " AND ".join(RULES.values())
_REASONS = " ".join(f"WHEN NOT {rule} THEN '{reason}'" for reason, rule in RULES.items())

# Why each row is left out, NULL where it is not; more than one may be left of an edit.
JUDGED = f"""
    SELECT l.generation, l.listing_id, l.edited_date::timestamptz AS edited_date, l.url, l.spam,
           CASE {_REASONS} END AS left_out
    FROM {{listings}} l"""

# The rows of each reason, and how many edits they are.
_COUNTED = """
    SELECT left_out, sum(rows)::bigint, count(*) FROM (
        SELECT left_out, count(*) AS rows
        FROM ({judged}) j GROUP BY left_out, edited_date, listing_id) edits
    GROUP BY 1"""

_ELIGIBLE = f"""
    SELECT DISTINCT ON (l.edited_date::timestamptz, l.listing_id)
           l.generation::int AS generation, l.listing_id::bigint AS listing_id,
           l.edited_date::timestamptz AS edited_date
    FROM {{listings}} l
    WHERE {_IS_ELIGIBLE}
      {{not_done}}
    ORDER BY l.edited_date::timestamptz DESC, l.listing_id, l.generation DESC"""

_NOT_DONE = f"""
    AND NOT EXISTS (SELECT FROM {{vectors}} v
        WHERE v.listing_id = l.listing_id AND v.edited_date = l.edited_date::timestamptz
          AND {HALF_OF_KEY})
    {{not_settled}}"""

# Microseconds since 1970, exact; a double, which to_timestamp() takes, would not be.
_EDITED = """timestamptz 'epoch' + make_interval(days => (microseconds / 86400000000)::int)
        + (microseconds % 86400000000) * interval '1 microsecond'"""


def _bound(table: str, **columns: str) -> str:
    """The rows that were bound as one array a column, given with its type."""
    arrays = ", ".join(
        f"current_setting('listing_vectors.{table}_{column}')::{kind}[]"
        for column, kind in columns.items()
    )
    return f"unnest({arrays}) AS w({', '.join(columns)})"


_KEYS = {"generation": "int", "listing_id": "bigint", "microseconds": "bigint"}
_KEY = f"generation, listing_id, {_EDITED} AS edited_date"

# Listings whose files were missing or broken, and still are; see pipeline/database/waiting.py.
# `changed` were, and are so no longer.
# Set operations hash or sort: with joins, a wrong estimate means to compare each with each.
_WAITING = f"""
    looked_at AS MATERIALIZED (
        SELECT {_KEY}, candidates FROM {_bound("looked_at", **_KEYS, candidates="text")}),
    unchanged AS MATERIALIZED (
        SELECT generation, listing_id, edited_date, {CANDIDATES_SQL} AS candidates
        FROM ({{candidates_of_waiting}}) c GROUP BY generation, listing_id, edited_date),
    waiting AS MATERIALIZED (
        SELECT {_KEY} FROM {_bound("unseen", **_KEYS)}
        UNION ALL
        SELECT generation, listing_id, edited_date
        FROM (TABLE looked_at INTERSECT TABLE unchanged) same),
    changed AS MATERIALIZED (
        SELECT {_KEY} FROM {_bound("changed", **_KEYS)}
        UNION ALL
        (SELECT generation, listing_id, edited_date FROM looked_at EXCEPT TABLE waiting)),"""

_NOBODY_WAITS = """
    waiting AS (SELECT 0 AS generation, 0::bigint AS listing_id, now() AS edited_date LIMIT 0),
    changed AS (TABLE waiting),"""

_NEWEST = "ORDER BY edited_date DESC, listing_id"

# What is pending, in figures; those that waited are told apart before those that were edited.
_DIGEST = f"""
    due AS MATERIALIZED ({{due}}),
    pending AS MATERIALIZED (SELECT * FROM due {_NEWEST} LIMIT {{limit}}),
    of_listings AS (
        SELECT count(*) AS images, sum(hashtextextended(c::text, 0)) AS hash,
               count(*) FILTER (WHERE NOT (
                   (is_stock_photo AND current_setting('listing_vectors.exclude_stock')::bool) OR
                   (battery_screenshot
                    AND current_setting('listing_vectors.exclude_screenshots')::bool))) AS kept
        FROM ({{candidates}}) c GROUP BY generation, listing_id, edited_date),
    of_images AS (
        SELECT coalesce(sum(images), 0)::bigint AS images, coalesce(sum(hash), 0)::text AS hash,
               coalesce(sum(least(CASE kept WHEN 0 THEN images ELSE kept END,
                   current_setting('listing_vectors.topk')::bigint)), 0)::bigint AS photos
        FROM of_listings),
    known AS (
        SELECT EXISTS (SELECT FROM {{vectors}} v
                   WHERE v.listing_id = p.listing_id AND {OF_KEY}) AS listing,
               EXISTS (SELECT FROM {{vectors}} v WHERE v.listing_id = p.listing_id
                   AND v.edited_date = p.edited_date AND {OF_KEY}) AS edit
        FROM (TABLE pending EXCEPT TABLE changed) p)
    SELECT (SELECT count(*) FROM pending), images,
           (SELECT coalesce(sum(hashtextextended(p::text, 0)), 0) FROM pending p)::text, hash,
           photos, (SELECT count(*) FROM due),
           (SELECT count(*) FROM (TABLE pending INTERSECT TABLE changed) again),
           (SELECT count(*) FROM known WHERE edit),
           (SELECT count(*) FROM known WHERE listing AND NOT edit)
    FROM of_images"""

_STANDING = f"""
    unfinished AS MATERIALIZED ({_ELIGIBLE.replace("{not_done}", _NOT_DONE)})
    SELECT 'unfinished', count(*) FROM unfinished"""

_WAITING_BY_REASON = f"""
    UNION ALL SELECT * FROM (
        WITH reasons AS MATERIALIZED (
            SELECT {_KEY}, reason FROM {_bound("looked_at", **_KEYS, reason="text")}
            UNION ALL SELECT {_KEY}, reason FROM {_bound("unseen", **_KEYS, reason="text")})
        SELECT reason, (SELECT count(*) FROM (
            TABLE unfinished INTERSECT TABLE waiting
            INTERSECT SELECT generation, listing_id, edited_date FROM reasons r
                      WHERE r.reason = named.reason) w)
        FROM (SELECT DISTINCT reason FROM reasons) named) by_reason"""

# Listings that had photos once, for they have a vector, be it under another key.
_WITNESSES = f"""
    WITH witnesses AS MATERIALIZED (
        SELECT l.generation::int AS generation, l.listing_id::bigint AS listing_id,
               l.edited_date::timestamptz AS edited_date
        FROM {{listings}} l
        WHERE {_IS_ELIGIBLE}
          AND EXISTS (SELECT FROM {{vectors}} v WHERE v.listing_id = l.listing_id
                      AND v.edited_date = l.edited_date::timestamptz)
        ORDER BY l.edited_date::timestamptz DESC, l.listing_id, l.generation DESC
        LIMIT {WITNESSES})
    SELECT edited_date, listing_id, generation,
           (array_agg(storage_path ORDER BY score DESC, image_index))[:{WITNESS_PHOTOS}]
    FROM ({{candidates_of_witnesses}}) c WHERE storage_path IS NOT NULL
    GROUP BY edited_date, listing_id, generation
    ORDER BY edited_date DESC, listing_id, generation"""

_NO_FEATURES = """
    SELECT p.generation, p.listing_id, p.edited_date, i.image_index::int AS image_index,
           i.storage_path::text AS storage_path, 0 AS score,
           false AS is_stock_photo, false AS battery_screenshot
    FROM {relation} p
    JOIN {images} i ON i.generation = p.generation AND i.listing_id = p.listing_id
    WHERE i.image_index IS NOT NULL
    GROUP BY 1, 2, 3, 4, 5"""

# Grouping by the image makes one candidate of duplicate feature rows: any flag, the best level.
_WITH_FEATURES = """
    SELECT p.generation, p.listing_id, p.edited_date, i.image_index::int AS image_index,
           i.storage_path::text AS storage_path,
           (10 * coalesce(max(f.photo_quality_level), 0)
            + 3 * coalesce(max(f.background_clean_level), 0))::int AS score,
           coalesce(bool_or(f.is_stock_photo), false) AS is_stock_photo,
           coalesce(bool_or(f.battery_screenshot), false) AS battery_screenshot
    FROM {relation} p
    JOIN {images} i ON i.generation = p.generation AND i.listing_id = p.listing_id
    LEFT JOIN {features} f
      ON f.feature_version = current_setting('listing_vectors.feature_version')::int
     AND f.generation = i.generation AND f.listing_id = i.listing_id
     AND f.image_index = i.image_index
    WHERE i.image_index IS NOT NULL
    GROUP BY 1, 2, 3, 4, 5"""

ORDER = """
    ORDER BY edited_date DESC, listing_id, generation, image_index,
             i.storage_path::text COLLATE "C" """


class Digest(NamedTuple):
    """What is pending, in figures. Equal sums: the same rows."""

    listings: int  # that the next run takes
    images: int  # their candidates
    listings_sum: str
    images_sum: str
    photos: int  # of the candidates, as many as will be selected
    due: int  # pending listings, those beyond the limit too
    changed: int  # of `listings`: waited, and a file or row of theirs has changed
    forced: int  # of `listings`: have a vector of this very edit
    edited: int  # of `listings`: have one of another edit


@dataclass(frozen=True)
class Pending:
    """The queries over the pending listings of one identity, inside one transaction."""

    listings: str  # that the next run takes
    due: str  # those, and the ones beyond the limit
    candidates: str  # of `listings`
    sample: str  # candidates of SAMPLE pending listings at most
    digest: str  # a Digest
    judged: str  # (reason, rows left out, _), and (None, eligible rows, edits of them)
    standing: str  # ('unfinished', listings without a vector), (reason, listings that wait) ...
    settled: Counter[str]  # those who wait that `standing` leaves out of what is unfinished
    rest: str  # how many rows of the key are of no pending listing
    witnesses: str


def has_any(cursor: Cursor, environment: Environment, listings: list[tuple[int, datetime]]) -> bool:
    """Whether one at least of these (listing_id, edited_date) is in the listings table."""
    wanted = [{"listing_id": i, "edited_date": date.isoformat()} for i, date in listings]
    found = fetch(
        cursor,
        f"SELECT EXISTS (SELECT FROM {quoted(environment.listings)} l"
        " JOIN jsonb_to_recordset($1::text::jsonb) AS w(listing_id bigint, edited_date timestamptz)"
        " ON w.listing_id = l.listing_id AND w.edited_date = l.edited_date::timestamptz)",
        (json.dumps(wanted),),
    )
    return bool(found[0][0])


def prepare(
    cursor: Cursor,
    environment: Environment,
    chosen: Settings,
    waiting: LeftOut = NOBODY,
) -> Pending:
    """Bind the values in this transaction and return the queries that use them.

    With `force`, neither the listings that wait nor the target leave a listing out.
    `chosen.model_rev` must be the resolved one.
    """
    skip_waiting = bool(waiting) and not chosen.force
    bind(
        cursor,
        {
            "limit": chosen.limit_listings,
            "topk": chosen.topk,
            "exclude_stock": chosen.exclude_stock,
            "exclude_screenshots": chosen.exclude_screenshots,
            **chosen.identity._asdict(),
            "feature_version": environment.feature_version,
        },
    )
    set_lock_timeout(cursor, chosen.lock_timeout_s)
    sort_in_memory(cursor)
    names = table_names(environment)
    names["not_settled"] = ""
    by_reason = Counter[str]()
    if skip_waiting:
        names["not_done"] = _NOT_DONE.format(**names)
        days, by_reason, others = settle(cursor, waiting, _ELIGIBLE.format(**names))
        bind(cursor, {**_arrays(others), "settled": "{" + ",".join(map(str, days)) + "}"})
        names["not_settled"] = NOT_SETTLED if by_reason else ""
    candidates = candidates_sql(cursor, environment)
    names["candidates_of_waiting"] = candidates.format(relation="looked_at", **names)
    names["candidates_of_witnesses"] = candidates.format(relation="witnesses", **names)
    names["not_done"] = "" if chosen.force else _NOT_DONE.format(**names)
    names["limit"] = "current_setting('listing_vectors.limit')::bigint"
    waits = (_WAITING if skip_waiting else _NOBODY_WAITS).format(**names)
    due = f"SELECT * FROM ({_ELIGIBLE.format(**names)}) e"
    if skip_waiting:
        due += " EXCEPT TABLE waiting"
    pending = (
        f"WITH {waits} pending AS MATERIALIZED"
        f" (SELECT * FROM ({due}) p {_NEWEST} LIMIT {names['limit']})"
    )
    of_pending = candidates.format(relation="pending", **names)
    of_sample = candidates.format(relation="sample", **names)
    standing = _STANDING.format(**names)
    return Pending(
        listings=f"{pending} SELECT * FROM pending {_NEWEST}",
        due=f"WITH {waits} due AS ({due}) SELECT * FROM due",
        candidates=f"{pending} {of_pending} {ORDER}",
        sample=f"{pending}, sample AS MATERIALIZED (SELECT * FROM pending"
        f" ORDER BY hashint8(listing_id), edited_date LIMIT {SAMPLE}) {of_sample} {ORDER}",
        digest=f"WITH {waits} {_DIGEST.format(due=due, candidates=of_pending, **names)}",
        judged=_COUNTED.format(judged=JUDGED.format(**names)),
        standing=f"WITH {waits} {standing} {_WAITING_BY_REASON if skip_waiting else ''}",
        settled=by_reason,
        rest=f"{pending} {rest_sql(environment, 'pending')}",
        witnesses=_WITNESSES.format(**names),
    )


def table_names(environment: Environment) -> dict[str, str]:
    """What the queries call the tables, quoted."""
    tables = ("listings", "images", "features", "vectors")
    return {table: quoted(getattr(environment, table)) for table in tables}


def candidates_sql(cursor: Cursor, environment: Environment) -> str:
    """The scored candidates of the listings in `{relation}`, of the tables of `table_names`."""
    return _WITH_FEATURES if has_table(cursor, environment.features) else _NO_FEATURES


def _arrays(waiting: LeftOut) -> dict[str, str]:
    """The rows as `_bound` finds them: for each table and column a Postgres array."""
    bound: dict[str, str] = {}
    for table, rows in waiting._asdict().items():
        columns = dict(zip(rows.column_names, rows.columns, strict=True))
        columns["microseconds"] = columns.pop("edited_date").cast(pa.int64())
        bound |= {f"{table}_{name}": _array(values) for name, values in columns.items()}
    return bound


def _array(values: pa.ChunkedArray) -> str:
    words = values.cast(pa.string()).combine_chunks()
    return f"{{{pc.binary_join(pa.ListArray.from_arrays([0, len(words)], words), ',')[0]}}}"
