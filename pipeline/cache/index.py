"""Where an image's entry is: 64-bit hashes to places in the parts, in memory."""

import numpy as np
import numpy.typing as npt

from pipeline.cache.parts import Hashes, Ints, written_ns


class Parts:
    """The parts by number: name, when they were written, and whether they are still there."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.known: set[str] = set()
        self._written: list[int] = []
        self._there: list[bool] = []

    def add(self, name: str) -> np.uint64:
        self.names.append(name)
        self.known.add(name)
        self._written.append(written_ns(name))
        self._there.append(True)
        return np.uint64(len(self.names) - 1)

    def drop(self, part: int) -> None:
        self._there[part] = False

    @property
    def written(self) -> Ints:
        return np.array(self._written, np.int64)

    @property
    def there(self) -> npt.NDArray[np.bool_]:
        return np.array(self._there, bool)


class Index:
    """From 64-bit hashes to places (part << 32 | row), the newest entry of each hash only.

    Sorted segments, each at most half as long as the one before, so that an addition is cheap
    and a lookup searches few. Two keys with one hash shadow each other: the older is a miss.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._segments: list[tuple[Hashes, Hashes]] = []

    def __len__(self) -> int:
        return sum(len(hashes) for hashes, _ in self._segments)

    def add(self, hashes: Hashes, places: Hashes) -> None:
        if not len(hashes):
            return
        self._segments.append(self._newest(hashes, places))
        while len(self._segments) > 1 and len(self._segments[-1][0]) * 2 > len(
            self._segments[-2][0]
        ):
            one, other = self._segments.pop(), self._segments.pop()
            self._segments.append(
                self._newest(np.concatenate([one[0], other[0]]), np.concatenate([one[1], other[1]]))
            )

    def _newest(self, hashes: Hashes, places: Hashes) -> tuple[Hashes, Hashes]:
        kept = newest(hashes, places, self._parts.written)
        return hashes[kept], places[kept]

    def find(self, wanted: Hashes) -> Ints:
        """The place of each hash, -1 where there is none."""
        written, there = self._parts.written, self._parts.there
        best = np.full(len(wanted), -1)
        age = np.full(len(wanted), -1)
        for hashes, places in self._segments:
            at = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
            place = places[at].astype(np.int64)
            part = place >> 32
            better = (hashes[at] == wanted) & there[part] & (written[part] > age)
            best[better], age[better] = place[better], written[part[better]]
        return best


def newest(hashes: Hashes, places: Hashes, written: Ints) -> Ints:
    """Positions, in the order of the hashes, of the newest place (part << 32 | row) of each."""
    order = np.lexsort((places, written[(places >> np.uint64(32)).astype(np.int64)], hashes))
    ordered = hashes[order]
    last = np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)]
    kept: Ints = order[last]
    return kept
