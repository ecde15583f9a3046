"""Select the Top-K images of every listing and split them into shards.

Reads: images.parquet and listings.parquet of the export. Writes: one Parquet file per shard with
ranks 1..K; all images of a listing are in one shard, listings in export order. Guarantees: every
exported listing has at least one selected image, and no shard of an earlier split is left over;
neither memory nor the number of open files grows with that of the shards.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import polars as pl
import pyarrow as pa

from pipeline.stage import command, parquet, settings
from pipeline.stage.command import log
from pipeline.stage.errors import DataError
from pipeline.stage.settings import Settings

LISTING = ["generation", "listing_id", "edited_date"]
BATCH_ROWS = 256_000
BUFFERED_ROWS = 1_000_000  # over all files, before a row group is written
OPEN_FILES = 64  # written side by side; with their locks within macOS's 256 descriptors

SPILLED = parquet.SELECTED.append(pa.field("shard", pa.uint32()))


def main() -> None:
    parser = command.stage_parser(__doc__)
    parser.add_argument("--listings", type=Path, required=True, help="listings.parquet")
    parser.add_argument("--images", type=Path, required=True, help="images.parquet")
    parser.add_argument("--selected", type=Path, required=True, help="folder to write to")
    parser.add_argument("--shards", type=int, required=True, help="N-of-SHARDS.parquet, how many")
    parser.add_argument(
        "--prune", type=Path, nargs="*", default=[], help="folders to clear of other shards"
    )
    settings.add_flags(parser, "topk", "exclude_stock", "exclude_screenshots")
    args = parser.parse_args()
    selected = select(args, settings.from_flags(args))
    log.info("%d images selected -> %s", selected, args.selected)


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
    made_by = {**parquet.metadata(args.images), "select": chosen.recipe}
    shards = parquet.shards(args.selected, args.shards)
    args.selected.mkdir(parents=True, exist_ok=True)
    images = write(_selected(args, chosen), shards, made_by)
    for folder in args.prune:
        _prune(folder, {path.name for path in shards})
    return images


def why_not(candidate: Mapping[str, Any], fallback: bool, chosen: Settings) -> str:
    """Why `select_images` did not take a candidate of a listing; `fallback`: it fell back."""
    if candidate["is_stock_photo"] and chosen.exclude_stock and not fallback:
        return "no: stock photo"
    if candidate["battery_screenshot"] and chosen.exclude_screenshots and not fallback:
        return "no: battery screenshot"
    return f"no: beyond topk {chosen.topk}"


def _selected(args: argparse.Namespace, chosen: settings.Settings) -> Iterator[pl.DataFrame]:
    """The selected images in export order, with the `shard` of each (0-based).

    DataError at the end where a listing has none.
    """
    shard = shard_of(pl.col("listing_id"), args.shards).cast(pl.UInt32).alias("shard")
    listings = 0
    for batch in parquet.clustered_batches(args.images, BATCH_ROWS):
        selected = select_images(
            pl.DataFrame(batch), chosen.topk, chosen.exclude_stock, chosen.exclude_screenshots
        )
        listings += int(selected["rank"].eq(1).sum())
        yield selected.with_columns(shard)
    _check_listings(listings, args.listings)


def write(selected: Iterable[pl.DataFrame], shards: Sequence[Path], made_by: dict[str, Any]) -> int:
    """Write each row to the shard that its `shard` names, none if an error ends them; counts them.

    Of more shards than OPEN_FILES, rows go to a temporary file first, those of OPEN_FILES shards
    together. It has no name, and is gone with its process.
    """
    if len(shards) <= OPEN_FILES:
        return _write_side_by_side(selected, shards, made_by)
    written, batches = 0, defaultdict(list)
    with TemporaryFile(dir=shards[0].parent) as file:
        zstd = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(file, SPILLED, options=zstd) as spill:
            for number, rows in _portions(selected, OPEN_FILES):
                for batch in rows.cast(SPILLED).to_batches(max_chunksize=BATCH_ROWS):
                    batches[number].append(spill.stats.num_record_batches)
                    spill.write_batch(batch)
        reader = pa.ipc.open_file(file)
        for number, start in enumerate(range(0, len(shards), OPEN_FILES)):
            those = (pl.DataFrame(reader.get_batch(i)) for i in batches[number])
            from_0 = (rows.with_columns(pl.col("shard") - start) for rows in those)
            written += _write_side_by_side(from_0, shards[start : start + OPEN_FILES], made_by)
    return written


def _write_side_by_side(
    selected: Iterable[pl.DataFrame], shards: Sequence[Path], made_by: dict[str, Any]
) -> int:
    written = 0
    with ExitStack() as stack:
        writers = [
            stack.enter_context(parquet.writer(path, parquet.SELECTED, made_by)) for path in shards
        ]
        for number, rows in _portions(selected, 1):
            table = rows.drop_columns("shard").cast(parquet.SELECTED)
            writers[number].write_table(table, row_group_size=parquet.ROW_GROUP)
            written += rows.num_rows
    return written


def _portions(selected: Iterable[pl.DataFrame], together: int) -> Iterator[tuple[int, pa.Table]]:
    """The rows by shard, so many shards together, in portions that do not shrink with them."""
    buffers: dict[int, list[pl.DataFrame]] = defaultdict(list)
    buffered = 0
    for rows in selected:
        numbered = rows.with_columns(number=pl.col("shard") // together)
        for (number,), some in numbered.partition_by(
            "number", as_dict=True, include_key=False
        ).items():
            buffers[int(number)].append(some)
        buffered += rows.height
        if buffered >= BUFFERED_ROWS:
            yield from _emptied(buffers)
            buffered = 0
    yield from _emptied(buffers)


def _emptied(buffers: dict[int, list[pl.DataFrame]]) -> Iterator[tuple[int, pa.Table]]:
    for number in sorted(buffers):
        yield number, pl.concat(buffers.pop(number)).to_arrow()


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
