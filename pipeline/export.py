"""Export pending listings and their scored image candidates from Postgres to Parquet.

Reads: the listings, images and features tables and the target, in one read-only REPEATABLE READ
snapshot. Writes: listings.parquet (newest edited_date first, then listing_id) and images.parquet
(the same order, then image_index). Guarantees: both files come from one snapshot, are streamed,
and hold every pending listing up to the limit with at least one candidate. images.parquet also
names photos of listings that have a vector, by which encode knows a wrong image root.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from adbc_driver_manager.dbapi import Connection, Cursor

from pipeline.database import census, waiting
from pipeline.database.connection import connect, fetch, quoted, retrying, translated_errors
from pipeline.database.inputs import check_inputs
from pipeline.database.pending import Pending, prepare
from pipeline.stage import command, parquet, settings
from pipeline.stage.command import log
from pipeline.stage.errors import DataError
from pipeline.stage.settings import Environment, Identity, Settings

BATCH_BYTES = 8 * 2**20
EXPORTED_BY = ("limit_listings", "force", *Identity._fields)


def main() -> None:
    parser = command.stage_parser(__doc__)
    parser.add_argument("--listings", type=Path, required=True, help="listings.parquet to write")
    parser.add_argument("--images", type=Path, required=True, help="images.parquet to write")
    parser.add_argument("--state", default="{}", help="JSON: what is pending, kept as metadata")
    settings.add_flags(parser, *EXPORTED_BY, "cache_dir", "lock_timeout_s", *settings.PHOTO_LIMITS)
    args = parser.parse_args()
    chosen = settings.from_flags(args)
    if not chosen.source:
        parser.error("--source must name the recipe")
    if not chosen.model_rev:
        parser.error("--model-rev must name the encoder")
    environment = Environment.read()
    state = json.loads(args.state)
    params = chosen.model_dump(include=set(EXPORTED_BY)) | {"state": state}
    log.info("from %s", quoted(environment.listings))
    counts = retrying(lambda: export(environment, chosen, params, args.listings, args.images))
    log.info(
        "%d listings, %d images -> %s", counts["listings"], counts["images"], args.listings.parent
    )


def export(
    environment: Environment, chosen: Settings, params: dict[str, Any], listings: Path, images: Path
) -> dict[str, int]:
    """Write both files from one snapshot; returns the row counts."""
    with connect(read_only=True, repeatable=True) as connection:
        with connection.cursor() as cursor:
            check_inputs(cursor, environment)
            files = waiting.Files(chosen, environment.image_root)
            left_out = waiting.left_out(files, chosen, chosen.identity)
            pending = prepare(cursor, environment, chosen, left_out)
            _log_left_out(cursor, pending)
            witnesses = [paths for *_, paths in fetch(cursor, pending.witnesses)]
        made_by = {"export": params, "witnesses": witnesses}
        with (
            parquet.writer(listings, parquet.LISTINGS, {"export": params}) as of_listings,
            parquet.writer(images, parquet.CANDIDATES, made_by) as of_images,
        ):
            counts = _write(_stream(connection, pending.candidates), of_listings, of_images)
    waiting.release(listings, chosen, chosen.identity)
    return counts


def _log_left_out(cursor: Cursor, pending: Pending) -> None:
    rows, by_reason, _ = census.judged(cursor, pending)
    left_out = {reason: count for reason, count in by_reason.items() if count}
    named = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"
    log.info("%d listing rows; left out: %s", rows, named)
    if left_out.get("bad_date"):
        log.warning("bad_date: edited_date is infinite or outside of the years 1 to 9999; refused")
    if left_out.get("other_generation"):
        log.warning("other_generation: of rows with one edited_date the highest generation wins")


def _write(
    batches: Iterable[pa.RecordBatch], listings: pq.ParquetWriter, images: pq.ParquetWriter
) -> dict[str, int]:
    """Write the candidates, and each listing as its first one comes: every listing has one."""
    rows = {"listings": 0, "images": 0}
    before = parquet.LISTINGS.empty_table()
    for batch in batches:
        candidates = pa.Table.from_batches([batch]).cast(parquet.CANDIDATES)
        if candidates["listing_id"].null_count:
            raise DataError("a listing_id in every row", "a null", "listings table")
        images.write_table(candidates)
        keys = pa.concat_tables([before, candidates.select(parquet.LISTINGS.names)])
        starts = parquet.listing_starts(keys)
        starts = starts[starts >= before.num_rows]
        listings.write_table(keys.take(starts))
        before = keys.slice(max(0, keys.num_rows - 1))
        rows["listings"] += len(starts)
        rows["images"] += candidates.num_rows
    return rows


def _stream(connection: Connection, sql: str) -> Iterator[pa.RecordBatch]:
    """Record batches of a COPY as they arrive, never the whole result."""
    with translated_errors(), connection.cursor() as cursor:
        cursor.adbc_statement.set_options(
            **{"adbc.postgresql.batch_size_hint_bytes": str(BATCH_BYTES)}
        )
        cursor.execute(sql)
        yield from cursor.fetch_record_batch()


if __name__ == "__main__":
    command.run(main, "export")
