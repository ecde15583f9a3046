"""Photos grouped by the listing that they are of, as arrays: what a side is, and what asks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

NEAR = 0.98  # a cosine of nearly the same

Array = npt.NDArray[Any]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Photos:
    """The photos of some listings, those of one together and the best rank first.

    `listing` int64 and `size` (one each a listing); `vec` float32 (photos, dim), unit vectors,
    `index` int32, `path` and `stock` (one each a photo).
    """

    listing: Array
    size: Array
    vec: Vectors
    index: Array
    path: Array
    stock: Array

    @property
    def start(self) -> Array:
        """The row of each listing's first photo."""
        start: Array = np.cumsum(self.size) - self.size
        return start

    @property
    def place(self) -> Array:
        """Of each photo its place among those of its listing, from 0."""
        place: Array = np.arange(len(self.vec)) - np.repeat(self.start, self.size)
        return place

    def kept(self, rows: Array) -> Self:
        """Only the photos of a boolean mask; a listing that keeps none is gone."""
        size = np.bincount(np.repeat(np.arange(len(self.size)), self.size)[rows],
                           minlength=len(self.size))  # fmt: skip
        there = size > 0
        return type(self)(self.listing[there], size[there], self.vec[rows], self.index[rows],
                          self.path[rows], self.stock[rows])  # fmt: skip

    def take(self, listings: Array) -> Self:
        """These listings, by their numbers, in this order."""
        size = self.size[listings]
        first = np.repeat(self.start[listings] - (np.cumsum(size) - size), size)
        rows = first + np.arange(size.sum())
        return type(self)(self.listing[listings], size, self.vec[rows], self.index[rows],
                          self.path[rows], self.stock[rows])  # fmt: skip

    def take_one(self, listing: int) -> Self:
        """That of a number alone."""
        return self.take(np.array([listing]))

    @classmethod
    def together(cls, parts: "Sequence[Photos]") -> Self:
        """One after the other; one part at least."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts])
                     for name in cls.__dataclass_fields__))  # fmt: skip

    def first(self, photos: int) -> Self:
        """Of each listing so many photos at most."""
        return self.kept(self.place < photos)

    def without_stock(self) -> Self:
        """Without stock photos, but where a listing has nothing else."""
        of = np.repeat(np.arange(len(self.size)), self.size)
        some = np.bincount(of[~self.stock], minlength=len(self.size)) > 0
        return self.kept(~self.stock | ~some[of])

    def mean(self) -> Vectors:
        """Unit vectors (listings, dim): the direction of the mean; 0 where there is none."""
        if not len(self.size):
            return self.vec[:0]
        return unit(np.add.reduceat(self.vec, self.start, dtype=np.float32))


def unit(vectors: Array) -> Vectors:
    """The same directions at length 1, float32; what has none stays 0."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    found: Vectors = (vectors / np.maximum(length, 1e-6)).astype(np.float32)
    return found
