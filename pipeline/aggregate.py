"""Aggregate the image vectors of each listing into one unit vector, in DuckDB.

Reads: the encode shards, and images.parquet of the export for the listings without a vector.
Writes: listing_vectors.parquet, one row per listing with at least one image vector;
without_vector.parquet, the other listings with the files that were tried; failures.json, the
failed images by reason. Guarantees: vec = l2_normalize(mean of the listing's unit image vectors),
to 1e-6 of unit length; listings in = vectors + listings without; memory does not grow with the
shards. Where not one photo is there, nothing is written, and the shards are removed: encode is to
look again.
"""

import argparse
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.database.waiting import CANDIDATES_SQL
from pipeline.photos.files import NOT_THERE
from pipeline.stage import command, parquet, settings
from pipeline.stage.command import log
from pipeline.stage.errors import DataError, WrongImageRoot
from pipeline.stage.settings import Identity

BATCH_ROWS = 16_384
SMALLEST_MEAN = 1e-6  # a shorter mean has no direction: its images cancel out

LISTING = "generation, listing_id, edited_date"


def main() -> None:
    parser = command.stage_parser(__doc__)
    parser.add_argument("--encoded", type=Path, nargs="+", required=True, help="encode shards")
    parser.add_argument("--images", type=Path, required=True, help="images.parquet of the export")
    parser.add_argument("--output", type=Path, required=True, help="listing_vectors.parquet")
    parser.add_argument(
        "--without-vector", type=Path, required=True, help="without_vector.parquet to write"
    )
    parser.add_argument("--failures", type=Path, required=True, help="failures.json to write")
    settings.add_flags(parser, *Identity._fields, "memory_mb", "max_failed_fraction")
    args = parser.parse_args()
    chosen = settings.from_flags(args)
    if not chosen.source:
        parser.error("--source must name the recipe")
    if not chosen.model_rev:
        parser.error("--model-rev must name the encoder")
    report = aggregate(args, chosen)
    log.info(
        "%d listings from %d images, %d failed -> %s",
        report.vectors, report.images, report.failed, args.output,
    )  # fmt: skip


@dataclass
class Report:
    """What was aggregated and what was not."""

    listings: int = 0
    vectors: int = 0
    without: int = 0
    images: int = 0
    not_there: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        return sum(self.reasons.values())


def mean_sql(dim: int) -> str:
    """The SQL of the listing vectors over a relation `encoded` with vectors of that dimension.

    Sums are in double precision; `length` is that of the mean before it is normalised. One
    aggregate per element is six times as fast as unnesting the vectors.
    """
    means = ", ".join(f"avg(vec[{i}])" for i in range(1, dim + 1))
    identity = ", ".join(f"${name} AS {name}" for name in Identity._fields)
    return f"""
        WITH means AS (
            SELECT {LISTING}, count(vec)::INTEGER AS n_images, [{means}] AS mean
            FROM encoded GROUP BY ALL HAVING count(vec) > 0),
        lengths AS (SELECT *, sqrt(list_inner_product(mean, mean)) AS length FROM means)
        SELECT {LISTING}, {identity},
               list_transform(mean, lambda x: x / length)::FLOAT[{dim}] AS vec, n_images, length
        FROM lengths ORDER BY edited_date DESC, listing_id, generation"""


FAILED_SQL = """
    SELECT split_part(error, ':', 1), count(*) FROM encoded WHERE error IS NOT NULL GROUP BY ALL"""

NOT_THERE_SQL = f"""
    SELECT count(*) FROM encoded
    WHERE {" OR ".join(f"starts_with(error, '{start}')" for start in NOT_THERE)}"""

WITHOUT_SQL = f"""
    SELECT {LISTING}, list({{'storage_path': storage_path, 'size': size, 'mtime_ns': mtime_ns,
        'error': error}} ORDER BY rank) AS files
    FROM encoded GROUP BY ALL HAVING count(vec) = 0"""

WITH_CANDIDATES_SQL = f"""
    WITH tried AS (
        SELECT {LISTING}, {CANDIDATES_SQL} AS candidates
        FROM images SEMI JOIN without USING ({LISTING}) GROUP BY ALL)
    SELECT {", ".join(parquet.WITHOUT_VECTOR.names)} FROM without JOIN tried USING ({LISTING})
    ORDER BY edited_date DESC, listing_id, generation"""


def aggregate(args: argparse.Namespace, chosen: settings.Settings) -> Report:
    """Write the three files; returns the report."""
    dim, made_by = _encoder_of(args.encoded)
    witnesses = made_by.pop("witnesses_there")
    schema = parquet.listing_vectors(dim)
    identity = chosen.identity._asdict()
    made_by["aggregate"] = identity
    report = Report()
    # One thread: sums in one order, so that the same input gives the same bytes.
    with duckdb.connect(config={"memory_limit": f"{chosen.memory_mb}MB", "threads": 1}) as con:
        con.execute("SET TimeZone = 'UTC'")  # else dates come back in this machine's zone
        con.from_arrow(_listings_without()).create("without")
        with parquet.writer(args.output, schema, made_by) as writer:
            for path in args.encoded:
                for encoded in parquet.clustered_batches(path, BATCH_ROWS):
                    _aggregate_batch(con, encoded, identity, writer, report)
            if not witnesses:
                _check_any_photo(report, args.encoded, chosen.max_failed_fraction)
        _write_without(con, args, made_by, report)
    if report.vectors + report.without != report.listings:
        raise DataError(
            f"{report.listings} listings", f"{report.vectors} + {report.without}", "aggregate"
        )
    parquet.write_json(
        args.failures,
        {
            "images": report.images,
            "failed": dict(sorted(report.reasons.items())),
            "listings": report.listings,
            "listings_without_vector": report.without,
        },
    )
    return report


def _check_any_photo(report: Report, encoded: list[Path], max_failed_fraction: float) -> None:
    """WrongImageRoot if not one photo of the run is there. One listing alone is no evidence."""
    if report.listings < 2 or report.not_there < report.images or max_failed_fraction == 1:
        return
    for path in encoded:
        path.unlink()
    raise WrongImageRoot(
        "one photo at least of the run under IMAGE_ROOT_DIR",
        f"none of {report.images}, of {report.listings} listings",
        "nothing waits, nothing is loaded",
        "check IMAGE_ROOT_DIR; if they are all to come later: --config max_failed_fraction=1",
    )


def _encoder_of(paths: list[Path]) -> tuple[int, dict[str, Any]]:
    """The dimension and metadata of the shards, which must all be made by the same.

    Of `witnesses_there` the most: a shard without images has not looked for any.
    """
    made_by = parquet.metadata(paths[0])
    for path in paths:
        other = parquet.metadata(path)
        if {**other, "witnesses_there": 0} != {**made_by, "witnesses_there": 0}:
            raise DataError(
                f"shards of one export, one selection and one encoder, as {paths[0]}",
                "another",
                str(path),
                "run encode again: --forcerun encode",
            )
        there = other.get("witnesses_there", 0)
        made_by["witnesses_there"] = max(there, made_by.get("witnesses_there", 0))
    return parquet.dimension(pq.read_schema(paths[0])), made_by


def _aggregate_batch(
    con: duckdb.DuckDBPyConnection,
    encoded: pa.Table,
    identity: dict[str, str],
    writer: pq.ParquetWriter,
    report: Report,
) -> None:
    con.register("encoded", encoded)
    dim = parquet.dimension(encoded.schema)
    means = con.sql(mean_sql(dim), params=identity).to_arrow_table()
    sound = [SMALLEST_MEAN < length < math.inf for length in means["length"].to_pylist()]
    vectors = means.filter(pa.array(sound, pa.bool_())).drop_columns(["length"])
    writer.write_table(
        vectors.cast(parquet.listing_vectors(dim)), row_group_size=parquet.VECTOR_ROW_GROUP
    )
    report.vectors += vectors.num_rows
    report.images += encoded.num_rows
    report.reasons.update(dict(con.execute(FAILED_SQL).fetchall()))
    report.not_there += con.execute(NOT_THERE_SQL).fetchall()[0][0]
    con.execute(f"INSERT INTO without BY NAME {WITHOUT_SQL}")
    cancelled = means.filter(pa.array([not s for s in sound], pa.bool_()))
    for listing in cancelled["listing_id"].to_pylist():
        log.warning(
            "listing %d has no vector: its image vectors cancel out or are not finite", listing
        )
    con.register("cancelled", cancelled)
    con.execute(f"INSERT INTO without BY NAME SELECT {LISTING}, [] AS files FROM cancelled")
    report.listings += con.execute(
        f"SELECT count(*) FROM (SELECT DISTINCT {LISTING} FROM encoded)"
    ).fetchall()[0][0]


def _listings_without() -> pa.Table:
    """No rows yet; DuckDB spills what becomes too many for memory."""
    return parquet.WITHOUT_VECTOR.empty_table().drop_columns("candidates")


def _write_without(
    con: duckdb.DuckDBPyConnection,
    args: argparse.Namespace,
    made_by: dict[str, Any],
    report: Report,
) -> None:
    """Write the listings without a vector, in the export's order, with what they were tried with.

    The candidates' hash comes from a pass over all candidates, so only where it is needed.
    """
    with parquet.writer(args.without_vector, parquet.WITHOUT_VECTOR, made_by) as writer:
        if not con.execute("SELECT count(*) FROM without").fetchall()[0][0]:
            return
        for images in parquet.clustered_batches(args.images):
            con.register("images", images)
            rows = con.sql(WITH_CANDIDATES_SQL).to_arrow_table()
            writer.write_table(rows.cast(parquet.WITHOUT_VECTOR))
            report.without += rows.num_rows


if __name__ == "__main__":
    command.run(main, "aggregate")
