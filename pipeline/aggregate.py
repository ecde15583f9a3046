"""Aggregate the image vectors of each listing into one unit vector, in DuckDB.

Reads: the encode shards. Writes: listing_vectors.parquet, one row per listing with at least one
image vector, and failures.json, the listings without one and the failed images by reason.
Guarantees: vec = l2_normalize(mean of the listing's unit image vectors), to 1e-6 of unit length;
listings in = vectors + listings without; memory does not grow with the shards.
"""

import argparse
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import command, parquet, settings
from pipeline.command import log
from pipeline.errors import DataError

BATCH_ROWS = 16_384
SMALLEST_MEAN = 1e-6  # a shorter mean has no direction: its images cancel out

LISTING = "generation, listing_id, edited_date"


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--encoded", type=Path, nargs="+", required=True, help="encode shards")
    parser.add_argument("--images", type=Path, required=True, help="images.parquet of the export")
    parser.add_argument("--output", type=Path, required=True, help="listing_vectors.parquet")
    parser.add_argument("--failures", type=Path, required=True, help="failures.json to write")
    settings.add_flags(parser, "source", "model_rev", "pca_rev", "memory_mb")
    args = parser.parse_args()
    chosen = settings.from_flags(args)
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
    images: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    without: list[dict[str, Any]] = field(default_factory=list)

    @property
    def failed(self) -> int:
        return sum(self.reasons.values())


def mean_sql(dim: int) -> str:
    """The SQL of the listing vectors over a relation `encoded` with vectors of that dimension.

    Sums are in double precision; `length` is that of the mean before it is normalised. One
    aggregate per element is six times as fast as unnesting the vectors.
    """
    means = ", ".join(f"avg(vec[{i}])" for i in range(1, dim + 1))
    return f"""
        WITH means AS (
            SELECT {LISTING}, count(vec)::INTEGER AS n_images, [{means}] AS mean
            FROM encoded GROUP BY ALL HAVING count(vec) > 0),
        lengths AS (SELECT *, sqrt(list_inner_product(mean, mean)) AS length FROM means)
        SELECT {LISTING}, $source AS source, $model_rev AS model_rev, $pca_rev AS pca_rev,
               list_transform(mean, lambda x: x / length)::FLOAT[{dim}] AS vec, n_images, length
        FROM lengths ORDER BY edited_date DESC, listing_id, generation"""


FAILED_SQL = """
    SELECT split_part(error, ':', 1), count(*) FROM encoded WHERE error IS NOT NULL GROUP BY ALL"""

WITHOUT_SQL = f"""
    SELECT {LISTING}, list({{'storage_path': storage_path, 'size': size, 'mtime_ns': mtime_ns,
        'error': error}} ORDER BY rank) AS files
    FROM encoded GROUP BY ALL HAVING count(vec) = 0
    ORDER BY edited_date DESC, listing_id"""

# The same text and hash as in pipeline/source.py, which compares it with the live rows.
CANDIDATES_SQL = """
    SELECT generation, listing_id, edited_date,
           md5(string_agg(concat_ws('|', image_index, storage_path, score,
               is_stock_photo::int, battery_screenshot::int), chr(10)
               ORDER BY image_index, storage_path)) AS candidates
    FROM read_parquet($images)
    WHERE listing_id IN (SELECT unnest($listing_ids))
    GROUP BY ALL"""


def aggregate(args: argparse.Namespace, chosen: settings.Settings) -> Report:
    """Write both files; returns the report."""
    dim, made_by = _encoder_of(args.encoded)
    schema = parquet.listing_vectors(dim)
    identity = chosen.model_dump(include={"source", "model_rev", "pca_rev"})
    report = Report()
    # One thread: sums in one order, so that the same input gives the same bytes.
    with duckdb.connect(config={"memory_limit": f"{chosen.memory_mb}MB", "threads": 1}) as con:
        con.execute("SET TimeZone = 'UTC'")  # else dates come back in this machine's zone
        with parquet.writer(args.output, schema, {**made_by, "aggregate": identity}) as writer:
            for path in args.encoded:
                for encoded in parquet.clustered_batches(path, BATCH_ROWS):
                    _aggregate_batch(con, encoded, identity, writer, report)
        _add_candidates(con, report.without, args.images)
    if report.vectors + len(report.without) != report.listings:
        raise DataError(
            f"{report.listings} listings", f"{report.vectors} + {len(report.without)}", "aggregate"
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


def _encoder_of(paths: list[Path]) -> tuple[int, dict[str, Any]]:
    """The dimension and metadata of the shards, which must all come from one encoder."""
    made_by = parquet.metadata(paths[0])
    for path in paths:
        other = parquet.metadata(path)
        if other["encoder"] != made_by["encoder"] or other["export"] != made_by["export"]:
            raise DataError(
                f"shards of one export and one encoder, as {paths[0]}",
                "another",
                str(path),
                "run encode again: --forcerun encode",
            )
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
    sound = [length > SMALLEST_MEAN for length in means["length"].to_pylist()]  # False for NaN
    vectors = means.filter(pa.array(sound, pa.bool_())).drop_columns(["length"])
    writer.write_table(
        vectors.cast(parquet.listing_vectors(dim)), row_group_size=parquet.VECTOR_ROW_GROUP
    )
    report.vectors += vectors.num_rows
    report.images += encoded.num_rows
    report.reasons.update(dict(con.execute(FAILED_SQL).fetchall()))
    without = con.sql(WITHOUT_SQL).to_arrow_table().to_pylist()
    cancelled = means.filter(pa.array([not s for s in sound], pa.bool_())).to_pylist()
    report.without += without + [_cancelled(listing) for listing in cancelled]
    report.listings += con.execute(
        f"SELECT count(*) FROM (SELECT DISTINCT {LISTING} FROM encoded)"
    ).fetchall()[0][0]


def _cancelled(listing: dict[str, Any]) -> dict[str, Any]:
    log.warning(
        "listing %d has no vector: its image vectors cancel out or are not finite",
        listing["listing_id"],
    )
    return {key: listing[key] for key in LISTING.split(", ")} | {"files": []}


def _add_candidates(
    con: duckdb.DuckDBPyConnection, without: list[dict[str, Any]], images: Path
) -> None:
    """Give each listing without a vector the hash of the candidates that it was tried with."""
    if not without:
        return
    ids = [listing["listing_id"] for listing in without]
    # By way of Arrow: DuckDB's own rows need pytz for a time with a zone.
    rows = con.sql(CANDIDATES_SQL, params={"images": str(images), "listing_ids": ids})
    hashes = {_key(row): row["candidates"] for row in rows.to_arrow_table().to_pylist()}
    for listing in without:
        listing["candidates"] = hashes[_key(listing)]
        listing["edited_date"] = listing["edited_date"].isoformat()


def _key(listing: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(listing[name] for name in LISTING.split(", "))


if __name__ == "__main__":
    command.run(main, "aggregate")
