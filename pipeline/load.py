"""Load the listing vectors into the pgvector table: COPY into a staging table, then one merge.

Reads: listing_vectors.parquet and without_vector.parquet of aggregate. Writes: the target table
and its registry, in one transaction, then the ledger of who waits and receipt.json. Guarantees:
all rows or none; only rows that differ are written (all of them when the export was forced);
nothing is loaded when a key would then have vectors of two encoders or recipes.
"""

import argparse
import logging
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from adbc_driver_manager.dbapi import Connection, Cursor

from pipeline.database import hnsw, registry, target, waiting
from pipeline.database.connection import (
    bind,
    connect,
    fetch,
    quoted,
    retrying,
    set_lock_timeout,
    sort_in_memory,
    translated_errors,
)
from pipeline.database.key import KEY, rest_sql
from pipeline.database.registry import MadeBy
from pipeline.stage import command, parquet, settings
from pipeline.stage.errors import DataError
from pipeline.stage.settings import Environment, Identity, Settings

log = logging.getLogger("pipeline")

BATCH_ROWS = parquet.VECTOR_ROW_GROUP  # 8 MB of 512-d vectors
MESSAGE_ROWS = 32  # 64 KB of 512-d vectors: small, so the server works while the next is made
STAGING = "listing_vectors_staging"

_KEY = ", ".join(KEY)

# Rows go in in key order, so that two loads of the same listings lock them in the same order.
_MERGE_SQL = f"""
    WITH merged AS (
        INSERT INTO {{vectors}} AS t
            ({_KEY}, vec, n_images)
        SELECT {_KEY}, vec, n_images
        FROM pg_temp.{STAGING}
        ORDER BY {_KEY}
        ON CONFLICT ({_KEY}) DO UPDATE
            SET vec = excluded.vec, n_images = excluded.n_images, updated_at = now()
            {{only_differing}}
        RETURNING (xmax = 0) AS inserted)
    SELECT count(*) FILTER (WHERE inserted), count(*) FILTER (WHERE NOT inserted) FROM merged"""

_ONLY_DIFFERING = "WHERE (t.vec, t.n_images) IS DISTINCT FROM (excluded.vec, excluded.n_images)"


def main() -> None:
    parser = command.stage_parser(__doc__)
    parser.add_argument("--vectors", type=Path, required=True, help="listing_vectors.parquet")
    parser.add_argument(
        "--without-vector", type=Path, required=True, help="without_vector.parquet of aggregate"
    )
    parser.add_argument("--listings", type=Path, required=True, help="listings.parquet of export")
    parser.add_argument("--receipt", type=Path, required=True, help="receipt.json to write")
    settings.add_flags(parser, "lock_timeout_s", "cache_dir", *settings.PHOTO_LIMITS)
    args = parser.parse_args()
    receipt = load(args, settings.from_flags(args), Environment.read())
    log.info(
        "%d inserted, %d updated, %d unchanged in %s",
        receipt["inserted"], receipt["updated"], receipt["unchanged"], receipt["table"],
    )  # fmt: skip


def load(args: argparse.Namespace, chosen: Settings, environment: Environment) -> dict[str, Any]:
    """Merge the file into the table and write the receipt; returns the receipt."""
    made_by = parquet.metadata(args.vectors)
    identity = Identity(**made_by["aggregate"])
    counts = retrying(lambda: _load_once(args, chosen, environment, identity))
    remembered = waiting.remember(args.without_vector, args.listings, chosen, identity)
    if remembered:
        log.warning("%d listings without a vector are remembered as waiting", remembered)
    receipt = {
        **counts,
        **identity._asdict(),
        "encoder": made_by["encoder"],
        "recipe": made_by["select"],
        "load_id": uuid.uuid4().hex,
        "table": quoted(environment.vectors),
        "waiting": remembered,
    }
    parquet.write_json(args.receipt, receipt)
    return receipt


def _load_once(
    args: argparse.Namespace, chosen: Settings, environment: Environment, identity: Identity
) -> dict[str, int]:
    document = parquet.metadata(args.vectors)
    made_by = MadeBy(document["encoder"], document["select"])
    force = document["export"]["force"]
    dim = parquet.dimension(pq.read_schema(args.vectors))
    replaced = None
    with connect() as connection:
        with connection.cursor() as cursor:
            set_lock_timeout(cursor, chosen.lock_timeout_s)
            sort_in_memory(cursor)
            target.check(cursor, environment, dim)
            if parquet.rows([args.vectors]):
                replaced = _claim_key(cursor, environment, identity, made_by, force)
            warn_of_an_index(cursor, environment, identity, parquet.rows([args.vectors]))
        staged = stage(connection, args.vectors, dim)
        inserted, updated = _merge(connection, environment, force)
        if replaced is not None:
            with connection.cursor() as cursor:
                bind(cursor, identity._asdict())
                rest = fetch(cursor, rest_sql(environment, f"pg_temp.{STAGING}"))[0][0]
            registry.refuse_a_rest(rest, replaced, made_by, environment, identity)
        with translated_errors():
            connection.commit()
    return {"inserted": inserted, "updated": updated, "unchanged": staged - inserted - updated}


def warn_of_an_index(
    cursor: Cursor, environment: Environment, identity: Identity, rows: int
) -> None:
    """Say so where a load into an index takes longer than a load and a build anew."""
    met = hnsw.met_by_a_load(cursor, environment, identity)
    if met and hnsw.is_rebuilt_sooner(rows, met[1]):
        log.warning(
            "%d rows go one by one into an HNSW index of about %d, which takes longer than to build"
            " it anew; hint: as the owner, DROP INDEX %s before such a load, and python -m pipeline"
            " index after it",
            rows, met[1], met[0],
        )  # fmt: skip


def _claim_key(
    cursor: Cursor, environment: Environment, identity: Identity, made_by: MadeBy, force: bool
) -> MadeBy | None:
    """Make the key this load's; returns what made the rows that it must replace to the last.

    MixedVectors: the key's rows are of another encoder or recipe, and nothing is forced.
    """
    there = registry.claim(cursor, environment, identity, made_by)
    if there is None or there == made_by:
        return None
    if not force:
        registry.refuse_mixing(there, made_by, environment, identity)
    changed = [part for part in made_by.encoder if made_by.encoder[part] != there.encoder.get(part)]
    if there.recipe is not None and there.recipe != made_by.recipe:
        changed.append("recipe")
    if changed:
        log.warning("this key's encoder or recipe changes in %s", ", ".join(changed))
    registry.replace(cursor, environment, identity, made_by)
    return there if made_by.unlike(there) else None


def staging_sql(dim: int) -> tuple[str, str]:
    """What makes the staging table: columns and storage as in target.sql.

    By itself, Postgres would store 512-d vectors outside of their rows, which takes half of the
    load's time.
    """
    return (
        f"CREATE TEMPORARY TABLE {STAGING} (listing_id bigint, edited_date timestamptz,"
        f" {', '.join(f'{name} text' for name in Identity._fields)},"
        f" vec vector({dim}), n_images int)"
        " ON COMMIT DROP",
        f"ALTER TABLE pg_temp.{STAGING} ALTER COLUMN vec SET STORAGE {target.storage(dim)}",
    )


def stage(connection: Connection, vectors: Path, dim: int) -> int:
    """COPY listing_vectors.parquet into the staging table; returns the number of rows.

    A thread reads and converts ahead of the one that sends. Memory does not grow with the file.
    """
    with translated_errors("staging table"), connection.cursor() as cursor:
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
        vectors=quoted(environment.vectors),
        only_differing="" if force else _ONLY_DIFFERING,
    )
    with connection.cursor() as cursor:
        inserted, updated = fetch(cursor, sql)[0]
    return int(inserted), int(updated)


def _wire_schema() -> pa.Schema:
    fields = [f for f in parquet.listing_vectors(1) if f.name not in ("generation", "vec")]
    return pa.schema([*fields, pa.field("vec", pa.binary())])


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


if __name__ == "__main__":
    command.run(main, "load")
