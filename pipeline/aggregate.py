"""Aggregate the image vectors of each listing into one unit vector.

Reads: the encode shards, and images.parquet of the export for the listings without a vector.
Writes: listing_vectors.parquet, one row per listing with at least one image vector;
without_vector.parquet, the other listings with the files that were tried; failures.json, the
failed images by reason. Guarantees: vec = l2_normalize(mean of the listing's unit image vectors),
to 1e-6 of unit length, projected and normalised again where pca is set; the same bytes on any
number of threads; listings in = vectors + listings without; memory does not grow with the shards.
Where not one photo is there, nothing is written, and the shards are removed: encode is to look
again.
"""

import argparse
import math
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.database.waiting import CANDIDATES_SQL
from pipeline.encoder import projection as projections
from pipeline.encoder.projection import Projection
from pipeline.photos.files import NOT_THERE
from pipeline.stage import command, parquet, settings
from pipeline.stage.command import log
from pipeline.stage.errors import DataError, WrongImageRoot
from pipeline.stage.settings import Identity

BATCH_ROWS = 8_192  # 17 MB of 512-d vectors, and six times as much while they are worked on
SMALLEST_MEAN = 1e-6  # a shorter mean has no direction: its images cancel out

LISTING = ", ".join(parquet.LISTINGS.names)


def main() -> None:
    parser = command.stage_parser(__doc__)
    parser.add_argument("--encoded", type=Path, required=True, help="folder of the encode shards")
    parser.add_argument("--shards", type=int, required=True, help="N-of-SHARDS.parquet, how many")
    parser.add_argument("--images", type=Path, required=True, help="images.parquet of the export")
    parser.add_argument("--output", type=Path, required=True, help="listing_vectors.parquet")
    parser.add_argument(
        "--without-vector", type=Path, required=True, help="without_vector.parquet to write"
    )
    parser.add_argument("--failures", type=Path, required=True, help="failures.json to write")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU cores to use")
    parser.add_argument("--projection", default="", help="refuse another file of --pca than this")
    settings.add_flags(parser, *Identity._fields, "pca", "memory_mb", "max_failed_fraction")
    args = parser.parse_args()
    chosen = settings.from_flags(args)
    if not chosen.source:
        parser.error("--source must name the recipe")
    if not chosen.model_rev:
        parser.error("--model-rev must name the encoder")
    args.encoded = parquet.shards(args.encoded, args.shards)
    projection = projections.read(Path(chosen.pca), args.projection) if chosen.pca else None
    report = aggregate(args, chosen, projection)
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


class Batch(NamedTuple):
    """What became of some listings of a shard."""

    listings: int
    images: int
    vectors: pa.Table  # parquet.listing_vectors
    without: pa.Table  # the others, with the files that were tried
    cancelled: pa.Table  # of those, who has image vectors, but without a direction together
    errors: list[str]


def means(vectors: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The mean of each listing's vectors: float32 (images, dim) in, float64 (listings, dim) out.

    A listing's images follow each other, from its row in `starts` on. They are added one by one in
    double precision, for all listings at a time: twenty times as fast as avg() of each element in
    DuckDB, and the same bits whatever the batch.
    """
    images = np.diff(starts, append=len(vectors))
    sums = vectors[starts].astype(np.float64)
    for k in range(1, images.max(initial=0)):
        more = np.flatnonzero(images > k)
        sums[more] += vectors[starts[more] + k]
    mean: np.ndarray = np.divide(sums, images[:, np.newaxis], out=sums)
    return mean


def batch_of(encoded: pa.Table, identity: Identity, projection: Projection | None) -> Batch:
    """What becomes of whole listings: they keep their order, which is the export's."""
    has_vec = encoded["vec"].is_valid()
    with_vec = encoded.filter(has_vec) if encoded["vec"].null_count else encoded
    vectors, cancelled = _vectors(with_vec, identity, projection)
    starts = parquet.listing_starts(encoded)
    images = np.diff(starts, append=encoded.num_rows)
    has_one = np.logical_or.reduceat(has_vec.to_numpy(), starts)
    return Batch(
        listings=len(starts),
        images=encoded.num_rows,
        vectors=vectors,
        without=_without(encoded.filter(pa.array(np.repeat(~has_one, images)))),
        cancelled=cancelled,
        errors=encoded["error"].drop_null().to_pylist(),
    )


def _vectors(
    encoded: pa.Table, identity: Identity, projection: Projection | None
) -> tuple[pa.Table, pa.Table]:
    """The vectors of listings, and the listings whose images' vectors have no direction."""
    dim = parquet.dimension(encoded.schema)
    vectors = encoded["vec"].combine_chunks().flatten().to_numpy().reshape(-1, dim)
    starts = parquet.listing_starts(encoded)
    with np.errstate(all="ignore"):  # of vectors that are not finite
        mean, sound = _unit(means(vectors, starts))
        if projection:
            mean, has_direction = _unit(projection.apply(mean))
            sound &= has_direction
    listings = encoded.select(parquet.LISTINGS.names).take(starts)
    columns = {
        **{name: listings[name] for name in listings.column_names},
        **{name: pa.repeat(value, len(starts)) for name, value in identity._asdict().items()},
        "vec": pa.FixedSizeListArray.from_arrays(
            pa.array(mean.astype(np.float32).ravel()), mean.shape[1]
        ),
        "n_images": np.diff(starts, append=len(vectors)).astype(np.int32),
    }
    made = pa.table(columns, schema=parquet.listing_vectors(mean.shape[1]))
    kept = pa.array(sound)
    return made.filter(kept), listings.filter(pc.invert(kept))


def _unit(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The vectors (n, dim), in place, at length 1, and of which that is a direction."""
    length = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    vectors /= length[:, np.newaxis]
    return vectors, (length > SMALLEST_MEAN) & (length < math.inf)


def _without(encoded: pa.Table) -> pa.Table:
    """A row for each of these listings, with its files by rank."""
    starts = parquet.listing_starts(encoded)
    columns = {name: encoded[name].take(starts) for name in parquet.LISTINGS.names}
    files = parquet.WITHOUT_VECTOR.field("files").type.value_type
    tried = pa.StructArray.from_arrays(
        [encoded[field.name].combine_chunks() for field in files], fields=list(files)
    )
    offsets = np.append(starts, encoded.num_rows).astype(np.int32)
    return pa.table({**columns, "files": pa.ListArray.from_arrays(offsets, tried)})


WITH_CANDIDATES_SQL = f"""
    WITH tried AS (
        SELECT {LISTING}, {CANDIDATES_SQL} AS candidates
        FROM candidates SEMI JOIN without USING ({LISTING}) GROUP BY ALL)
    SELECT {LISTING}, candidates, coalesce(files, []) AS files
    FROM without JOIN tried USING ({LISTING})
    ORDER BY edited_date DESC, listing_id, generation"""


def aggregate(
    args: argparse.Namespace, chosen: settings.Settings, projection: Projection | None = None
) -> Report:
    """Write the three files; returns the report.

    ModelError: the projection was fitted on the vectors of another encoder.
    """
    dim = parquet.dimension(pq.read_schema(args.encoded[0]))
    made_by = parquet.made_by(args.encoded)
    if projection:
        projection.check(made_by["encoder"], dim)
        made_by["select"] = {**made_by["select"], "projection": projection.digest}
        dim = projection.dimensions
    witnesses = made_by.pop("witnesses_there")
    made_by["aggregate"] = chosen.identity._asdict()
    report = Report()
    with duckdb.connect(config={"memory_limit": f"{chosen.memory_mb}MB", "threads": 1}) as con:
        con.execute("SET TimeZone = 'UTC'")  # else dates come back in this machine's zone
        no_rows = parquet.WITHOUT_VECTOR.empty_table().drop_columns("candidates")
        con.from_arrow(no_rows).create("without")  # it spills what is too much for memory
        with parquet.writer(args.output, parquet.listing_vectors(dim), made_by) as writer:
            for batch in _batches(args.encoded, chosen.identity, projection, args.threads):
                writer.write_table(batch.vectors, row_group_size=parquet.VECTOR_ROW_GROUP)
                _count(con, batch, report)
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


def _batches(
    encoded: Iterable[Path], identity: Identity, projection: Projection | None, threads: int
) -> Iterator[Batch]:
    """All batches in the order of the shards; so many threads work at those that come next."""
    coming: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for file, rows in _parts(encoded):
            coming.append(pool.submit(_batch, file, rows, identity, projection))
            if len(coming) > threads:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _parts(encoded: Iterable[Path]) -> Iterator[tuple[tuple[Path, pq.FileMetaData], range]]:
    """The rows of each batch, found by the keys alone: batches can be read side by side."""
    for path in encoded:
        footer, start = pq.read_metadata(path), 0
        for keys in parquet.clustered_batches(path, BATCH_ROWS, parquet.LISTINGS.names):
            rows = range(start, start + keys.num_rows)
            yield (path, footer), rows
            start = rows.stop


def _batch(
    file: tuple[Path, pq.FileMetaData],
    rows: range,
    identity: Identity,
    projection: Projection | None,
) -> Batch:
    path, footer = file
    with pq.ParquetFile(path, metadata=footer, pre_buffer=False) as shard:
        return batch_of(parquet.read_rows(shard, rows), identity, projection)


def _count(con: duckdb.DuckDBPyConnection, batch: Batch, report: Report) -> None:
    """Add what a batch held to the report, and who has no vector to `without`."""
    report.listings += batch.listings
    report.images += batch.images
    report.vectors += batch.vectors.num_rows
    report.reasons.update(error.partition(":")[0] for error in batch.errors)
    report.not_there += sum(error.startswith(NOT_THERE) for error in batch.errors)
    for listing in batch.cancelled["listing_id"].to_pylist():
        log.warning(
            "listing %d has no vector: its image vectors cancel out or are not finite", listing
        )
    for rows in (batch.without, batch.cancelled):
        if rows.num_rows:
            con.register("rows", rows)
            con.execute("INSERT INTO without BY NAME FROM rows")


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
        for candidates in parquet.clustered_batches(args.images):
            con.register("candidates", candidates)
            rows = con.sql(WITH_CANDIDATES_SQL).to_arrow_table()
            writer.write_table(rows.cast(parquet.WITHOUT_VECTOR))
            report.without += rows.num_rows


if __name__ == "__main__":
    command.run(main, "aggregate")
