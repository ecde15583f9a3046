"""What each precision brings and costs on a processor: images a second, cosines, recall.

ViT-B-32 has random weights: it gives the time of its size, and cosines of CLOCKED photos. The
trained encoder (EfficientNet-Lite0, ImageNet) gives recall@1 too: the mean of half of a listing's
photos asks, those of all other halves answer, and photos that stand alone lie between. A folder
that holds photos is a listing; with a manifest.csv (columns file, group, group_level) a group is
one, unless its level is 'class': then each photo stands alone. Files of the same bytes count once.
"""

import argparse
import csv
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import material, measure
from benchmarks.parity import quantiles
from pipeline.encoder.model import find_model
from pipeline.encoder.tower import Encoder, load_encoder
from pipeline.photos.files import PhotoError
from pipeline.photos.pixels import Transform, load_pixels

PRECISIONS = ("fp32", "bf16")
SPLITS = 20  # of each listing into halves; the mean over them is the listing's recall
RESAMPLES = 10_000
CLOCKED = 96  # photos that a ViT-B-32 encodes in a round; the smaller encoder takes four times more

Vectors = npt.NDArray[np.float32]


def main() -> None:
    parser = material.parser(__doc__)
    parser.add_argument("--photos", type=Path, help="folder of photos; rendered ones if not given")
    args = parser.parse_args()
    with material.work_folder(args.work) as folder:
        name = "real" if args.photos else "rendered"
        trained = material.trained(folder)
        pixels, listings = decoded(material.own_photos(args.photos or rendered(folder)), trained)
        compare("ViT-B-32", material.vit(folder), name, pixels[:CLOCKED], CLOCKED, args)
        vectors = compare("EfficientNet-Lite0", trained, name, pixels, 4 * CLOCKED, args)
        recall(name, vectors, listings)


def rendered(folder: Path) -> Path:
    """A folder of rendered photos, four a listing."""
    return material.photos(folder, "2 MP", 256)[0].parent.parent


def decoded(paths: list[Path], model_name: str) -> tuple[list[torch.Tensor], list[str]]:
    """The pixels of each readable photo, uint8, and the name of its listing."""
    encoder = load_encoder(find_model(model_name, ""), "cpu", "fp32", 1)
    transform = Transform.from_preprocess_cfg(encoder.preprocess)
    pixels, listings, seen = [], [], set()
    for path, listing in zip(paths, listings_of(paths), strict=True):
        data = path.read_bytes()
        digest = hashlib.sha256(data).digest()
        if digest in seen:
            continue
        seen.add(digest)
        try:
            pixels.append(load_pixels(data, transform, "scaled", True, 10**9))
            listings.append(listing)
        except PhotoError as error:
            measure.say(f"{path} is left out: {error}")
    return pixels, listings


def listings_of(paths: list[Path]) -> Iterator[str]:
    """The name of each photo's listing: its group's in the manifest above it, or its folder's."""
    known: dict[Path, str] = {}
    for manifest in {folder / "manifest.csv" for path in paths for folder in path.parents}:
        if manifest.is_file():
            with manifest.open(newline="") as file:
                for row in csv.DictReader(file):
                    alone = row["group_level"] == "class"
                    known[manifest.parent / row["file"]] = row["file" if alone else "group"]
    return (known.get(path, str(path.parent)) for path in paths)


def compare(
    model: str,
    model_name: str,
    photos: str,
    pixels: list[torch.Tensor],
    clocked: int,
    args: argparse.Namespace,
) -> dict[str, Vectors]:
    """One line for each precision, with the rate of the tower alone; returns all the vectors."""
    found = find_model(model_name, "")
    encoders = {p: load_encoder(found, "cpu", p, args.threads) for p in PRECISIONS}
    with ThreadPoolExecutor(args.threads) as pool:

        def encoded(encoder: Encoder, pixels: list[torch.Tensor]) -> Vectors:
            rows = encoder.batch_rows
            batches = [pixels[start : start + rows] for start in range(0, len(pixels), rows)]
            return np.concatenate(list(pool.map(encoder.encode, batches)))

        some = pixels[:clocked]
        took = measure.fastest(
            args.rounds, **{p: partial(encoded, e, some) for p, e in encoders.items()}
        )
        vectors = {p: encoded(e, pixels) for p, e in encoders.items()}
    for precision, timing in took.items():
        cosines = np.einsum("ij,ij->i", vectors[precision], vectors["fp32"])
        measure.emit(
            "precision", model=model, precision=precision, photos=photos, images=len(pixels),
            threads=args.threads, images_per_second=len(some) / timing.wall,
            ratio=took["fp32"].wall / timing.wall, cpu_ratio=took["fp32"].cpu / timing.cpu,
            **quantiles(cosines),
        )  # fmt: skip
    return vectors


def recall(photos: str, vectors: dict[str, Vectors], listings: list[str]) -> None:
    """Two lines for each precision: recall@1 of its own vectors, and of those that ask fp32's, as
    they do in a table that was begun in fp32; and what that is more than fp32 alone has.
    """
    exact = hits_of(vectors["fp32"], vectors["fp32"], listings)
    for precision, each in vectors.items():
        for gallery in dict.fromkeys((precision, "fp32")):
            hits = hits_of(each, vectors[gallery], listings)
            low, high = interval(hits - exact)
            measure.emit(
                "precision recall", precision=precision, gallery=gallery, photos=photos,
                listings=len(hits), recall_at_1=round(float(hits.mean()), 4),
                difference=round(float((hits - exact).mean()), 4), low=low, high=high,
            )  # fmt: skip


def hits_of(asking: Vectors, answering: Vectors, listings: list[str]) -> npt.NDArray[np.float64]:
    """Of each listing of two photos or more, the share of all splits in which its halves met.

    Both are vectors of the same photos; each half asks once.
    """
    of = np.unique(listings, return_inverse=True)[1]
    rows = [np.flatnonzero(of == listing) for listing in range(of.max() + 1)]
    alone = answering[[each[0] for each in rows if len(each) == 1]]
    many = [each for each in rows if len(each) > 1]
    draw = np.random.default_rng(0)
    hits = np.zeros(len(many))
    for _ in range(SPLITS):
        mixed = [draw.permutation(each) for each in many]
        halves = [(each[: len(each) // 2], each[len(each) // 2 :]) for each in mixed]
        for one in (0, 1):
            gallery = _means(answering, [half[1 - one] for half in halves])
            queries = _means(asking, [half[one] for half in halves])
            nearest = (queries @ np.concatenate([gallery, alone]).T).argmax(1)
            hits += nearest == np.arange(len(many))
    return hits / (2 * SPLITS)


def interval(differences: npt.NDArray[np.float64]) -> tuple[float, float]:
    """95 % of the means of as many listings, drawn anew."""
    draw = np.random.default_rng(0)
    drawn = draw.integers(0, len(differences), (RESAMPLES, len(differences)))
    low, high = np.percentile(differences[drawn].mean(1), [2.5, 97.5])
    return round(float(low), 4), round(float(high), 4)


def _means(vectors: Vectors, rows: list[npt.NDArray[np.intp]]) -> Vectors:
    means = np.stack([vectors[each].mean(0) for each in rows])
    unit: Vectors = means / np.linalg.norm(means, axis=1, keepdims=True)
    return unit


if __name__ == "__main__":
    main()
