"""The current vectors of one key, for a report: a sample of the listings, and all as a stream."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import numpy.typing as npt
from adbc_driver_manager.dbapi import Cursor
from pgvector import Vector

from pipeline.database.connection import bind, fetch, quoted, translated_errors
from pipeline.stage.settings import Environment, Identity

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_OF_KEY = """v.source = current_setting('listing_vectors.source')
    AND v.model_rev = current_setting('listing_vectors.model_rev')
    AND v.pca_rev = current_setting('listing_vectors.pca_rev')"""


@dataclass(frozen=True)
class Embedded:
    """A live listing's current vector, without the vector."""

    listing_id: int
    edited_date: datetime
    n_images: int


class Current:
    """`<vectors>_current` of one key, inside one transaction."""

    def __init__(self, cursor: Cursor, environment: Environment, identity: Identity) -> None:
        self._cursor, self._view = cursor, quoted(environment.current)
        bind(cursor, identity._asdict())

    def count(self) -> int:
        """How many there are."""
        return int(
            fetch(self._cursor, f"SELECT count(*) FROM {self._view} v WHERE {_OF_KEY}")[0][0]
        )

    def newest(self, number: int) -> list[Embedded]:
        """Those that were edited last."""
        return self._embedded("ORDER BY v.edited_date DESC, v.listing_id", number)

    def random(self, number: int) -> list[Embedded]:
        """By a hash of their id: the same each time, whatever else comes or goes."""
        return self._embedded("ORDER BY hashint8(v.listing_id), v.listing_id", number)

    def of(self, listings: list[int]) -> tuple[list[Embedded], Vectors]:
        """These listings, as far as they are there, by id, and their vectors (n, dim)."""
        bind(self._cursor, {"listings": json.dumps(listings)})
        rows = fetch(
            self._cursor,
            f"SELECT v.listing_id, v.edited_date, v.n_images, v.vec FROM {self._view} v"
            f" WHERE {_OF_KEY} AND v.listing_id IN (SELECT jsonb_array_elements_text("
            "current_setting('listing_vectors.listings')::jsonb)::bigint) ORDER BY 1",
        )
        return [Embedded(*row[:3]) for row in rows], _matrix([row[3] for row in rows])

    def stream(self, share: int) -> Iterator[tuple[Ids, Vectors]]:
        """Batches of ids and vectors (n, dim): of all, or one in `share` of them by a hash."""
        with translated_errors():
            self._cursor.execute(
                f"SELECT v.listing_id, v.vec FROM {self._view} v WHERE {_OF_KEY}"
                f" AND (hashint8(v.listing_id) & 2147483647) % {share:d} = 0"
            )
            for batch in self._cursor.fetch_record_batch():
                if batch.num_rows:
                    ids: Ids = batch.column(0).to_numpy()
                    yield ids, _matrix(batch.column(1).to_pylist())

    def drawn(self, rows: int, seed: int) -> Iterator[Vectors]:
        """Batches (n, dim) of `rows` vectors at most, drawn and ordered by a seeded hash."""
        hashed = f"hashint8extended(v.listing_id, {seed:d})"
        with translated_errors():
            # The hashes alone are sorted to find the last; of all vectors, that would take a disk.
            self._cursor.execute(
                f"SELECT v.vec FROM {self._view} v WHERE {_OF_KEY} AND {hashed} <="
                f" (SELECT max(hash) FROM (SELECT {hashed} AS hash FROM {self._view} v"
                f" WHERE {_OF_KEY} ORDER BY 1 LIMIT {rows:d}) few) ORDER BY {hashed}, v.listing_id"
            )
            for batch in self._cursor.fetch_record_batch():
                if batch.num_rows:
                    yield _matrix(batch.column(0).to_pylist())

    def _embedded(self, order: str, number: int) -> list[Embedded]:
        rows = fetch(
            self._cursor,
            f"SELECT v.listing_id, v.edited_date, v.n_images FROM {self._view} v"
            f" WHERE {_OF_KEY} {order} LIMIT {number:d}",
        )
        return [Embedded(*row) for row in rows]


def _matrix(rows: list[bytes]) -> Vectors:
    if not rows:
        return np.empty((0, 0), np.float32)
    return np.stack([Vector.from_binary(row).to_numpy() for row in rows])
