"""What the target table must hold, worked out in plain Python from the rows and the files.

It shares no code with the stages but the decoder and the encoder themselves, which have tests of
their own: no SQL of the export, no polars, no cache, no DuckDB.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.encoder.model import find_model
from pipeline.encoder.tower import load_encoder
from pipeline.photos.files import PhotoError
from pipeline.photos.pixels import Transform, load_pixels

if TYPE_CHECKING:
    from conftest import Database

Key = tuple[int, str]  # listing_id, edited_date as Postgres writes it
Vector = np.ndarray
Embed = Callable[[str], Vector | None]


@dataclass(frozen=True)
class Row:
    """A listing's vector, float64 of unit length, and how many images are in it."""

    vec: Vector
    n_images: int


def expected_rows(database: "Database", embed: Embed, topk: int) -> dict[Key, Row]:
    """The row of every eligible listing with at least one image that can be embedded."""
    images: dict[tuple[int, int], list[tuple[int, str]]] = {}
    for generation, listing, index, path in database.execute(
        'SELECT generation, listing_id, image_index, storage_path FROM "iPhone".iphone_image_assets'
    ):
        images.setdefault((generation, listing), []).append((index, path))
    flags = {
        (generation, listing, index): (stock or screenshot, 10 * (quality or 0) + 3 * (clean or 0))
        for generation, listing, index, stock, screenshot, quality, clean in database.execute(
            "SELECT generation, listing_id, image_index, is_stock_photo, battery_screenshot,"
            " photo_quality_level, background_clean_level FROM ml.iphone_image_features_v1"
            " WHERE feature_version = 1"
        )
    }
    rows: dict[Key, Row] = {}
    for generation, listing, edited, url, spam in database.execute(
        "SELECT generation, listing_id, edited_date::text, url, spam"
        ' FROM "iPhone".iphone_listings ORDER BY generation'
    ):
        candidates = images.get((generation, listing))
        if not candidates or not edited or url is None or spam is not None:
            continue
        chosen = _top(generation, listing, candidates, flags, topk)
        found = [vec for vec in map(embed, chosen) if vec is not None]
        rows.pop((listing, edited), None)  # the highest generation wins
        if found:
            mean = np.mean([vec.astype(np.float64) for vec in found], axis=0)
            rows[listing, edited] = Row(mean / np.linalg.norm(mean), len(found))
    return rows


def _top(
    generation: int,
    listing: int,
    candidates: list[tuple[int, str]],
    flags: dict[tuple[int, int, int], tuple[bool, int]],
    topk: int,
) -> list[str]:
    """The storage paths of the best K; of the first K if all are left out."""
    scored = [
        (*flags.get((generation, listing, index), (False, 0)), index, path)
        for index, path in candidates
    ]
    wanted = [(-score, index, path) for out, score, index, path in scored if not out]
    wanted = wanted or [(0, index, path) for _, _, index, path in scored]
    return [path for _, _, path in sorted(wanted)[:topk]]


def embedder(encoder: Path, photos: Path) -> Embed:
    """A function from a storage path to the unit vector of its file, None where there is none.

    Each photo is encoded alone, and once for each content.
    """
    model = find_model(f"local-dir:{encoder}", "")
    assert model.preprocess is not None
    transform = Transform.from_preprocess_cfg(model.preprocess)
    loaded = load_encoder(model, "cpu", "fp32", 1, 16)
    known: dict[bytes, Vector | None] = {}

    def embed(storage_path: str) -> Vector | None:
        try:
            data = (photos / storage_path).read_bytes()
        except FileNotFoundError:
            return None
        digest = hashlib.sha256(data).digest()
        if digest not in known:
            try:
                pixels = load_pixels(data, transform, "full", True, 80_000_000)
                known[digest] = loaded.encode(pixels[None])[0]
            except PhotoError:
                known[digest] = None
        return known[digest]

    return embed
