"""The mean of raw image vectors against the mean of unit vectors, ours, on one split.

What is stored has unit length, so `snakemake evaluate` cannot tell: here photos are encoded once
with their lengths. A folder that holds photos is a listing; the encoder is trained.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks import lifelike, material, measure
from pipeline.encoder.model import find_model
from pipeline.encoder.tower import load_clip
from pipeline.photos.files import PhotoError
from pipeline.photos.pixels import Transform, load_pixels
from pipeline.retrieval import bootstrap
from pipeline.retrieval.choices import Block, Means, Ours
from pipeline.retrieval.evaluation import Found
from pipeline.retrieval.halves import Halves
from pipeline.retrieval.photos import Photos, Vectors, unit
from pipeline.stage import parquet

BATCH = 32


def main() -> None:
    parser = material.parser(__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="a folder of folders of photos")
    args = parser.parse_args()
    with material.work_folder(args.work) as folder:
        paths, raw = encoded(material.own_photos(args.photos), material.trained(folder))
        shard = shard_of(folder / "raw.parquet", paths, lifelike.unit(raw))
        compare(shard, dict(zip(map(str, paths), np.linalg.norm(raw, axis=1), strict=True)))


def encoded(paths: list[Path], model_name: str) -> tuple[list[Path], Vectors]:
    """The photos that can be read, and their vectors as the tower gives them."""
    clip, preprocess = load_clip(find_model(model_name, ""))
    transform = Transform.from_preprocess_cfg(preprocess)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (transform.mean, transform.std))
    kept, pixels = [], []
    for path in paths:
        try:
            found = load_pixels(path.read_bytes(), transform, "scaled", True, 10**9)
        except PhotoError as error:
            measure.say(f"{path} is left out: {error}")
            continue
        pixels.append((found / 255 - mean) / std)
        kept.append(path)
    with torch.inference_mode():
        parts = [
            clip.encode_image(torch.stack(pixels[i : i + BATCH])).numpy()
            for i in range(0, len(pixels), BATCH)
        ]
    return kept, np.concatenate(parts)


def shard_of(path: Path, photos: list[Path], vectors: Vectors) -> Path:
    """An encode shard of these unit vectors."""
    listing = np.unique([str(photo.parent) for photo in photos], return_inverse=True)[1]
    schema = parquet.encoded(vectors.shape[1])
    columns = {
        **dict.fromkeys(schema.names, pa.nulls(len(photos))),
        "generation": np.ones(len(photos), np.int32),
        "listing_id": listing,
        "edited_date": material.days(np.zeros(len(photos), np.int64)),
        "image_index": np.arange(len(photos), dtype=np.int32),
        "storage_path": [str(photo) for photo in photos],
        "vec": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
    }
    with parquet.writer(path, schema, {}) as writer:
        writer.write_table(pa.table([pa.array(columns[f.name]).cast(f.type) for f in schema],
                                    schema=schema))  # fmt: skip
    return path


def compare(shard: Path, lengths: dict[str, float]) -> None:
    """One line: both figures, and their difference on the same queries."""
    halves = Halves([shard], None, 0, 1024)
    found = Found(parquet.dimension(pq.read_schema(shard)), 0)
    for part in halves.splits():
        found.add(part)
    found.choose()
    assert found.queries

    def mean_of_raw(photos: Photos) -> Vectors:
        length = np.array([lengths[path] for path in photos.path], np.float32)
        return unit(np.add.reduceat(photos.vec * length[:, None], photos.start))

    ours = Ours(0, found.queries)
    raw = Means("mean of raw vectors", "", 0, found.queries, mean_of_raw)
    for part in halves.splits():
        for choice in (ours, raw):
            choice.count(Block(part.gallery, found.queries))
    difference = bootstrap.differences(raw.ranks, ours.ranks, 0)
    each = sorted(map(float, lengths.values()))
    measure.say(
        f"raw against unit: recall@1 {bootstrap.said_difference(difference['recall_at_1'])},"
        f" mrr {bootstrap.said_difference(difference['mrr'])}"
    )
    measure.emit(
        "raw mean", queries=len(found.queries), gallery=found.split + found.distractors,
        shortest_to_longest=round(each[0] / each[-1], 3),
        unit=bootstrap.figures(ours.ranks, 0), raw=bootstrap.figures(raw.ranks, 0),
        difference=difference,
    )  # fmt: skip


if __name__ == "__main__":
    main()
