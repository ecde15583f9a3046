"""Thumbnails of many photos for a page, read and decoded on all cores."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from pipeline.photos.ahead import Ahead
from pipeline.photos.files import PhotoError
from pipeline.photos.root import photos_at
from pipeline.stage.errors import StorageError
from pipeline.stage.settings import Environment, Settings

MOST_BYTES = 14_000_000  # of thumbnails


class Album:
    """Thumbnails, each made once, until there are MOST_BYTES of them."""

    def __init__(self, chosen: Settings, environment: Environment) -> None:
        self._root = photos_at(environment.image_root, chosen, patient=False)
        self._chosen = chosen
        self._bytes = 0
        self._made: dict[tuple[str, int], tuple[str, str]] = {}

    def make(self, wanted: Iterable[tuple[str, int]]) -> None:
        """Make these, on all cores."""
        keys, ahead = list(dict.fromkeys(wanted)), Ahead(self._root)
        for path, _ in keys:
            ahead.expect(path)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for key, made in zip(keys, pool.map(partial(self._make, ahead), keys), strict=True):
                self._made[key] = made
                self._bytes += len(made[0])
        ahead.close(wait=False)

    def thumbnail(self, path: str, side: int) -> tuple[str, str]:
        """A data URI, or nothing, and why."""
        return self._made.get((path, side), ("", "no room on this page"))

    def _make(self, ahead: Ahead, key: tuple[str, int]) -> tuple[str, str]:
        from pipeline.photos.thumbnail import thumbnail

        path, side = key
        if self._bytes > MOST_BYTES:
            return "", "no room on this page"
        try:
            return thumbnail(ahead.read(path)[0], side, self._chosen), ""
        except (PhotoError, StorageError) as error:
            return "", str(error)
