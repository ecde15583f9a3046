"""What the next run has to do: listings, photos, how many of them the cache knows, and how long."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from adbc_driver_manager.dbapi import Cursor

from pipeline.cache.vectors import VectorCache
from pipeline.database.connection import translated_errors
from pipeline.database.pending import Digest, Pending
from pipeline.encoder.model import Model, fingerprint, resolve_device, resolve_precision
from pipeline.photos.files import FileStat
from pipeline.photos.root import photos_at
from pipeline.select import select_images
from pipeline.stage import parquet
from pipeline.stage.errors import PipelineError
from pipeline.stage.settings import Environment, Settings


@dataclass(frozen=True)
class Outlook:
    """The next run. `cached` and `seconds` are None where they can't be told."""

    listings: int
    photos: int
    cached: int | None  # of `photos`, by path, size and mtime
    seconds: int | None  # to encode the others, at the last measured rate


def foresee(
    cursor: Cursor,
    pending: Pending,
    digest: Digest,
    chosen: Settings,
    environment: Environment,
    model: Model,
    rate: float | None,
) -> Outlook:
    """`rate` is in images a second. Of very many listings, a sample is looked up in the cache."""
    share: float | None = 0.0
    if digest.photos and not chosen.force:
        share = _cached_share(cursor, pending.sample, chosen, environment, model)
    cached = None if share is None else round(share * digest.photos)
    if rate is None or cached is None:
        return Outlook(digest.listings, digest.photos, cached, None)
    seconds = round((digest.photos - cached) / rate)
    return Outlook(digest.listings, digest.photos, cached, seconds)


def _cached_share(
    cursor: Cursor, sample: str, chosen: Settings, environment: Environment, model: Model
) -> float | None:
    """How much of the sample's photos the cache knows, 0 to 1; None where that can't be told."""
    if model.embed_dim is None:
        return None
    try:
        cache = _cache(chosen, model, model.embed_dim)
        if not cache.entries:
            return None if _has_others(cache) else 0.0
        paths = selected_paths(cursor, sample, chosen)
        photos = photos_at(environment.image_root, chosen, patient=False)
        there = [
            (path, found)
            for path, found in zip(paths, photos.stats(paths), strict=True)
            if path is not None and isinstance(found, FileStat)
        ]
    except (PipelineError, OSError):
        return None  # a run would say it better
    if not there:
        return 0.0
    names, stats = zip(*there, strict=True)
    sizes, mtimes = np.array([tuple(stat) for stat in stats], np.int64).T
    return len(cache.lookup_files(list(names), sizes, mtimes)) / len(paths)


def _cache(chosen: Settings, model: Model, dim: int) -> VectorCache:
    made_by = fingerprint(
        model,
        precision=resolve_precision(chosen.precision, resolve_device(chosen.device)),
        decode=chosen.decode,
        apply_exif_orientation=chosen.apply_exif_orientation,
    )
    return VectorCache.of(Path(chosen.cache_dir), made_by.as_dict(), dim)


def _has_others(cache: VectorCache) -> bool:
    """Whether there are vectors of another fingerprint.

    Where precision is auto, a machine with a GPU may have made them, and will run this too.
    """
    return any(folder != cache.folder for folder in cache.folder.parent.glob("*"))


def selected_paths(cursor: Cursor, candidates: str, chosen: Settings) -> list[str | None]:
    """The storage_path of each image that `select` would take of the candidates of a query."""
    with translated_errors():
        cursor.execute(candidates)
        frame = pl.DataFrame(cursor.fetch_arrow_table().cast(parquet.CANDIDATES))
    selected = select_images(frame, chosen.topk, chosen.exclude_stock, chosen.exclude_screenshots)
    return list(selected["storage_path"])
