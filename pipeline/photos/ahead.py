"""Photos fetched before they are asked for, where to fetch one is to wait: in an object store."""

import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.photos.files import FileStat, Photos

MEMORY = 256 * 2**20  # bytes of photos that are here or on their way, before they are asked for
REMEMBERED = 100_000  # photos whose state is kept, in case that more rows have them
LIMIT = 0.2  # of the time: who waits more for a store has it as the limit


def limit(waited: float | None) -> str:
    """'; the object store was the limit: ...' where it was; `waited` is a share of the time."""
    if waited is None or waited < LIMIT:
        return ""
    return f"; the object store was the limit: {waited:.0%} of the time went into waiting for it"


@dataclass(eq=False)
class _Fetch:
    """A photo that is expected by so many rows, and the bytes set aside for it."""

    rows: int = 0
    size: int = 0
    over: bool = False
    photo: Future[tuple[bytes, FileStat]] | None = None


class Ahead:
    """Reads photos for many threads; those of a store, `photos.readers` at a time, in advance.

    A photo that several rows expect at a time is fetched once. The first of those to come may
    always be fetched; the others are asked for while there is room, and wait for as much of it as
    they take, which the store's answer says, before their bytes come.
    """

    def __init__(self, photos: Photos, memory: int = MEMORY) -> None:
        self.photos = photos
        self.memory = memory
        self.waited_s = 0.0  # of all threads that asked
        self.fetched: dict[str | None, FileStat] = {}  # of a store, the first REMEMBERED
        self._expected: dict[str | None, _Fetch] = {}  # in the order in which they were
        self._held = 0
        self._over = False
        self._changed = threading.Condition()  # over all of the above
        self._pool = ThreadPoolExecutor(max(1, photos.readers), "read")

    def close(self, wait: bool) -> None:
        """Fetch nothing more; what is on its way comes to nothing."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
        self._pool.shutdown(wait=wait, cancel_futures=True)

    def expect(self, path: str | None) -> None:
        """Have a photo fetched, if that is worth it; for each call one of read() has to follow."""
        if not self.photos.readers:
            return
        with self._changed:
            fetch = self._expected.get(path)
            if fetch is None:
                fetch = self._expected[path] = _Fetch()
                fetch.photo = self._pool.submit(self._run, path, fetch)
            fetch.rows += 1

    def read(self, path: str | None) -> tuple[bytes, FileStat]:
        """As photos.read()."""
        with self._changed:
            fetch = self._expected.get(path)
        if fetch is None or fetch.photo is None:
            return self.photos.read(path)
        start = time.monotonic()
        try:
            return fetch.photo.result()
        finally:
            with self._changed:
                self.waited_s += time.monotonic() - start
                fetch.rows -= 1
                if not fetch.rows:
                    del self._expected[path]
                    self._set_aside(fetch, 0)

    def _run(self, path: str | None, fetch: _Fetch) -> tuple[bytes, FileStat]:
        size = 0
        try:
            self._take_room(fetch, 1)
            found = self.photos.read(path, lambda size: self._take_room(fetch, size))
            size = len(found[0])
            if len(self.fetched) < REMEMBERED:
                self.fetched[path] = found[1]
            return found
        finally:
            with self._changed:
                fetch.over = True
                self._set_aside(fetch, size)

    def _take_room(self, fetch: _Fetch, size: int) -> None:
        """Wait for so many bytes in all to be free for this photo, or for its turn."""

        def may_come() -> bool:
            if self._held - fetch.size + size <= self.memory:
                return True
            return fetch is next(each for each in self._expected.values() if not each.over)

        with self._changed:
            self._changed.wait_for(lambda: self._over or may_come())
            if self._over:
                raise CancelledError
            self._set_aside(fetch, size)

    def _set_aside(self, fetch: _Fetch, size: int) -> None:
        self._held += size - fetch.size
        fetch.size = size
        self._changed.notify_all()
