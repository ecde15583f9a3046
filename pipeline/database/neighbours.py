"""Which listings are nearest to a vector, under one key, as they are now or as they were.

All vectors have unit length: the inner product is the cosine, and an index for it is used.
"""

import json
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from adbc_driver_manager.dbapi import Cursor
from pgvector import Vector

from pipeline.database.catalog import has_table
from pipeline.database.connection import bind, fetch, quoted, translated_errors
from pipeline.database.pending import ORDER, candidates_sql, table_names
from pipeline.database.registry import registered
from pipeline.stage import parquet
from pipeline.stage.errors import DatabaseError
from pipeline.stage.settings import Environment, Identity

EF_SEARCH = "100"  # of an HNSW index, if there is one; the scan goes on until enough are found

_OF_KEY = "v.source = $1 AND v.model_rev = $2 AND v.pca_rev = $3"

# Of each found listing the row that its photos hang on: of this edit if it still is, else the last.
_FOUND = """
    WITH listing AS (
        SELECT DISTINCT ON (f.listing_id)
               l.generation::int AS generation, f.listing_id, f.edited_date
        FROM jsonb_to_recordset(current_setting('listing_vectors.found')::jsonb)
            AS f(listing_id bigint, edited_date timestamptz)
        JOIN {listings} l ON l.listing_id = f.listing_id AND l.spam IS NULL
        ORDER BY f.listing_id, (l.edited_date::timestamptz = f.edited_date) DESC NULLS LAST,
                 l.generation DESC)"""


@dataclass(frozen=True)
class Neighbour:
    """A listing as it was embedded, and how near it is: 1 is the same direction."""

    listing_id: int
    edited_date: datetime
    cosine: float


class Neighbourhood:
    """The vectors of one key, at a moment or now; never of listings that are gone by now."""

    def __init__(
        self, cursor: Cursor, environment: Environment, identity: Identity, moment: datetime | None
    ) -> None:
        """DatabaseError: create-table has not made what is asked, or no vector has this key."""
        self._cursor, self._environment, self._identity = cursor, environment, identity
        current = quoted(environment.current)
        if not has_table(cursor, environment.current):
            raise DatabaseError(
                f"the view {current}", "no such view", "",
                "python -m pipeline create-table, as the owner, makes it",
            )  # fmt: skip
        self._vectors = f"{current} v WHERE {_OF_KEY}"
        if moment is not None:
            bind(cursor, {"moment": moment.isoformat()})
            self._vectors = (
                f"{quoted(environment.as_of)}(current_setting('listing_vectors.moment')"
                f"::timestamptz) v WHERE {_OF_KEY} AND EXISTS (SELECT FROM"
                f" {quoted(environment.listings)} l WHERE l.listing_id = v.listing_id"
                " AND l.spam IS NULL)"
            )
        self._refuse_an_empty_key()

    def _refuse_an_empty_key(self) -> None:
        where = quoted(self._environment.vectors)
        any_row = f"SELECT EXISTS (SELECT FROM {where} v WHERE {_OF_KEY})"
        if fetch(self._cursor, any_row, self._identity)[0][0]:
            return
        keys = sorted(registered(self._cursor, self._environment))
        hint = ", ".join(f"--source {k.source} --model-rev {k.model_rev}" for k in keys[:3])
        raise DatabaseError(f"vectors of {self._identity}", "none", where, hint and f"try {hint}")

    def vector_of(self, listing_id: int) -> npt.NDArray[np.float32]:
        """A listing's vector, float32 (dim,). DatabaseError: it has none, or is gone."""
        found = fetch(
            self._cursor,
            f"SELECT v.vec FROM {self._vectors} AND v.listing_id = $4",
            (*self._identity, listing_id),
        )
        if not found:
            raise DatabaseError(
                f"a vector of listing {listing_id}", "none, or a listing that is deleted or spam",
                quoted(self._environment.vectors), f"python -m pipeline why {listing_id}",
            )  # fmt: skip
        vector: npt.NDArray[np.float32] = Vector.from_binary(found[0][0]).to_numpy()
        return vector

    def nearest(
        self, vector: npt.NDArray[np.float32], top: int, but: int | None = None
    ) -> list[Neighbour]:
        """The `top` nearest of a unit vector, nearest first, without listing `but`.

        DatabaseError: the vector is of another dimension than the table's.
        """
        for name, value in (("ef_search", EF_SEARCH), ("iterative_scan", "strict_order")):
            fetch(self._cursor, "SELECT set_config($1, $2, true)", (f"hnsw.{name}", value))
        found = fetch(
            self._cursor,
            "SELECT v.listing_id, v.edited_date, -(v.vec <#> $4::text::vector) AS cosine"
            f" FROM {self._vectors} AND v.listing_id IS DISTINCT FROM $5::bigint"
            " ORDER BY v.vec <#> $4::text::vector LIMIT $6",
            (*self._identity, Vector(vector).to_text(), but, top),
        )
        return [Neighbour(*row) for row in found]

    def candidates(self, of: list[tuple[int, datetime]]) -> pa.Table:
        """The scored candidates (parquet.CANDIDATES) of these (listing_id, edited_date)."""
        rows = [{"listing_id": i, "edited_date": date.isoformat()} for i, date in of]
        bind(self._cursor, {"found": json.dumps(rows)})
        bind(self._cursor, {"feature_version": self._environment.feature_version})
        names = table_names(self._environment)
        candidates = candidates_sql(self._cursor, self._environment)
        with translated_errors():
            self._cursor.execute(
                f"{_FOUND.format(**names)} {candidates.format(relation='listing', **names)} {ORDER}"
            )
            return self._cursor.fetch_arrow_table().cast(parquet.CANDIDATES)
