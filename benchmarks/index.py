"""What an HNSW index brings to a search, and what it costs a load, on vectors like real ones.

How the vectors are made is told in benchmarks/lifelike.py; LISTING_PHOTOS_DIR names the folder of
real photos, without it they are rendered. Expect a search in a few milliseconds instead of one that
reads the table, and a load that takes as much longer as each row has neighbours to be found.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import lifelike, material, measure
from benchmarks.load import load_all, psql
from pipeline import index
from pipeline.stage.settings import Identity

SHARES = (0.01, 0.1, 1.0)  # of the table, that one load adds
IDENTITY = Identity(**material.IDENTITY)


def main() -> None:
    parser = material.parser(__doc__)
    parser.add_argument("--vectors", type=int, default=50_000, help="in the table that is searched")
    parser.add_argument("--rows", type=int, default=100_000, help="in the table that is loaded")
    args = parser.parse_args()
    with material.work_folder(args.work) as folder, material.database(folder) as dsn:
        name, real = lifelike.of_photos(folder, args.threads)
        if args.vectors:
            searched(folder, dsn, name, real, args.vectors)
        if args.rows:
            for line in loaded(folder, dsn, real, args.rows):
                measure.emit("index: load", photos=name, rows=args.rows, **line)


def searched(folder: Path, dsn: str, name: str, real: lifelike.Vectors, rows: int) -> None:
    """One line for vectors, one for halves of them, and what the table is made of."""
    made = lifelike.more(real, rows)
    measure.emit(
        "index: vectors", photos=name, real=len(real), made=rows, **lifelike.likeness(real, made)
    )
    add(folder, made, 0)
    psql(
        dsn,
        'INSERT INTO "iPhone".iphone_listings'
        " SELECT 1, listing_id, edited_date, 'https://example.com' FROM ml.img_vec512_v1",
        "VACUUM ANALYZE",
    )
    for halfvec in (False, True):
        report = build("--halfvec" if halfvec else "--no-halfvec")
        for line in index.table(report):
            measure.say(line)
        measure.emit("index: search", photos=name, vectors=rows, **report)
    psql(dsn, f'DROP INDEX ml."{report["index"]}"', "TRUNCATE ml.img_vec512_v1")


def loaded(folder: Path, dsn: str, real: lifelike.Vectors, rows: int) -> Iterator[dict[str, Any]]:
    """Milliseconds for each row that a load adds, with the index and without, and for a build."""
    add(folder, lifelike.more(real, rows), 0)
    added = [lifelike.more(real, int(rows * share), seed) for seed, share in enumerate(SHARES, 1)]
    plain = []
    for vectors in added:
        plain.append(add(folder, vectors, 10 * rows))
        psql(dsn, f"DELETE FROM ml.img_vec512_v1 WHERE listing_id >= {10 * rows}", "VACUUM")
    built = build("--sample", "1")["build"]
    first = 10 * rows
    for share, vectors, without in zip(SHARES, added, plain, strict=True):
        seconds = add(folder, vectors, first)
        first += len(vectors)
        yield {
            "share": share,
            "added": len(vectors),
            "with_index_ms_per_row": 1000 * seconds / len(vectors),
            "without_ms_per_row": 1000 * without / len(vectors),
            "build_ms_per_row": 1000 * built["seconds"] / built["rows"],
        }


def add(folder: Path, vectors: lifelike.Vectors, first: int) -> float:
    """Load vectors of new listings; the seconds that the stage takes."""
    path = folder / "vectors.parquet"
    material.listing_vectors(path, len(vectors), vectors=vectors, first=first)
    return measure.seconds(lambda: load_all(folder, path))


def build(*flags: str) -> dict[str, Any]:
    """The report of `python -m pipeline index`."""
    parser = argparse.ArgumentParser()
    index.add_flags(parser)
    args = parser.parse_args(flags)
    return index.index(args, material.defaults(), material.environment(), IDENTITY)


if __name__ == "__main__":
    main()
