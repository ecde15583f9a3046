"""What the benchmarks work on: photos, encoders, shards of images or vectors, a database."""

import argparse
import functools
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from demo import postgres, render
from demo.marketplace import IMAGE_SUFFIXES
from pipeline.database import target
from pipeline.encode import EncodeJob
from pipeline.stage import parquet, settings
from pipeline.stage.settings import Environment, Settings

SIZES = {"2 MP": (1600, 1200), "12 MP": (4000, 3000)}
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpg": ("JPEG", {"quality": 88, "subsampling": "4:2:0"}),
    "jpg progressive": ("JPEG", {"quality": 88, "subsampling": "4:2:0", "progressive": True}),
    "png": ("PNG", {"compress_level": 1}),
    "webp": ("WEBP", {"quality": 80, "method": 2}),
    "heic": ("HEIF", {"quality": 60}),
}
DAY = datetime(2026, 1, 1, tzinfo=UTC)
ENCODER = {"weights": "w", "architecture": "a", "transform": "t", "precision": "fp32"}
IDENTITY = {"source": "benchmark", "model_rev": "benchmark", "pca_rev": ""}


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks share."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--work", type=Path, help="folder to keep photos and models in between runs")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="cores to use")
    made.add_argument("--rounds", type=int, default=2, help="the fastest of so many counts")
    return made


@contextmanager
def work_folder(kept: Path | None) -> Iterator[Path]:
    """The folder that is kept, or one that goes away."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with TemporaryDirectory(prefix="benchmarks-") as folder:
        yield Path(folder)


def photos(folder: Path, size: str, count: int) -> list[Path]:
    """Rendered JPEG photos of a size in SIZES, four a listing; made once."""
    out = folder / f"photos-{size.replace(' ', '')}"
    listings = -(-count // 4)
    if not (out / f"{listings - 1:06d}" / "3.jpg").exists():
        render.write_all(
            render.photo_jobs(out, listings, 4, SIZES[size], 0, 88), workers=os.cpu_count() or 1
        )
    return sorted(out.rglob("*.jpg"))[:count]


def fitted(folder: Path, sources: list[Path], size: str) -> list[Path]:
    """The photos as JPEGs of a size in SIZES, cut to its shape; made once."""
    of = hashlib.sha256("".join(f"{p.resolve()} {p.stat()}" for p in sources).encode()).hexdigest()
    out = folder / f"fitted-{size.replace(' ', '')}-{of[:12]}"
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{number:06d}.jpg" for number in range(len(sources))]
    name, options = FORMATS["jpg"]
    for source, path in zip(sources, files, strict=True):
        if not path.exists():
            with Image.open(source) as image:
                resized = ImageOps.fit(image.convert("RGB"), SIZES[size], Image.Resampling.LANCZOS)
                resized.save(path, name, **options)
    return files


def own_photos(folder: Path) -> list[Path]:
    """Every image file below a folder, in the order of the names."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


def converted(folder: Path, sources: list[Path], kind: str) -> list[Path]:
    """The photos in one of FORMATS; made once."""
    name, options = FORMATS[kind]
    out = folder / kind.replace(" ", "-")
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for source in sources:
        path = (
            out / f"{source.parent.parent.name}-{source.parent.name}-{source.stem}.{name.lower()}"
        )
        if not path.exists():
            with Image.open(source) as image:
                image.save(path, name, **options)
        files.append(path)
    return files


def small_photos(folder: Path, count: int) -> Path:
    """A folder of 64 x 48 JPEGs that all differ, as 000/00000.jpg; made once."""
    out = folder / f"small-{count}"
    if (out / "whole").exists():
        return out
    draw = np.random.default_rng(0)
    for number in range(count):
        path = small_name(out, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        block = draw.integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(block).save(path, "JPEG")
    (out / "whole").touch()
    return out


def small_name(folder: Path, number: int) -> Path:
    return folder / f"{number // 1000:03d}" / f"{number:06d}.jpg"


def vit(folder: Path) -> str:
    """The model_name of a ViT-B-32 with weights from a fixed seed."""
    from demo import encoder  # imports torch, which only some benchmarks need

    return f"local-dir:{encoder.random_encoder(folder / 'vit-b-32', model_name='ViT-B-32')}"


def tiny(folder: Path, dim: int = 512) -> str:
    """The model_name of an encoder that takes no time."""
    from demo import encoder  # imports torch, which only some benchmarks need

    return f"local-dir:{encoder.random_encoder(folder / f'tiny-{dim}', embed_dim=dim)}"


def trained(folder: Path) -> str:
    """The model_name of EfficientNet-Lite0 with ImageNet's weights."""
    from demo import encoder  # imports torch, which only some benchmarks need

    return f"local-dir:{encoder.efficientnet_encoder(folder / 'efficientnet-lite0')}"


def job(root: Path | str, cache: Path, threads: int, **chosen: Any) -> EncodeJob:
    """What the encode stage knows before its first image."""
    return EncodeJob.prepare(
        Settings(cache_dir=str(cache), **chosen),
        Environment.read({"IMAGE_ROOT_DIR": str(root)}),
        threads,
    )


def select_shard(path: Path, storage_paths: list[str], per_listing: int = 4) -> Path:
    """A select shard of these images, so many a listing."""
    rows = len(storage_paths)
    listing = np.arange(rows) // per_listing
    rank = np.arange(rows) % per_listing
    table = pa.table(
        {
            "generation": np.ones(rows, np.int32),
            "listing_id": listing,
            "edited_date": days(listing),
            "image_index": rank.astype(np.int32),
            "storage_path": storage_paths,
            "score": np.zeros(rows, np.int32),
            "rank": (rank + 1).astype(np.int8),
            "fallback": np.zeros(rows, bool),
        },
        schema=parquet.SELECTED,
    )
    made_by = {"export": {"force": False}, "select": defaults().recipe}
    with parquet.writer(path, table.schema, made_by) as writer:
        writer.write_table(table)
    return path


def encode_shard(path: Path, images: int, per_listing: int = 2, dim: int = 512) -> Path:
    """An encode shard of random unit vectors, so many images a listing."""
    schema = parquet.encoded(dim)
    made_by = {"export": {"force": False}, "select": defaults().recipe, "encoder": ENCODER}
    with parquet.writer(path, schema, made_by) as writer:
        for start in range(0, images, 4096):
            row = np.arange(start, min(images, start + 4096))
            listing = row // per_listing
            columns = {
                "generation": np.ones(len(row), np.int32),
                "listing_id": listing,
                "edited_date": days(listing),
                "image_index": (row % per_listing).astype(np.int32),
                "storage_path": [f"{i}.jpg" for i in row],
                "score": np.zeros(len(row), np.int32),
                "rank": (row % per_listing + 1).astype(np.int8),
                "fallback": np.zeros(len(row), bool),
                "size": row,
                "mtime_ns": row,
                "vec": unit_vectors(len(row), dim, start),
                "error": pa.nulls(len(row), pa.string()),
            }
            writer.write_table(pa.table(columns, schema=schema), row_group_size=4096)
    return path


def listing_vectors(
    path: Path,
    listings: int,
    dim: int = 512,
    vectors: np.ndarray | None = None,
    first: int = 0,
) -> Path:
    """What aggregate writes, of these unit vectors or random ones, for listings from `first` on."""
    schema = parquet.listing_vectors(dim)
    made_by = {
        "export": {"force": False},
        "select": defaults().recipe,
        "encoder": ENCODER,
        "aggregate": IDENTITY,
    }
    with parquet.writer(path, schema, made_by) as writer:
        for start in range(0, listings, 4096):
            listing = np.arange(start, min(listings, start + 4096))
            vec = (
                unit_vectors(len(listing), dim, start)
                if vectors is None
                else pa.FixedSizeListArray.from_arrays(pa.array(vectors[listing].ravel()), dim)
            )
            listing += first
            columns = {
                "generation": np.ones(len(listing), np.int32),
                "listing_id": listing,
                "edited_date": days(listing),
                **{name: [value] * len(listing) for name, value in IDENTITY.items()},
                "vec": vec,
                "n_images": np.full(len(listing), 4, np.int32),
            }
            writer.write_table(pa.table(columns, schema=schema), row_group_size=4096)
    return path


def unit_vectors(rows: int, dim: int, seed: int) -> pa.FixedSizeListArray:
    values = np.random.default_rng(seed).standard_normal((rows, dim), np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), dim)


def days(listing: np.ndarray) -> pa.Array:
    """Dates that fall as the listing's number grows, as all files of the pipeline have them."""
    newest = int((DAY + timedelta(days=365)).timestamp() * 1e6)
    return pa.array(newest - listing.astype(np.int64) * 1_000_000, pa.timestamp("us", tz="UTC"))


@contextmanager
def database(folder: Path, dim: int = 512, *, durable: bool = False) -> Iterator[str]:
    """A fresh database on an embedded server, with the target and the three inputs, all empty.

    PG_DSN names it while the block runs. One that is `durable` waits for its disk.
    """
    server = folder / "postgres"
    with postgres.embedded_postgres(server, durable=durable):
        name = f"benchmark_{os.getpid()}"
        dsn = postgres.create_database(server, name)
        before = os.environ.get("PG_DSN")
        os.environ["PG_DSN"] = dsn
        try:
            target.create_tables(environment(), dim, inputs=True)
            yield dsn
        finally:
            os.environ.pop("PG_DSN")
            if before is not None:
                os.environ["PG_DSN"] = before


def environment() -> Environment:
    """The default names of schemas and tables, whatever the caller's environment says."""
    return Environment.read({})


@functools.cache
def defaults() -> Settings:
    return settings.Settings()
