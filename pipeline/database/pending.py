"""What the database holds to embed: pending listings and their scored image candidates.

The SQL names tables only; every value reaches it through `bind`.
"""

import json
from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc
from adbc_driver_manager.dbapi import Cursor

from pipeline.database.catalog import has_table
from pipeline.database.connection import bind, fetch, quoted, set_lock_timeout
from pipeline.database.target import OF_KEY, rest_sql
from pipeline.database.waiting import CANDIDATES_SQL, NOBODY, LeftOut
from pipeline.stage.settings import Environment, Settings

# The dates that Arrow, Python and DuckDB can all hold; 'infinity' is outside.
_FIRST, _LAST = "0001-01-01 00:00:00+00", "9999-12-31 23:59:59.999999+00"

WITNESSES = 100  # listings by whose photos a wrong image root is known
WITNESS_PHOTOS = 5  # of each

_IS_ELIGIBLE = f"""
          l.edited_date::timestamptz BETWEEN '{_FIRST}' AND '{_LAST}'
      AND l.url IS NOT NULL AND l.spam IS NULL
      AND EXISTS (SELECT FROM {{images}} i WHERE i.generation = l.generation
                  AND i.listing_id = l.listing_id AND i.image_index IS NOT NULL)"""

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
          AND {OF_KEY})"""

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

# Listings whose files were missing or broken, and still are; see pipeline/database/waiting.py.
# Set operations hash or sort: with joins, a wrong estimate means to compare each with each.
_WAITING = f"""
    looked_at AS MATERIALIZED (
        SELECT generation, listing_id, {_EDITED} AS edited_date, candidates
        FROM {_bound("looked_at", **_KEYS, candidates="text")}),
    unchanged AS MATERIALIZED (
        SELECT generation, listing_id, edited_date, {CANDIDATES_SQL} AS candidates
        FROM ({{candidates_of_waiting}}) c GROUP BY generation, listing_id, edited_date),
    waiting AS MATERIALIZED (
        SELECT generation, listing_id, {_EDITED} AS edited_date FROM {_bound("unseen", **_KEYS)}
        UNION ALL
        SELECT generation, listing_id, edited_date
        FROM (TABLE looked_at INTERSECT TABLE unchanged) same),"""

_NOT_WAITING = "EXCEPT TABLE waiting"

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

_ORDER = """
    ORDER BY edited_date DESC, listing_id, generation, image_index,
             i.storage_path::text COLLATE "C" """


@dataclass(frozen=True)
class Pending:
    """The queries over the pending listings of one identity, inside one transaction."""

    listings: str
    candidates: str
    digest: str
    census: str
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
            **chosen.identity._asdict(),
            "feature_version": environment.feature_version,
            **(_arrays(waiting) if skip_waiting else {}),
        },
    )
    set_lock_timeout(cursor, chosen.lock_timeout_s)
    names = {t: quoted(getattr(environment, t)) for t in ("listings", "images", "vectors")}
    names["features"] = quoted(environment.features)
    candidates = _WITH_FEATURES if has_table(cursor, environment.features) else _NO_FEATURES
    for relation, name in (("looked_at", "waiting"), ("witnesses", "witnesses")):
        names[f"candidates_of_{name}"] = candidates.format(relation=relation, **names)
    names["not_done"] = "" if chosen.force else _NOT_DONE.format(**names)
    pending = (
        f"WITH {_WAITING if skip_waiting else ''} pending AS MATERIALIZED ("
        f"SELECT * FROM (SELECT * FROM ({_ELIGIBLE}) e {_NOT_WAITING if skip_waiting else ''}) p"
        " ORDER BY edited_date DESC, listing_id"
        " LIMIT current_setting('listing_vectors.limit')::bigint)"
    ).format(**names)
    candidates = candidates.format(relation="pending", **names)
    return Pending(
        listings=f"{pending} SELECT * FROM pending ORDER BY edited_date DESC, listing_id",
        candidates=f"{pending} {candidates} {_ORDER}",
        digest=f"""{pending}
            SELECT (SELECT count(*) FROM pending), count(*),
                   (SELECT coalesce(sum(hashtextextended(p::text, 0)), 0) FROM pending p)::text,
                   coalesce(sum(hashtextextended(c::text, 0)), 0)::text
            FROM ({candidates}) c""",
        census=_census(names),
        rest=f"{pending} {rest_sql(environment, 'pending')}",
        witnesses=_WITNESSES.format(**names),
    )


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


def _census(names: dict[str, str]) -> str:
    """Why listings are not exported, counted in the same snapshot."""
    return f"""
        SELECT count(*), count(*) FILTER (WHERE l.spam IS NOT NULL),
               count(*) FILTER (WHERE l.edited_date IS NULL),
               count(*) FILTER (WHERE l.url IS NULL),
               count(*) FILTER (WHERE NOT l.edited_date::timestamptz
                                BETWEEN '{_FIRST}' AND '{_LAST}'),
               (SELECT count(*) FROM (
                    SELECT count(*) FROM {{listings}} g
                    WHERE g.url IS NOT NULL AND g.spam IS NULL AND g.edited_date IS NOT NULL
                      AND EXISTS (SELECT FROM {{images}} i WHERE i.generation = g.generation
                                  AND i.listing_id = g.listing_id AND i.image_index IS NOT NULL)
                    GROUP BY g.listing_id, g.edited_date::timestamptz
                    HAVING count(*) > 1) superseded)
        FROM {{listings}} l""".format(**names)
