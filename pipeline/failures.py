"""Listings left without a vector: they wait until one of their files appears or changes.

They stay pending, but cause no rerun and take no place under `limit_listings` while their files
and candidate rows are as they were. `cache_dir/waiting.json` remembers them from load to load;
deleting it makes the next run try them again, no more.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import parquet
from pipeline.command import log
from pipeline.photo_files import PhotoError, PhotoFolder
from pipeline.settings import Settings

LEDGER = "waiting.json"
_KEY = ("generation", "listing_id", "edited_date")
_IDENTITY = ("source", "model_rev", "pca_rev")
_POLICY = ("follow_symlinks", "max_image_bytes", "max_image_pixels")

Listing = dict[str, Any]


def waiting(chosen: Settings, image_root: Path, identity: dict[str, str]) -> str:
    """The listings to leave out of an export: JSON as `source.prepare` takes it."""
    folder = _photos(chosen, image_root)
    listings = [
        {name: listing[name] for name in (*_KEY, "candidates")}
        for listing in _read(Path(chosen.cache_dir)).get(_identity_key(identity), [])
        if listing["policy"] == _policy(chosen) and not _changed(listing, folder)
    ]
    return json.dumps(listings)


def changed_files(report: Path, chosen: Settings, image_root: Path) -> str:
    """A digest of the files that failed in the last run and have appeared or changed since.

    `report` is aggregate's failures.json; empty if nothing failed or all is as it was.
    """
    if not report.exists():
        return ""
    folder = _photos(chosen, image_root)
    listings = json.loads(report.read_text())["listings_without_vector"]
    changed = [change for listing in listings for change in _changed(listing, folder)]
    return hashlib.sha256(json.dumps(changed).encode()).hexdigest()[:12] if changed else ""


def remember(
    report: Path, tried: set[tuple[int, int, str]], chosen: Settings, identity: dict[str, str]
) -> int:
    """Replace what is remembered of the listings tried in this run; returns how many wait now.

    `tried` holds the (generation, listing_id, ISO edited_date) of every exported listing.
    """
    failed = json.loads(report.read_text())["listings_without_vector"]
    waits = [{**listing, "policy": _policy(chosen)} for listing in failed]
    newest = {(generation, row): edited for generation, row, edited in sorted(tried)}
    path = Path(chosen.cache_dir) / LEDGER
    try:
        with _locked(path):
            ledger = _read(path.parent)
            waits += [  # what was tried is replaced, and so are its earlier edits
                listing
                for listing in ledger.get(_identity_key(identity), [])
                if listing["edited_date"]
                > newest.get((listing["generation"], listing["listing_id"]), "")
            ]
            ledger[_identity_key(identity)] = waits
            parquet.write_json(path, {key: value for key, value in ledger.items() if value})
    except OSError as error:  # the rows are in the table: at stake is a retry too many
        reason = os.strerror(error.errno) if error.errno else error
        log.warning("%s cannot be written: %s", path, reason)
    return len(waits)


def _changed(listing: Listing, folder: PhotoFolder) -> list[tuple[str, int, int]]:
    """The files of a listing that can be read now and differ from what was tried."""
    changes = []
    for file in listing["files"]:
        try:
            now = folder.stat(file["storage_path"])
        except PhotoError:
            continue
        if (now.size, now.mtime_ns) != (file["size"], file["mtime_ns"]):
            changes.append((file["storage_path"], now.size, now.mtime_ns))
    return changes


def _photos(chosen: Settings, image_root: Path) -> PhotoFolder:
    return PhotoFolder(image_root, chosen.follow_symlinks, chosen.max_image_bytes)


def _policy(chosen: Settings) -> list[Any]:
    return [getattr(chosen, name) for name in _POLICY]


def _identity_key(identity: dict[str, str]) -> str:
    return json.dumps([identity[name] for name in _IDENTITY])


def _read(cache_dir: Path) -> dict[str, list[Listing]]:
    try:
        return dict(json.loads((cache_dir / LEDGER).read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process at a time replaces the ledger; the kernel drops the lock with its holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
