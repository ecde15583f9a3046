"""One listing's way from its rows to its vector, and where it ended."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
from adbc_driver_manager.dbapi import Cursor

from pipeline.database import listing, target, waiting
from pipeline.database.connection import connect, quoted
from pipeline.database.inputs import check_inputs
from pipeline.database.listing import Row, Vector
from pipeline.database.pending import prepare
from pipeline.encoder.model import identity_of, model_of
from pipeline.photos.files import PhotoError
from pipeline.photos.root import photos_at
from pipeline.select import select_images, why_not
from pipeline.stage import command, settings
from pipeline.stage.errors import DatabaseError, StorageError
from pipeline.stage.settings import Environment, Settings

RULES = {
    "spam": "spam is not NULL",
    "no_edited_date": "edited_date is NULL",
    "no_url": "url is NULL",
    "no_generation": "generation is NULL",
    "bad_date": "edited_date is infinite or outside of the years 1 to 9999",
    "no_images": "no image row of its generation has an image_index",
    "other_generation": "a higher generation of the same edit wins",
}


@dataclass(frozen=True)
class Photo:
    """A candidate, and what became of it."""

    row: dict[str, Any]  # parquet.CANDIDATES
    chosen: str  # 'rank 1', 'fallback, rank 1', or why not
    became: str  # of the file; empty where it was not selected


@dataclass(frozen=True)
class Edit:
    """A row of the listings table, and how far it came."""

    row: Row
    standing: str
    photos: list[Photo] = field(default_factory=list)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Which listing."""
    parser.add_argument("listing_id", type=command.bigint, metavar="LISTING_ID")


def main(args: argparse.Namespace) -> None:
    """Print all that is known of it."""
    chosen, environment = settings.read_config(args.config), Environment.read()
    print("\n".join(lines(args.listing_id, chosen, environment)))


def lines(listing_id: int, chosen: Settings, environment: Environment) -> Iterator[str]:
    """DatabaseError: neither a row nor a vector of it is there."""
    model = model_of(chosen)
    chosen = chosen.model_copy(update=identity_of(chosen, model)._asdict())
    with connect(read_only=True, repeatable=True) as connection, connection.cursor() as cursor:
        check_inputs(cursor, environment)
        target.check(cursor, environment, model.dimension)
        rows = listing.rows(cursor, environment, listing_id)
        vectors = listing.vectors(cursor, environment, listing_id)
        if not rows and not vectors:
            raise DatabaseError(
                f"listing {listing_id}", "neither a row nor a vector of it",
                f"{quoted(environment.listings)}, {quoted(environment.vectors)}",
            )  # fmt: skip
        image_rows = listing.image_rows(cursor, environment, listing_id)
        judge = Judge(cursor, chosen, environment, listing_id, vectors)
        edits = list(judge.edits(rows))
    yield f"listing {listing_id} in {quoted(environment.listings)}"
    if not rows:
        yield "  no row: it is deleted; retire --gone deletes its vectors"
    if not image_rows:
        yield f"  no image row in {quoted(environment.images)}"
    for generation, count in image_rows.items():
        yield f"  {count} image rows of generation {generation}"
    for edit in edits:
        yield ""
        yield f"generation {edit.row.generation}, edited {edit.row.edited}: {edit.standing}"
        yield from _table(edit.photos)
    yield ""
    yield from _vectors(vectors, environment)


class Judge:
    """How far the rows of one listing came, under the key of the settings."""

    def __init__(
        self,
        cursor: Cursor,
        chosen: Settings,
        environment: Environment,
        listing_id: int,
        vectors: list[Vector],
    ) -> None:
        self._cursor, self._chosen, self._environment = cursor, chosen, environment
        self._listing_id = listing_id
        self._done = {v.edited for v in vectors if v.key == chosen.identity}
        files = waiting.Files(chosen, environment.image_root)
        left_out = waiting.left_out(files, chosen, chosen.identity)
        pending = prepare(cursor, environment, chosen, left_out)
        self._next = listing.edits_in(cursor, pending.listings, listing_id)
        self._due = listing.edits_in(cursor, pending.due, listing_id)
        self._waits = waiting.files_of(chosen, chosen.identity, listing_id)
        self._root = photos_at(environment.image_root, chosen, patient=False)
        self._encoded = _encoded(listing_id)

    def edits(self, rows: list[Row]) -> Iterator[Edit]:
        """Each row with its standing; the photos of those that are eligible."""
        seen: set[str | None] = set()
        for row in rows:
            if row.left_out is not None:
                said = f" ({row.spam!r})" if row.left_out == "spam" else ""
                yield Edit(row, f"left out, {row.left_out}: {RULES[row.left_out]}{said}")
            elif row.edited in seen:
                yield Edit(row, f"left out, other_generation: {RULES['other_generation']}")
            else:
                seen.add(row.edited)
                yield Edit(row, self._standing(str(row.edited)), list(self._photos(row)))

    def _standing(self, edited: str) -> str:
        when = datetime.fromisoformat(edited)
        again = " again, by force" if edited in self._done else ""
        if when in self._next:
            return f"eligible; pending: the next run embeds it{again}"
        if edited in self._done:
            return "eligible; it has a vector"
        if when in self._due:
            return "eligible; pending, but beyond limit_listings: a later run embeds it"
        if when in self._waits:
            files = ", ".join(f"{f['storage_path']} ({f['error']})" for f in self._waits[when])
            tried = f": {files}" if files else ""
            return f"eligible; waits until one of its files appears or changes, or its rows{tried}"
        return "eligible; waits until one of its files appears or changes, or its rows"

    def _photos(self, row: Row) -> Iterator[Photo]:
        chosen = self._chosen
        candidates = pl.DataFrame(
            listing.candidates(self._cursor, self._environment, self._listing_id, row)
        )
        selected = select_images(
            candidates, chosen.topk, chosen.exclude_stock, chosen.exclude_screenshots
        )
        ranks = {
            (image["image_index"], image["storage_path"]): image
            for image in selected.iter_rows(named=True)
        }
        for candidate in candidates.iter_rows(named=True):
            image = ranks.get((candidate["image_index"], candidate["storage_path"]))
            if image is None:
                fallback = bool(selected["fallback"].any())
                yield Photo(candidate, why_not(candidate, fallback, self._chosen), "")
                continue
            rank = f"{'fallback, ' if image['fallback'] else ''}rank {image['rank']}"
            became = self._became(candidate["edited_date"], candidate["storage_path"])
            yield Photo(candidate, rank, became)

    def _became(self, edited: datetime, path: str | None) -> str:
        """What the shards at hand say of it, and what the file is now where that says more."""
        now = self._now(path)
        if (edited, path) not in self._encoded:
            return f"{now}; not in results/encode"
        error = self._encoded[edited, path]
        if error is None:
            return "has a vector in results/encode"
        return error if error == now else f"{error}, in results/encode; now {now}"

    def _now(self, path: str | None) -> str:
        try:
            return f"there, {self._root.stat(path).size} bytes"
        except (PhotoError, StorageError) as error:
            return str(error)


def _encoded(listing_id: int) -> dict[tuple[datetime, str | None], str | None]:
    """Of the photos that the shards at hand hold: (edited_date, storage_path) to the error."""
    files = sorted(Path("results/encode").glob("*-of-*.parquet"))
    if not files:
        return {}
    found = pq.read_table(
        files,
        columns=["edited_date", "storage_path", "error"],
        filters=[("listing_id", "=", listing_id)],
    )
    return {(row["edited_date"], row["storage_path"]): row["error"] for row in found.to_pylist()}


def _table(photos: list[Photo]) -> Iterator[str]:
    """The candidates, by image_index."""
    if not photos:
        return
    rows = [("image", "score", "flags", "selected", "storage_path")]
    for photo in photos:
        flags = [name for name in ("is_stock_photo", "battery_screenshot") if photo.row[name]]
        rows.append(
            (str(photo.row["image_index"]), str(photo.row["score"]), ", ".join(flags) or "-",
             photo.chosen, str(photo.row["storage_path"]))
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    fates = ["what became of it", *(photo.became for photo in photos)]
    for row, fate in zip(rows, fates, strict=True):
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"  {cells}  {fate}".rstrip()


def _vectors(vectors: list[Vector], environment: Environment) -> Iterator[str]:
    yield f"vectors in {quoted(environment.vectors)}{'' if vectors else ': none'}"
    for vector in vectors:
        yield (
            f"  edited {vector.edited}: of {vector.n_images} images,"
            f" written {vector.updated}, key {vector.key}"
        )
