"""What could have been chosen: each ranks the same entries for the same queries, block by block.

A choice makes scores of a side A and an entry of the gallery. The rank of the right entry is 1
and one more for each other that scores as high or higher: a tie loses, so an encoder to which all
is the same finds nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.encoder.projection import Fit
from pipeline.retrieval.photos import Array, Photos, Vectors, unit

TIE = 1e-6  # cosines in float32 that differ by less are the same
CHUNK, FEW = 512, 256  # queries that are scored together
SHORTLIST = 100  # of the nearest by bits, those that are ranked by cosine

BITS = {"vector": 32, "halfvec": 16, "bits": 1}  # of a component, by how pgvector stores it

Map = Callable[[Photos], Vectors]


@dataclass(frozen=True)
class Queries:
    """Side A of the listings that ask, and side B, which is to be found; in the same order."""

    asked: Photos
    right: Photos

    def __len__(self) -> int:
        return len(self.asked.size)

    def chunks(self) -> Iterator[slice]:
        """Some of them at a time."""
        for start in range(0, len(self), CHUNK):
            yield slice(start, min(len(self), start + CHUNK))


class Block:
    """Entries of the gallery, those of most photos first, and which queries they are right for."""

    def __init__(self, photos: Photos, queries: Queries) -> None:
        self.photos = photos.take(np.argsort(-photos.size, kind="stable"))
        order = np.argsort(queries.asked.listing, kind="stable")
        place = np.searchsorted(queries.asked.listing[order], self.photos.listing)
        query = order[np.minimum(place, len(order) - 1)]
        self.entry = np.flatnonzero(queries.asked.listing[query] == self.photos.listing)
        self.query = query[self.entry]

    def right_in(self, chunk: slice) -> tuple[Array, Array]:
        """(entry, query of the chunk) of the right ones."""
        mine = (self.query >= chunk.start) & (self.query < chunk.stop)
        return self.entry[mine], self.query[mine] - chunk.start


class Choice:
    """Scores of entries, and how many of them are as high as the right one's."""

    def __init__(self, name: str, group: str, size: float, queries: Queries) -> None:
        """`size` is the bytes of an entry; of a `group` are choices of the same thing."""
        self.name, self.group, self.size, self.queries = name, group, size, queries
        self.better = np.zeros(len(queries), np.int64)
        self._limit: Array | None = None

    @property
    def ranks(self) -> Array:
        """Of each query, from 1."""
        return self.better + 1

    def seen(self, photos: Photos) -> Any:
        """What is needed of some entries, those of most photos first, for all queries."""
        raise NotImplementedError

    def scores(self, seen: Any, chunk: slice) -> Array:
        """Float32 (entries, queries of the chunk)."""
        raise NotImplementedError

    @property
    def limit(self) -> Array:
        """Of each query the score that another has to reach."""
        if self._limit is None:
            self._limit = np.empty(len(self.queries), np.float32)
            for start in range(0, len(self.queries), FEW):
                few = slice(start, min(len(self.queries), start + FEW))
                order = np.argsort(-self.queries.right.size[few], kind="stable")
                scores = self.scores(self.seen(self.queries.right.take(start + order)), few)
                self._limit[few][order] = scores[np.arange(len(order)), order] - TIE
        return self._limit

    def count(self, block: Block) -> None:
        """Add the entries of a block that score as high as the right one."""
        limit, seen = self.limit, self.seen(block.photos)
        for chunk in self.queries.chunks():
            scores = self.scores(seen, chunk)
            scores[block.right_in(chunk)] = -np.inf
            self.better[chunk] += np.count_nonzero(scores >= limit[chunk], axis=0)
            self.met(block, chunk, scores)

    def met(self, block: Block, chunk: slice, scores: Array) -> None:
        """Told the scores of each block, those of the right entries -inf."""


class Means(Choice):
    """One vector on either side."""

    def __init__(
        self, name: str, group: str, size: float, queries: Queries, vectors: Map = Photos.mean
    ) -> None:
        super().__init__(name, group, size, queries)
        self._vectors = vectors
        self._asked = vectors(queries.asked)

    def seen(self, photos: Photos) -> Vectors:
        return self._vectors(photos)

    def scores(self, seen: Vectors, chunk: slice) -> Array:
        found: Array = seen @ self._asked[chunk].T
        return found


class Ours(Means):
    """The mean of unit vectors, and the wrong entry that scores highest with each query."""

    def __init__(self, size: float, queries: Queries) -> None:
        super().__init__("mean of all photos of a side", "", size, queries)
        self.rival = np.full(len(queries), -1, np.int64)
        self._best = np.full(len(queries), -np.inf, np.float32)

    def met(self, block: Block, chunk: slice, scores: Array) -> None:
        """Remember the listing of the highest; of those that score the same the first."""
        if not len(scores):
            return
        best, rival = self._best[chunk], self.rival[chunk]
        higher = np.flatnonzero(scores.max(axis=0) > best)
        entry = scores[:, higher].argmax(axis=0)
        best[higher] = scores[entry, higher]
        rival[higher] = block.photos.listing[entry]


@dataclass(frozen=True)
class Projection:
    """PCA: what is taken away, and the directions (dim, dimensions), most variance first."""

    mean: Array
    directions: Array

    @classmethod
    def of(cls, fit: Fit) -> "Projection":
        """As `pca` projects, in float32."""
        return cls(fit.mean.astype(np.float32), fit.components.T.astype(np.float32))

    def first(self, dimensions: int) -> "Projection":
        """On fewer directions."""
        return Projection(self.mean, np.ascontiguousarray(self.directions[:, :dimensions]))

    def __call__(self, vectors: Vectors) -> Vectors:
        return unit((vectors - self.mean) @ self.directions)


class Projected(Choice):
    """Means in fewer dimensions; the projection of a query was fitted without its listing."""

    def __init__(
        self,
        name: str,
        group: str,
        size: float,
        queries: Queries,
        of: list[Projection],
        fold: Array,
    ) -> None:
        """`fold` says for each query which of the projections is its."""
        super().__init__(name, group, size, queries)
        self._of, self._fold = of, fold
        mean = queries.asked.mean()
        projected = np.stack([each(mean) for each in of])
        self._asked = projected[fold, np.arange(len(queries))]

    def seen(self, photos: Photos) -> list[Vectors]:
        mean = photos.mean()
        return [each(mean) for each in self._of]

    def scores(self, seen: list[Vectors], chunk: slice) -> Array:
        asked, fold = self._asked[chunk], self._fold[chunk]
        found = np.empty((len(seen[0]), len(asked)), np.float32)
        for number, entries in enumerate(seen):
            mine = np.flatnonzero(fold == number)
            found[:, mine] = entries @ asked[mine].T
        return found


class BestPhoto(Choice):
    """The highest cosine of A's mean with a photo of the entry."""

    def __init__(self, name: str, group: str, size: float, queries: Queries) -> None:
        super().__init__(name, group, size, queries)
        self._asked = queries.asked.mean()

    def seen(self, photos: Photos) -> Photos:
        return photos

    def scores(self, seen: Photos, chunk: slice) -> Array:
        return _highest(seen, self._asked[chunk])


class BestPair(BestPhoto):
    """The highest cosine of any photo of A with any photo of the entry."""

    def scores(self, seen: Photos, chunk: slice) -> Array:
        part = self.queries.asked.take(np.arange(chunk.start, chunk.stop))
        found = _highest(seen, part.vec[part.start])
        for place in range(1, int(part.size.max(initial=1))):
            more = np.flatnonzero(part.size > place)
            scores = _highest(seen, part.vec[part.start[more] + place])
            found[:, more] = np.maximum(found[:, more], scores)
        return found


def _highest(seen: Photos, asked: Vectors) -> Array:
    """Of each entry's photos, float32 (entries, asked); entries of most photos come first."""
    found: Array = seen.vec[seen.start] @ asked.T
    for place in range(1, int(seen.size.max(initial=1))):
        more = int((seen.size > place).sum())
        np.maximum(found[:more], seen.vec[seen.start[:more] + place] @ asked.T, out=found[:more])
    return found


class Bits(Choice):
    """The nearest by bits, one a dimension, are ranked by cosine; another is as far as its bits.

    Who is not nearer than the SHORTLISTth is not in the list, but those as near as that one are.
    """

    def __init__(self, name: str, group: str, size: float, queries: Queries) -> None:
        super().__init__(name, group, size, queries)
        self._asked = queries.asked.mean()
        self._bits = _signs(self._asked)
        dim = self._asked.shape[1]
        right = queries.right.mean()
        self._differ = ((dim - np.einsum("ij,ij->i", self._bits, _signs(right))) / 2).astype(int)
        self._cosine = np.einsum("ij,ij->i", self._asked, right) - TIE
        self._as_near = np.zeros(len(queries), np.int64)  # others by bits alone
        self._near = np.zeros((len(queries), dim + 1), np.int32)  # entries by differing bits
        self._rivals = np.zeros_like(self._near)  # of these, with a cosine as high
        self._last = np.full(len(queries), dim)  # bits by which one in the shortlist may differ
        self._near[np.arange(len(queries)), self._differ] = 1  # the right one

    def count(self, block: Block) -> None:
        """Count entries by the bits in which they differ, as far as they can be in the list."""
        mean = block.photos.mean()
        signs, dim = _signs(mean), mean.shape[1]
        for chunk in self.queries.chunks():
            same = signs @ self._bits[chunk].T
            same[block.right_in(chunk)] = -np.inf
            differ = self._differ[chunk]
            self._as_near[chunk] += np.count_nonzero(same >= dim - 2 * differ, axis=0)
            listed = same >= dim - 2 * self._last[chunk]
            self._add(self._near[chunk], same, listed)
            listed &= mean @ self._asked[chunk].T >= self._cosine[chunk]
            self._add(self._rivals[chunk], same, listed)
            enough = np.cumsum(self._near[chunk], axis=1) >= SHORTLIST
            self._last[chunk] = np.where(enough[:, -1], enough.argmax(axis=1), dim)

    @staticmethod
    def _add(counts: Array, same: Array, which: Array) -> None:
        flat = np.flatnonzero(which)
        query, bins = flat % which.shape[1], counts.shape[1]
        differ = ((bins - 1 - same.ravel()[flat]) / 2).astype(np.int64)
        counts += np.bincount(query * bins + differ, minlength=counts.size).reshape(counts.shape)

    @property
    def ranks(self) -> Array:
        """By cosine where the right one is in the shortlist, else by bits."""
        upto = np.arange(self._rivals.shape[1]) <= self._last[:, None]
        rivals = (self._rivals * upto).sum(axis=1)
        found: Array = 1 + np.where(self._differ <= self._last, rivals, self._as_near)
        return found


def _signs(vectors: Vectors) -> Vectors:
    """1 where a component is above 0, else -1: their product counts the bits that agree."""
    return np.where(vectors > 0, np.float32(1), np.float32(-1))


def stored_bytes(dim: int, kind: str = "vector") -> int:
    """Of a vector in the table or its index, with its header."""
    return -(-dim * BITS[kind] // 8) + 8


def half(vectors: Vectors) -> Vectors:
    """As pgvector's halfvec has them."""
    return unit(vectors.astype(np.float16).astype(np.float32))
