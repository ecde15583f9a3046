"""All choices on one split, in passes over the shards: who asks, who is found, who instead.

Memory holds the photos of the queries, a block of the gallery and its scores, however many
listings there are.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from pipeline.encoder.projection import Moments
from pipeline.retrieval import bootstrap
from pipeline.retrieval.choices import (
    SHORTLIST,
    BestPair,
    BestPhoto,
    Bits,
    Block,
    Choice,
    Means,
    Ours,
    Projected,
    Projection,
    Queries,
    half,
    stored_bytes,
)
from pipeline.retrieval.halves import ALL, B, Halves, Split, hashed
from pipeline.retrieval.photos import NEAR, Array, Photos, Vectors
from pipeline.stage.errors import DataError

MOST_QUERIES = 5_000
LADDER = (1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 48)  # photos of a side
DIMENSIONS = (256, 128, 64)
WORST = 12  # misses that are shown


@dataclass
class Found:
    """What the first pass leaves: the queries, and the figures of what was split."""

    dim: int
    seed: int
    photos: int = 0
    stock: int = 0
    split: int = 0  # listings with two sides
    distractors: int = 0
    most: int = 0  # photos of a side
    entry_photos: int = 0
    queries: Queries | None = None
    others: list[Moments] = field(init=False)  # of each fold: of the listings that are not in it
    _waiting: list[tuple[Array, Queries]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.others = [Moments(self.dim), Moments(self.dim)]

    def add(self, part: Split) -> None:
        """Another batch."""
        asked, gallery = part.asked, part.gallery
        right = part.photos.kept(part.side == B)
        self.photos += len(part.side)
        self.stock += int(part.photos.stock.sum())
        self.split += len(asked.size)
        self.distractors += len(part.photos.kept(part.side == ALL).size)
        self.entry_photos += len(gallery.vec)
        self.most = max(self.most, *(int(side.size.max(initial=0)) for side in (asked, right)))
        self._fit(part.photos)
        order = np.array([hashed(f"{self.seed}/{i}") for i in asked.listing.tolist()], np.uint64)
        self._waiting.append((order, Queries(asked, right)))
        if sum(len(order) for order, _ in self._waiting) > 2 * MOST_QUERIES:
            self.choose()

    def choose(self) -> None:
        """Of the queries so far keep those with the smallest hashes, in their order."""
        order = np.concatenate([order for order, _ in self._waiting])
        first = np.argsort(order, kind="stable")[:MOST_QUERIES]
        asked, right = (
            Photos.together([getattr(q, side) for _, q in self._waiting]).take(first)
            for side in ("asked", "right")
        )
        self.queries = Queries(asked, right)
        self._waiting = [(order[first], self.queries)]

    def _fit(self, photos: Photos) -> None:
        """Listings of one fold go into the projection of the other's."""
        means, folds = photos.mean(), fold(photos.listing, self.seed)
        for number, others in enumerate(self.others):
            others.add(means[folds != number])

    def projections(self, dimensions: int) -> list[Projection]:
        """That of each fold."""
        return [Projection.of(others.fit(dimensions)) for others in self.others]


def fold(listing: Array, seed: int) -> Array:
    """0 or 1 for each listing."""
    return np.array([hashed(f"{seed}/{i}/fold") & 1 for i in listing.tolist()], np.intp)


def evaluate(halves: Halves, dim: int, seed: int, threads: int) -> tuple[dict[str, Any], "Misses"]:
    """The figures, the choices and the ranks, as evaluate.json has them; and the worst misses.

    DataError where no listing can be split.
    """
    found = Found(dim, seed)
    for part in halves.splits():
        found.add(part)
    if not found.split:
        raise DataError(
            "a listing with two photos that are not nearly the same",
            f"none among {found.distractors:,} listings with a vector", "results/encode",
            "all listings are evaluated with --config source=trial, see docs/evaluate.md",
        )  # fmt: skip
    found.choose()
    assert found.queries
    choices = list(_choices(found.queries, found))
    with ThreadPoolExecutor(threads) as pool:  # no choice waits for another
        for part in halves.splits():
            block = Block(part.gallery, found.queries)
            list(pool.map(lambda choice, block=block: choice.count(block), choices))
    ours = choices[0]
    assert isinstance(ours, Ours)
    misses = Misses(found.queries, ours)
    for part in halves.splits():
        misses.add(part)
    return _document(found, choices, misses), misses


def _choices(queries: Queries, found: Found) -> Iterator[Choice]:
    """Ours first, with which the others are compared."""
    size = stored_bytes(found.dim)
    all_photos = size * found.entry_photos / (found.split + found.distractors)
    yield Ours(size, queries)
    for photos in LADDER:
        if photos < found.most:
            yield Means(f"K = {photos}", "photos", size, queries, partial(_mean_of, photos))
    if found.most > 1:
        yield BestPhoto("best single photo", "mean", all_photos, queries)
        yield BestPair("best pair of photos", "mean", all_photos, queries)
    if found.stock:
        yield Means("without stock photos", "stock", size, queries, _mean_without_stock)
    folds = fold(queries.asked.listing, found.seed)
    fits = [d for d in DIMENSIONS if d < min(found.dim, *(others.rows for others in found.others))]
    most = found.projections(max(fits)) if fits else []
    for dimensions in fits:
        of = [each.first(dimensions) for each in most]
        name = f"{dimensions} dimensions"
        yield Projected(name, "dimensions", stored_bytes(dimensions), queries, of, folds)
    yield Means("halfvec", "storage", stored_bytes(found.dim, "halfvec"), queries, _halves)
    yield Bits(
        f"bits, the best {SHORTLIST} re-ranked",
        "bits",
        size + stored_bytes(found.dim, "bits"),
        queries,
    )


def _mean_of(number: int, photos: Photos) -> Vectors:
    return photos.first(number).mean()


def _mean_without_stock(photos: Photos) -> Vectors:
    return photos.without_stock().mean()


def _halves(photos: Photos) -> Vectors:
    return half(photos.mean())


class Misses:
    """What was taken for the right entry: how often nearly the same, and the worst as pictures."""

    def __init__(self, queries: Queries, ours: Ours) -> None:
        self.sides = queries.asked, queries.right
        self.ranks, self.rival = ours.ranks, ours.rival
        self.near = np.zeros(len(queries), bool)
        wrong = np.flatnonzero(self.ranks > 1)
        self.worst = wrong[np.argsort(-self.ranks[wrong], kind="stable")][:WORST].tolist()
        self.found: dict[int, list[str]] = {}  # by query, the photos of the entry that was found
        order = np.argsort(self.rival, kind="stable")
        self._queries_of = order, self.rival[order]

    def add(self, part: Split) -> None:
        """Another batch of all photos: is a rival in it?"""
        order, rivals = self._queries_of
        low, high = (np.searchsorted(rivals, part.photos.listing, side) for side in _SIDES)
        for entry in np.flatnonzero(high > low).tolist():
            theirs = part.photos.take_one(entry).vec
            for query in order[low[entry] : high[entry]].tolist():
                mine = [side.take_one(query).vec for side in self.sides]
                self.near[query] = max((theirs @ vec.T).max() for vec in mine) >= NEAR
        gallery = part.gallery
        for query in self.worst:
            found = np.flatnonzero(gallery.listing == self.rival[query])
            if len(found):
                self.found[query] = gallery.take(found).path.tolist()


_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")


def _document(found: Found, choices: Sequence[Choice], misses: Misses) -> dict[str, Any]:
    ours, seed = choices[0], found.seed
    return {
        "seed": seed,
        "queries": len(ours.queries),
        "asked_of": found.split,
        "gallery": found.split + found.distractors,
        "distractors": found.distractors,
        "photos": found.photos,
        "most_photos_of_a_side": found.most,
        "dimensions": found.dim,
        **bootstrap.figures(ours.ranks, seed),
        "rival_is_near_duplicate": round(float(misses.near.mean()), bootstrap.DIGITS),
        "choices": [_choice(each, ours, seed) for each in choices],
        "ranks": list(_ranks(ours)),
    }


def _choice(choice: Choice, ours: Choice, seed: int) -> dict[str, Any]:
    of_ours = bootstrap.differences(choice.ranks, ours.ranks, seed) if choice is not ours else None
    return {
        "name": choice.name,
        "group": choice.group,
        "bytes": round(choice.size),
        **bootstrap.figures(choice.ranks, seed),
        "difference": of_ours,
    }


def _ranks(ours: Choice) -> Iterator[dict[str, Any]]:
    """Of each query its rank, and a digest of its halves: equal ones can be compared in pairs."""
    sides = [_texts(ours.queries.asked), _texts(ours.queries.right)]
    listings = ours.queries.asked.listing.tolist()
    for listing, rank, a, b in zip(listings, ours.ranks.tolist(), *sides, strict=True):
        digest = blake2b(f"A{a}B{b}".encode(), digest_size=4).hexdigest()
        yield {"listing_id": listing, "rank": rank, "halves": digest}


def _texts(side: Photos) -> list[str]:
    ends = np.cumsum(side.size).tolist()
    named = [f"{i} {path}" for i, path in zip(side.index.tolist(), side.path, strict=True)]
    return [str(sorted(named[end - size : end]))
            for end, size in zip(ends, side.size.tolist(), strict=True)]  # fmt: skip
