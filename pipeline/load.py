"""Load the listing vectors into the pgvector table: COPY into a staging table, then one merge.

Reads: listing_vectors.parquet and failures.json of aggregate. Writes: the target table and the
encoder registry, in one transaction, then receipt.json. Guarantees: all rows or none; only rows
that differ are written (all of them when the export was forced); nothing is loaded when too many
images failed or when the table holds another encoder's vectors under the same key.
"""

import argparse
import json
import logging
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from adbc_driver_manager.dbapi import Connection

from pipeline import command, database, failures, parquet, settings, target
from pipeline.errors import DataError, TooManyFailures
from pipeline.settings import Environment, Settings

log = logging.getLogger("pipeline")

BATCH_ROWS = parquet.VECTOR_ROW_GROUP  # 8 MB of 512-d vectors
MESSAGE_ROWS = 32  # 64 KB of 512-d vectors: small, so the server works while the next is made
STAGING = "listing_vectors_staging"

# Rows go in in key order, so that two loads of the same listings lock them in the same order.
_MERGE_SQL = f"""
    WITH merged AS (
        INSERT INTO {{vectors}} AS t
            (listing_id, edited_date, source, model_rev, pca_rev, vec, n_images)
        SELECT listing_id, edited_date, source, model_rev, pca_rev, vec, n_images
        FROM pg_temp.{STAGING}
        ORDER BY listing_id, edited_date, source, model_rev, pca_rev
        ON CONFLICT (listing_id, edited_date, source, model_rev, pca_rev) DO UPDATE
            SET vec = excluded.vec, n_images = excluded.n_images, updated_at = now()
            {{only_differing}}
        RETURNING (xmax = 0) AS inserted)
    SELECT count(*) FILTER (WHERE inserted), count(*) FILTER (WHERE NOT inserted) FROM merged"""

_ONLY_DIFFERING = "WHERE (t.vec, t.n_images) IS DISTINCT FROM (excluded.vec, excluded.n_images)"


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--vectors", type=Path, required=True, help="listing_vectors.parquet")
    parser.add_argument("--failures", type=Path, required=True, help="failures.json of aggregate")
    parser.add_argument("--listings", type=Path, required=True, help="listings.parquet of export")
    parser.add_argument("--receipt", type=Path, required=True, help="receipt.json to write")
    settings.add_flags(
        parser, "max_failed_fraction", "lock_timeout_s", "cache_dir",
        "follow_symlinks", "max_image_bytes", "max_image_pixels",
    )  # fmt: skip
    args = parser.parse_args()
    receipt = load(args, settings.from_flags(args), Environment.read())
    log.info(
        "%d inserted, %d updated, %d unchanged in %s",
        receipt["inserted"], receipt["updated"], receipt["unchanged"], receipt["table"],
    )  # fmt: skip


def load(args: argparse.Namespace, chosen: Settings, environment: Environment) -> dict[str, Any]:
    """Merge the file into the table and write the receipt; returns the receipt."""
    report = json.loads(args.failures.read_text())
    refuse_too_many_failures(report, chosen.max_failed_fraction)
    made_by = parquet.metadata(args.vectors)
    identity = target.Identity(**made_by["aggregate"])
    counts = database.retrying(lambda: _load_once(args, chosen, environment, identity))
    remembered = failures.remember(args.failures, _listings(args.listings), chosen, vars(identity))
    if remembered:
        log.warning("%d listings without a vector wait for their files", remembered)
    receipt = {
        **counts,
        **vars(identity),
        "encoder": made_by["encoder"],
        "load_id": uuid.uuid4().hex,
        "table": database.quoted(environment.vectors),
        "waiting": remembered,
    }
    parquet.write_json(args.receipt, receipt)
    return receipt


def refuse_too_many_failures(report: dict[str, Any], max_failed_fraction: float) -> None:
    """TooManyFailures above the limit. A single listing is no evidence against the whole run."""
    failed = sum(report["failed"].values())
    if report["listings"] < 2 or failed <= max_failed_fraction * report["images"]:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in report["failed"].items())
    raise TooManyFailures(
        f"at most {max_failed_fraction:.0%} of the images to fail (max_failed_fraction)",
        f"{failed} of {report['images']}: {reasons}",
        "nothing was loaded",
        "check IMAGE_ROOT_DIR; results/encode/*.parquet has each image's error",
    )


def _load_once(
    args: argparse.Namespace, chosen: Settings, environment: Environment, identity: target.Identity
) -> dict[str, int]:
    made_by = parquet.metadata(args.vectors)
    dim = parquet.dimension(pq.read_schema(args.vectors))
    force = made_by["export"]["force"]
    with database.connect() as connection:
        with connection.cursor() as cursor:
            database.fetch(
                cursor,
                "SELECT set_config('lock_timeout', $1, true)",
                (f"{chosen.lock_timeout_s}s",),
            )
            target.check(cursor, environment, dim)
            if parquet.rows([args.vectors]):
                _check_encoder(cursor, environment, identity, made_by["encoder"], force)
        staged = stage(connection, args.vectors, dim)
        inserted, updated = _merge(connection, environment, force)
        with database.translated_errors():
            connection.commit()
    return {"inserted": inserted, "updated": updated, "unchanged": staged - inserted - updated}


def _check_encoder(
    cursor: Any,
    environment: Environment,
    identity: target.Identity,
    encoder: dict[str, Any],
    force: bool,
) -> None:
    where = database.quoted(environment.vectors)
    registered = target.claim_key(cursor, environment, identity, encoder)
    if registered is None:
        log.warning(
            "no encoder registry beside %s and no right to make one: models are not told apart;"
            " hint: python -m pipeline create-table as the owner",
            where,
        )
    elif registered != encoder:
        if not force:
            target.refuse_mixing(registered, encoder, identity, where)
        changed = [k for k in encoder if encoder[k] != registered.get(k)]
        log.warning("this key's encoder changes in %s", ", ".join(changed))
        target.register_encoder(cursor, environment, identity, encoder)


def staging_sql(dim: int) -> tuple[str, str]:
    """What makes the staging table: columns and storage as in target.sql.

    By itself, Postgres would store 512-d vectors outside of their rows, which takes half of the
    load's time.
    """
    return (
        f"CREATE TEMPORARY TABLE {STAGING} (listing_id bigint, edited_date timestamptz,"
        f" source text, model_rev text, pca_rev text, vec vector({dim}), n_images int)"
        " ON COMMIT DROP",
        f"ALTER TABLE pg_temp.{STAGING} ALTER COLUMN vec SET STORAGE {target.storage(dim)}",
    )


def stage(connection: Connection, vectors: Path, dim: int) -> int:
    """COPY listing_vectors.parquet into the staging table; returns the number of rows.

    A thread reads and converts ahead of the one that sends. Memory does not grow with the file.
    """
    with database.translated_errors("staging table"), connection.cursor() as cursor:
        for statement in staging_sql(dim):
            cursor.execute(statement)
        failed: list[BaseException] = []
        reader = pa.RecordBatchReader.from_batches(_wire_schema(), _messages(vectors, failed))
        try:
            staged = cursor.adbc_ingest(STAGING, reader, mode="append", temporary=True)
        except Exception:
            if failed:  # the driver takes it for an error of its own
                raise failed[0] from None
            raise
    expected = parquet.rows([vectors])
    if staged != expected:
        raise DataError(f"{expected} rows staged", str(staged), str(vectors), "load again")
    return staged


def _merge(connection: Connection, environment: Environment, force: bool) -> tuple[int, int]:
    sql = _MERGE_SQL.format(
        vectors=database.quoted(environment.vectors),
        only_differing="" if force else _ONLY_DIFFERING,
    )
    with connection.cursor() as cursor:
        inserted, updated = database.fetch(cursor, sql)[0]
    return int(inserted), int(updated)


def _wire_schema() -> pa.Schema:
    fields = [f for f in parquet.listing_vectors(1) if f.name not in ("generation", "vec")]
    fields.insert(-1, pa.field("vec", pa.binary()))
    return pa.schema(fields)


def _messages(vectors: Path, failed: list[BaseException]) -> Iterator[pa.RecordBatch]:
    """The rows in portions to send; what ends them early, a signal too, is kept in `failed`."""
    try:
        for batch in _one_ahead(wire_batches(vectors)):
            for start in range(0, len(batch), MESSAGE_ROWS):
                yield batch.slice(start, MESSAGE_ROWS)
    except GeneratorExit:
        raise
    except BaseException as error:
        failed.append(error)
        raise


def _one_ahead(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same batches; a thread makes the next while the caller works on one."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def wire_batches(vectors: Path) -> Iterator[pa.RecordBatch]:
    """The rows of listing_vectors.parquet with `vec` in pgvector's binary form."""
    schema = _wire_schema()
    for batch in parquet.batches(vectors, BATCH_ROWS):
        columns = [
            wire_vectors(batch.column("vec")) if name == "vec" else batch.column(name)
            for name in schema.names
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def wire_vectors(vectors: pa.FixedSizeListArray) -> pa.Array:
    """Vectors as pgvector's vector_send writes them: int16 dim, int16 0, big-endian float32s."""
    rows, dim = len(vectors), vectors.type.list_size
    wire = np.empty((rows, 4 + 4 * dim), np.uint8)
    wire[:, :4].view(">i2")[:] = dim, 0
    wire[:, 4:].view(">f4")[:] = vectors.flatten().to_numpy().reshape(rows, dim)
    offsets = np.arange(rows + 1, dtype=np.int32) * wire.shape[1]
    return pa.Array.from_buffers(
        pa.binary(), rows, [None, pa.py_buffer(offsets), pa.py_buffer(wire)]
    )


def _listings(path: Path) -> set[tuple[int, int, str]]:
    rows = pq.read_table(path).to_pylist()
    return {(r["generation"], r["listing_id"], r["edited_date"].isoformat()) for r in rows}


if __name__ == "__main__":
    command.run(main, "load")
