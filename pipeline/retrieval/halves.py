"""Each listing's photos on two sides, A and B, by hashes that anyone can compute.

The rules are in docs/evaluate.md, word for word; a script of forty lines in the tests follows
them. Memory holds one batch, and a few bytes for each photo that is in several listings, is a
stock photo, or is of a listing with several edits.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.retrieval.photos import NEAR, Array, Photos, Vectors
from pipeline.stage import parquet

A, B, ALL = 0, 1, 2  # the side of a photo; ALL: of a listing that cannot be split
BATCH_ROWS = 8_192

COLUMNS = [*parquet.LISTINGS.names, "image_index", "storage_path", "vec"]
SEEN = pa.schema(
    [*parquet.LISTINGS, pa.field("image_index", pa.int32()),
     pa.field("hash", pa.uint64()), pa.field("alike", pa.int64())]
)  # fmt: skip

# Of each listing the newest edit; of those of one moment the highest generation.
NEWEST = """
    SELECT listing_id, max({'edited': edited_date, 'generation': generation}) AS newest
    FROM seen GROUP BY listing_id"""
OLDER = f"""
    DELETE FROM seen USING ({NEWEST}) n
    WHERE n.listing_id = seen.listing_id
      AND n.newest <> {{'edited': edited_date, 'generation': generation}}"""
# Vectors that several listings have, and the first photo of each.
SHARED = """
    SELECT hash, min({'listing': listing_id, 'index': image_index}) AS first
    FROM seen GROUP BY hash HAVING count(DISTINCT listing_id) > 1"""
EDITED = f"""
    SELECT listing_id, epoch_us(newest.edited), newest.generation
    FROM ({NEWEST}) SEMI JOIN (
        SELECT listing_id FROM seen GROUP BY listing_id
        HAVING count(DISTINCT (edited_date, generation)) > 1) USING (listing_id)
    ORDER BY listing_id"""
# Shared photos that some listing has beside nearly the same: all of them go to one side.
LINKED = """
    SELECT list(DISTINCT hash) FROM seen SEMI JOIN shared USING (hash)
    GROUP BY alike HAVING count(DISTINCT hash) > 1"""


def hashed(text: str) -> int:
    """The BLAKE2b of a text, of 64 bits."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Split:
    """Photos and the side of each; a listing that is split has some on A and some on B."""

    photos: Photos
    side: Array

    @property
    def asked(self) -> Photos:
        """Side A of the listings that are split."""
        return self.photos.kept(self.side == A)

    @property
    def gallery(self) -> Photos:
        """Side B of those, and all photos of the others."""
        return self.photos.kept(self.side != A)


class Halves:
    """The split of what some encode shards hold."""

    def __init__(
        self, shards: Sequence[Path], images: Path | None, seed: int, memory_mb: int
    ) -> None:
        """Looks through all shards once. `images`: of the export, where stock photos are told."""
        self._shards, self._seed, self._stock = shards, seed, np.zeros(0, np.uint64)
        with duckdb.connect(config={"memory_limit": f"{memory_mb}MB", "threads": 1}) as con:
            con.execute("SET TimeZone = 'UTC'")
            con.from_arrow(SEEN.empty_table()).create("seen")
            self._look_through(con)
            self._edited, self._moment, self._generation = _arrays(con.sql(EDITED), np.int64)
            con.execute(OLDER)
            self._shared, self._side = self._sides_of_shared(con)
            if images:
                flagged = con.read_parquet(str(images)).filter("is_stock_photo")
                keys = flagged.select("listing_id, image_index").to_arrow_reader(BATCH_ROWS)
                self._stock = np.sort(
                    np.concatenate([self._stock, *(_keys(*_lists(rows)) for rows in keys)])
                )

    def splits(self) -> Iterator[Split]:
        """All photos that have a vector, in the order of the shards; of a listing one edit."""
        for rows in _batches(self._shards):
            newest = rows.filter(pa.array(self._is_newest(rows)))
            if newest.num_rows:
                photos = self._photos(newest)
                yield Split(photos, self._sides(photos))

    def _look_through(self, con: duckdb.DuckDBPyConnection) -> None:
        """Note each photo with the hash of its vector and the number of those that are like it."""
        done = 0
        for rows in _batches(self._shards):
            vec, size = parquet.matrix(rows), _sizes(rows)
            columns = [*(rows[name] for name in SEEN.names[:-2]),
                       _hashes(vec), done + alike(vec, size)]  # fmt: skip
            con.register("rows", pa.table([pa.array(c) if isinstance(c, np.ndarray) else c
                                           for c in columns], schema=SEEN))  # fmt: skip
            con.execute("INSERT INTO seen FROM rows")
            done += rows.num_rows

    def _sides_of_shared(self, con: duckdb.DuckDBPyConnection) -> tuple[Array, Array]:
        """(hash of the vector, side) of the photos that several listings have, by the hash."""
        con.execute(f"CREATE TABLE shared AS {SHARED}")
        found = con.execute("SELECT hash, first.listing, first.index FROM shared").fetchall()
        first = {of: (listing, index) for of, listing, index in found}
        whole: dict[int, int] = {}
        for (linked,) in con.execute(LINKED).fetchall():
            for other in linked[1:]:
                whole[_root(whole, linked[0])] = _root(whole, other)
        name = dict(first)
        for of, photo in first.items():
            root = _root(whole, of)
            name[root] = min(name[root], photo)
        sides = [
            hashed(f"{self._seed}/shared/{listing}/{index}") & 1
            for listing, index in (name[_root(whole, of)] for of in sorted(first))
        ]
        return np.array(sorted(first), np.uint64), np.array(sides, np.int8)

    def _is_newest(self, rows: pa.Table) -> Array:
        place, several = _found(self._edited, rows["listing_id"].to_numpy())
        if not several.any():
            return ~several
        moment = rows["edited_date"].cast(pa.int64()).to_numpy()
        generation = rows["generation"].to_numpy()
        same = (self._moment[place] == moment) & (self._generation[place] == generation)
        kept: Array = ~several | same
        return kept

    def _photos(self, rows: pa.Table) -> Photos:
        listing, index = rows["listing_id"].to_numpy(), rows["image_index"].to_numpy()
        size = _sizes(rows)
        stock = np.zeros(len(index), bool)
        if len(self._stock):
            stock = _found(self._stock, _keys(listing.tolist(), index.tolist()))[1]
        path = np.array(rows["storage_path"].to_pylist(), object)
        start = np.cumsum(size) - size
        return Photos(listing[start], size, parquet.matrix(rows), index, path, stock)

    def _sides(self, photos: Photos) -> Array:
        """Of each photo A, B or ALL."""
        groups = alike(photos.vec, photos.size).tolist()
        fixed = np.full(len(groups), -1, np.int8)
        if len(self._shared):
            place, shared = _found(self._shared, _hashes(photos.vec))
            fixed[shared] = self._side[place[shared]]
        sides: list[int] = []
        index, at = photos.index.tolist(), 0
        for listing, size in zip(photos.listing.tolist(), photos.size.tolist(), strict=True):
            rows = slice(at, at + size)
            sides += self._dealt(listing, index[rows], groups[rows], fixed[rows].tolist())
            at += size
        return np.array(sides, np.int8)

    def _dealt(
        self, listing: int, index: list[int], groups: list[int], fixed: list[int]
    ) -> list[int]:
        """The sides of a listing's photos: groups whose side is `fixed`, then the largest first."""
        members: dict[int, list[int]] = {}
        for row, group in enumerate(groups):
            members.setdefault(group, []).append(row)
        sides, count, free = [ALL] * len(index), [0, 0], []
        for rows in members.values():
            side = max(fixed[row] for row in rows)
            if side < 0:
                name = hashed(f"{self._seed}/{listing}/{min(index[row] for row in rows)}")
                free.append((-len(rows), name, rows))
            else:
                count[side] += len(rows)
                sides = [side if row in rows else s for row, s in enumerate(sides)]
        for less, name, rows in sorted(free):
            side = name & 1 if count[A] == count[B] else int(count[B] < count[A])
            count[side] -= less
            for row in rows:
                sides[row] = side
        return sides if all(count) else [ALL] * len(index)


def alike(vec: Vectors, size: Array) -> Array:
    """Of each photo the row of one that it is nearly the same as, by way of others too.

    Those of one listing with one number are a group.
    """
    end = np.repeat(np.cumsum(size), size)
    root = np.arange(len(vec))
    above: dict[int, int] = {}
    for step in range(1, int(size.max(initial=1))):
        rows = np.flatnonzero(root + step < end)
        near = np.einsum("ij,ij->i", vec[rows], vec[rows + step]) >= NEAR
        for row in rows[near].tolist():
            above[_root(above, row + step)] = _root(above, row)
    root[list(above)] = [_root(above, row) for row in above]
    return root


def _root(above: dict[int, int], one: int) -> int:
    while one in above and above[one] != one:
        one = above[one]
    return one


def _batches(shards: Iterable[Path]) -> Iterator[pa.Table]:
    """The photos that have a vector; no batch splits a listing, and none is empty."""
    for path in shards:
        for rows in parquet.clustered_batches(path, BATCH_ROWS, COLUMNS):
            rows = rows.filter(pc.is_valid(rows["vec"]))
            if rows.num_rows:
                yield rows


def _sizes(rows: pa.Table) -> Array:
    return np.diff(parquet.listing_starts(rows), append=rows.num_rows)


def _hashes(vec: Vectors) -> Array:
    digests = b"".join(blake2b(row, digest_size=8).digest() for row in np.ascontiguousarray(vec))
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def _keys(listing: list[int], index: list[int]) -> Array:
    return np.array([hashed(f"{a}/{b}") for a, b in zip(listing, index, strict=True)], np.uint64)


def _lists(rows: pa.RecordBatch) -> list[list[int]]:
    return [column.to_pylist() for column in rows.columns]


def _arrays(rows: duckdb.DuckDBPyRelation, kind: type) -> list[Array]:
    table = rows.to_arrow_table()
    return [table.column(i).to_numpy().astype(kind) for i in range(table.num_columns)]


def _found(among: Array, values: Array) -> tuple[Array, Array]:
    """Of each value its place in a sorted array, and whether it is there."""
    if not len(among):
        return np.zeros(len(values), np.intp), np.zeros(len(values), bool)
    place = np.minimum(np.searchsorted(among, values), len(among) - 1)
    return place, among[place] == values
