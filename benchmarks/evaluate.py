"""`snakemake evaluate` over made-up listings of one to five photos: seconds and memory.

Each photo is mixed from a vector of its listing and one of its own; both have the structure of
real ones (benchmarks/lifelike.py).
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import lifelike, material, measure
from pipeline.retrieval.evaluation import evaluate
from pipeline.retrieval.halves import Halves
from pipeline.stage import parquet

AT_A_TIME = 10_000  # listings that are made together
OWN = 0.6  # of a photo's vector, beside its listing's


def main() -> None:
    parser = material.parser(__doc__)
    parser.add_argument("--listings", type=int, default=100_000, help="in the gallery")
    args = parser.parse_args()
    with material.work_folder(args.work) as folder:
        shard = shard_of(folder, args.listings, args.threads)
        with measure.memory() as memory:
            found: list[dict[str, object]] = []
            took = measure.seconds(lambda: found.append(_evaluated(shard, args.threads)))
    figures = {name: found[0][name] for name in ("queries", "gallery", "photos")}
    measure.say(
        f"{args.listings} listings: {took:.0f} s, {memory.start:.0f} -> {memory.peak:.0f} MB"
    )
    measure.emit(
        "evaluate", **figures, seconds=took, recall_at_1=found[0]["recall_at_1"],
        megabytes_before=memory.start, megabytes_peak=memory.peak,
    )  # fmt: skip


def _evaluated(shard: Path, threads: int) -> dict[str, object]:
    halves = Halves([shard], None, 0, 1024)
    return evaluate(halves, parquet.dimension(pq.read_schema(shard)), 0, threads)[0]


def shard_of(folder: Path, listings: int, threads: int) -> Path:
    """An encode shard of so many listings; made once."""
    path = folder / f"evaluate-{listings}.parquet"
    if path.exists():
        return path
    real = lifelike.of_photos(folder, threads)[1]
    schema = parquet.encoded(real.shape[1])
    made_by = {"export": material.IDENTITY, "encoder": material.ENCODER}
    with parquet.writer(path, schema, made_by) as writer:
        for start in range(0, listings, AT_A_TIME):
            listing = np.arange(start, min(listings, start + AT_A_TIME))
            size = np.random.default_rng(start).integers(1, 6, len(listing))
            listing_of = np.repeat(listing, size)
            place = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
            theirs = np.repeat(lifelike.more(real, len(listing), 2 * start), size, axis=0)
            own = lifelike.more(real, len(place), 2 * start + 1)
            vec = lifelike.unit((1 - OWN) * theirs + OWN * own)
            names = [f"{a}/{b}.jpg" for a, b in zip(listing_of, place, strict=True)]
            columns = {
                "generation": np.ones(len(place), np.int32),
                "listing_id": listing_of,
                "edited_date": material.days(listing_of),
                "image_index": place.astype(np.int32),
                "storage_path": names,
                "score": np.zeros(len(place), np.int32),
                "rank": (place + 1).astype(np.int8),
                "fallback": np.zeros(len(place), bool),
                "size": place,
                "mtime_ns": place,
                "vec": pa.FixedSizeListArray.from_arrays(pa.array(vec.ravel()), vec.shape[1]),
                "error": pa.nulls(len(place), pa.string()),
            }
            writer.write_table(pa.table(columns, schema=schema), row_group_size=4096)
    return path


if __name__ == "__main__":
    main()
