"""Export and select out of a large database: all pending, then one in a hundred, then none."""

import argparse
from pathlib import Path

from benchmarks import material, measure
from pipeline import export as stage
from pipeline import select
from pipeline.database.connection import connect
from pipeline.stage import parquet

FILL = """
    INSERT INTO "iPhone".iphone_listings (generation, listing_id, edited_date, url, spam)
        SELECT 1, i, timestamptz '2026-01-01' + i * interval '1 second', 'https://example.com',
            CASE WHEN i % 50 = 0 THEN 'spam' END
        FROM generate_series(1, {n}) i;
    INSERT INTO "iPhone".iphone_image_assets (generation, listing_id, image_index, storage_path)
        SELECT 1, i, k, i || '/' || k || '.jpg'
        FROM generate_series(1, {n}) i, generate_series(0, {images} - 1) k;
    INSERT INTO ml.iphone_image_features_v1 (feature_version, generation, listing_id, image_index,
            is_stock_photo, battery_screenshot, photo_quality_level, background_clean_level)
        SELECT 1, 1, i, k, (i + k) % 9 = 0, (i + k) % 11 = 0, (i * 7 + k) % 5, (i + k * 3) % 4
        FROM generate_series(1, {n}) i, generate_series(0, {images} - 1) k;
    ANALYZE"""

# One vector for all: what is measured reads the keys. The dates of one in a hundred differ.
DONE = """
    INSERT INTO ml.img_vec512_v1 (listing_id, edited_date, source, model_rev, vec, n_images)
        SELECT listing_id, edited_date, 'benchmark', 'benchmark',
            array_fill(0.04419417::real, ARRAY[512])::vector, 3
        FROM "iPhone".iphone_listings WHERE spam IS NULL AND listing_id % 100 <> 1;
    ANALYZE ml.img_vec512_v1"""
REST = """
    INSERT INTO ml.img_vec512_v1 (listing_id, edited_date, source, model_rev, vec, n_images)
        SELECT listing_id, edited_date, 'benchmark', 'benchmark',
            array_fill(0.04419417::real, ARRAY[512])::vector, 3
        FROM "iPhone".iphone_listings WHERE spam IS NULL AND listing_id % 100 = 1"""


def main() -> None:
    parser = material.parser(__doc__)
    parser.add_argument("--listings", type=int, default=1_000_000)
    parser.add_argument("--images", type=int, default=4, help="image rows of a listing")
    args = parser.parse_args()
    with material.work_folder(args.work) as folder, material.database(folder):
        run(FILL.format(n=args.listings, images=args.images))
        measured(args, folder, "all pending")
        run(DONE)
        measured(args, folder, "1 in 100 pending")
        run(REST)
        measured(args, folder, "nothing pending")


def run(script: str) -> None:
    """Each statement of a script."""
    with connect() as connection:
        with connection.cursor() as cursor:
            for statement in script.split(";"):
                cursor.execute(statement)
        connection.commit()


def measured(args: argparse.Namespace, folder: Path, what: str) -> None:
    """One line: seconds of export and of select, listings that were pending."""
    chosen = material.defaults().model_copy(
        update={
            **material.IDENTITY, "limit_listings": args.listings,
            "cache_dir": str(folder / "export-cache"),
        }
    )  # fmt: skip
    params = {**material.IDENTITY, "force": False}
    listings, images = folder / "listings.parquet", folder / "images.parquet"
    flags = argparse.Namespace(
        listings=listings, images=images, selected=folder / "select", shards=4, prune=[]
    )
    with measure.memory() as memory:
        export_s = measure.seconds(
            lambda: stage.export(material.environment(), chosen, params, listings, images)
        )
        select_s = measure.seconds(lambda: select.select(flags, chosen))
    pending, rows = parquet.rows([listings]), parquet.rows([images])
    measure.say(
        f"{what}: {pending} listings, {rows} images; export {export_s:.1f} s,"
        f" select {select_s:.1f} s; {memory.start:.0f} -> {memory.peak:.0f} MB"
    )
    measure.emit(
        "export and select", what=what, listings=args.listings,
        images_per_listing=args.images, pending=pending, images=rows,
        export_seconds=export_s, select_seconds=select_s,
        megabytes_before=memory.start, megabytes_peak=memory.peak,
    )  # fmt: skip


if __name__ == "__main__":
    main()
