"""Listing vectors into pgvector: our COPY beside psql's \\copy of the same rows, and the merge."""

import argparse
import os
import subprocess
from pathlib import Path

from benchmarks import material, measure
from demo.postgres import binary
from pipeline import load
from pipeline.database.connection import connect
from pipeline.stage import parquet

STAGING = [statement.replace(" ON COMMIT DROP", "") for statement in load.staging_sql(512)]


def main() -> None:
    parser = material.parser(__doc__)
    parser.add_argument("--listings", type=int, default=200_000)
    parser.set_defaults(rounds=5)
    args = parser.parse_args()
    with material.work_folder(args.work) as folder, material.database(folder) as dsn:
        vectors = material.listing_vectors(folder / "vectors.parquet", args.listings)
        dump = (folder / "vectors.copy").resolve()
        dumped(dsn, vectors, dump)
        with measure.memory() as memory:
            best = measure.fastest(
                args.rounds, ours=lambda: stage(vectors), psql=lambda: copy(dsn, dump)
            )
            best |= measure.fastest(
                args.rounds,
                empty=lambda: psql(dsn, "TRUNCATE ml.img_vec512_v1"),
                whole=lambda: load_all(folder, vectors),
                again=lambda: load_all(folder, vectors),
            )
        dump.unlink()
    rate = {name: args.listings / timing.wall for name, timing in best.items()}
    measure.say(
        f"COPY {rate['ours']:.0f} rows/s, psql {rate['psql']:.0f};"
        f" load {rate['whole']:.0f}, unchanged {rate['again']:.0f};"
        f" {memory.start:.0f} -> {memory.peak:.0f} MB"
    )
    measure.emit(
        "load", listings=args.listings,
        rows_per_second=rate["ours"], psql_rows_per_second=rate["psql"],
        share_of_psql=rate["ours"] / rate["psql"],
        load_rows_per_second=rate["whole"], unchanged_rows_per_second=rate["again"],
        megabytes_before=memory.start, megabytes_peak=memory.peak,
    )  # fmt: skip


def stage(vectors: Path) -> None:
    """What the load does before it merges; uncommitted, so nothing is kept."""
    with connect() as connection:
        load.stage(connection, vectors, 512)


def dumped(dsn: str, vectors: Path, dump: Path) -> None:
    """The rows as psql would send them: out of a table that the load's own COPY filled."""
    with connect() as connection:
        load.stage(connection, vectors, 512)
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE TABLE dumped AS SELECT * FROM pg_temp.{load.STAGING}")
        connection.commit()
    psql(dsn, f"\\copy dumped TO '{dump}' (FORMAT binary)", "DROP TABLE dumped")


def copy(dsn: str, dump: Path) -> None:
    """psql's \\copy into a temporary table of the same kind."""
    psql(dsn, *STAGING, f"\\copy {load.STAGING} FROM '{dump}' (FORMAT binary)")


def psql(dsn: str, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(
        [str(binary("psql")), dsn, "-qX", "-v", "ON_ERROR_STOP=1", *words],
        check=True, env={k: v for k, v in os.environ.items() if not k.startswith("PG")},
    )  # fmt: skip


def load_all(folder: Path, vectors: Path) -> None:
    """The whole stage: COPY, merge, receipt."""
    without_vector, listings = folder / "without_vector.parquet", folder / "listings.parquet"
    for path, schema in ((without_vector, parquet.WITHOUT_VECTOR), (listings, parquet.LISTINGS)):
        with parquet.writer(path, schema, {}):
            pass
    load.load(
        argparse.Namespace(
            vectors=vectors,
            without_vector=without_vector,
            listings=listings,
            receipt=folder / "receipt.json",
        ),
        material.defaults().model_copy(update={"cache_dir": str(folder / "load-cache")}),
        material.environment(),
    )


if __name__ == "__main__":
    main()
