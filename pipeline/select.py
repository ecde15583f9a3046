"""Select the Top-K images of every listing and split them into shards.

Reads: images.parquet and listings.parquet of the export. Writes: one Parquet file per shard with
ranks 1..K; all images of a listing are in one shard, listings in export order. Guarantees: every
exported listing has at least one selected image, and no shard of an earlier split is left over.
"""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.stage import command, parquet, settings
from pipeline.stage.command import log
from pipeline.stage.errors import DataError
from pipeline.stage.settings import Settings

LISTING = ["generation", "listing_id", "edited_date"]
BATCH_ROWS = 256_000
BUFFERED_ROWS = 1_000_000  # over all shards, before a row group is written


def main() -> None:
    parser = command.stage_parser(__doc__)
    parser.add_argument("--listings", type=Path, required=True, help="listings.parquet")
    parser.add_argument("--images", type=Path, required=True, help="images.parquet")
    parser.add_argument("--outputs", type=Path, nargs="+", required=True, help="files to write")
    parser.add_argument(
        "--prune", type=Path, nargs="*", default=[], help="folders to clear of other shards"
    )
    settings.add_flags(parser, "topk", "exclude_stock", "exclude_screenshots")
    args = parser.parse_args()
    selected = select(args, settings.from_flags(args))
    log.info("%d images selected -> %s", selected, args.outputs[0].parent)


def select_images(
    candidates: pl.DataFrame, topk: int, exclude_stock: bool, exclude_screenshots: bool
) -> pl.DataFrame:
    """The Top-K of each listing, in the order of the listings and then by rank.

    `candidates` has the columns of `parquet.CANDIDATES`, each listing's rows together. Best score
    first, then lowest image_index, then storage_path. A listing whose images are all excluded
    falls back to its first K by image_index, marked `fallback`. Returns `parquet.SELECTED`.
    """
    stock = pl.lit(exclude_stock) & pl.col("is_stock_photo")
    screenshot = pl.lit(exclude_screenshots) & pl.col("battery_screenshot")
    return (
        candidates.with_columns(listing=pl.struct(LISTING).rle_id(), excluded=stock | screenshot)
        .with_columns(fallback=pl.col("excluded").all().over("listing"))
        .filter(~pl.col("excluded") | pl.col("fallback"))
        .with_columns(order=pl.when("fallback").then(0).otherwise(-pl.col("score")))
        .sort("listing", "order", "image_index", "storage_path", nulls_last=True)
        .with_columns(rank=pl.int_range(1, pl.len() + 1).over("listing"))
        .filter(pl.col("rank") <= topk)
        .with_columns(pl.col("rank").cast(pl.Int8))
        .select(parquet.SELECTED.names)
    )


def shard_of(listing_id: pl.Expr, shards: int) -> pl.Expr:
    """The shard (0-based) of a listing: a multiplicative hash (Knuth, TAOCP 3, 6.4) of its id.

    It depends on nothing else, so a new listing moves no other; the hash spreads ids with gaps.
    """
    mixed = listing_id.reinterpret(signed=False) * pl.lit(0x9E3779B97F4A7C15, dtype=pl.UInt64)
    return (mixed // 2**33) % shards


def select(args: argparse.Namespace, chosen: settings.Settings) -> int:
    """Write all shards in one pass over the candidates; returns the number of images."""
    export = parquet.metadata(args.images)
    made_by = {**export, "select": chosen.recipe}
    listings = images = 0
    with ExitStack() as stack:
        writers = [
            stack.enter_context(parquet.writer(path, parquet.SELECTED, made_by))
            for path in args.outputs
        ]
        shards = ShardWriter(writers)
        for batch in parquet.clustered_batches(args.images, BATCH_ROWS):
            frame = pl.DataFrame(batch)
            selected = select_images(
                frame, chosen.topk, chosen.exclude_stock, chosen.exclude_screenshots
            )
            shards.write(selected)
            listings += int(selected["rank"].eq(1).sum())
            images += selected.height
        shards.flush()
        _check_listings(listings, args.listings)
    for folder in args.prune:
        _prune(folder, {path.name for path in args.outputs})
    return images


def why_not(candidate: Mapping[str, Any], fallback: bool, chosen: Settings) -> str:
    """Why `select_images` did not take a candidate of a listing; `fallback`: it fell back."""
    if candidate["is_stock_photo"] and chosen.exclude_stock and not fallback:
        return "no: stock photo"
    if candidate["battery_screenshot"] and chosen.exclude_screenshots and not fallback:
        return "no: battery screenshot"
    return f"no: beyond topk {chosen.topk}"


class ShardWriter:
    """Spreads rows over the shards' writers, in row groups that do not shrink with their number."""

    def __init__(self, writers: list[pq.ParquetWriter]) -> None:
        self.shards: list[tuple[pq.ParquetWriter, list[pl.DataFrame]]] = [(w, []) for w in writers]
        self.buffered = 0

    def write(self, selected: pl.DataFrame) -> None:
        """Add rows, each to the shard of its listing."""
        shard = shard_of(pl.col("listing_id"), len(self.shards)).alias("shard")
        for (number,), rows in (
            selected.with_columns(shard)
            .partition_by("shard", as_dict=True, include_key=False)
            .items()
        ):
            self.shards[int(number)][1].append(rows)
        self.buffered += selected.height
        if self.buffered >= BUFFERED_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered."""
        for writer, buffer in self.shards:
            if buffer:
                writer.write_table(_arrow(pl.concat(buffer)), row_group_size=parquet.ROW_GROUP)
                buffer.clear()
        self.buffered = 0


def _arrow(selected: pl.DataFrame) -> pa.Table:
    return selected.to_arrow().cast(parquet.SELECTED)


def _check_listings(found: int, listings: Path) -> None:
    expected = parquet.rows([listings])
    if found != expected:
        raise DataError(
            f"{expected} listings with a selected image",
            str(found),
            str(listings),
            "run the export again: --forcerun export",
        )


def _prune(folder: Path, keep: set[str]) -> None:
    for path in _leftovers(folder, keep):
        path.unlink()
        log.info("removed %s, a shard of another split", path)


def _leftovers(folder: Path, keep: set[str]) -> Iterator[Path]:
    """Shards of other splits, and temporary files of killed runs, whose names begin with a dot."""
    for path in sorted(folder.glob("*-of-*")):
        if path.with_suffix(".parquet").name not in keep:
            yield path


if __name__ == "__main__":
    command.run(main, "select")
