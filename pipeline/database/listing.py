"""One listing: its rows, its candidates and its vectors, as the export and the load see them."""

from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa
from adbc_driver_manager.dbapi import Cursor

from pipeline.database.connection import bind, fetch, quoted, translated_errors
from pipeline.database.pending import JUDGED, ORDER, candidates_sql, table_names
from pipeline.stage import parquet
from pipeline.stage.settings import Environment, Identity


@dataclass(frozen=True)
class Row:
    """A row of the listings table; `left_out` is the first rule that it fails, None if none.

    `edited` is edited_date as text: it may be infinite.
    """

    generation: int | None
    edited: str | None
    url: str | None
    spam: str | None
    left_out: str | None


@dataclass(frozen=True)
class Vector:
    """A row of the target without its vector; times as text."""

    edited: str
    key: Identity
    n_images: int
    updated: str


def rows(cursor: Cursor, environment: Environment, listing_id: int) -> list[Row]:
    """Newest edit first, of one edit the highest generation first."""
    found = fetch(
        cursor,
        "SELECT generation, edited_date::text, url, spam::text, left_out"
        f" FROM ({JUDGED.format(**table_names(environment))}) j WHERE listing_id = $1"
        " ORDER BY j.edited_date DESC NULLS LAST, generation DESC NULLS LAST",
        (listing_id,),
    )
    return [Row(*row) for row in found]


def image_rows(cursor: Cursor, environment: Environment, listing_id: int) -> dict[int | None, int]:
    """How many image rows it has, by generation."""
    where = quoted(environment.images)
    return dict(
        fetch(
            cursor,
            f"SELECT generation, count(*) FROM {where} WHERE listing_id = $1 GROUP BY 1 ORDER BY 1",
            (listing_id,),
        )
    )


def candidates(cursor: Cursor, environment: Environment, listing_id: int, row: Row) -> pa.Table:
    """The scored candidates of one of its eligible rows (parquet.CANDIDATES)."""
    bind(cursor, {"listing_id": listing_id, "generation": row.generation, "edited": row.edited})
    of = candidates_sql(cursor, environment).format(relation="listing", **table_names(environment))
    with translated_errors():
        cursor.execute(
            "WITH listing AS (SELECT current_setting('listing_vectors.generation')::int"
            " AS generation, current_setting('listing_vectors.listing_id')::bigint AS listing_id,"
            " current_setting('listing_vectors.edited')::timestamptz AS edited_date)"
            f" {of} {ORDER}"
        )
        return cursor.fetch_arrow_table().cast(parquet.CANDIDATES)


def vectors(cursor: Cursor, environment: Environment, listing_id: int) -> list[Vector]:
    """Its rows of the target, newest edit first."""
    found = fetch(
        cursor,
        "SELECT edited_date::text, n_images, updated_at::text, source, model_rev, pca_rev"
        f" FROM {quoted(environment.vectors)} v WHERE listing_id = $1"
        " ORDER BY v.edited_date DESC, source, model_rev, pca_rev",
        (listing_id,),
    )
    return [Vector(edited, Identity(*key), n, updated) for edited, n, updated, *key in found]


def edits_in(cursor: Cursor, listings: str, listing_id: int) -> list[datetime]:
    """The edits of it among the rows of one of Pending's queries."""
    return [
        edited
        for (edited,) in fetch(
            cursor,
            f"SELECT edited_date FROM ({listings}) p WHERE listing_id = {listing_id:d}",
        )
    ]
