"""What the last run did, read from the files that it left."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.stage import parquet

RESULTS = Path("results")


def main() -> None:
    """Print a few lines that a person can read; nothing where there are no results."""
    for stage, text in lines(RESULTS):
        print(f"  {stage:<10} {text}")


def lines(results: Path) -> Iterator[tuple[str, str]]:
    """(stage, what it did) in data order, for the stages that have results."""
    export = results / "export"
    if not (export / "images.parquet").exists():
        return
    listings = parquet.rows([export / "listings.parquet"])
    images = parquet.rows([export / "images.parquet"])
    yield "export", f"{listings} listings, {images} images -> {export}"
    shards = sorted((results / "select").glob("*.parquet"))
    yield "select", f"{parquet.rows(shards)} images in {len(shards)} shards -> {results / 'select'}"
    stats = _encode_stats(results)
    if stats:
        yield "encode", f"{encoded(stats)} -> {results / 'encode'}"
    vectors = results / "aggregate" / "listing_vectors.parquet"
    if vectors.exists():
        failures = json.loads((results / "aggregate" / "failures.json").read_text())
        without = failures["listings_without_vector"]
        left = f", {without} listings without (without_vector.parquet)" if without else ""
        yield "aggregate", f"{parquet.rows([vectors])} listing vectors{left} -> {vectors.parent}"
    receipt = results / "load" / "receipt.json"
    if receipt.exists() and receipt.stat().st_mtime_ns >= vectors.stat().st_mtime_ns:
        yield "load", loaded(json.loads(receipt.read_text()))


def _encode_stats(results: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((results / "encode").glob("*.json"))]


def hit_rate(results: Path) -> str:
    """How many of the last run's images needed no encode."""
    stats = _encode_stats(results)
    images = sum(shard["images"] for shard in stats)
    if not images:
        return "no run in this folder yet, so no hit rate"
    saved = sum(sum(shard["saved"].values()) for shard in stats)
    return f"last run: {saved} of {images} images were not encoded again ({saved / images:.0%})"


def encoded(stats: list[dict[str, Any]]) -> str:
    """One line over all shards: encodes made, encodes saved by reason, failures by reason."""
    saved: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for shard in stats:
        saved.update(shard["saved"])
        failed.update(shard["failed"])
    parts = [f"{sum(shard['encoded'] for shard in stats)} images encoded"]
    parts += [f"{count} saved ({how})" for how, count in saved.items() if count]
    parts += [f"{count} failed ({reason})" for reason, count in failed.items()]
    return ", ".join(parts)


def loaded(receipt: dict[str, Any]) -> str:
    """One line of a receipt."""
    waiting = f", {receipt['waiting']} listings wait for files" if receipt["waiting"] else ""
    return (
        f"{receipt['inserted']} inserted, {receipt['updated']} updated,"
        f" {receipt['unchanged']} unchanged{waiting} -> {receipt['table']}"
    )
