"""What the database holds to embed: pending listings and their scored image candidates.

The SQL names tables only; every value reaches it through `database.bind`.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from adbc_driver_manager.dbapi import Cursor

from pipeline import database
from pipeline.errors import DatabaseError
from pipeline.settings import Environment, Settings

# The dates that Arrow, Python and DuckDB can all hold; 'infinity' is outside.
_FIRST, _LAST = "0001-01-01 00:00:00+00", "9999-12-31 23:59:59.999999+00"

_ELIGIBLE = f"""
    SELECT DISTINCT ON (l.edited_date::timestamptz, l.listing_id)
           l.generation::int AS generation, l.listing_id::bigint AS listing_id,
           l.edited_date::timestamptz AS edited_date
    FROM {{listings}} l
    WHERE l.edited_date::timestamptz BETWEEN '{_FIRST}' AND '{_LAST}'
      AND l.url IS NOT NULL AND l.spam IS NULL
      AND EXISTS (SELECT FROM {{images}} i WHERE i.generation = l.generation
                  AND i.listing_id = l.listing_id AND i.image_index IS NOT NULL)
      {{not_done}}
    ORDER BY l.edited_date::timestamptz DESC, l.listing_id, l.generation DESC"""

_NOT_DONE = """
    AND NOT EXISTS (SELECT FROM {vectors} v
        WHERE v.listing_id = l.listing_id AND v.edited_date = l.edited_date::timestamptz
          AND v.source = current_setting('listing_vectors.source')
          AND v.model_rev = current_setting('listing_vectors.model_rev')
          AND v.pca_rev = current_setting('listing_vectors.pca_rev'))"""

# Listings whose files were missing or broken, and still are; see pipeline/failures.py.
_WAITING = """
    waiting AS MATERIALIZED (
        SELECT * FROM jsonb_to_recordset(current_setting('listing_vectors.waiting')::jsonb)
            AS w(generation int, listing_id bigint, edited_date timestamptz, candidates text)),
    unchanged AS MATERIALIZED (
        SELECT generation, listing_id, edited_date,
               md5(string_agg(concat_ws('|', image_index, storage_path, score,
                   is_stock_photo::int, battery_screenshot::int), E'\\n'
                   ORDER BY image_index, storage_path COLLATE "C")) AS candidates
        FROM ({candidates_of_waiting}) c GROUP BY generation, listing_id, edited_date),"""

_NOT_WAITING = """
    AND NOT EXISTS (
        SELECT FROM waiting w
        JOIN unchanged u USING (generation, listing_id, edited_date, candidates)
        WHERE w.generation = e.generation AND w.listing_id = e.listing_id
          AND w.edited_date = e.edited_date)"""

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

_COLUMNS = {
    "listings": ("generation", "listing_id", "edited_date", "url", "spam"),
    "images": ("generation", "listing_id", "image_index", "storage_path"),
    "features": (
        "feature_version", "generation", "listing_id", "image_index", "is_stock_photo",
        "battery_screenshot", "photo_quality_level", "background_clean_level",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Pending:
    """The queries over the pending listings of one identity, inside one transaction."""

    listings: str
    candidates: str
    digest: str
    census: str


def has_any(cursor: Cursor, environment: Environment, listings: list[tuple[int, datetime]]) -> bool:
    """Whether one at least of these (listing_id, edited_date) is in the listings table."""
    wanted = [{"listing_id": i, "edited_date": date.isoformat()} for i, date in listings]
    found = database.fetch(
        cursor,
        f"SELECT EXISTS (SELECT FROM {database.quoted(environment.listings)} l"
        " JOIN jsonb_to_recordset($1::text::jsonb) AS w(listing_id bigint, edited_date timestamptz)"
        " ON w.listing_id = l.listing_id AND w.edited_date = l.edited_date::timestamptz)",
        (json.dumps(wanted),),
    )
    return bool(found[0][0])


def prepare(
    cursor: Cursor,
    environment: Environment,
    chosen: Settings,
    waiting: str = "[]",
) -> Pending:
    """Bind the values in this transaction and return the queries that use them.

    `waiting` is a JSON array of {generation, listing_id, edited_date, candidates}: listings to
    leave out while the md5 of their candidates is unchanged. With `force`, neither it nor the
    target leaves a listing out. `chosen.model_rev` must be the resolved one.
    """
    database.bind(
        cursor,
        {
            "limit": chosen.limit_listings,
            "source": chosen.source,
            "model_rev": chosen.model_rev,
            "pca_rev": chosen.pca_rev,
            "waiting": waiting,
            "feature_version": environment.feature_version,
        },
    )
    timeout = f"{chosen.lock_timeout_s}s"
    database.fetch(cursor, "SELECT set_config('lock_timeout', $1, true)", (timeout,))
    names = {t: database.quoted(getattr(environment, t)) for t in ("listings", "images", "vectors")}
    names["features"] = database.quoted(environment.features)
    candidates = _WITH_FEATURES if has_table(cursor, environment.features) else _NO_FEATURES
    skip_waiting = waiting != "[]" and not chosen.force
    names["candidates_of_waiting"] = candidates.format(relation="waiting", **names)
    names["not_done"] = "" if chosen.force else _NOT_DONE.format(**names)
    pending = (
        f"WITH {_WAITING if skip_waiting else ''} pending AS MATERIALIZED ("
        f"SELECT * FROM ({_ELIGIBLE}) e WHERE true {_NOT_WAITING if skip_waiting else ''}"
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
    )


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


def has_table(cursor: Cursor, name: tuple[str, str]) -> bool:
    """Whether a table or view of that name exists."""
    found = database.fetch(cursor, "SELECT to_regclass($1) IS NOT NULL", (database.quoted(name),))
    return bool(found[0][0])


def columns(cursor: Cursor, name: tuple[str, str]) -> dict[str, str]:
    """Column name to formatted type, of a table or view."""
    rows = database.fetch(
        cursor,
        "SELECT attname::text, format_type(atttypid, atttypmod) FROM pg_attribute"
        " WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped",
        (database.quoted(name),),
    )
    return dict(rows)


def check_inputs(cursor: Cursor, environment: Environment) -> None:
    """The input tables or views exist with the columns the job reads; else DatabaseError."""
    for role, expected in _COLUMNS.items():
        name: tuple[str, str] = getattr(environment, role)
        found: dict[str, Any] = columns(cursor, name)
        if not found and role == "features":
            continue  # optional: no flags, all levels 0
        if not found:
            raise DatabaseError(
                f"the {role} table {database.quoted(name)}",
                "no such table or view",
                "",
                f"set {_variables(role)}, or python -m pipeline create-table --all for a trial",
            )
        missing = [column for column in expected if column not in found]
        if missing:
            raise DatabaseError(
                f"column {', '.join(missing)} in the {role} table",
                f"columns {', '.join(sorted(found)) or 'none'}",
                database.quoted(name),
                "a view with these column names will do",
            )


def _variables(role: str) -> str:
    return {
        "listings": "LISTINGS_SCHEMA and LISTINGS_TABLE",
        "images": "ASSETS_SCHEMA and ASSETS_TABLE",
        "features": "ML_SCHEMA and IMAGE_FEATURES_TABLE",
    }[role]
