"""The demo's marketplace: listings, image rows, feature rows, and the photos they speak of.

Either made up, with every kind of row that a real one has (`made_up`), or a folder of somebody's
own photos, in which each folder that holds images is a listing (`from_photos`).
"""

import functools
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import adbc_driver_postgresql.dbapi as adbc
import pyarrow as pa

from demo import render
from demo.render import Job, Size
from pipeline.stage.errors import SettingsError

FIRST_ID = 1000
FIRST_DAY = datetime(2026, 3, 1, 8, tzinfo=UTC)
OFFERS = 3  # listings, with photos of their own, of one and the same phone
CYCLE = 40  # the special listings come back after as many
PHOTO_SIZE: Size = (600, 800)
FEATURE_VERSION = 1
# What people keep photos in; whether each file can be read is for the job to find out.
IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".png", ".webp", ".heic", ".heif", ".avif", ".gif", ".bmp", ".tif", ".tiff"]
)
TRUNCATED_BYTES = 1024  # a header that promises a photo, and none of its pixels

# What is special about a listing, by its place in the cycle.
SPAM, NO_URL, NO_DATE, NO_IMAGES = 0, 1, 2, 3
ONLY_STOCK, TRUNCATED_FILE, MISSING_FILE, LENDS_PHOTO, BORROWS_PHOTO = 6, 7, 8, 9, 10
DUPLICATE_FEATURES, NO_FEATURES, MANY_PHOTOS = 11, 12, 16
STOCK_FIRST, SCREENSHOT_LAST = (4, 14, 24), (5, 15)

LISTINGS = pa.schema(
    [
        ("generation", pa.int32()),
        ("listing_id", pa.int64()),
        ("edited_date", pa.timestamp("us", tz="UTC")),
        ("url", pa.string()),
        ("spam", pa.string()),
        ("title", pa.string()),
    ]
)
IMAGES = pa.schema(
    [
        ("generation", pa.int32()),
        ("listing_id", pa.int64()),
        ("image_index", pa.int32()),
        ("storage_path", pa.string()),
    ]
)
FEATURES = pa.schema(
    [
        ("feature_version", pa.int32()),
        ("generation", pa.int32()),
        ("listing_id", pa.int64()),
        ("image_index", pa.int32()),
        ("is_stock_photo", pa.bool_()),
        ("battery_screenshot", pa.bool_()),
        ("photo_quality_level", pa.int16()),
        ("background_clean_level", pa.int16()),
    ]
)
TABLES = (
    ("iPhone", "iphone_listings", LISTINGS),
    ("iPhone", "iphone_image_assets", IMAGES),
    ("ml", "iphone_image_features_v1", FEATURES),
)


@dataclass
class Marketplace:
    """The rows of the three tables, and what has to be done for their files to be there."""

    root: Path
    listings: list[dict[str, Any]] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)
    features: list[dict[str, Any]] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    copies: list[tuple[Path, Path]] = field(default_factory=list)


def made_up(root: Path, listings: int, size: Size = PHOTO_SIZE) -> Marketplace:
    """`listings` listings whose photos will be drawn under `root`; the same each time."""
    market = Marketplace(root)
    for number in range(listings):
        _add_listing(market, number, phone=number % max(1, listings // OFFERS), size=size)
    return market


def _add_listing(market: Marketplace, number: int, phone: int, size: Size) -> None:
    place = number % CYCLE
    listing = render.draw_listing(phone)
    key = {
        "generation": render.MODELS[listing.model].generation,
        "listing_id": FIRST_ID + number,
    }
    edited = FIRST_DAY + timedelta(minutes=37 * number, microseconds=number)
    market.listings.append(
        key
        | {
            "edited_date": None if place == NO_DATE else edited,
            "url": None if place == NO_URL else f"https://market.example/{key['listing_id']}",
            "spam": "reported" if place == SPAM else None,
            "title": f"{listing.title}, {listing.background}",
        }
    )
    if place == NO_IMAGES:
        return
    for index, picture in enumerate(_pictures(listing, number, size)):
        path = f"{key['listing_id']}/{index}.jpg"
        market.images.append(key | {"image_index": index, "storage_path": path})
        _add_file(market, number, index, Job(market.root / path, picture))
        _add_features(market, number, key | {"image_index": index}, picture)


Picture = functools.partial[Any]


def _pictures(listing: render.Listing, number: int, size: Size) -> Iterator[Picture]:
    """What the listing's images show, in order."""
    place = number % CYCLE
    stock = functools.partial(render.render_stock, listing.model, listing.colour, size=size)
    if place in STOCK_FIRST or place == ONLY_STOCK:
        yield stock
    if place == ONLY_STOCK:
        yield stock
        return
    for k in range(7 if place == MANY_PHOTOS else 3 + number % 3):
        yield functools.partial(render.render_view, listing, k, size, number)
    if place in SCREENSHOT_LAST:
        yield functools.partial(render.render_screenshot, size=size, seed=number)


def _add_file(market: Marketplace, number: int, index: int, job: Job) -> None:
    """The job that draws the file, or what happens to this one instead."""
    place = number % CYCLE
    if place == MISSING_FILE and index == 1:
        return
    if place == BORROWS_PHOTO and index == 0:
        lender = market.root / f"{FIRST_ID + number - 1}" / job.path.name
        market.copies.append((lender, job.path))
        return
    if place == TRUNCATED_FILE and index == 0:
        job = replace(job, keep_bytes=TRUNCATED_BYTES)
    market.jobs.append(job)


def _add_features(market: Marketplace, number: int, key: dict[str, int], picture: Picture) -> None:
    place, index = number % CYCLE, key["image_index"]
    if place == NO_FEATURES:
        return
    unknown = (number + index) % 17 == 0
    row = {
        "feature_version": FEATURE_VERSION,
        **key,
        "is_stock_photo": picture.func is render.render_stock,
        "battery_screenshot": picture.func is render.render_screenshot,
        "photo_quality_level": None if unknown else (7 * number + 3 * index) % 4,
        "background_clean_level": (number + index) % 4,
    }
    market.features += [row] * (2 if place == DUPLICATE_FEATURES else 1)


def draw_photos(market: Marketplace, workers: int) -> int:
    """Make the files that are not there yet, and leave the others as they are; how many."""
    jobs = [job for job in market.jobs if not job.path.exists()]
    if jobs:
        render.write_all(jobs, workers)
    copies = [(source, to) for source, to in market.copies if not to.exists()]
    for source, to in copies:
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, to)
    return len(jobs) + len(copies)


def from_photos(folder: Path) -> Marketplace:
    """Each folder below `folder` (or itself) that holds images, as a listing.

    The listing's title is the folder's path, its number a hash of that, so folders can come and
    go; its edited_date is the time of its newest file, so a changed folder is pending again.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise SettingsError("a folder of photos", "none", str(folder), "make demo PHOTOS=folder")
    market = Marketplace(folder)
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        photos = sorted(name for name in files if _is_photo(name))
        if photos:
            _add_folder(market, Path(place), photos)
    if not market.listings:
        raise SettingsError(
            "at least one image in a folder", "none", str(folder), "each subfolder is a listing"
        )
    return market


def _is_photo(name: str) -> bool:
    """An image by its suffix, not hidden, with a name that the database can hold."""
    suffix = os.path.splitext(name)[1].lower()
    return not name.startswith(".") and suffix in IMAGE_SUFFIXES and name.isprintable()


def _add_folder(market: Marketplace, place: Path, photos: list[str]) -> None:
    name = place.relative_to(market.root).as_posix()
    if not name.isprintable():
        return
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6])
    newest = max((place / photo).stat(follow_symlinks=False).st_mtime_ns for photo in photos)
    key = {"generation": 0, "listing_id": number}
    market.listings.append(
        key
        | {
            "edited_date": datetime.fromtimestamp(0, UTC) + timedelta(microseconds=newest // 1000),
            "url": f"file:{name}",
            "spam": None,
            "title": place.name if name == "." else name,
        }
    )
    for index, photo in enumerate(photos):
        path = photo if name == "." else f"{name}/{photo}"
        market.images.append(key | {"image_index": index, "storage_path": path})


def is_empty(dsn: str) -> bool:
    """Whether nobody has put a listing into the database yet."""
    with adbc.connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute('select 1 from "iPhone".iphone_listings limit 1')
        return cursor.fetchone() is None


def fill(dsn: str, market: Marketplace) -> None:
    """Make the three tables hold exactly this marketplace, in one transaction."""
    with adbc.connect(dsn) as connection, connection.cursor() as cursor:
        # Like any real marketplace, the table has a column more than the job reads.
        cursor.execute('alter table "iPhone".iphone_listings add column if not exists title text')
        for (schema, table, columns), rows in zip(
            TABLES, (market.listings, market.images, market.features), strict=True
        ):
            cursor.execute(f'delete from "{schema}"."{table}"')
            data = pa.Table.from_pylist(rows, schema=columns)
            cursor.adbc_ingest(table, data, mode="append", db_schema_name=schema)
        connection.commit()
