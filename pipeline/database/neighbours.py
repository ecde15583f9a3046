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

from pipeline.database import hnsw
from pipeline.database.catalog import has_table
from pipeline.database.connection import bind, fetch, quoted, translated_errors
from pipeline.database.pending import ORDER, candidates_sql, table_names
from pipeline.database.registry import registered
from pipeline.stage import parquet
from pipeline.stage.errors import DatabaseError
from pipeline.stage.settings import Environment, Identity

EF_SEARCH = 100  # of an HNSW index, if there is one; the scan goes on until enough are found

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


@dataclass(frozen=True)
class Query:
    """A listing's own vector, float32 (dim,), of unit length."""

    listing_id: int
    vector: npt.NDArray[np.float32]


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
        self._index = hnsw.of_key(cursor, environment, identity)

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

    def sample(self, size: int) -> list[Query]:
        """So many of the vectors, always the same, in no order that means anything."""
        rows = fetch(
            self._cursor,
            f"SELECT v.listing_id, v.vec FROM {self._vectors}"
            " ORDER BY hashint8(v.listing_id), v.listing_id LIMIT $4",
            (*self._identity, size),
        )
        return [Query(listing, Vector.from_binary(vec).to_numpy()) for listing, vec in rows]

    def nearest(
        self,
        vector: npt.NDArray[np.float32],
        top: int,
        but: int | None = None,
        ef_search: int = EF_SEARCH,
    ) -> list[Neighbour]:
        """The `top` nearest of a unit vector, nearest first, without listing `but`.

        DatabaseError: the vector is of another dimension than the table's.
        """
        for name, value in (("ef_search", str(ef_search)), ("iterative_scan", "strict_order")):
            fetch(self._cursor, "SELECT set_config($1, $2, true)", (f"hnsw.{name}", value))
        found = fetch(self._cursor, self._nearest(len(vector)), self._asked(vector, top, but))
        return [Neighbour(*row) for row in found]

    def plan(self, vector: npt.NDArray[np.float32], top: int) -> str:
        """How Postgres would find them, as its EXPLAIN has it in JSON."""
        sql = f"EXPLAIN (FORMAT JSON) {self._nearest(len(vector))}"
        return str(fetch(self._cursor, sql, self._asked(vector, top, None))[0][0])

    def _asked(
        self, vector: npt.NDArray[np.float32], top: int, but: int | None
    ) -> tuple[str | int | None, ...]:
        return (*self._identity, Vector(vector).to_text(), but, top)

    def _nearest(self, dimension: int) -> str:
        """Ordered by what the key's index is on, vectors or halves of them; cosines are exact."""
        distance = "v.vec <#> $4::text::vector"
        if self._index and self._index.definition.halfvec:
            half = f"halfvec({dimension:d})"
            distance = f"v.vec::{half} <#> $4::text::{half}"
        elif self._index and not hnsw.is_typed(self._cursor, self._environment):
            distance = f"v.vec::vector({dimension:d}) <#> $4::text::vector"
        return (
            "SELECT * FROM (SELECT v.listing_id, v.edited_date,"
            f" -(v.vec <#> $4::text::vector) AS cosine FROM {self._vectors}"
            f" AND v.listing_id IS DISTINCT FROM $5::bigint ORDER BY {distance} LIMIT $6) found"
            " ORDER BY cosine DESC"
        )

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
